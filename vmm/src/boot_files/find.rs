//! Finds on a guest's disk what it is started by.

use std::rc::Rc;

use super::disk::{self, Content, Source};
use super::files::{FileError, Files, shown};
use super::loader::{self, Entry};
use super::modules::{Driver, Modules};
use super::{NicName, initrd};

/// Longest configuration of a loader, kernel configuration or list of modules, in bytes.
const MAX_TEXT: u64 = 4 << 20;
/// Largest kernel, in bytes.
const MAX_KERNEL: u64 = 128 << 20;
/// Largest initial RAM disk, in bytes, and how many may be put together.
const MAX_INITRD: u64 = 512 << 20;
const MAX_INITRDS: usize = 8;
/// Largest module, in bytes.
const MAX_MODULE: u64 = 32 << 20;
/// Longest command line: room for what the caller adds is left.
const MAX_LINE: usize = 1900;
/// What the disk hangs on here, and the network card.
const DISK: [&str; 2] = ["virtio_mmio", "virtio_blk"];
const NIC: &str = "virtio_net";
/// Where GRUB has its files, in the file system that has them.
const GRUB: [&str; 4] = ["/boot/grub", "/boot/grub2", "/grub", "/grub2"];
/// Where kernels lie.
const BOOT: [&str; 2] = ["/boot", "/"];
/// Where modules lie.
const MODULES: [&str; 2] = ["/usr/lib/modules", "/lib/modules"];
/// Names of a disk by what it hangs on, without its letter or number.
const DISKS: [&str; 3] = ["/dev/sd", "/dev/hd", "/dev/xvd"];

/// Why a guest cannot be started by its kernel. Each is the end of a sentence that says so.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// No kernel.
    #[error("there is no kernel in a file system that can be read; the first disk has {0}")]
    NoKernel(String),
    /// A file that cannot be used.
    #[error("a file of it cannot be used")]
    File(#[from] FileError),
    /// The kernel is none that can be started.
    #[error("{0} is no kernel that can be started here (a bzImage of 64 bits)")]
    NoBzImage(String),
    /// The kernel lacks drivers.
    #[error("its kernel {version} has no {missing}, which disks and network hang on here")]
    NoVirtio {
        /// The kernel's version.
        version: String,
        /// What it lacks.
        missing: String,
    },
    /// The kernel has drivers as modules that cannot be read.
    #[error(
        "its kernel {version} has no {missing} built in, and its modules cannot be read; the first disk has {found}"
    )]
    NoModules {
        /// The kernel's version.
        version: String,
        /// What it lacks.
        missing: String,
        /// What the disk has.
        found: String,
    },
    /// Modules cannot be loaded before the root file system is there.
    #[error("its kernel {0} has virtio as modules and is started without an initial RAM disk")]
    NoInitrd(String),
    /// A disk by a name that it has not here.
    #[error("its /etc/fstab names {0}, which has another name here; name it by its UUID")]
    Fstab(String),
    /// The root file system by a name that it has not here.
    #[error("its kernel's command line has {0}, which has another name here; name it by its UUID")]
    Root(String),
    /// The command line.
    #[error("its kernel's command line is longer than {MAX_LINE} bytes")]
    Line,
}

/// What a guest is started by.
#[derive(Debug)]
pub struct Found {
    /// A bzImage.
    pub kernel: Vec<u8>,
    /// The guest's initial RAM disks, and behind them what is needed besides.
    pub initrd: Option<Vec<u8>>,
    /// The kernel's command line.
    pub command_line: String,
    /// The kernel's version.
    pub version: String,
}

/// Looks at a disk. `has_nic` says that the network card must work; `name` that it is to have a name of old.
pub fn find(disk: &Rc<dyn Source>, has_nic: bool, name: Option<&NicName>) -> Result<Found, FindError> {
    let Disk { systems, found } = Disk::read(disk);
    let Some((files, entry)) = systems.iter().find_map(|files| Some((files, entry(files)?))) else {
        return Err(FindError::NoKernel(found));
    };
    let kernel = files.read(&entry.kernel, MAX_KERNEL)?;
    let version = version(&kernel).ok_or_else(|| FindError::NoBzImage(shown(&entry.kernel)))?;
    let mut tables = systems.iter().filter_map(|files| files.text("/etc/fstab", MAX_TEXT).ok().flatten());
    if let Some(device) = tables.find_map(|table| fstab(&table)) {
        return Err(FindError::Fstab(device));
    }
    let options = options(&entry)?;
    // A guest that does not name its cards by their slots has none of these names.
    let name = name.filter(|_| has_nic && !options.iter().any(|option| option == "net.ifnames=0"));
    let needed = needed(&systems, &version, has_nic, name.is_some(), &found)?;
    let mut initrd = Vec::new();
    for path in entry.initrds.iter().take(MAX_INITRDS) {
        initrd.extend(files.read(path, MAX_INITRD - (initrd.len() as u64).min(MAX_INITRD))?);
        initrd.resize(initrd.len().next_multiple_of(4), 0);
    }
    if !needed.is_empty() && initrd.is_empty() {
        return Err(FindError::NoInitrd(version));
    }
    let command_line = command_line(options, !needed.is_empty())?;
    if !initrd.is_empty() && (!needed.is_empty() || name.is_some()) {
        initrd.extend(initrd::archive(&needed, name));
    }
    Ok(Found { kernel, initrd: Some(initrd).filter(|initrd| !initrd.is_empty()), command_line, version })
}

