//! What the VMX says, in typed form and checked.

use std::net::Ipv4Addr;

use catalyst_api::PublishPort;
use thiserror::Error;

use super::foreign::Registered;
use super::foreign::hardware::{Firmware, Hardware};
use super::id::VmId;
use super::vmx::{Vmx, VmxError};

/// Virtual CPUs a VM can have.
pub const CPUS: std::ops::RangeInclusive<u64> = 1..=32;
/// Least memory in MiB: below it the guest's kernel does not come up.
pub const MIN_MEMORY_MIB: u64 = 128;
/// Virtual disk sizes in GiB. The least is the size of lumen's root file system.
pub const DISK_GIB: std::ops::RangeInclusive<u64> = 64..=16384;
/// What the old clients ask for (AppCatalyst reference section 4.1).
pub const DEFAULT_MEMORY_MIB: u64 = 1024;
/// See [`DEFAULT_MEMORY_MIB`].
pub const DEFAULT_CPUS: u64 = 1;
/// The smallest disk: it costs nothing until it is written.
pub const DEFAULT_DISK_GIB: u64 = *DISK_GIB.start();
/// The bundled template.
pub const DEFAULT_TEMPLATE: &str = "lumen";

/// The template of containers.
pub const MICRO: &str = "micro";

/// The key of the published ports.
const PORTS: &str = "catalyst.ports";
/// The key that says that a VM is powered on when the host has started.
const AUTOSTART: &str = "catalyst.autostart";
/// Says that a VM's guest starts by its own loader, on a PC.
const MACHINE: &str = "catalyst.machine";
const PC: &str = "pc";
/// Published ports a VM can have.
pub const MAX_PORTS: usize = 128;
const MAX_TAGS: usize = 16;
const MAX_TEXT: usize = 64;

/// A value that no VM can have.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// The file is no VMX.
    #[error(transparent)]
    Vmx(#[from] VmxError),
    /// Out of range.
    #[error("{what} of {value} is not possible: {least} to {most} are")]
    Range {
        /// What, e.g. `Memory in MiB`.
        what: &'static str,
        /// The value asked for.
        value: u64,
        /// Least possible value.
        least: u64,
        /// Greatest possible value.
        most: u64,
    },
    /// A name or tag that cannot be written in a VMX or a list.
    #[error(
        "{what} {text:?} is too long (at most {MAX_TEXT} characters) or has characters it cannot have (control characters; in tags, commas)"
    )]
    Text {
        /// What, e.g. `The tag`.
        what: &'static str,
        /// The text.
        text: String,
    },
    /// Too many tags.
    #[error("{0} tags are too many: at most {MAX_TAGS} are possible")]
    TooManyTags(usize),
    /// Too many ports.
    #[error("{0} published ports are too many: a VM can have {MAX_PORTS}")]
    TooManyPorts(usize),
    /// A registered VMX has a device that there is not.
    #[error("'{key}' is \"{value}\"; of these there are {possible}")]
    Unsupported {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What it may be.
        possible: &'static str,
    },
    /// A registered VMX names a disk that is not looked for.
    #[error("'{key}' is \"{value}\"; a disk must lie beside the VMX, as .vmdk, .qcow2 or .img")]
    DiskName {
        /// The key.
        key: String,
        /// Its value.
        value: String,
    },
    /// A registered VMX has nothing to start from.
    #[error("it has no disk: no scsi, sata, nvme or ide disk is present")]
    NoDisk,
    /// Or too much.
    #[error("it has {count} disks; at most {most} are possible")]
    TooManyDisks {
        /// How many it has.
        count: usize,
        /// The most.
        most: usize,
    },
    /// Or one disk in two places.
    #[error("it has the disk \"{0}\" twice")]
    SameDisk(String),
    /// A line of ours was damaged.
    #[error("'{key}' is \"{value}\", which is not {wanted}")]
    Malformed {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        wanted: &'static str,
    },
}

/// The configuration of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// Display name.
    pub name: String,
    /// Virtual CPUs, within [`CPUS`].
    pub cpus: u32,
    /// Memory in MiB, at least [`MIN_MEMORY_MIB`].
    pub memory_mib: u64,
    /// Virtual disk size in GiB, within [`DISK_GIB`]; 0 of a template without a disk.
    pub disk_gib: u64,
    /// Template it was made from.
    pub template: String,
    /// Version of the template that the disk stands on.
    pub version: String,
    /// MAC address of the NIC, once it has one.
    pub mac: Option<[u8; 6]>,
    /// Fixed address, once it has one.
    pub address: Option<Ipv4Addr>,
    /// Tags.
    pub tags: Vec<String>,
    /// Ports of the guest that are published on the host.
    pub ports: Vec<PublishPort>,
    /// Whether it is powered on when the host has started.
    pub autostart: bool,
    /// The machine of a VM whose guest starts by its own loader: one that was registered in place, which has no template, and
    /// whose disk is as large as it is; or one of an imported image.
    pub hardware: Option<Hardware>,
}

