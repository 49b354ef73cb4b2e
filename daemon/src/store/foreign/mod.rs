//! VMs that were registered in place (AppCatalyst reference section 1.3): their VMX and disks lie in a folder of others.
//!
//! Such a VM has a folder of ours like any other. In it are a link `<id>.vmx` for clients, the overlays that take what
//! the guest writes, and `registered.json`, which says what is registered. The link is never followed by us: one that
//! somebody planted registers nothing.

pub mod hardware;
pub mod image;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Instant;

use catalyst_api::PublishPort;
use catalyst_vmm::description::Format;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::flatten::{self, Source};
use super::{
    Store, StoreError, VmConfig, VmDir, VmId, Vmx, disk, files, io_error, parse_vmx, read_json, read_vmx, vmx,
};
use hardware::{Hardware, is_disk_name, is_plain_name};
use image::{Image, Parts};

/// The file.
const FILE: &str = "registered.json";
/// Longest such file, in bytes.
const MAX_SIZE: usize = 256 * 1024;
/// Longest path of a VMX, in bytes (PATH_MAX).
const MAX_PATH: usize = 4096;
/// What VMware's products and its boxes have beside a VMX, by their endings.
const COMPANIONS: [&str; 4] = ["nvram", "vmsd", "vmxf", "vmx.lck"];
/// What else a box has, in a folder that was made for the VM.
const ACCESSORIES: [&str; 3] = ["metadata.json", "info.json", "Vagrantfile"];

/// Why a VM cannot be registered.
#[derive(Debug, Error)]
pub enum RegisterError {
    /// No path of a VMX.
    #[error("{0:?} cannot be registered: it must be the absolute path of a .vmx file")]
    Path(String),
    /// Not there, or no file that the owner may read.
    #[error("Cannot open {path}, which is to be registered")]
    Open {
        /// The VMX.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is one of ours.
    #[error("{0} is the file of a VM of Catalyst already; clone that one instead")]
    Ours(String),
    /// Another VM has it.
    #[error("{path} is registered already, as '{id}'; see: catalyst vm show {id}")]
    Taken {
        /// The VMX.
        path: String,
        /// The VM.
        id: VmId,
    },
    /// A disk cannot be used.
    #[error("{path} cannot be registered")]
    Disk {
        /// The VMX.
        path: String,
        /// Why not.
        #[source]
        source: disk::DiskError,
    },
}

/// What is registered, and what is kept of it here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registered {
    /// The VMX.
    pub vmx: PathBuf,
    /// The display name, if it was given here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Tags.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// MAC address of the NIC, once it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<[u8; 6]>,
    /// Fixed address, once it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
    /// Ports of the guest that are published on the host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PublishPort>,
    /// Whether it is powered on when the host has started.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub autostart: bool,
    /// Its disks.
    pub disks: Vec<Overlay>,
}

/// A disk of a registered VM, which is only read, and where its changes go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Overlay {
    /// The disk's file beside the VMX.
    pub file: String,
    /// All files that the disk consists of.
    pub files: Vec<String>,
    /// The overlay in the VM's folder.
    pub overlay: String,
    /// Size in bytes.
    pub bytes: u64,
}

impl Registered {
    /// The folder in which the VMX lies.
    pub fn folder(&self) -> &Path {
        self.vmx.parent().unwrap_or(Path::new("/"))
    }

    /// Size of all disks in GiB, rounded up.
    pub(super) fn disk_gib(&self) -> u64 {
        self.disks.iter().fold(0_u64, |sum, disk| sum.saturating_add(disk.bytes)).div_ceil(1 << 30)
    }

    /// Reads the VMX, and what it says of the VM `id`.
    pub(super) fn read(&self, id: &VmId) -> Result<(Vmx, VmConfig), StoreError> {
        let vmx = read_vmx(&self.vmx)?;
        let config = VmConfig::of_registered(&vmx, id, self)
            .map_err(|source| StoreError::Vmx { path: self.vmx.display().to_string(), source })?;
        Ok((vmx, config))
    }

