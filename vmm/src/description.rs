//! What a VM is made of: the description that the caller gives, as JSON, beside open descriptors.
//!
//! The monitor opens nothing that its caller could have opened; descriptors are named by their numbers in this
//! process. Unknown fields are refused, and so is a version that this monitor does not know.

use std::collections::HashSet;
use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};

/// The version that this monitor understands.
pub const VERSION: u32 = 1;
/// Longest description, in bytes.
pub const MAX_LENGTH: u64 = 1 << 20;
/// Most virtual CPUs.
pub const MAX_CPUS: u8 = 32;
/// Most disks of a VM.
pub const MAX_DISKS: usize = 8;
/// Most NICs of a VM.
pub const MAX_NICS: usize = 4;
/// Most layers of a disk, with its base.
pub const MAX_LAYERS: usize = 64;
/// Most queues of a disk.
pub const MAX_QUEUES: u16 = 8;
/// Most ports of the serial device besides the console.
pub const MAX_PORTS: usize = 14;

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// [`VERSION`].
    pub version: u32,
    /// For messages and the names of threads.
    pub name: String,
    /// Virtual CPUs, 1 to [`MAX_CPUS`].
    pub cpus: u8,
    /// RAM in MiB, at least 16, at most the host's.
    pub memory_mib: u64,
    /// Let the kernel use huge pages for RAM.
    #[serde(default)]
    pub huge_pages: bool,
    /// A file for RAM that others may map too, such as a memfd; without it RAM is this process's alone. With `restore`:
    /// the file of the RAM that was saved, which is only read, as long as RAM to the byte, and must not change as long as
    /// the machine runs.
    #[serde(default)]
    pub memory: Option<RawFd>,
    /// `/dev/kvm`, for reading and writing.
    pub kvm: RawFd,
    /// Listening Unix stream socket of the control protocol.
    pub control: RawFd,
    /// What is started. This or `restore`.
    #[serde(default)]
    pub boot: Option<Boot>,
    /// What was saved (control command `save`), a file open for reading: the machine goes on from there.
    #[serde(default)]
    pub restore: Option<RawFd>,
    /// Build the machine and let it stand until it is told to resume.
    #[serde(default)]
    pub paused: bool,
    /// Disks: the first is `vda`.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// NICs: the first is `eth0`.
    #[serde(default)]
    pub nics: Vec<Nic>,
    /// The 16550 serial port, `ttyS0`.
    #[serde(default)]
    pub uart: Option<Console>,
    /// The virtio console: `hvc0` and named ports.
    #[serde(default)]
    pub serial: Option<Serial>,
    /// A source of random bytes.
    #[serde(default)]
    pub rng: bool,
    /// A balloon, which gives pages that the guest reports as free back to the host.
    #[serde(default)]
    pub balloon: bool,
    /// A vsock.
    #[serde(default)]
    pub vsock: Option<Vsock>,
    /// A shared file system.
    #[serde(default)]
    pub share: Option<Share>,
    /// The 16 bytes of the VM generation ID; a random one if it is left out. A guest that is restored is told that it is
    /// new.
    #[serde(default)]
    pub generation_id: Option<[u8; 16]>,
    /// Confine the process before the guest starts. Off only for debugging.
    #[serde(default = "yes")]
    pub confine: bool,
}

fn yes() -> bool {
    true
}

/// What is started, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// Kernel: ELF `vmlinux` or bzImage, open for reading.
    pub kernel: RawFd,
    /// Initial RAM disk, open for reading.
    #[serde(default)]
    pub initrd: Option<RawFd>,
    /// Command line, at most 2047 bytes.
    #[serde(default)]
    pub command_line: String,
    /// How the kernel is entered.
    #[serde(default)]
    pub protocol: Protocol,
}

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// By PVH where an ELF kernel has its note, by the 64-bit boot protocol else.
    #[default]
    Auto,
    /// By PVH only.
    Pvh,
    /// By Linux's 64-bit boot protocol only.
    Linux64,
}

