//! QEMU's command line, as a function of what a VM is made of.
//!
//! Settings that a warm template's state depends on are here from the first day (design
//! decision 5): modern virtio-mmio, an explicit block graph, passed descriptors.

use std::ffi::OsString;
use std::os::fd::RawFd;

use catalyst_agent_protocol::{CONTAINER_PORT_NAME, FOLDERS_PORT_NAME, PORT_NAME};
use catalyst_vmm::description::Format;

use super::accelerator::accelerator;
use crate::store::config::format_mac;

/// The numbers of the descriptors that QEMU inherits.
#[derive(Clone, Copy, Debug)]
pub struct Descriptors {
    /// Kernel image.
    pub kernel: RawFd,
    /// Initial RAM disk.
    pub initrd: RawFd,
    /// Listening socket of the agent's port.
    pub agent: RawFd,
    /// Listening socket of the port for folders.
    pub folders: RawFd,
    /// Listening socket of the port of containers, where there is one.
    pub container: Option<RawFd>,
    /// Listening socket of the console.
    pub console: RawFd,
    /// Console log, open for appending.
    pub console_log: RawFd,
    /// Listening socket of the monitor protocol.
    pub qmp: RawFd,
}

/// What the machine is like.
#[derive(Clone, Debug)]
pub struct Machine<'a> {
    /// What QEMU says it is.
    pub program: &'a str,
    /// Name, seen in the process list.
    pub name: &'a str,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Kernel command line.
    pub command_line: &'a str,
    /// Taps and MAC addresses of the NICs, in the guest's order.
    pub nics: &'a [(RawFd, [u8; 6])],
    /// The files of the disk, its own first; none for a machine without a disk.
    pub layers: &'a [(RawFd, Format)],
    /// Where its memory is.
    pub memory: Memory,
}

/// Where a machine has its memory, and so whether it boots or goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// New: it boots.
    New,
    /// In a memfd that nobody writes: pages that it writes are its own. It waits for its state.
    Private(RawFd),
    /// In a memfd of its own. It waits for its state.
    Own(RawFd),
}

/// What the disk is called.
pub const DISK: &str = "disk0";
/// What the host's end of the first NIC's cable is called.
pub const CABLE: &str = "net0";
/// What QEMU keeps itself from.
pub const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
/// Left out: five-level paging and what guests use wherever they see it although it is slow in software.
pub const PROCESSOR: &str = "max,-la57,-erms,-smap";
/// Sets of descriptors (`-add-fd`) that are not a disk's; those of its layers begin at [`LAYER_SETS`].
pub const LOG_SET: u32 = 1;
/// Where state is written to.
pub const STATE_SET: u32 = 2;
const LAYER_SETS: usize = 10;

/// The character device of the console, which the set [`LOG_SET`] has the log of.
pub fn console(fd: RawFd) -> String {
    format!("socket,id=console,fd={fd},server=on,wait=off,logfile=/dev/fdset/{LOG_SET},logappend=on")
}

