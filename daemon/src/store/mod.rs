//! The VMs on disk: one folder each, named like the VM (design decision 3).
//!
//! A new folder is built aside (`.new-…`) and renamed in; a deleted one is renamed aside
//! (`.gone-…`) and removed. What a crash leaves of either is swept at the next start.

pub mod began;
pub mod chain;
pub mod config;
pub mod container;
pub mod disk;
pub mod files;
pub mod flatten;
pub mod folders;
pub mod foreign;
pub mod id;
pub mod identity;
pub mod layers;
pub mod logs;
pub mod set_up;
pub mod snapshots;
pub mod sparse;
pub mod vmx;

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use thiserror::Error;

pub use began::Began;
pub use chain::Chain;
pub use config::{ConfigError, VmConfig};
pub use id::{IdError, VmId};
pub use snapshots::Snapshot;
pub use vmx::Vmx;

/// Folders that are being built start with this.
const NEW: &str = ".new-";
/// Folders that are being removed start with this.
const GONE: &str = ".gone-";
/// Folders of VMs that become warm states.
const WARMING: &str = ".warming-";

/// Why something in the store could not be done.
#[derive(Debug, Error)]
pub enum StoreError {
    /// A file or folder could not be read or written.
    #[error("Cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The VMX is unusable.
    #[error("The VM's file {path} is unusable; mend that line or restore the file")]
    Vmx {
        /// The file.
        path: String,
        /// What is wrong.
        #[source]
        source: ConfigError,
    },
    /// VMs are to lie elsewhere than they do.
    #[error("There are VMs in {from}; move them to {to}, or take that setting away")]
    Elsewhere {
        /// Where they are.
        from: String,
        /// Where they are to be.
        to: String,
    },
    /// A VM of this id is there already.
    #[error("A VM '{0}' exists already; choose another id or delete it: catalyst vm delete {0}")]
    Exists(VmId),
    /// The disk could not be made.
    #[error(transparent)]
    Disk(#[from] disk::DiskError),
}

impl StoreError {
    /// A file of a VM could not be written.
    pub fn write(path: PathBuf) -> impl FnOnce(io::Error) -> Self {
        move |source| io_error("write", &path)(source)
    }
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.display().to_string();
    move |source| StoreError::Io { what, path, source }
}

/// What stands in a file of JSON of at most `most` bytes, if it is there.
fn read_json<T: DeserializeOwned>(path: &Path, most: usize) -> Result<Option<T>, StoreError> {
    match files::read_bounded(path, most) {
        Ok(bytes) => {
            serde_json::from_slice(&bytes).map_err(|error| io_error("understand", path)(error.into()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error("read", path)(error)),
    }
}

/// Reads a VMX.
fn read_vmx(path: &Path) -> Result<Vmx, StoreError> {
    let bytes = files::read_bounded(path, vmx::MAX_SIZE).map_err(io_error("read the VM's file", path))?;
    parse_vmx(path, &bytes)
}

/// What was read from the VMX at `path`.
fn parse_vmx(path: &Path, bytes: &[u8]) -> Result<Vmx, StoreError> {
    let unusable =
        |error: vmx::VmxError| StoreError::Vmx { path: path.display().to_string(), source: error.into() };
    Vmx::parse(bytes).map_err(unusable)
}

/// The folder of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmDir {
    id: VmId,
    path: PathBuf,
}

impl VmDir {
    /// The VM.
    pub fn id(&self) -> &VmId {
        &self.id
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `<id>.vmx`.
    pub fn vmx(&self) -> PathBuf {
        self.path.join(format!("{}.vmx", self.id))
    }

    /// The disk, a qcow2 overlay on the template's.
    pub fn disk(&self) -> PathBuf {
        self.path.join("disk.qcow2")
    }

    /// Machine-id and host keys.
    pub fn identity(&self) -> PathBuf {
        self.path.join("identity.json")
    }

    /// What the guest wrote to its serial console.
    pub fn console_log(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// What the VM process wrote.
    pub fn engine_log(&self) -> PathBuf {
        self.path.join("vm.log")
    }

    /// Why the VM is off, kept for the next daemon.
    pub fn reason(&self) -> PathBuf {
        self.path.join("reason")
    }

    /// The machine as it was when it was suspended; there while it is.
    pub fn suspended(&self) -> PathBuf {
        self.path.join("suspended")
    }

    /// Gives the machine that is suspended up, if there is one: at once and for good.
    pub fn forget_suspended(&self) -> Result<(), StoreError> {
        let gone = self.path.join(".forgotten");
        let _ = fs::remove_dir_all(&gone);
        match fs::rename(self.suspended(), &gone) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            renamed => renamed.map_err(StoreError::write(self.suspended()))?,
        }
        files::sync_folder(&self.path).map_err(StoreError::write(self.suspended()))?;
        // Whoever goes on from it has it open.
        if let Err(error) = fs::remove_dir_all(&gone) {
            tracing::warn!(path = %gone.display(), %error, "a saved machine that was given up stays on disk");
        }
        Ok(())
    }

    /// There while it is not known which of two files the VM process writes its disk to.
    pub fn switching(&self) -> PathBuf {
        self.path.join("switching")
    }

    /// There while the daemon has the VM stand to save it, and lets it go on after.
    pub fn standing(&self) -> PathBuf {
        self.path.join("standing")
    }

    /// Notes that the VM is to go on, should the daemon that has it stand end.
    pub fn note_standing(&self) -> Result<(), StoreError> {
        files::write_atomically(&self.standing(), b"", 0o600).map_err(StoreError::write(self.standing()))
    }

    /// Takes that note away.
    pub fn forget_standing(&self) {
        if let Err(error) = files::remove_file(&self.standing()) {
            tracing::warn!(path = %self.standing().display(), %error, "a note stays");
        }
    }

    /// There while the guest is a copy of another and does not yet know who it is.
    pub fn unnamed(&self) -> PathBuf {
        self.path.join("unnamed")
    }

    /// Lock and pid of the VM process; sockets stand beside it.
    pub fn run(&self) -> PathBuf {
        self.path.join("run")
    }

    /// Reads the VMX and what it says.
    pub fn read(&self) -> Result<(Vmx, VmConfig), StoreError> {
        if let Some(record) = self.registered()? {
            return record.read(&self.id);
        }
        let path = self.vmx();
        let vmx = read_vmx(&path)?;
        let unusable = |source| StoreError::Vmx { path: path.display().to_string(), source };
        let config = VmConfig::from_vmx(&vmx, &self.id).map_err(unusable)?;
        Ok((vmx, config))
    }

    /// Writes the VMX with `config` in it. One that was registered is written only if it says something else, and what
    /// is ours alone is kept beside it.
    pub fn write(&self, mut vmx: Vmx, config: &VmConfig) -> Result<(), StoreError> {
        let path = match self.registered()? {
            None => {
                config.write_to(&mut vmx);
                self.vmx()
            }
            Some(record) => {
                self.write_registered(&config.kept(&vmx, &self.id, record.clone()))?;
                if !config.write_size(&mut vmx) {
                    return Ok(());
                }
                record.vmx
            }
        };
        files::write_atomically(&path, vmx.to_text().as_bytes(), 0o644)
            .map_err(io_error("write the VM's file", &path))
    }
}

/// A folder that goes when it is dropped, or at the daemon's next start.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// It.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// All VMs of one state folder.
#[derive(Clone, Debug)]
pub struct Store {
    vms: PathBuf,
}

impl Store {
    /// Lets the VMs of `state_dir` lie in `vm_dir`: `vms` becomes a link to it, so that who knows the state folder finds
    /// them.
    pub fn lie_in(state_dir: &Path, vm_dir: &Path) -> Result<(), StoreError> {
        let link = state_dir.join("vms");
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(vm_dir).map_err(io_error("make the folder", vm_dir))?;
        if files::are_same(&link, vm_dir) {
            return Ok(());
        }
        let is_folder = link.symlink_metadata().is_ok_and(|about| about.is_dir());
        if is_folder && fs::remove_dir(&link).is_err() {
            let (from, to) = (link.display().to_string(), vm_dir.display().to_string());
            return Err(StoreError::Elsewhere { from, to });
        }
        let aside = state_dir.join(format!(".vms-{}", std::process::id()));
        let linked = std::os::unix::fs::symlink(vm_dir, &aside).and_then(|()| fs::rename(&aside, &link));
        linked.map_err(io_error("make the link", &link))
    }

    /// Opens `<state_dir>/vms`, makes it if need be, and sweeps what a crash left.
    pub fn open(state_dir: &Path) -> Result<Self, StoreError> {
        let vms = state_dir.join("vms");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&vms)
            .map_err(io_error("make the folder", &vms))?;
        let linked = vms.symlink_metadata().is_ok_and(|about| about.is_symlink());
        let vms = if linked { vms.canonicalize().map_err(io_error("read the folder", &vms))? } else { vms };
        let store = Self { vms };
        for path in store.entries()? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with(NEW) || name.starts_with(GONE) {
                fs::remove_dir_all(&path).map_err(io_error("remove the leftover", &path))?;
            }
        }
        Ok(store)
    }

    /// The store of another daemon, to look into: nothing is made or swept.
    pub fn open_existing(state_dir: &Path) -> Self {
        Self { vms: state_dir.join("vms") }
    }

    /// The folder in which VMs lie.
    pub fn path(&self) -> &Path {
        &self.vms
    }

    /// The folder a VM has or would have.
    pub fn dir(&self, id: &VmId) -> VmDir {
        VmDir { id: id.clone(), path: self.vms.join(id.as_str()) }
    }

    /// All VMs there are. Folders without a VMX of their name are none.
    pub fn scan(&self) -> Result<Vec<VmDir>, StoreError> {
        let mut dirs: Vec<VmDir> = self
            .entries()?
            .into_iter()
            .filter_map(|path| VmId::parse(path.file_name()?.to_str()?).ok())
            .map(|id| self.dir(&id))
            .filter(|dir| dir.vmx().symlink_metadata().is_ok())
            .collect();
        dirs.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(dirs)
    }

    /// Makes the folder of a VM: `fill` puts the disk into a folder aside, which then takes its place.
    pub fn create(
        &self,
        id: &VmId,
        config: &VmConfig,
        fill: impl FnOnce(&VmDir) -> Result<(), StoreError>,
    ) -> Result<VmDir, StoreError> {
        self.build(id, |aside| {
            fill(aside)?;
            let mut vmx = Vmx::default();
            vmx.set(".encoding", "UTF-8");
            vmx.set("config.version", "8");
            vmx.set("guestos", "debian12-64");
            vmx.set("ethernet0.present", "TRUE");
            vmx.set("ethernet0.addresstype", "static");
            config.write_to(&mut vmx);
            let path = aside.vmx();
            files::write_new(&path, vmx.to_text().as_bytes(), 0o644).map_err(io_error("write", &path))
        })
    }

    /// Makes a VM's folder: `fill` puts everything into a folder aside, which then takes its place.
    fn build(
        &self,
        id: &VmId,
        fill: impl FnOnce(&VmDir) -> Result<(), StoreError>,
    ) -> Result<VmDir, StoreError> {
        let dir = self.dir(id);
        let aside = VmDir { id: id.clone(), path: self.aside(NEW) };
        let build = || {
            fs::DirBuilder::new()
                .mode(0o700)
                .create(&aside.path)
                .map_err(io_error("make the folder", &aside.path))?;
            fill(&aside)?;
            if dir.path.symlink_metadata().is_ok() {
                return Err(StoreError::Exists(id.clone()));
            }
            fs::rename(&aside.path, &dir.path).map_err(io_error("make the folder", &dir.path))?;
            files::sync_folder(&self.vms).map_err(io_error("sync", &self.vms))
        };
        build().map(|()| dir.clone()).inspect_err(|_| {
            let _ = fs::remove_dir_all(&aside.path);
        })
    }

    /// Makes a folder for something that is passed on.
    pub fn scratch(&self) -> Result<Scratch, StoreError> {
        let path = self.aside(NEW);
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(io_error("make the folder", &path))?;
        Ok(Scratch(path))
    }

    /// Makes a folder for a VM that becomes a warm state.
    pub fn make_warming(&self) -> Result<VmDir, StoreError> {
        let path = self.aside(WARMING);
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(io_error("make the folder", &path))?;
        Self::warming_dir(path)
    }

    /// The folders of VMs that were becoming warm states.
    pub fn warming(&self) -> Result<Vec<VmDir>, StoreError> {
        let is_warming = |path: &PathBuf| {
            path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(WARMING))
        };
        self.entries()?.into_iter().filter(is_warming).map(Self::warming_dir).collect()
    }

