//! QEMU's command line for guests that start by their own loader, as a function of what their VM is made of.
//!
//! Such a guest has the drivers of the machine that it was made for, so it gets the nearest devices that there are. As with
//! [`super::command`], files are passed as descriptors, names in headers are not followed, and no path of the host but those
//! of QEMU's own firmware is used.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};

use super::super::pc::{PcDisk, PcSpec};
use super::accelerator::accelerator;
use super::command::{CABLE, LOG_SET, PROCESSOR, SANDBOX, console};
use crate::saved;
use crate::store::config::format_mac;
use crate::store::foreign::hardware::{Bus, Nic};
use crate::store::foreign::image::{self, Extent, Parts};

/// The numbers of the descriptors that every QEMU inherits.
#[derive(Clone, Copy, Debug)]
pub struct Descriptors {
    /// Listening socket of the console.
    pub console: RawFd,
    /// Console log, open for appending.
    pub console_log: RawFd,
    /// Listening socket of the monitor protocol.
    pub qmp: RawFd,
}

/// A command line, and what must stay open for it.
#[derive(Debug)]
pub struct Line {
    /// The arguments.
    pub args: Vec<OsString>,
    /// Descriptors that they name.
    pub kept: Vec<OwnedFd>,
}

/// Files of disks have the sets from here on.
const FIRST_SET: u32 = 10;
/// The first SAS address of a disk: locally assigned (NAA 3 of SPC-4).
const WWN: u64 = 0x3ca7_0000_0000_0000;

struct Builder {
    args: Vec<String>,
    kept: Vec<OwnedFd>,
    next_set: u32,
}

impl Builder {
    fn arg(&mut self, option: &str, value: impl Into<String>) {
        self.args.push(option.to_owned());
        self.args.extend(Some(value.into()).filter(|value| !value.is_empty()));
    }

    fn block(&mut self, node: &Value) {
        self.arg("-blockdev", node.to_string());
    }

    /// Passes a file and gives the name that QEMU opens it by.
    fn pass(&mut self, file: OwnedFd) -> String {
        let set = self.next_set;
        self.next_set += 1;
        self.arg("-add-fd", format!("fd={},set={set}", file.as_raw_fd()));
        self.kept.push(file);
        format!("/dev/fdset/{set}")
    }
}

/// The command line of `spec`, whose descriptors it takes, for the QEMU that calls itself `program`.
pub fn line(spec: PcSpec, fd: Descriptors, program: &str) -> io::Result<Line> {
    let mut line = Builder { args: Vec::new(), kept: Vec::new(), next_set: FIRST_SET };
    // Guests with an IDE disk want it where a PC of old had it.
    let old = spec.disks.iter().any(|disk| disk.bus == Bus::Ide);
    let mut machine = format!("{},vmport=off,memory-backend=ram", if old { "pc" } else { "q35" });
    if let Some(efi) = spec.efi {
        for (node, file, read_only) in [("code", efi.code, true), ("variables", efi.variables, false)] {
            let name = line.pass(file);
            let file = json!({ "driver": "file", "filename": name, "read-only": read_only });
            line.block(&json!({ "driver": "raw", "node-name": node, "file": file, "read-only": read_only }));
        }
        machine += ",smm=off,pflash0=code,pflash1=variables";
    }
    line.arg("-name", format!("guest={},debug-threads=on", spec.dir.id()));
    line.arg("-nodefaults", "");
    line.arg("-no-user-config", "");
    line.arg("-display", "none");
    line.arg("-sandbox", SANDBOX);
    line.arg("-machine", machine);
    line.arg("-accel", accelerator(spec.cpus, program));
    line.arg("-cpu", PROCESSOR);
    line.arg("-smp", spec.cpus.to_string());
    line.arg("-m", format!("{}M", spec.memory_mib));
    line.arg("-object", format!("memory-backend-ram,id=ram,size={}M", spec.memory_mib));
    line.arg("-rtc", "base=utc");
    line.arg("-boot", "strict=on");
    line.arg("-device", "VGA,vgamem_mb=8");
    line.arg("-device", "virtio-rng-pci");
    disks(&mut line, spec.disks)?;
    if let Some((nic, tap)) = spec.nic {
        line.arg("-netdev", format!("tap,id={CABLE},fd={},vhost=off", tap.as_raw_fd()));
        let model = match nic {
            Nic::E1000 => "e1000-82545em",
            Nic::E1000e => "e1000e",
            Nic::Vmxnet3 => "vmxnet3",
            Nic::Vlance => "pcnet",
        };
        // It does not start from the network.
        let mac = format_mac(spec.mac);
        let bus = spec.slot.filter(|_| !old).map(|number| slot(&mut line, number)).unwrap_or_default();
        line.arg("-device", format!("{model},netdev={CABLE},id=nic0,mac={mac},romfile={bus}"));
        line.kept.push(tap);
    }
    line.arg("-add-fd", format!("fd={},set={LOG_SET}", fd.console_log));
    line.arg("-chardev", console(fd.console));
    line.arg("-serial", "chardev:console");
    line.arg("-chardev", format!("socket,id=qmp,fd={},server=on,wait=off", fd.qmp));
    line.arg("-mon", "chardev=qmp,mode=control");
    line.arg("-S", "");
    Ok(Line { args: line.args.into_iter().map(OsString::from).collect(), kept: line.kept })
}