/// A disk: layers of images, each standing on the next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// The chain, the disk's own image first and the base last. All but the first are only read.
    pub layers: Vec<Layer>,
    /// The guest cannot write.
    #[serde(default)]
    pub read_only: bool,
    /// Queues, 1 to [`MAX_QUEUES`], each with a thread of its own.
    #[serde(default = "one")]
    pub queues: u16,
    /// What the guest reads as the disk's serial number, at most 20 bytes.
    #[serde(default)]
    pub serial: String,
}

fn one() -> u16 {
    1
}

/// One image of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// The open file.
    pub fd: RawFd,
    /// Its format; it is never guessed, since a raw disk's content is the guest's.
    pub format: Format,
}

/// Format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Plain bytes.
    Raw,
    /// qcow2; names in its header are not followed.
    Qcow2,
}

/// A NIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// A tap, open, with `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`.
    pub tap: RawFd,
    /// MAC address. A guest that is restored keeps the one that it was saved with.
    pub mac: [u8; 6],
    /// Whether the link is up; if it is left out, as it was saved, and up where nothing was.
    #[serde(default)]
    pub link_up: Option<bool>,
}

/// Where a console goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// Listening Unix stream socket; who connects sees and types. One client at a time.
    #[serde(default)]
    pub listener: Option<RawFd>,
    /// A file open for appending, to which all output goes.
    #[serde(default)]
    pub log: Option<RawFd>,
}

/// The virtio console device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// Port 0, `hvc0`.
    #[serde(default)]
    pub console: Option<Console>,
    /// Further ports, by name.
    #[serde(default)]
    pub ports: Vec<Port>,
}

/// A named port of the virtio console device, `/dev/virtio-ports/<name>` in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// The name, at most 64 bytes.
    pub name: String,
    /// Listening Unix stream socket; one client at a time, and the guest sees whether there is one.
    pub listener: RawFd,
}

/// A vsock over Unix sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's context ID, 3 or more.
    pub cid: u32,
    /// Listening Unix stream socket for connections to the guest: a client writes `CONNECT <port>\n` and reads
    /// `OK <host port>\n`; then the stream is the connection.
    #[serde(default)]
    pub listener: Option<RawFd>,
    /// Connected Unix seqpacket socket for connections from the guest: each is one message, the port as four bytes in
    /// little-endian order, with the connection's end as its one descriptor. Who does not want it closes it.
    #[serde(default)]
    pub upstream: Option<RawFd>,
}

/// The file system that the guest mounts by virtio-fs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// Its tag: `mount -t virtiofs <tag> …`; 1 to 36 bytes.
    pub tag: String,
    /// The folder that is shared. Without it, an empty one in the process's own mount namespace, below which the
    /// caller mounts what the guest shall see; that takes the capability to make one.
    #[serde(default)]
    pub folder: Option<RawFd>,
}

/// Why a description is no use.
#[derive(Debug, thiserror::Error)]
pub enum DescriptionError {
    /// It is no JSON, or has fields that are not known or not right.
    #[error("The machine description cannot be read")]
    Json(#[from] serde_json::Error),
    /// It is of another version.
    #[error("The machine description has version {0}; this monitor knows version {VERSION}")]
    Version(u32),
    /// A value that cannot be.
    #[error("The machine description's {field} is not possible: {why}")]
    Value {
        /// The field.
        field: String,
        /// What is wrong, and what would be right.
        why: String,
    },
    /// One descriptor for two things.
    #[error("The machine description names descriptor {0} twice")]
    Twice(RawFd),
    /// A descriptor that is none.
    #[error("The machine description's {field} names descriptor {fd}, which is not open")]
    NotOpen {
        /// The field.
        field: String,
        /// The descriptor.
        fd: RawFd,
    },
}

impl Description {
    /// Reads and checks a description.
    pub fn from_json(text: &[u8]) -> Result<Self, DescriptionError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        // First the version: another one may have other fields.
        let Versioned { version } = serde_json::from_slice(text)?;
        if version != VERSION {
            return Err(DescriptionError::Version(version));
        }
        let description: Self = serde_json::from_slice(text)?;
        description.check()?;
        Ok(description)
    }