    fn warming_dir(path: PathBuf) -> Result<VmDir, StoreError> {
        let no_name = |error: IdError| io_error("name the VM in", &path)(io::Error::other(error.to_string()));
        let id = VmId::parse("warming").map_err(no_name)?;
        Ok(VmDir { id, path })
    }

    /// Removes a VM's folder, and what was registered in place with its files. Where that fails, the VM stays.
    pub fn delete(&self, dir: &VmDir) -> Result<(), StoreError> {
        match dir.registered() {
            Err(error) => tracing::warn!(vm = %dir.id, %error, "what was registered in place stays"),
            Ok(record) => record.iter().try_for_each(|record| dir.delete_registered(record))?,
        }
        let gone = self.aside(GONE);
        fs::rename(&dir.path, &gone).map_err(io_error("remove the folder", &dir.path))?;
        files::sync_folder(&self.vms).map_err(io_error("sync", &self.vms))?;
        fs::remove_dir_all(&gone).map_err(io_error("remove the folder", &gone))
    }

    fn aside(&self, prefix: &str) -> PathBuf {
        self.vms.join(format!("{prefix}{}", uuid::Uuid::new_v4().simple()))
    }

    fn entries(&self) -> Result<Vec<PathBuf>, StoreError> {
        fs::read_dir(&self.vms)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
            .map_err(io_error("read the folder", &self.vms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig::from_vmx(&Vmx::default(), &VmId::parse("a").unwrap()).unwrap()
    }

    #[test]
    fn a_vm_is_a_folder_that_comes_and_goes_whole() {
        let state = tempfile::tempdir().unwrap();
        let store = Store::open(state.path()).unwrap();
        let id = VmId::parse("web1").unwrap();
        let dir = store.create(&id, &config(), |_| Ok(())).unwrap();
        assert_eq!(dir.vmx(), state.path().join("vms/web1/web1.vmx"));
        assert_eq!(store.scan().unwrap(), std::slice::from_ref(&dir));
        assert!(matches!(store.create(&id, &config(), |_| Ok(())), Err(StoreError::Exists(_))));
        store.delete(&dir).unwrap();
        assert_eq!(fs::read_dir(store.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_create_that_fails_or_is_cut_short_leaves_nothing() {
        let state = tempfile::tempdir().unwrap();
        let store = Store::open(state.path()).unwrap();
        let id = VmId::parse("web1").unwrap();
        let failed = store.create(&id, &config(), |_| Err(disk::DiskError::Missing("x".into()).into()));
        assert!(failed.is_err());
        fs::create_dir(store.path().join(".new-123")).unwrap();
        fs::create_dir_all(store.path().join(".gone-123/deep")).unwrap();
        let store = Store::open(state.path()).unwrap();
        assert_eq!(fs::read_dir(store.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_moved_folder_is_found_and_a_foreign_one_is_not() {
        let state = tempfile::tempdir().unwrap();
        let store = Store::open(state.path()).unwrap();
        fs::create_dir_all(store.path().join("moved")).unwrap();
        fs::write(store.path().join("moved/moved.vmx"), "memsize = \"512\"\n").unwrap();
        fs::create_dir_all(store.path().join("other")).unwrap();
        let found = store.scan().unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].read().unwrap().1.memory_mib, 512);
    }

    #[test]
    fn vms_lie_where_they_are_to_and_are_not_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let (state, elsewhere) = (folder.path().join("state"), folder.path().join("deep/VMs"));
        Store::open(&state).unwrap();
        Store::lie_in(&state, &elsewhere).unwrap();
        let store = Store::open(&state).unwrap();
        let dir = store.create(&VmId::parse("web1").unwrap(), &config(), |_| Ok(())).unwrap();
        assert_eq!(dir.vmx(), elsewhere.join("web1/web1.vmx"));
        assert_eq!(Store::open_existing(&state).scan().unwrap().len(), 1);
        let third = folder.path().join("third");
        Store::lie_in(&state, &third).unwrap();
        assert!(Store::open(&state).unwrap().scan().unwrap().is_empty());
        Store::lie_in(&state, &elsewhere).unwrap();
        assert_eq!(Store::open(&state).unwrap().scan().unwrap().len(), 1);
        let other = folder.path().join("other");
        Store::open(&other).unwrap().create(&VmId::parse("a").unwrap(), &config(), |_| Ok(())).unwrap();
        let error = Store::lie_in(&other, &third).unwrap_err();
        assert!(matches!(error, StoreError::Elsewhere { .. }), "{error}");
    }

    #[test]
    fn a_damaged_vmx_is_named_with_its_path() {
        let state = tempfile::tempdir().unwrap();
        let store = Store::open(state.path()).unwrap();
        let dir = store.create(&VmId::parse("web1").unwrap(), &config(), |_| Ok(())).unwrap();
        fs::write(dir.vmx(), "memsize = \"lots\"\n").unwrap();
        let error = dir.read().unwrap_err();
        assert!(error.to_string().contains("web1.vmx"), "{error}");
    }
}