/// A slot of that number, as guests find it where PCI Express tells of slots and ACPI does not.
fn slot(line: &mut Builder, number: u16) -> String {
    line.arg("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off");
    line.arg("-device", format!("pcie-root-port,id=slot0,slot={number},chassis=1"));
    ",bus=slot0".to_owned()
}

fn disks(line: &mut Builder, disks: Vec<PcDisk>) -> io::Result<()> {
    let controllers: BTreeSet<(Bus, u8)> = disks.iter().map(|disk| (disk.bus, disk.controller)).collect();
    for (bus, number) in controllers {
        let device = match bus {
            Bus::Pvscsi => format!("pvscsi,id=pvscsi{number}"),
            Bus::Lsi => format!("mptsas1068,id=lsi{number}"),
            Bus::Ahci => format!("ich9-ahci,id=sata{number}"),
            Bus::Nvme => format!("nvme,id=nvme{number},serial=catalyst{number}"),
            // Part of the machine.
            Bus::Ide => continue,
        };
        line.arg("-device", device);
    }
    for (at, disk) in disks.into_iter().enumerate() {
        let below = base(line, at, disk.parts)?;
        let name = line.pass(disk.overlay);
        let file = json!({ "driver": "file", "filename": name, "discard": "unmap", "aio": "threads" });
        line.block(&json!({
            "driver": "qcow2", "node-name": format!("disk{at}"), "file": file, "backing": below,
            "discard": "unmap", "detect-zeroes": "unmap",
        }));
        let (number, unit) = (disk.controller, disk.unit);
        let place = match disk.bus {
            Bus::Pvscsi => format!("scsi-hd,bus=pvscsi{number}.0,scsi-id={unit}"),
            // Linux finds a SAS disk by its address alone.
            Bus::Lsi => {
                let wwn = WWN + u64::from(number) * 256 + u64::from(unit);
                format!("scsi-hd,bus=lsi{number}.0,scsi-id={unit},wwn={wwn:#x}")
            }
            Bus::Ahci => format!("ide-hd,bus=sata{number}.{unit}"),
            Bus::Nvme => format!("nvme-ns,bus=nvme{number},nsid={}", unit + 1),
            Bus::Ide => format!("ide-hd,bus=ide.{number},unit={unit}"),
        };
        line.arg("-device", format!("{place},drive=disk{at},bootindex={at}"));
    }
    Ok(())
}

/// The node of what is only read.
fn base(line: &mut Builder, at: usize, parts: Parts) -> io::Result<String> {
    let (driver, file) = match parts {
        Parts::Raw(file) => ("raw", file),
        Parts::Qcow2(file) => ("qcow2", file),
        Parts::Vmdk(file) => ("vmdk", file),
        Parts::Extents(extents) => ("vmdk", descriptor(line, extents)?),
    };
    let name = line.pass(file.into());
    let node = format!("base{at}");
    let file = json!({ "driver": "file", "filename": name, "read-only": true });
    let mut block = json!({ "driver": driver, "node-name": node, "file": file, "read-only": true });
    if driver != "raw" {
        block["backing"] = Value::Null;
    }
    line.block(&block);
    Ok(node)
}