impl VmConfig {
    /// Reads and checks what `vmx` says of the VM `id`; what is absent has its default.
    pub fn from_vmx(vmx: &Vmx, id: &VmId) -> Result<Self, ConfigError> {
        let text = |key: &str| vmx.get(key).filter(|value| !value.is_empty()).map(str::to_owned);
        let config = Self {
            name: text("displayname").unwrap_or_else(|| id.to_string()),
            cpus: u32::try_from(vmx.number("numvcpus")?.unwrap_or(DEFAULT_CPUS)).unwrap_or(u32::MAX),
            memory_mib: vmx.number("memsize")?.unwrap_or(DEFAULT_MEMORY_MIB),
            disk_gib: vmx.number("catalyst.disk_gib")?.unwrap_or(DEFAULT_DISK_GIB),
            template: text("catalyst.template").unwrap_or_else(|| DEFAULT_TEMPLATE.to_owned()),
            version: text("catalyst.version").unwrap_or_default(),
            mac: text("ethernet0.address").map(|value| parse_mac(&value)).transpose()?,
            address: text("catalyst.address").map(|value| parse_address(&value)).transpose()?,
            tags: split_tags(vmx.get("catalyst.tags").unwrap_or_default()),
            ports: parse_ports(vmx.get(PORTS).unwrap_or_default())?,
            autostart: vmx.get(AUTOSTART).is_some_and(|value| value.eq_ignore_ascii_case("true")),
            hardware: is_pc(vmx).then(|| Hardware::from_vmx(vmx)).transpose()?,
        };
        config.check()?;
        Ok(config)
    }

    /// The same of a VM that was registered in place.
    pub(super) fn of_registered(vmx: &Vmx, id: &VmId, record: &Registered) -> Result<Self, ConfigError> {
        let config = Self {
            name: record.name.clone().or_else(|| foreign_name(vmx)).unwrap_or_else(|| id.to_string()),
            cpus: u32::try_from(vmx.number("numvcpus")?.unwrap_or(DEFAULT_CPUS)).unwrap_or(u32::MAX),
            memory_mib: vmx.number("memsize")?.unwrap_or(DEFAULT_MEMORY_MIB),
            disk_gib: record.disk_gib(),
            template: String::new(),
            version: String::new(),
            mac: record.mac,
            address: record.address,
            tags: record.tags.clone(),
            ports: record.ports.clone(),
            autostart: record.autostart,
            hardware: Some(Hardware::from_vmx(vmx)?),
        };
        config.check()?;
        Ok(config)
    }

    /// What of it is kept beside a registered VMX.
    pub(super) fn kept(&self, vmx: &Vmx, id: &VmId, record: Registered) -> Registered {
        let of_vmx = foreign_name(vmx).unwrap_or_else(|| id.to_string());
        let renamed = record.name.is_some() || of_vmx != self.name;
        let name = renamed.then(|| self.name.clone());
        let (tags, ports, autostart) = (self.tags.clone(), self.ports.clone(), self.autostart);
        Registered { name, tags, mac: self.mac, address: self.address, ports, autostart, ..record }
    }

    /// Writes CPUs and memory into `vmx`; whether it says something else now.
    pub(super) fn write_size(&self, vmx: &mut Vmx) -> bool {
        let before = vmx.clone();
        for (key, value, default) in [
            ("numvcpus", u64::from(self.cpus), DEFAULT_CPUS),
            ("memsize", self.memory_mib, DEFAULT_MEMORY_MIB),
        ] {
            if vmx.number(key).map(|now| now.unwrap_or(default)) != Ok(value) {
                vmx.set(key, value.to_string());
            }
        }
        *vmx != before
    }