    fn overlay_of(&self, file: &str) -> Option<&Overlay> {
        self.disks.iter().find(|disk| disk.file == file)
    }
}

/// A disk that is ready for a VM process.
#[derive(Debug)]
pub struct Opened {
    /// What is only read.
    pub image: Image,
    /// What is written.
    pub overlay: File,
}

impl VmDir {
    fn registered_file(&self) -> PathBuf {
        self.path().join(FILE)
    }

    /// Whether the VM was registered in place.
    pub fn is_registered(&self) -> bool {
        self.registered_file().symlink_metadata().is_ok()
    }

    /// What is registered; `None` of a VM of our own.
    pub fn registered(&self) -> Result<Option<Registered>, StoreError> {
        let path = self.registered_file();
        let Some(record) = read_json::<Registered>(&path, MAX_SIZE)? else { return Ok(None) };
        let overlay = |disk: &Overlay| super::chain::is_plain(&disk.overlay) && is_disk_name(&disk.overlay);
        if !record.vmx.is_absolute() || !record.disks.iter().all(overlay) {
            let error = io::Error::other("it names what is no file of the VM");
            return Err(io_error("understand", &path)(error));
        }
        Ok(Some(record))
    }

    pub(super) fn write_registered(&self, record: &Registered) -> Result<(), StoreError> {
        let path = self.registered_file();
        files::write_json(&path, record, 0o644).map_err(io_error("write", &path))
    }

    /// Opens the disks that the VMX names, in their order, and makes overlays for those that are new. With `plain` each stands on
    /// a qcow2 or on the disk as it is: a VMDK is copied into one in the VM's folder, once.
    pub fn open_disks(
        &self,
        hardware: &Hardware,
        owner: (u32, u32),
        plain: bool,
    ) -> Result<Vec<Opened>, StoreError> {
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let mut record =
            self.registered()?.ok_or_else(|| io_error("read", &self.registered_file())(missing()))?;
        let mut opened = Vec::new();
        for wanted in &hardware.disks {
            let mut image = image::open(record.folder(), &wanted.file)?;
            let name = match record.overlay_of(&wanted.file) {
                Some(known) => known.overlay.clone(),
                None => self.add_overlay(&mut record, &wanted.file, &image, owner)?,
            };
            let path = self.path().join(&name);
            if plain {
                image.parts = self.plain(&name, image.parts, owner)?;
                disk::name_base(&path, owner)?;
            }
            let overlay = disk::open_overlay(&path)?;
            opened.push(Opened { image, overlay });
        }
        Ok(opened)
    }

    /// What the overlay `name` stands on, as a qcow2 or as it is.
    fn plain(&self, name: &str, parts: Parts, owner: (u32, u32)) -> Result<Parts, StoreError> {
        if matches!(parts, Parts::Raw(_) | Parts::Qcow2(_)) {
            return Ok(parts);
        }
        let path = self.path().join(format!("plain-{name}"));
        if path.symlink_metadata().is_err() {
            tracing::info!(vm = %self.id(), disk = name, "its VMDK is copied into a qcow2, once");
            let began = Instant::now();
            let aside = self.path().join(format!(".new-plain-{name}"));
            let source = Source::of_parts(parts).map_err(io_error("name the files of", &path))?;
            flatten::convert(&source, &aside, Format::Qcow2, owner)?;
            fs::rename(&aside, &path).map_err(io_error("put into place", &path))?;
            let mib = path.metadata().map_or(0, |copy| copy.len() >> 20);
            tracing::info!(vm = %self.id(), disk = name, mib, seconds = began.elapsed().as_secs(), "its VMDK is copied");
        }
        Ok(Parts::Qcow2(disk::open_qcow2(&path, false)?))
    }

    fn add_overlay(
        &self,
        record: &mut Registered,
        file: &str,
        image: &Image,
        owner: (u32, u32),
    ) -> Result<String, StoreError> {
        let overlay = make_overlay(self, record.disks.len(), file, image, owner)?;
        let name = overlay.overlay.clone();
        record.disks.push(overlay);
        self.write_registered(record)?;
        Ok(name)
    }