/// The arguments of `qemu-system-x86_64`.
pub fn arguments(machine: &Machine<'_>, fd: Descriptors) -> Vec<OsString> {
    let Machine { program, name, cpus, memory_mib, command_line, nics, layers, memory } = machine;
    let mut args: Vec<String> = Vec::new();
    let mut arg = |option: &str, value: String| args.extend([option.to_owned(), value]);

    arg("-name", format!("guest={name},debug-threads=on"));
    arg("-nodefaults", String::new());
    arg("-no-user-config", String::new());
    arg("-display", "none".into());
    arg("-sandbox", SANDBOX.into());
    // `suppress-vmdesc`: no description of the state is expected after it.
    arg(
        "-machine",
        "microvm,acpi=on,pit=off,pic=off,rtc=on,isa-serial=on,x-option-roms=off,memory-backend=ram,suppress-vmdesc=on"
            .into(),
    );
    // It loads the kernel by itself. What QEMU takes where it is not told is this one in Debian 12, and elsewhere one that needs option ROMs.
    arg("-bios", "qboot.rom".into());
    arg("-accel", accelerator(*cpus, program).into());
    arg("-cpu", PROCESSOR.into());
    arg("-smp", format!("{cpus}"));
    arg("-m", format!("{memory_mib}M"));
    arg("-global", "virtio-mmio.force-legacy=false".into());
    let (file, share) = match memory {
        Memory::New => {
            arg("-object", format!("memory-backend-ram,id=ram,size={memory_mib}M"));
            arg("-kernel", format!("/proc/self/fd/{}", fd.kernel));
            arg("-initrd", format!("/proc/self/fd/{}", fd.initrd));
            arg("-append", (*command_line).to_owned());
            (None, "")
        }
        Memory::Private(file) => (Some(file), "off"),
        Memory::Own(file) => (Some(file), "on"),
    };
    if let Some(file) = file {
        let path = format!("/proc/self/fd/{file}");
        arg(
            "-object",
            format!("memory-backend-file,id=ram,size={memory_mib}M,mem-path={path},share={share}"),
        );
        // The state is that of devices alone (`xen-save-devices-state`), without what a migration has around it.
        arg("-global", "migration.send-configuration=off".into());
        // Once is enough for a bridge; a clone is on none yet. With none QEMU 7.2 dies when the guest resets its NIC.
        arg("-global", "migration.announce-rounds=1".into());
        arg("-incoming", "defer".into());
        // There is no kernel to boot anew with: the daemon starts another process.
        arg("-action", "reboot=shutdown".into());
    }

    // Descriptor sets keep QEMU from opening, and names in image headers from being followed.
    arg("-add-fd", format!("fd={},set={LOG_SET}", fd.console_log));
    for (at, (fd, format)) in layers.iter().enumerate().rev() {
        let disk = LAYER_SETS + at;
        arg("-add-fd", format!("fd={fd},set={disk}"));
        let (node, mut rest) = (node_name(at), String::new());
        let (mut options, format) = match format {
            Format::Raw => (String::from(",cache.direct=off"), "raw"),
            Format::Qcow2 => (String::new(), "qcow2"),
        };
        if at + 1 < layers.len() && format == "qcow2" {
            rest = format!(",backing={}", node_name(at + 1));
        }
        if at == 0 {
            options.push_str(",discard=unmap,aio=threads");
            rest.push_str(",discard=unmap,detect-zeroes=unmap");
        } else {
            options.push_str(",read-only=on");
            rest.push_str(",read-only=on");
        }
        arg("-blockdev", format!("driver=file,node-name={node}-file,filename=/dev/fdset/{disk}{options}"));
        arg("-blockdev", format!("driver={format},node-name={node},file={node}-file{rest}"));
    }
    if !layers.is_empty() {
        arg("-device", format!("virtio-blk-device,drive=disk,id={DISK}"));
    }

    // Each device takes the highest place that is free, and ACPI names the places to the guest from the highest on (QEMU 7.2).
    for (at, (tap, mac)) in nics.iter().enumerate() {
        let cable = if at == 0 { CABLE.to_owned() } else { format!("net{at}") };
        arg("-netdev", format!("tap,id={cable},fd={tap},vhost=off"));
        let mac = format_mac(*mac);
        arg("-device", format!("virtio-net-device,netdev={cable},id=nic{at},mac={mac}"));
    }

    arg("-device", "virtio-serial-device,id=serial0".into());
    arg("-chardev", format!("socket,id=agent,fd={},server=on,wait=off", fd.agent));
    arg("-device", format!("virtserialport,chardev=agent,name={PORT_NAME}"));
    arg("-chardev", format!("socket,id=folders,fd={},server=on,wait=off", fd.folders));
    arg("-device", format!("virtserialport,chardev=folders,name={FOLDERS_PORT_NAME}"));
    if let Some(container) = fd.container {
        arg("-chardev", format!("socket,id=container,fd={container},server=on,wait=off"));
        arg("-device", format!("virtserialport,chardev=container,name={CONTAINER_PORT_NAME}"));
    }

    arg("-chardev", console(fd.console));
    arg("-serial", "chardev:console".into());
    arg("-device", "virtio-rng-device".into());

    arg("-chardev", format!("socket,id=qmp,fd={},server=on,wait=off", fd.qmp));
    arg("-mon", "chardev=qmp,mode=control".into());
    // The virtual CPUs stand until they are told to go.
    arg("-S", String::new());
    args.into_iter().filter(|arg| !arg.is_empty()).map(OsString::from).collect()
}

/// What a layer of the disk is called among block nodes.
fn node_name(layer: usize) -> String {
    if layer == 0 { "disk".to_owned() } else { format!("below{layer}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_descriptor_is_used_and_no_path_of_the_host_is() {
        let fd = Descriptors {
            kernel: 101,
            initrd: 102,
            agent: 106,
            folders: 110,
            container: Some(111),
            console: 107,
            console_log: 108,
            qmp: 109,
        };
        let machine = Machine {
            program: "QEMU emulator version 7.2.22",
            name: "web1",
            cpus: 2,
            memory_mib: 1024,
            command_line: "console=ttyS0",
            nics: &[(105, [0x52, 0x54, 0, 0, 0, 1]), (112, [0x52, 0x54, 0, 0, 0, 2])],
            layers: &[(103, Format::Qcow2), (104, Format::Raw)],
            memory: Memory::New,
        };
        let args = arguments(&machine, fd);
        let text = args.join(std::ffi::OsStr::new(" ")).into_string().unwrap();
        for number in 101..=112 {
            assert!(text.contains(&number.to_string()), "descriptor {number} in {text}");
        }
        assert!(text.contains("mac=52:54:00:00:00:01"));
        let paths = text.split(['=', ' ', ',']).filter(|word| word.starts_with('/'));
        assert!(
            paths
                .into_iter()
                .all(|path| path.starts_with("/proc/self/fd/") || path.starts_with("/dev/fdset/"))
        );
    }
}