    /// Writes the configuration into `vmx`, leaving its other lines.
    pub fn write_to(&self, vmx: &mut Vmx) {
        vmx.set("displayname", &self.name);
        vmx.set("numvcpus", self.cpus.to_string());
        vmx.set("memsize", self.memory_mib.to_string());
        vmx.set("catalyst.disk_gib", self.disk_gib.to_string());
        vmx.set("catalyst.template", &self.template);
        vmx.set("catalyst.version", &self.version);
        vmx.set("catalyst.tags", self.tags.join(","));
        // Most VMs have none, and need no line that says so.
        if !self.ports.is_empty() || vmx.get(PORTS).is_some() {
            let ports: Vec<String> = self.ports.iter().map(ToString::to_string).collect();
            vmx.set(PORTS, ports.join(","));
        }
        if self.autostart || vmx.get(AUTOSTART).is_some() {
            vmx.set(AUTOSTART, if self.autostart { "TRUE" } else { "FALSE" });
        }
        if self.hardware.is_some() && !is_pc(vmx) {
            write_pc(vmx, self.firmware());
        }
        if let Some(mac) = self.mac {
            vmx.set("ethernet0.address", format_mac(mac));
        }
        if let Some(address) = self.address {
            vmx.set("catalyst.address", address.to_string());
        }
    }

    fn firmware(&self) -> Firmware {
        self.hardware.as_ref().map_or(Firmware::Bios, |hardware| hardware.firmware)
    }

    /// Whether all values are possible on any host.
    pub fn check(&self) -> Result<(), ConfigError> {
        check_size(self.cpus, self.memory_mib)?;
        let least = if self.hardware.is_none() { *DISK_GIB.start() } else { 1 };
        if !self.template.is_empty() && self.disk_gib != 0 {
            in_range("A disk size in GiB", self.disk_gib, least..=*DISK_GIB.end())?;
        }
        check_text("The name", &self.name, |_| true)?;
        check_text("The template", &self.template, |c| c.is_ascii_alphanumeric() || "-_.".contains(c))?;
        check_text("The template version", &self.version, |c| c.is_ascii_alphanumeric())?;
        if self.tags.len() > MAX_TAGS {
            return Err(ConfigError::TooManyTags(self.tags.len()));
        }
        self.tags.iter().try_for_each(|tag| check_text("The tag", tag, |c| c != ','))?;
        if self.ports.len() > MAX_PORTS {
            return Err(ConfigError::TooManyPorts(self.ports.len()));
        }
        Ok(())
    }
}

/// Whether the VM is one of an image that starts by its own loader.
fn is_pc(vmx: &Vmx) -> bool {
    vmx.get(MACHINE) == Some(PC)
}

/// Describes the machine of such a VM, as its guest most likely has drivers for; whoever knows better changes it.
fn write_pc(vmx: &mut Vmx, firmware: Firmware) {
    vmx.set(MACHINE, PC);
    vmx.set("firmware", if firmware == Firmware::Efi { "efi" } else { "bios" });
    vmx.set("sata0.present", "TRUE");
    vmx.set("sata0:0.present", "TRUE");
    vmx.set("sata0:0.filename", "disk.qcow2");
    vmx.set("ethernet0.virtualdev", "e1000e");
}

/// The machine that [`write_pc`] describes.
pub fn pc(firmware: Firmware) -> Result<Hardware, ConfigError> {
    let mut vmx = Vmx::default();
    write_pc(&mut vmx, firmware);
    vmx.set("ethernet0.present", "TRUE");
    Hardware::from_vmx(&vmx)
}

/// Whether a VM can have so many CPUs and so much memory (MiB) here.
pub fn check_size(cpus: u32, memory_mib: u64) -> Result<(), ConfigError> {
    in_range("A number of virtual CPUs", u64::from(cpus), CPUS)?;
    in_range("Memory in MiB", memory_mib, MIN_MEMORY_MIB..=host_memory_mib())
}

/// Memory of the host in MiB: no VM gets more.
pub fn host_memory_mib() -> u64 {
    let info = rustix::system::sysinfo();
    // The types differ between C libraries.
    #[allow(clippy::useless_conversion)]
    let (total, unit) = (u64::from(info.totalram), u64::from(info.mem_unit));
    total.saturating_mul(unit) >> 20
}

fn in_range(what: &'static str, value: u64, range: std::ops::RangeInclusive<u64>) -> Result<(), ConfigError> {
    let (least, most) = (*range.start(), *range.end());
    if range.contains(&value) { Ok(()) } else { Err(ConfigError::Range { what, value, least, most }) }
}