    /// Checks all values, but for whether descriptors are open.
    pub fn check(&self) -> Result<(), DescriptionError> {
        let within = |field: &str, good: bool, why: String| {
            if good { Ok(()) } else { Err(DescriptionError::Value { field: field.to_owned(), why }) }
        };
        within("cpus", (1..=MAX_CPUS).contains(&self.cpus), format!("1 to {MAX_CPUS}"))?;
        within("memory_mib", self.memory_mib >= 16, "at least 16 MiB".into())?;
        let one = self.boot.is_some() != self.restore.is_some();
        within("boot", one, "it takes either this or restore".into())?;
        let has_memory = self.restore.is_none() || self.memory.is_some();
        within("memory", has_memory, "with restore it takes the file of the saved memory".into())?;
        let line = self.boot.as_ref().map_or("", |boot| &boot.command_line);
        let most = crate::layout::COMMAND_LINE_MAX - 1;
        within(
            "boot.command_line",
            line.len() <= most && !line.contains('\0'),
            format!("at most {most} bytes, without zeros"),
        )?;
        within("disks", self.disks.len() <= MAX_DISKS, format!("at most {MAX_DISKS}"))?;
        within("nics", self.nics.len() <= MAX_NICS, format!("at most {MAX_NICS}"))?;
        for (index, disk) in self.disks.iter().enumerate() {
            let field = |name: &str| format!("disks[{index}].{name}");
            within(
                &field("layers"),
                (1..=MAX_LAYERS).contains(&disk.layers.len()),
                format!("1 to {MAX_LAYERS}"),
            )?;
            within(&field("queues"), (1..=MAX_QUEUES).contains(&disk.queues), format!("1 to {MAX_QUEUES}"))?;
            within(&field("serial"), disk.serial.len() <= 20, "at most 20 bytes".into())?;
        }
        if let Some(serial) = &self.serial {
            within("serial.ports", serial.ports.len() <= MAX_PORTS, format!("at most {MAX_PORTS}"))?;
            for port in &serial.ports {
                let good = (1..=64).contains(&port.name.len()) && !port.name.contains('\0');
                within("serial.ports.name", good, "1 to 64 bytes, without zeros".into())?;
            }
        }
        if let Some(vsock) = &self.vsock {
            let good = vsock.cid >= 3 && vsock.cid != u32::MAX;
            within("vsock.cid", good, "3 or more; 4294967295 is nobody's".into())?;
        }
        if let Some(share) = &self.share {
            let good = (1..=36).contains(&share.tag.len()) && !share.tag.contains('\0');
            within("share.tag", good, "1 to 36 bytes, without zeros".into())?;
        }
        let mut seen = HashSet::new();
        for (field, fd) in self.descriptors() {
            within(&field, fd > 2, "3 or more".into())?;
            if !seen.insert(fd) {
                return Err(DescriptionError::Twice(fd));
            }
        }
        Ok(())
    }

    /// The names of its virtio devices, in the order in which the guest finds them.
    pub fn virtio_devices(&self) -> Vec<String> {
        let disks = (0..self.disks.len()).map(|index| format!("disk{index}"));
        let nics = (0..self.nics.len()).map(|index| format!("nic{index}"));
        let others = [
            ("serial", self.serial.is_some()),
            ("rng", self.rng),
            ("balloon", self.balloon),
            ("vsock", self.vsock.is_some()),
            ("share", self.share.is_some()),
        ];
        let others = others.into_iter().filter(|(_, is_there)| *is_there).map(|(name, _)| name.to_owned());
        disks.chain(nics).chain(others).collect()
    }

