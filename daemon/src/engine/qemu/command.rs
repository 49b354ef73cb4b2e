//! QEMU's command line, as a function of what a VM is made of.
//!
//! Settings that a warm template's state depends on are here from the first day (design
//! decision 5): modern virtio-mmio, an explicit block graph, passed descriptors.

use std::ffi::OsString;
use std::os::fd::RawFd;

use crate::store::config::format_mac;

/// The numbers of the descriptors that QEMU inherits.
#[derive(Clone, Copy, Debug)]
pub struct Descriptors {
    /// Kernel image.
    pub kernel: RawFd,
    /// Initial RAM disk.
    pub initrd: RawFd,
    /// The template's raw disk.
    pub base: RawFd,
    /// The VM's qcow2.
    pub overlay: RawFd,
    /// Tap.
    pub tap: RawFd,
    /// Listening socket of the agent's port.
    pub agent: RawFd,
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
    /// Name, seen in the process list.
    pub name: &'a str,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Kernel command line.
    pub command_line: &'a str,
    /// MAC address of the NIC.
    pub mac: [u8; 6],
}

/// The arguments of `qemu-system-x86_64`.
pub fn arguments(machine: &Machine<'_>, fd: Descriptors) -> Vec<OsString> {
    let Machine { name, cpus, memory_mib, command_line, mac } = machine;
    let mac = format_mac(*mac);
    let mut args: Vec<String> = Vec::new();
    let mut arg = |option: &str, value: String| args.extend([option.to_owned(), value]);

    arg("-name", format!("guest={name},debug-threads=on"));
    arg("-nodefaults", String::new());
    arg("-no-user-config", String::new());
    arg("-display", "none".into());
    arg("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());
    arg(
        "-machine",
        "microvm,acpi=on,pit=off,pic=off,rtc=on,isa-serial=on,x-option-roms=off,memory-backend=ram".into(),
    );
    arg("-accel", "tcg,thread=multi,tb-size=256".into());
    // Left out: five-level paging and what guests use wherever they see it although it is slow in software.
    arg("-cpu", "max,-la57,-erms,-smap".into());
    arg("-smp", format!("{cpus}"));
    arg("-m", format!("{memory_mib}M"));
    arg("-object", format!("memory-backend-ram,id=ram,size={memory_mib}M"));
    arg("-global", "virtio-mmio.force-legacy=false".into());

    arg("-kernel", format!("/proc/self/fd/{}", fd.kernel));
    arg("-initrd", format!("/proc/self/fd/{}", fd.initrd));
    arg("-append", (*command_line).to_owned());

    // Descriptor sets keep QEMU from opening, and names in image headers from being followed.
    arg("-add-fd", format!("fd={},set=1", fd.base));
    arg("-add-fd", format!("fd={},set=2", fd.overlay));
    arg("-add-fd", format!("fd={},set=3", fd.console_log));
    arg(
        "-blockdev",
        "driver=file,node-name=base-file,filename=/dev/fdset/1,read-only=on,cache.direct=off".into(),
    );
    arg("-blockdev", "driver=raw,node-name=base,file=base-file,read-only=on".into());
    arg(
        "-blockdev",
        "driver=file,node-name=disk-file,filename=/dev/fdset/2,discard=unmap,aio=threads".into(),
    );
    arg(
        "-blockdev",
        "driver=qcow2,node-name=disk,file=disk-file,backing=base,discard=unmap,detect-zeroes=unmap".into(),
    );
    arg("-device", "virtio-blk-device,drive=disk,id=disk0".into());

    arg("-netdev", format!("tap,id=net0,fd={},vhost=off", fd.tap));
    arg("-device", format!("virtio-net-device,netdev=net0,id=nic0,mac={mac}"));

    arg("-device", "virtio-serial-device,id=serial0".into());
    arg("-chardev", format!("socket,id=agent,fd={},server=on,wait=off", fd.agent));
    arg("-device", "virtserialport,chardev=agent,name=org.catalyst.agent.0".into());

    arg(
        "-chardev",
        format!("socket,id=console,fd={},server=on,wait=off,logfile=/dev/fdset/3,logappend=on", fd.console),
    );
    arg("-serial", "chardev:console".into());
    arg("-device", "virtio-rng-device".into());

    arg("-chardev", format!("socket,id=qmp,fd={},server=on,wait=off", fd.qmp));
    arg("-mon", "chardev=qmp,mode=control".into());
    args.into_iter().filter(|arg| !arg.is_empty()).map(OsString::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_descriptor_is_used_and_no_path_of_the_host_is() {
        let fd = Descriptors {
            kernel: 101,
            initrd: 102,
            base: 103,
            overlay: 104,
            tap: 105,
            agent: 106,
            console: 107,
            console_log: 108,
            qmp: 109,
        };
        let machine = Machine {
            name: "web1",
            cpus: 2,
            memory_mib: 1024,
            command_line: "console=ttyS0",
            mac: [0x52, 0x54, 0, 0, 0, 1],
        };
        let args = arguments(&machine, fd);
        let text = args.join(std::ffi::OsStr::new(" ")).into_string().unwrap();
        for number in 101..=109 {
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