/// The file systems of a disk that can be read, and what it has, for people.
struct Disk {
    systems: Vec<Files>,
    found: String,
}

impl Disk {
    fn read(disk: &Rc<dyn Source>) -> Self {
        let mut systems = Vec::new();
        let mut found = Vec::new();
        for part in disk::partitions(disk.as_ref()) {
            found.push(match disk::content(disk.as_ref(), part) {
                Content::Ext => match Files::open(Rc::clone(disk), part) {
                    Ok(files) => {
                        systems.push(files);
                        "ext4".to_owned()
                    }
                    Err(error) => format!("ext4 that cannot be read ({error})"),
                },
                Content::Other(name) => name.to_owned(),
                Content::Unknown => "a partition that is not understood".to_owned(),
            });
        }
        found.dedup();
        found.truncate(8);
        Self { systems, found: shown(&found.join(", ")) }
    }
}

/// What a file system has its guest start.
fn entry(files: &Files) -> Option<Entry> {
    for folder in GRUB {
        let text = |name: &str| files.text(&format!("{folder}/{name}"), MAX_TEXT).ok().flatten();
        let saved = text("grubenv").and_then(|block| loader::environment(&block, "saved_entry"));
        let chosen = text("grub.cfg").and_then(|config| loader::chosen(&config, saved.as_deref()));
        if let Some(entry) = chosen.filter(|entry| files.exists(&entry.kernel)) {
            return Some(entry);
        }
    }
    BOOT.into_iter().find_map(|folder| newest(files, folder))
}

/// The newest kernel of a folder, with its initial RAM disk; its root is this file system, if that has one.
fn newest(files: &Files, folder: &str) -> Option<Entry> {
    let names = files.names(folder);
    let versions = names.iter().filter_map(|name| name.strip_prefix("vmlinuz-"));
    let version = versions.max_by_key(|version| numbers(version))?;
    let initrds = [format!("initrd.img-{version}"), format!("initramfs-{version}.img")];
    let initrd = initrds.into_iter().find(|name| names.contains(name));
    let path = |name: &str| format!("{}/{name}", folder.trim_end_matches('/'));
    // A file system that holds kernels alone does not say what its root is.
    let has_root = files.exists("/etc") && files.exists("/sbin/init");
    has_root.then(|| Entry {
        kernel: path(&format!("vmlinuz-{version}")),
        initrds: initrd.iter().map(|name| path(name)).collect(),
        options: vec![format!("root=UUID={}", files.uuid()), "ro".to_owned()],
        ..Entry::default()
    })
}

/// The numbers in a version, which tell what is newer.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

/// The version that a bzImage of 64 bits tells (kernel, Documentation/arch/x86/boot.rst: `kernel_version`).
fn version(kernel: &[u8]) -> Option<String> {
    let word = |at: usize| Some(usize::from(u16::from_le_bytes(kernel.get(at..at + 2)?.try_into().ok()?)));
    let is_long = word(0x236)? & 1 == 1;
    if kernel.get(0x202..0x206)? != b"HdrS" || word(0x206)? < 0x20c || !is_long {
        return None;
    }
    let text = kernel.get(word(0x20e)? + 0x200..)?;
    let text = text.iter().take(128).take_while(|byte| byte.is_ascii_graphic());
    let version: String = text.map(|byte| char::from(*byte)).collect();
    (!version.is_empty() && !version.contains('/') && !version.starts_with('.')).then_some(version)
}