    /// Deletes the files of a registered VM in their folder, the VMX last, and the folder if nothing is left in it.
    /// What is gone already is as good.
    pub(super) fn delete_registered(&self, record: &Registered) -> Result<(), StoreError> {
        let path = record.folder();
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let folder = match open(path, flags, Mode::empty()) {
            Ok(folder) => folder,
            Err(nix::Error::ENOENT) => return Ok(()),
            Err(errno) => return Err(io_error("open the folder", path)(errno.into())),
        };
        for name in names_of(record, self.id()) {
            match unlinkat(&folder, name.as_str(), UnlinkatFlags::NoRemoveDir) {
                Ok(()) | Err(nix::Error::ENOENT | nix::Error::EISDIR) => {}
                Err(errno) => return Err(io_error("remove", &path.join(name))(errno.into())),
            }
        }
        // It stays where something else lies in it, or where it is not the owner's to remove.
        let _ = fs::remove_dir(path);
        Ok(())
    }
}

/// The files of a VM in its folder, its VMX last.
fn names_of(record: &Registered, id: &VmId) -> Vec<String> {
    let mut names: BTreeSet<String> =
        record.disks.iter().flat_map(|disk| &disk.files).filter(|name| is_disk_name(name)).cloned().collect();
    let text = |name: Option<&OsStr>| name.unwrap_or_default().to_string_lossy().into_owned();
    let stem = text(record.vmx.file_stem());
    names.extend(COMPANIONS.map(|ending| format!("{stem}.{ending}")));
    names.insert("vmware.log".to_owned());
    names.extend((0..10).map(|number| format!("vmware-{number}.log")));
    if record.folder().file_name() == Some(OsStr::new(id.as_str())) {
        names.extend(ACCESSORIES.map(str::to_owned));
    }
    let vmx = text(record.vmx.file_name());
    names.remove(&vmx);
    names.into_iter().chain([vmx]).filter(|name| is_plain_name(name)).collect()
}

/// Makes the overlay of the disk that comes after `before` others.
fn make_overlay(
    dir: &VmDir,
    before: usize,
    file: &str,
    image: &Image,
    owner: (u32, u32),
) -> Result<Overlay, StoreError> {
    let overlay = if before == 0 { "disk.qcow2".to_owned() } else { format!("disk-{}.qcow2", before + 1) };
    disk::create_empty(&dir.path().join(&overlay), image.bytes, owner)?;
    Ok(Overlay { file: file.to_owned(), files: image.files.clone(), overlay, bytes: image.bytes })
}

/// A VMX that can be registered.
#[derive(Debug)]
pub struct Candidate {
    vmx: PathBuf,
    hardware: Hardware,
    images: Vec<Image>,
}

impl Candidate {
    /// The MAC address that the VMX names.
    pub fn mac(&self) -> Option<[u8; 6]> {
        self.hardware.mac
    }
}

