//! Images that a user makes: out of a VM, or out of a disk of others.
//!
//! Such an image is built aside and takes its place by one rename. It lies below the store, root's as all of that, in a folder
//! that nobody else may enter: it holds what its user had on a disk.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::digest::sha256_file;
use crate::manifest::{
    DISK_FILE, FileEntry, INITRD_FILE, KERNEL_FILE, MANIFEST_FILE, MANIFEST_FORMAT, Machine, Manifest,
    Package,
};
use crate::recipe;
use crate::store::{CURRENT_LINK, Image, ImageError, ImageStore, check_name, io_error};

/// Images that are being made start with this, and the number of the process that does.
const NEW: &str = ".new-";
/// How many this process has begun.
static COUNT: AtomicU32 = AtomicU32::new(0);
/// The only version's folder while it is made.
const VERSION: &str = "version";

/// An image that is being made; dropped unfinished, it leaves nothing.
#[derive(Debug)]
pub struct NewTemplate {
    store: ImageStore,
    name: String,
    /// What takes its place.
    target: PathBuf,
    aside: PathBuf,
}

/// What an image is made from.
#[derive(Debug)]
pub enum Origin<'a> {
    /// A VM of that image, which it is told by.
    Vm(&'a Image, String),
    /// A disk of others, with a loader for that machine.
    Disk(Machine, String),
}

impl ImageStore {
    /// Begins an image of the user's own.
    pub fn begin_template(&self, name: &str) -> Result<NewTemplate, ImageError> {
        check_name(name)?;
        let own = self.own().ok_or_else(|| ImageError::BadName(name.to_owned()))?;
        let exists = || ImageError::Exists(name.to_owned());
        if [recipe::NAME, recipe::MICRO].contains(&name) || self.root().join(name).exists() {
            return Err(exists());
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(own)
            .map_err(|error| io_error("make", own, error))?;
        sweep(own);
        let target = own.join(name);
        if target.join(CURRENT_LINK).symlink_metadata().is_ok() {
            return Err(exists());
        }
        // What a deletion left that was cut short.
        match fs::remove_dir_all(&target) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("remove", &target, error));
            }
            _ => {}
        }
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let aside = own.join(format!("{NEW}{}-{number}", std::process::id()));
        let new = NewTemplate { store: self.clone(), name: name.to_owned(), target, aside };
        let _ = fs::remove_dir_all(&new.aside);
        let folder = new.folder();
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&folder)
            .map_err(|error| io_error("make", &folder, error))?;
        Ok(new)
    }
}