fn check_text(what: &'static str, text: &str, allowed: impl Fn(char) -> bool) -> Result<(), ConfigError> {
    let possible = text.chars().all(|c| !c.is_control() && allowed(c));
    // A template's dots must not climb out of the image folder.
    if possible && text.chars().count() <= MAX_TEXT && !text.starts_with('.') {
        Ok(())
    } else {
        Err(ConfigError::Text { what, text: text.chars().take(MAX_TEXT).collect() })
    }
}

/// Splits the comma-separated list in which tags are kept.
pub fn split_tags(list: &str) -> Vec<String> {
    list.split(',').map(str::trim).filter(|tag| !tag.is_empty()).map(str::to_owned).collect()
}

/// `00:50:56:…` as text.
pub fn format_mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The name that a foreign VMX has, as far as it can be one here.
fn foreign_name(vmx: &Vmx) -> Option<String> {
    let name = vmx.get("displayname")?.trim().trim_start_matches('.');
    let name: String = name.chars().filter(|c| !c.is_control()).take(MAX_TEXT).collect();
    (!name.is_empty()).then_some(name)
}

pub(super) fn parse_mac(value: &str) -> Result<[u8; 6], ConfigError> {
    let malformed = || ConfigError::Malformed {
        key: "ethernet0.address",
        value: value.to_owned(),
        wanted: "a MAC address",
    };
    let mut mac = [0_u8; 6];
    let mut parts = value.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2).ok_or_else(malformed)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| malformed())?;
    }
    // A group address (lowest bit of the first octet) is no NIC's.
    if parts.next().is_some() || mac[0] & 1 == 1 { Err(malformed()) } else { Ok(mac) }
}

fn parse_ports(list: &str) -> Result<Vec<PublishPort>, ConfigError> {
    let malformed = |_| ConfigError::Malformed {
        key: PORTS,
        value: list.chars().take(MAX_TEXT).collect(),
        wanted: "a list of ports as 8080:80/tcp, with commas between",
    };
    let ports = list.split(',').map(str::trim).filter(|port| !port.is_empty());
    ports.map(|port| port.parse().map_err(malformed)).collect()
}

fn parse_address(value: &str) -> Result<Ipv4Addr, ConfigError> {
    value.parse().map_err(|_| ConfigError::Malformed {
        key: "catalyst.address",
        value: value.to_owned(),
        wanted: "an IPv4 address",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<VmConfig, ConfigError> {
        VmConfig::from_vmx(&Vmx::parse(text.as_bytes()).unwrap(), &VmId::parse("web1").unwrap())
    }

    #[test]
    fn an_empty_vmx_is_the_default_vm() {
        let config = read("").unwrap();
        assert_eq!((config.cpus, config.memory_mib, config.disk_gib), (1, 1024, 64));
        assert_eq!((config.name.as_str(), config.template.as_str()), ("web1", "lumen"));
    }

    #[test]
    fn what_is_written_reads_back() {
        let mut config = read("").unwrap();
        config.tags = vec!["a".into(), "b c".into()];
        config.mac = Some([0x52, 0x54, 0, 1, 2, 3]);
        config.address = Some(Ipv4Addr::new(10, 1, 2, 3));
        config.ports = vec!["8080:80".parse().unwrap(), "[::1]:53:53/udp".parse().unwrap()];
        config.autostart = true;
        let mut vmx = Vmx::default();
        config.write_to(&mut vmx);
        assert_eq!(VmConfig::from_vmx(&vmx, &VmId::parse("web1").unwrap()).unwrap(), config);
        config.ports.clear();
        config.autostart = false;
        config.write_to(&mut vmx);
        assert_eq!(VmConfig::from_vmx(&vmx, &VmId::parse("web1").unwrap()).unwrap(), config);
    }

    #[test]
    fn impossible_values_are_named_with_what_is_possible() {
        for (text, word) in [
            ("numvcpus = \"0\"", "1 to 32"),
            ("numvcpus = \"10000\"", "1 to 32"),
            ("memsize = \"1\"", "128 to"),
            ("memsize = \"999999999\"", "128 to"),
            ("catalyst.disk_gib = \"1\"", "64 to"),
            ("ethernet0.address = \"zz\"", "MAC"),
            ("ethernet0.address = \"01:00:00:00:00:00\"", "MAC"),
            ("catalyst.address = \"1.2.3\"", "IPv4"),
            ("catalyst.ports = \"8080:80,nonsense\"", "8080:80/tcp"),
            ("catalyst.template = \"../../etc\"", "template"),
            ("catalyst.tags = \"1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17\"", "17 tags"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