/// The modules that must be loaded before the root file system can be there, with their files' names.
fn needed(
    systems: &[Files],
    version: &str,
    has_nic: bool,
    nic_early: bool,
    found: &str,
) -> Result<Vec<(String, Vec<u8>)>, FindError> {
    let text = |files: &Files, path: &str| files.text(path, MAX_TEXT).ok().flatten();
    let all = systems.iter().flat_map(|files| MODULES.map(|folder| (files, format!("{folder}/{version}"))));
    let place = all.into_iter().find_map(|(files, folder)| {
        let dependencies = text(files, &format!("{folder}/modules.dep"))?;
        let built_in = text(files, &format!("{folder}/modules.builtin")).unwrap_or_default();
        Some((files, folder, Modules::parse(&built_in, &dependencies)))
    });
    let from_config = || {
        let configs = systems
            .iter()
            .flat_map(|files| BOOT.map(|boot| text(files, &format!("{boot}/config-{version}"))));
        Modules::of_config(&configs.flatten().next().unwrap_or_default(), &[NIC])
    };
    let (place, modules) = match place {
        Some((files, folder, modules)) => (Some((files, folder)), modules),
        None => (None, from_config()),
    };
    let mut wanted: Vec<&str> = Vec::new();
    let mut missing = Vec::new();
    let mut paths: Vec<String> = Vec::new();
    wanted.extend(DISK);
    wanted.extend(has_nic.then_some(NIC));
    for driver in wanted {
        match modules.driver(driver) {
            Driver::BuiltIn => {}
            Driver::Missing => missing.push(driver),
            // udev loads it by itself.
            Driver::Module(_) if driver == NIC && !nic_early => {}
            Driver::Module(files) => paths.extend(files),
        }
    }
    let version = version.to_owned();
    let missing = missing.join(", ");
    let Some((files, folder)) = place else {
        if missing.is_empty() {
            return Ok(Vec::new());
        }
        return Err(FindError::NoModules { version, missing, found: found.to_owned() });
    };
    if !missing.is_empty() {
        return Err(FindError::NoVirtio { version, missing });
    }
    let mut needed: Vec<(String, Vec<u8>)> = Vec::new();
    for path in paths {
        if !needed.iter().any(|(known, _)| *known == path) {
            let bytes = files.read(&format!("{folder}/{path}"), MAX_MODULE)?;
            needed.push((path, bytes));
        }
    }
    Ok(needed)
}

/// The first disk in a table of file systems that would be waited for and not come.
fn fstab(text: &str) -> Option<String> {
    let lines = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let is_waited_for = |words: &Vec<&str>| {
        let options = words.get(3).copied().unwrap_or_default();
        !options.split(',').any(|option| ["noauto", "nofail"].contains(&option)) && words.len() >= 3
    };
    lines.filter(is_waited_for).find(|words| is_disk_of_old(words[0])).map(|words| shown(words[0]))
}

fn is_disk_of_old(device: &str) -> bool {
    DISKS.iter().any(|start| device.starts_with(start)) || device.starts_with("/dev/nvme")
}

/// The options of a command line, as they are right here.
fn options(entry: &Entry) -> Result<Vec<String>, FindError> {
    let mut options = entry.options.clone();
    for option in &mut options {
        let Some(device) = option.strip_prefix("root=") else { continue };
        if is_disk_of_old(device) {
            *option = renamed(device)
                .map(|device| format!("root={device}"))
                .ok_or_else(|| FindError::Root(shown(option)))?;
        }
    }
    Ok(options)
}

/// The name here of a disk's partition: `/dev/sda1` is `/dev/vda1`, `/dev/nvme0n1p2` is `/dev/vda2`.
fn renamed(device: &str) -> Option<String> {
    let rest = DISKS.iter().find_map(|start| device.strip_prefix(start));
    let (letter, number) = match rest {
        Some(rest) => (rest.chars().next().filter(char::is_ascii_lowercase)?, &rest[1..]),
        None => ('a', device.strip_prefix("/dev/nvme0n1p")?),
    };
    let is_number = number.len() <= 3 && number.chars().all(|c| c.is_ascii_digit());
    is_number.then(|| format!("/dev/vd{letter}{number}"))
}

fn command_line(mut options: Vec<String>, loads_modules: bool) -> Result<String, FindError> {
    // Here is no screen; the last console is that which programs write to.
    if !options.iter().any(|option| option.starts_with("console=ttyS")) {
        options.push("console=ttyS0".to_owned());
    }
    if loads_modules {
        options.retain(|option| !option.starts_with("rdinit="));
        options.push(format!("rdinit={}", initrd::INIT));
    }
    let quoted = options.iter().map(|option| match option.split_once('=') {
        Some((key, value)) if value.contains(' ') => format!("{key}=\"{value}\""),
        _ => option.clone(),
    });
    let line = quoted.collect::<Vec<_>>().join(" ");
    if line.len() > MAX_LINE { Err(FindError::Line) } else { Ok(line) }
}

#[cfg(test)]
#[path = "find_tests.rs"]
mod tests;