/// Takes away what processes left that were killed.
fn sweep(own: &Path) {
    for entry in fs::read_dir(own).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid =
            name.strip_prefix(NEW).and_then(|rest| rest.split('-').next()).and_then(|pid| pid.parse().ok());
        if pid.is_some_and(|pid: u32| !Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

impl NewTemplate {
    /// The folder in which it is made.
    pub fn folder(&self) -> PathBuf {
        self.aside.join(VERSION)
    }

    /// Where its disk goes.
    pub fn disk(&self) -> PathBuf {
        self.folder().join(DISK_FILE)
    }

    /// Puts it into its place. Its disk is there.
    pub fn finish(self, origin: &Origin<'_>) -> Result<Image, ImageError> {
        let folder = self.folder();
        let mut manifest = match origin {
            Origin::Vm(base, vm) => {
                for (from, name) in [(&base.vmlinux, KERNEL_FILE), (&base.initrd, INITRD_FILE)] {
                    let to = folder.join(name);
                    fs::hard_link(from, &to).map_err(|error| io_error("make", &to, error))?;
                }
                Manifest { made_from: Some(vm.clone()), ..base.manifest.clone() }
            }
            Origin::Disk(machine, file) => foreign(*machine, file),
        };
        manifest.files.retain(|name, _| [KERNEL_FILE, INITRD_FILE].contains(&name.as_str()));
        let entry = entry(&self.disk())?;
        let version = recipe::version(&entry.sha256).to_owned();
        manifest.name.clone_from(&self.name);
        manifest.recipe_key.clone_from(&entry.sha256);
        manifest.version.clone_from(&version);
        manifest.created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        manifest.files.insert(DISK_FILE.to_owned(), entry);
        let path = folder.join(MANIFEST_FILE);
        let placed = serde_json::to_vec_pretty(&manifest)
            .map_err(io::Error::from)
            .and_then(|text| fs::write(&path, text))
            .and_then(|()| File::open(&path)?.sync_all())
            .and_then(|()| fs::rename(&folder, self.aside.join(&version)))
            .and_then(|()| symlink(&version, self.aside.join(CURRENT_LINK)))
            .and_then(|()| fs::rename(&self.aside, &self.target));
        placed.map_err(|error| match error.kind() {
            // Another one was quicker.
            io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => {
                ImageError::Exists(self.name.clone())
            }
            _ => io_error("put into place", &self.target, error),
        })?;
        self.store.current(&self.name)
    }
}

impl Drop for NewTemplate {
    fn drop(&mut self) {
        // Where it has taken its place, nothing is left here.
        let _ = fs::remove_dir_all(&self.aside);
    }
}

fn entry(path: &Path) -> Result<FileEntry, ImageError> {
    let failed = |error| io_error("read", path, error);
    fs::set_permissions(path, Permissions::from_mode(0o644)).map_err(failed)?;
    File::open(path).and_then(|file| file.sync_all()).map_err(failed)?;
    let sha256 = sha256_file(path, true, |_| {}).map_err(failed)?;
    let about = fs::metadata(path).map_err(failed)?;
    let mtime_ns = crate::store::mtime_ns(&about);
    Ok(FileEntry { size: about.len(), allocated: about.blocks() * 512, mtime_ns, sha256, sparse: true })
}

fn foreign(machine: Machine, file: &str) -> Manifest {
    Manifest {
        format: MANIFEST_FORMAT,
        name: String::new(),
        version: String::new(),
        recipe_key: String::new(),
        created: 0,
        build_command: Vec::new(),
        suite: String::new(),
        sources: Vec::new(),
        kernel: String::new(),
        kernel_package: Package { name: String::new(), version: String::new() },
        kernel_hz: 0,
        command_line: String::new(),
        command_line_software_cpu: String::new(),
        made_from: Some(file.to_owned()),
        machine: Some(machine),
        diskless: false,
        files: std::collections::BTreeMap::new(),
        packages: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(store: &ImageStore, name: &str) -> Result<Image, ImageError> {
        let new = store.begin_template(name)?;
        fs::write(new.disk(), name).unwrap();
        new.finish(&Origin::Disk(Machine::Efi, "disk.qcow2".to_owned()))
    }

    #[test]
    fn a_users_images_are_that_users_alone_and_several_lie_side_by_side() {
        let folder = tempfile::tempdir().unwrap();
        let store = ImageStore::open(folder.path()).with_own(7);
        assert!(store.list().unwrap().is_empty());
        let image = made(&store, "base").unwrap();
        assert_eq!((image.manifest.machine, image.version.len()), (Some(Machine::Efi), 12));
        made(&store, "other").unwrap();
        let names =
            |store: &ImageStore| store.list().unwrap().into_iter().map(|one| one.name).collect::<Vec<_>>();
        assert_eq!(names(&store), ["base", "other"]);
        assert!(names(&ImageStore::open(folder.path()).with_own(8)).is_empty());
        let mode = folder.path().join(".of-7").metadata().unwrap().mode();
        assert_eq!(mode & 0o777, 0o700);
        assert!(matches!(made(&store, "base"), Err(ImageError::Exists(_))));
        for bundled in ["lumen", "micro"] {
            assert!(matches!(made(&store, bundled), Err(ImageError::Exists(_))));
        }
        for bad in ["", "..", "a/b", "A", ".of-8"] {
            assert!(matches!(store.begin_template(bad), Err(ImageError::BadName(_))), "{bad}");
        }
        store.remove("base", &[]).unwrap();
        assert_eq!(names(&store), ["other"]);
        made(&store, "base").unwrap();
    }

    #[test]
    fn one_that_is_given_up_or_was_cut_short_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let store = ImageStore::open(folder.path()).with_own(7);
        drop(store.begin_template("base").unwrap());
        let own = folder.path().join(".of-7");
        assert_eq!(fs::read_dir(&own).unwrap().count(), 0);
        // No process has this number (proc_sys_kernel(5), pid_max).
        fs::create_dir(own.join(".new-4194305-old")).unwrap();
        made(&store, "base").unwrap();
        assert_eq!(fs::read_dir(&own).unwrap().count(), 1);
    }
}