impl Store {
    /// Looks at the VMX `path` and its disks.
    pub fn candidate(&self, path: &str) -> Result<Candidate, RegisterFailed> {
        let given = Path::new(path);
        let is_vmx = given.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("vmx"));
        let name = given.file_name().and_then(OsStr::to_str).filter(|name| is_plain_name(name));
        let (Some(folder), Some(name)) = (given.parent(), name) else {
            return Err(RegisterError::Path(path.chars().take(200).collect()).into());
        };
        if !given.is_absolute() || !is_vmx || path.len() > MAX_PATH || path.contains(char::is_control) {
            return Err(RegisterError::Path(path.chars().take(200).collect()).into());
        }
        let open_failed = |source| RegisterError::Open { path: path.to_owned(), source };
        // The folder's own name is wanted: a link to it may lead elsewhere tomorrow.
        let folder = folder.canonicalize().map_err(open_failed)?;
        let vmx = folder.join(name);
        let bytes = files::read_bounded(&vmx, vmx::MAX_SIZE).map_err(open_failed)?;
        if self.path().canonicalize().is_ok_and(|ours| vmx.starts_with(ours)) {
            return Err(RegisterError::Ours(path.to_owned()).into());
        }
        for dir in self.scan()? {
            if dir.registered().ok().flatten().is_some_and(|record| files::are_same(&record.vmx, &vmx)) {
                return Err(RegisterError::Taken { path: path.to_owned(), id: dir.id().clone() }.into());
            }
        }
        let unusable = |source| StoreError::Vmx { path: path.to_owned(), source };
        let hardware = Hardware::from_vmx(&parse_vmx(&vmx, &bytes)?).map_err(unusable)?;
        let disk_failed = |source| RegisterError::Disk { path: path.to_owned(), source };
        let open = |disk: &hardware::Disk| image::open(&folder, &disk.file).map_err(disk_failed);
        let images = hardware.disks.iter().map(open).collect::<Result<_, _>>()?;
        Ok(Candidate { vmx, hardware, images })
    }

    /// Makes the folder of a VM that stays where it is.
    pub fn register(
        &self,
        id: &VmId,
        candidate: &Candidate,
        record: Registered,
        owner: (u32, u32),
    ) -> Result<VmDir, StoreError> {
        let mut record = Registered { vmx: candidate.vmx.clone(), disks: Vec::new(), ..record };
        self.build(id, |aside| {
            for (disk, image) in candidate.hardware.disks.iter().zip(&candidate.images) {
                record.disks.push(make_overlay(aside, record.disks.len(), &disk.file, image, owner)?);
            }
            aside.write_registered(&record)?;
            // What it says must be possible here.
            record.read(id)?;
            let link = aside.vmx();
            std::os::unix::fs::symlink(&record.vmx, &link).map_err(io_error("make the link", &link))
        })
    }
}

/// Why a VMX cannot be registered, or could not be looked at.
#[derive(Debug, Error)]
pub enum RegisterFailed {
    /// It cannot be.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// It could not be looked at, or is unusable.
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use super::*;