/// A descriptor of ours, which names the files of a VMDK by their descriptors, in a file that nobody can change.
fn descriptor(line: &mut Builder, extents: Vec<Extent>) -> io::Result<File> {
    let text = image::descriptor(extents, |file| line.pass(file.into()));
    let file = memfd_create("catalyst-vmdk", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(file);
    file.write_all(text.as_bytes())?;
    saved::seal(&file)?;
    // Of a set QEMU takes the descriptor that has the very access it wants.
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::pc::Efi;
    use crate::store::{Store, VmId};

    fn file() -> File {
        tempfile::tempfile().unwrap()
    }

    fn disk(bus: Bus, controller: u8, unit: u8, parts: Parts) -> PcDisk {
        PcDisk { bus, controller, unit, overlay: file().into(), parts }
    }

    fn spec(disks: Vec<PcDisk>, efi: bool) -> PcSpec {
        let store = Store::open_existing(std::path::Path::new("/nowhere"));
        PcSpec {
            dir: store.dir(&VmId::parse("web1").unwrap()),
            cpus: 2,
            memory_mib: 512,
            efi: efi.then(|| Efi { code: file().into(), variables: file().into() }),
            disks,
            nic: Some((Nic::Vmxnet3, file().into())),
            slot: Some(160),
            mac: [0x52, 0x54, 0, 0, 0, 1],
            user: 1,
        }
    }

    fn text(spec: PcSpec) -> String {
        let line = line(spec, Descriptors { console: 107, console_log: 108, qmp: 109 }, "").unwrap();
        line.args.join(std::ffi::OsStr::new(" ")).into_string().unwrap()
    }

    #[test]
    fn every_controller_has_its_device_and_the_first_disk_is_started_from() {
        let disks = vec![
            disk(Bus::Pvscsi, 1, 3, Parts::Vmdk(file())),
            disk(Bus::Lsi, 0, 0, Parts::Qcow2(file())),
            disk(Bus::Ahci, 0, 2, Parts::Vmdk(file())),
            disk(Bus::Nvme, 0, 0, Parts::Vmdk(file())),
        ];
        let text = text(spec(disks, true));
        for word in [
            "q35,vmport=off",
            "pvscsi,id=pvscsi1",
            "scsi-hd,bus=pvscsi1.0,scsi-id=3,drive=disk0,bootindex=0",
            "scsi-hd,bus=lsi0.0,scsi-id=0,wwn=0x3ca7000000000000,drive=disk1,bootindex=1",
            "ide-hd,bus=sata0.2",
            "nvme-ns,bus=nvme0,nsid=1",
            "pflash0=code",
            "pcie-root-port,id=slot0,slot=160,",
            "vmxnet3,netdev=net0,id=nic0,mac=52:54:00:00:00:01,romfile=,bus=slot0",
        ] {
            assert!(text.contains(word), "{word} in {text}");
        }
        let old = self::text(spec(vec![disk(Bus::Ide, 1, 0, Parts::Vmdk(file()))], false));
        assert!(
            old.contains("-machine pc,") && !old.contains("pcie") && old.contains("ide-hd,bus=ide.1,unit=0"),
            "{old}"
        );
    }

    #[test]
    fn no_path_of_the_host_and_no_name_of_the_box_is_used() {
        let extents = vec![
            Extent { file: file(), sectors: 4_192_256, flat: None },
            Extent { file: file(), sectors: 16, flat: Some(8) },
        ];
        let spec = spec(vec![disk(Bus::Pvscsi, 0, 0, Parts::Extents(extents))], true);
        let line = line(spec, Descriptors { console: 107, console_log: 108, qmp: 109 }, "").unwrap();
        let text = line.args.join(std::ffi::OsStr::new(" ")).into_string().unwrap();
        let mut paths = text.split(['=', ' ', ',', '"']).filter(|word| word.starts_with('/'));
        assert!(paths.all(|path| path.starts_with("/dev/fdset/")), "{text}");
        assert!(text.contains("\"backing\":null"), "{text}");
        let written: Vec<String> = line
            .kept
            .iter()
            .map(|fd| {
                std::fs::read_to_string(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap_or_default()
            })
            .filter(|text| text.starts_with("# Disk"))
            .collect();
        assert!(written[0].contains("RW 4192256 SPARSE \"/dev/fdset/12\"\n"), "{written:?}");
        assert!(written[0].contains("RW 16 FLAT \"/dev/fdset/13\" 8\n"), "{written:?}");
    }
}
