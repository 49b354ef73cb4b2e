//! The monitor's description of a VM that was made for another machine, and its start.
//!
//! Its guest is started by its own kernel, on the monitor's own devices: disks in their order, whatever they hung on before, and a
//! virtio network card. There is no agent in it, so there are no ports for one.

use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;

use catalyst_api::EngineName;
use catalyst_vmm::description::{Boot, Console, Description, Disk, Format, Layer, Nic, Protocol, VERSION};

use super::super::process::{Launch, Process};
use super::super::{EngineError, PcSpec, folder};
use super::boot_files::{Found, base};
use super::{CONTROL_SOCKET, REMEDY, described, open_kvm, program};
use crate::store::foreign::image::Parts;

/// The numbers of the descriptors that the monitor inherits beside those of the VM's specification.
#[derive(Clone, Copy, Debug)]
pub struct Descriptors {
    /// `/dev/kvm`.
    pub kvm: RawFd,
    /// Listening socket of the control protocol.
    pub control: RawFd,
    /// Listening socket of the console.
    pub console: RawFd,
    /// Console log, open for appending.
    pub console_log: RawFd,
}

/// Describes the VM of `spec`, which is started by `found`.
pub fn describe(spec: &PcSpec, found: &Found, fd: Descriptors) -> Result<Description, EngineError> {
    let disks = spec.disks.iter().map(|disk| {
        let (base, format) = base(disk)?;
        let own = Layer { fd: disk.overlay.as_raw_fd(), format: Format::Qcow2 };
        let layers = vec![own, Layer { fd: base.as_raw_fd(), format }];
        Ok(Disk { layers, read_only: false, queues: 1, serial: String::new() })
    });
    Ok(Description {
        version: VERSION,
        name: spec.dir.id().to_string(),
        cpus: u8::try_from(spec.cpus).unwrap_or(u8::MAX),
        memory_mib: spec.memory_mib,
        huge_pages: true,
        memory: None,
        kvm: fd.kvm,
        control: fd.control,
        boot: Some(Boot {
            kernel: found.kernel.as_raw_fd(),
            initrd: found.initrd.as_ref().map(AsRawFd::as_raw_fd),
            command_line: format!("{} pci=off", found.command_line),
            protocol: Protocol::Auto,
        }),
        restore: None,
        paused: true,
        disks: disks.collect::<Result<_, EngineError>>()?,
        nics: spec
            .nic
            .iter()
            .map(|(_, tap)| Nic { tap: tap.as_raw_fd(), mac: spec.mac, link_up: None })
            .collect(),
        uart: Some(Console { listener: Some(fd.console), log: Some(fd.console_log) }),
        serial: None,
        rng: true,
        balloon: true,
        vsock: None,
        share: None,
        generation_id: None,
        confine: true,
    })
}

/// Starts its monitor.
pub fn launch(spec: PcSpec, found: Found, path: PathBuf) -> Result<Process, EngineError> {
    let program = program(path, spec.dir.id().as_str())?;
    let kvm = open_kvm()?;
    let folder::Opened { log, console_log, console, .. } = folder::open(&spec.dir, false)?;
    let control = folder::listen(&spec.dir, CONTROL_SOCKET)?;
    let descriptors = Descriptors {
        kvm: kvm.as_raw_fd(),
        control: control.as_raw_fd(),
        console: console.as_raw_fd(),
        console_log: console_log.as_raw_fd(),
    };
    let description = described(&describe(&spec, &found, descriptors)?)?;
    let (run, user) = (spec.dir.run(), (spec.user, spec.user));
    let disks = spec.disks.into_iter().flat_map(|disk| {
        let base = match disk.parts {
            Parts::Raw(file) | Parts::Qcow2(file) | Parts::Vmdk(file) => Some(file.into()),
            Parts::Extents(_) => None,
        };
        [Some(disk.overlay), base].into_iter().flatten()
    });
    let args = ["run", "--description-fd", &description.as_raw_fd().to_string()].map(Into::into).to_vec();
    let fds = disks
        .chain(spec.nic.map(|(_, tap)| tap))
        .chain(found.initrd)
        .chain([found.kernel, description, kvm, control, console, console_log])
        .collect();
    let launch = Launch {
        engine: EngineName::Kvm,
        program,
        remedy: REMEDY,
        args,
        fds,
        user,
        may_mount: true,
        open_files: None,
        cgroup_of: None,
        large_pages: true,
        log,
    };
    Process::spawn(launch, &run)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::path::Path;

    use super::*;
    use crate::engine::pc::PcDisk;
    use crate::store::foreign::hardware::{Bus, Nic as Card};
    use crate::store::{Store, VmId};

    fn null() -> File {
        File::open("/dev/null").unwrap()
    }

    fn disk(parts: Parts) -> PcDisk {
        PcDisk { bus: Bus::Pvscsi, controller: 0, unit: 0, overlay: null().into(), parts }
    }

    fn spec(disks: Vec<PcDisk>) -> PcSpec {
        PcSpec {
            dir: Store::open_existing(Path::new("/nowhere")).dir(&VmId::parse("deb").unwrap()),
            cpus: 1,
            memory_mib: 384,
            efi: None,
            disks,
            nic: Some((Card::E1000, null().into())),
            slot: Some(33),
            mac: [0, 0x0c, 0x29, 0, 0, 1],
            user: 1,
        }
    }

    fn found() -> Found {
        let kernel = OwnedFd::from(null());
        Found { kernel, initrd: Some(null().into()), command_line: "root=UUID=1 ro".to_owned() }
    }

    const FD: Descriptors = Descriptors { kvm: 1001, control: 1002, console: 1003, console_log: 1004 };

    #[test]
    fn disks_keep_their_order_and_the_card_its_address() {
        let spec = spec(vec![disk(Parts::Qcow2(null())), disk(Parts::Raw(null()))]);
        let described = describe(&spec, &found(), FD).unwrap();
        described.check().unwrap();
        let formats =
            described.disks.iter().map(|disk| disk.layers.iter().map(|layer| layer.format).collect());
        let formats: Vec<Vec<Format>> = formats.collect();
        assert_eq!(formats, [[Format::Qcow2, Format::Qcow2], [Format::Qcow2, Format::Raw]]);
        assert_eq!(described.nics[0].mac, spec.mac);
        assert_eq!(described.boot.as_ref().unwrap().command_line, "root=UUID=1 ro pci=off");
        assert!(described.confine && described.serial.is_none() && described.share.is_none());
    }

    #[test]
    fn a_vmdk_that_was_not_converted_is_refused() {
        for parts in [Parts::Vmdk(null()), Parts::Extents(vec![])] {
            let error = describe(&spec(vec![disk(parts)]), &found(), FD).unwrap_err().to_string();
            assert!(error.contains("VMDK") && error.contains("--engine qemu"), "{error}");
        }
    }
}
