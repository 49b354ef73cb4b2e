//! The monitor's description of a VM, as a function of what the VM is made of.

use std::os::fd::{AsRawFd, RawFd};

use catalyst_agent_protocol::{CONTAINER_PORT_NAME, FOLDERS_PORT_NAME, PORT_NAME};
use catalyst_vmm::description::{
    Boot, Console, Description, Disk, Layer, Nic, Port, Protocol, Serial, Share, VERSION, Vsock,
};

use super::super::StartSpec;

/// What guests mount shared folders by.
const SHARE_TAG: &str = "catalyst";

/// The numbers of the descriptors that the monitor inherits beside those of the VM's specification.
#[derive(Clone, Copy, Debug)]
pub struct Descriptors {
    /// `/dev/kvm`.
    pub kvm: RawFd,
    /// Listening socket of the control protocol.
    pub control: RawFd,
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
    /// Listening socket of the vsock.
    pub vsock: RawFd,
}

/// Describes the VM of `spec`. Values are passed on as they are; [`Description::check`] refuses those that cannot be.
pub fn describe(spec: &StartSpec, fd: Descriptors) -> Description {
    let from = spec.from.as_ref();
    let boot = || Boot {
        kernel: spec.kernel.as_raw_fd(),
        initrd: Some(spec.initrd.as_raw_fd()),
        // What a software CPU needs besides is not for this one. There is no PCI, and a search for it is thousands of exits.
        command_line: format!("{} pci=off", spec.command_line),
        protocol: Protocol::Auto,
    };
    let layers: Vec<Layer> =
        spec.layers.iter().map(|own| Layer { fd: own.file.as_raw_fd(), format: own.format }).collect();
    let disk = Disk { layers, read_only: false, queues: 1, serial: String::new() };
    let ports = [
        (PORT_NAME, Some(fd.agent)),
        (FOLDERS_PORT_NAME, Some(fd.folders)),
        // Last: a guest knows ports by their numbers as well.
        (CONTAINER_PORT_NAME, fd.container),
    ];
    let port = |(name, listener): (&str, Option<RawFd>)| {
        listener.map(|listener| Port { name: name.to_owned(), listener })
    };
    Description {
        version: VERSION,
        name: spec.dir.id().to_string(),
        cpus: u8::try_from(spec.cpus).unwrap_or(u8::MAX),
        memory_mib: spec.memory_mib,
        huge_pages: true,
        memory: from.map(|saved| saved.memory.as_raw_fd()),
        kvm: fd.kvm,
        control: fd.control,
        boot: from.is_none().then(boot),
        restore: from.map(|saved| saved.state.as_raw_fd()),
        paused: true,
        disks: if disk.layers.is_empty() { vec![] } else { vec![disk] },
        nics: spec
            .nics
            .iter()
            .map(|nic| Nic { tap: nic.tap.as_raw_fd(), mac: nic.mac, link_up: None })
            .collect(),
        uart: Some(Console { listener: Some(fd.console), log: Some(fd.console_log) }),
        serial: Some(Serial { console: None, ports: ports.into_iter().filter_map(port).collect() }),
        rng: true,
        balloon: true,
        vsock: Some(Vsock { cid: spec.cid, listener: Some(fd.vsock), upstream: None }),
        share: Some(Share { tag: SHARE_TAG.to_owned(), folder: None }),
        generation_id: None,
        confine: true,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::path::Path;

    use super::*;
    use catalyst_vmm::description::Format;

    use crate::store::{Store, VmId};

    fn spec() -> StartSpec {
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        StartSpec {
            dir: Store::open_existing(Path::new("/nowhere")).dir(&VmId::parse("web1").unwrap()),
            cpus: 2,
            memory_mib: 1024,
            kernel: null(),
            initrd: null(),
            command_line: "console=ttyS0 quiet".to_owned(),
            command_line_software_cpu: "mitigations=off".to_owned(),
            kernel_hz: 250,
            layers: [Format::Qcow2, Format::Raw]
                .map(|format| super::super::super::Layer { file: null(), format })
                .into(),
            nics: vec![crate::engine::Nic { tap: null(), mac: [2, 0xca, 0xa5, 1, 2, 3] }],
            container: false,
            user: 1_879_113_738,
            cid: 13,
            from: None,
            cgroup_of: None,
        }
    }

    const FD: Descriptors = Descriptors {
        kvm: 1001,
        control: 1002,
        agent: 1003,
        folders: 1007,
        container: None,
        console: 1004,
        console_log: 1005,
        vsock: 1006,
    };

    #[test]
    fn the_monitor_understands_it_and_every_descriptor_is_in_it_once() {
        let spec = spec();
        let text = serde_json::to_vec(&describe(&spec, FD)).unwrap();
        let read = Description::from_json(&text).unwrap();
        let named: Vec<RawFd> = read.descriptors().into_iter().map(|(_, fd)| fd).collect();
        let [overlay, base] = [0, 1].map(|layer: usize| &spec.layers[layer].file);
        let own = [&spec.kernel, &spec.initrd, base, overlay, &spec.nics[0].tap].map(AsRawFd::as_raw_fd);
        for fd in own.into_iter().chain(1001..=1007) {
            assert!(named.contains(&fd), "{fd} in {named:?}");
        }
        assert_eq!(named.len(), 12);
    }

    #[test]
    fn the_overlay_stands_on_the_base_and_nothing_of_a_software_cpu_is_told() {
        let spec = spec();
        let described = describe(&spec, FD);
        let layers = &described.disks[0].layers;
        assert_eq!((layers[0].fd, layers[0].format), (spec.layers[0].file.as_raw_fd(), Format::Qcow2));
        assert_eq!((layers[1].fd, layers[1].format), (spec.layers[1].file.as_raw_fd(), Format::Raw));
        assert_eq!(described.boot.as_ref().unwrap().command_line, "console=ttyS0 quiet pci=off");
        assert_eq!(described.nics[0].mac, spec.nics[0].mac);
        assert_eq!(described.vsock.unwrap().cid, 13);
        assert!(described.confine && described.huge_pages);
    }

    #[test]
    fn a_vm_of_a_container_has_no_disk_its_own_port_and_its_nics_in_order() {
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        let nics =
            (0..4).map(|last| crate::engine::Nic { tap: null(), mac: [2, 0, 0, 0, 0, last] }).collect();
        let spec = StartSpec { layers: vec![], nics, container: true, ..spec() };
        let described = describe(&spec, Descriptors { container: Some(1008), ..FD });
        described.check().unwrap();
        assert!(described.disks.is_empty());
        assert_eq!(described.nics.iter().map(|nic| nic.mac[5]).collect::<Vec<_>>(), [0, 1, 2, 3]);
        let ports = described.serial.unwrap().ports;
        assert_eq!(ports.len(), 3);
        assert_eq!(ports[2], Port { name: CONTAINER_PORT_NAME.to_owned(), listener: 1008 });
    }

    #[test]
    fn what_goes_on_from_memory_boots_nothing() {
        for frozen in [true, false] {
            let file = || File::open("/dev/null").unwrap();
            let from = Some(crate::engine::Saved { memory: file(), frozen, state: file().into() });
            let described = describe(&StartSpec { from, ..spec() }, FD);
            assert!(described.boot.is_none() && described.restore.is_some() && described.memory.is_some());
        }
    }

    #[test]
    fn more_cpus_than_the_monitor_has_are_refused_not_cut() {
        let many = StartSpec { cpus: 300, ..spec() };
        let error = describe(&many, FD).check().unwrap_err().to_string();
        assert!(error.contains("cpus"), "{error}");
    }
}