    /// Every descriptor that it names, with the field's name.
    pub fn descriptors(&self) -> Vec<(String, RawFd)> {
        let mut all = vec![("kvm".to_owned(), self.kvm), ("control".to_owned(), self.control)];
        let mut add = |field: &str, fd: Option<RawFd>| all.extend(fd.map(|fd| (field.to_owned(), fd)));
        let mut console = |field: &str, console: Option<&Console>| {
            add(&format!("{field}.listener"), console.and_then(|console| console.listener));
            add(&format!("{field}.log"), console.and_then(|console| console.log));
        };
        console("uart", self.uart.as_ref());
        console("serial.console", self.serial.as_ref().and_then(|serial| serial.console.as_ref()));
        add("memory", self.memory);
        add("restore", self.restore);
        add("boot.kernel", self.boot.as_ref().map(|boot| boot.kernel));
        add("boot.initrd", self.boot.as_ref().and_then(|boot| boot.initrd));
        add("vsock.listener", self.vsock.and_then(|vsock| vsock.listener));
        add("vsock.upstream", self.vsock.and_then(|vsock| vsock.upstream));
        add("share.folder", self.share.as_ref().and_then(|share| share.folder));
        for (index, disk) in self.disks.iter().enumerate() {
            for (depth, layer) in disk.layers.iter().enumerate() {
                add(&format!("disks[{index}].layers[{depth}].fd"), Some(layer.fd));
            }
        }
        for (index, nic) in self.nics.iter().enumerate() {
            add(&format!("nics[{index}].tap"), Some(nic.tap));
        }
        for port in self.serial.iter().flat_map(|serial| &serial.ports) {
            add(&format!("serial.ports.{}", port.name), Some(port.listener));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALLEST: &str =
        r#"{"version":1,"name":"t","cpus":1,"memory_mib":64,"kvm":3,"control":4,"boot":{"kernel":5}}"#;

    fn with(extra: &str) -> Result<Description, DescriptionError> {
        Description::from_json(SMALLEST.replacen('{', &format!("{{{extra},"), 1).as_bytes())
    }

    #[test]
    fn the_smallest_description_is_enough_and_comes_back_the_same() {
        let description = Description::from_json(SMALLEST.as_bytes()).unwrap();
        assert!(description.confine && !description.rng && description.disks.is_empty());
        let text = serde_json::to_vec(&description).unwrap();
        assert_eq!(Description::from_json(&text).unwrap(), description);
    }

    #[test]
    fn a_machine_is_booted_or_restored_and_the_latter_takes_its_memory() {
        let restored =
            |more: &str| Description::from_json(SMALLEST.replace(r#""boot":{"kernel":5}"#, more).as_bytes());
        let description = restored(r#""restore":5,"memory":6,"paused":true"#).unwrap();
        assert!(description.paused && description.boot.is_none());
        let fields: Vec<_> = description.descriptors().into_iter().map(|(field, _)| field).collect();
        assert_eq!(fields, ["kvm", "control", "memory", "restore"]);
        assert!(restored(r#""restore":5"#).unwrap_err().to_string().contains("memory"));
        assert!(restored(r#""paused":true"#).unwrap_err().to_string().contains("boot"));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let refused = |extra: &str| with(extra).unwrap_err().to_string();
        let disk = |layers: &str| format!(r#""disks":[{{"layers":[{layers}]}}]"#);
        assert!(refused(&disk("")).contains("disks[0].layers"));
        assert!(refused(&disk(r#"{"fd":5,"format":"raw"}"#)).contains("descriptor 5 twice"));
        assert!(refused(&disk(r#"{"fd":0,"format":"raw"}"#)).contains("disks[0].layers[0].fd"));
        assert!(refused(r#""vsock":{"cid":2}"#).contains("vsock.cid"));
        assert!(refused(r#""share":{"tag":""}"#).contains("share.tag"));
        assert!(refused(r#""restore":6,"memory":7"#).contains("either this or restore"));
        assert!(matches!(with(r#""colour":1"#), Err(DescriptionError::Json(_))));
        let newer = SMALLEST.replace("\"version\":1", "\"version\":2,\"colour\":1");
        assert!(matches!(Description::from_json(newer.as_bytes()), Err(DescriptionError::Version(2))));
        let many = SMALLEST.replace("\"cpus\":1", "\"cpus\":33");
        assert!(Description::from_json(many.as_bytes()).unwrap_err().to_string().contains("1 to 32"));
    }
}