    /// A state folder, and a box beside it.
    fn world() -> (tempfile::TempDir, Store, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("state")).unwrap();
        let boxed = folder.path().join("web1");
        fs::create_dir(&boxed).unwrap();
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"])
            .arg(boxed.join("disk.vmdk"))
            .arg("3G")
            .status()
            .unwrap();
        assert!(made.success());
        let vmx = boxed.join("box.vmx");
        let text = "displayName = \"Box\"\nmemsize = \"256\"\nnumvcpus = \"2\"\nscsi0:0.present = \"TRUE\"\n\
                    scsi0:0.fileName = \"disk.vmdk\"\nethernet0.present = \"TRUE\"\n\
                    ethernet0.generatedAddress = \"00:0c:29:00:00:01\"\n";
        fs::write(&vmx, text).unwrap();
        (folder, store, vmx)
    }

    fn record() -> Registered {
        Registered {
            vmx: PathBuf::new(),
            name: None,
            tags: vec![],
            mac: None,
            address: None,
            ports: vec![],
            autostart: false,
            disks: vec![],
        }
    }

    fn registered(store: &Store, vmx: &Path) -> VmDir {
        let candidate = store.candidate(vmx.to_str().unwrap()).unwrap();
        store.register(&VmId::parse("web1").unwrap(), &candidate, record(), (0, 0)).unwrap()
    }

    #[test]
    fn a_registered_vm_is_what_its_vmx_says_and_stays_where_it_is() {
        let (_folder, store, vmx) = world();
        let before = fs::read(&vmx).unwrap();
        let dir = registered(&store, &vmx);
        assert_eq!(store.scan().unwrap(), std::slice::from_ref(&dir));
        let (text, mut config) = dir.read().unwrap();
        assert_eq!(
            (config.name.as_str(), config.cpus, config.memory_mib, config.disk_gib),
            ("Box", 2, 256, 3)
        );
        assert_eq!(config.hardware.as_ref().unwrap().mac, Some([0, 0x0c, 0x29, 0, 0, 1]));
        config.tags = vec!["vagrant".into()];
        config.address = Some(Ipv4Addr::new(10, 1, 2, 3));
        dir.write(text.clone(), &config).unwrap();
        assert_eq!(fs::read(&vmx).unwrap(), before, "what is ours is not written into it");
        assert_eq!(dir.read().unwrap().1, config);
        config.memory_mib = 512;
        dir.write(text, &config).unwrap();
        assert!(fs::read_to_string(&vmx).unwrap().contains("memsize = \"512\""));
        assert_eq!(dir.read().unwrap().1.memory_mib, 512);
        assert_eq!(fs::read_link(dir.vmx()).unwrap(), vmx.canonicalize().unwrap());
    }

    #[test]
    fn deleting_takes_the_vms_files_and_nothing_else() {
        let (folder, store, vmx) = world();
        let dir = registered(&store, &vmx);
        let boxed = vmx.parent().unwrap();
        for name in ["box.nvram", "vmware.log", "metadata.json"] {
            fs::write(boxed.join(name), "x").unwrap();
        }
        store.delete(&dir).unwrap();
        assert!(!boxed.exists() && store.scan().unwrap().is_empty());
        // Among other files they alone go, and a link goes as a link.
        let (folder_2, store, vmx) = world();
        let dir = registered(&store, &vmx);
        let boxed = vmx.parent().unwrap();
        fs::write(boxed.join("thesis.doc"), "x").unwrap();
        fs::write(folder_2.path().join("precious.vmdk"), "x").unwrap();
        fs::remove_file(boxed.join("disk-s001.vmdk")).unwrap();
        symlink("../precious.vmdk", boxed.join("disk-s001.vmdk")).unwrap();
        fs::write(&vmx, "damaged \x01").unwrap();
        store.delete(&dir).unwrap();
        let left: Vec<_> = fs::read_dir(boxed).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["thesis.doc"]);
        assert!(folder_2.path().join("precious.vmdk").exists());
        drop(folder);
    }

    #[test]
    fn what_cannot_be_registered_is_named_and_leaves_nothing() {
        let (folder, store, vmx) = world();
        let refused = |path: &str| store.candidate(path).unwrap_err().to_string();
        for path in
            ["", "web1/box.vmx", "/etc/passwd", "/", "/..", "a\0b.vmx", "/a\nb.vmx", "\\\\host\\box.vmx"]
        {
            assert!(refused(path).contains("absolute path"), "{path}");
        }
        assert!(refused("/nowhere/box.vmx").contains("Cannot open"));
        let link = folder.path().join("link.vmx");
        symlink(&vmx, &link).unwrap();
        assert!(refused(link.to_str().unwrap()).contains("Cannot open"));
        fs::create_dir(folder.path().join("folder.vmx")).unwrap();
        assert!(refused(folder.path().join("folder.vmx").to_str().unwrap()).contains("Cannot open"));
        let dir = registered(&store, &vmx);
        assert!(refused(vmx.to_str().unwrap()).contains("'web1'"));
        let ours = dir.path().join("other.vmx");
        fs::write(&ours, "").unwrap();
        assert!(refused(ours.to_str().unwrap()).contains("already"));
    }

    #[test]
    fn a_planted_link_registers_nothing_and_a_damaged_record_is_named() {
        let (_folder, store, vmx) = world();
        let planted = store.path().join("evil");
        fs::create_dir(&planted).unwrap();
        symlink(&vmx, planted.join("evil.vmx")).unwrap();
        store.dir(&VmId::parse("evil").unwrap()).read().unwrap_err();
        let dir = registered(&store, &vmx);
        for bad in ["", "{", "{\"vmx\":\"box.vmx\",\"disks\":[]}"] {
            fs::write(dir.registered_file(), bad).unwrap();
            assert!(dir.read().unwrap_err().to_string().contains("registered.json"), "{bad}");
        }
        // It can be deleted; what it stood for is not known any more, and stays.
        store.delete(&dir).unwrap();
        assert!(vmx.exists() && !dir.path().exists());
    }
}
