//! The store of built images: `<store>/<name>/<version>/` with a link `<store>/<name>/current`.
//!
//! A version appears in the store by one rename when it is complete and on disk, and never changes afterwards:
//! the disks of VMs are overlays on it. Builds go on in `<store>/<name>/.build-<version>/`.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::digest::sha256_file;
use crate::manifest::{DISK_FILE, FileEntry, INITRD_FILE, KERNEL_FILE, Manifest, ManifestError};

/// Prefix of the folder in which a version is built.
pub const BUILD_PREFIX: &str = ".build-";
/// Prefix of the folder that a version becomes before its files are deleted.
const REMOVE_PREFIX: &str = ".remove-";
/// Link to the version that new VMs get.
pub const CURRENT_LINK: &str = "current";
/// File that `verify` leaves in a damaged version; it holds the reason.
const DAMAGE_FILE: &str = "damaged";
/// What the folder of a user's own images is called before the user's number.
const OWN_PREFIX: &str = ".of-";
/// Longest name or version that is accepted.
const MAX_NAME: usize = 64;

/// Why an image cannot be had or changed. Every message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// There is no such image.
    #[error("there is no image '{name}' in {store}: build it with 'catalyst image build'", store = .store.display())]
    Missing {
        /// The image asked for.
        name: String,
        /// The store's folder.
        store: PathBuf,
    },
    /// There is no such version of the image.
    #[error("image '{name}' has no version '{version}' in {store}: 'catalyst image list' shows what there is", store = .store.display())]
    MissingVersion {
        /// The image asked for.
        name: String,
        /// The version asked for.
        version: String,
        /// The store's folder.
        store: PathBuf,
    },
    /// Its build was begun and not ended.
    #[error("image '{name}' is only half built: 'catalyst image build' goes on where it was interrupted")]
    Incomplete {
        /// The image.
        name: String,
    },
    /// Its files are not those that were built.
    #[error(
        "image '{name}' version {version} is damaged ({reason}): build it again with 'catalyst image build'"
    )]
    Damaged {
        /// The image.
        name: String,
        /// Its version.
        version: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A name that no image can have.
    #[error(
        "'{0}' is no name of an image: use 1 to {MAX_NAME} of a-z, 0-9, '-' and '.', beginning with a letter or digit"
    )]
    BadName(String),
    /// There is one of that name.
    #[error(
        "there is a template '{0}' already: choose another name, or delete it with 'catalyst template delete {0}'"
    )]
    Exists(String),
    /// A file of the store cannot be read or changed.
    #[error("cannot {action} {path}", path = .path.display())]
    Io {
        /// What was tried (`read`, `remove`, …).
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// State of a version in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", content = "reason", rename_all = "lowercase")]
pub enum ImageState {
    /// Complete and as it was built.
    Ok,
    /// Its files are not those that were built; the reason.
    Damaged(String),
    /// Its build was begun and not ended.
    Incomplete,
}

/// One line of the list of images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// Name of the image (`lumen`).
    pub name: String,
    /// Its version.
    pub version: String,
    /// Whether new VMs get this version.
    pub current: bool,
    /// Complete, damaged or half built.
    #[serde(flatten)]
    pub state: ImageState,
    /// Size of the disk as a VM sees it, in bytes; 0 if unknown.
    pub size_virtual: u64,
    /// Bytes that all files of the version take on disk.
    pub allocated: u64,
    /// Release of the kernel; empty if unknown.
    pub kernel: String,
    /// Debian release; empty if unknown.
    pub suite: String,
    /// When it was built, in seconds since 1970; 0 if unknown.
    pub created: u64,
    /// Number of Debian packages in it.
    pub packages: usize,
}

/// A complete version: what a VM is started from.
#[derive(Debug, Clone)]
pub struct Image {
    /// Name of the image (`lumen`).
    pub name: String,
    /// Its version.
    pub version: String,
    /// Its folder.
    pub dir: PathBuf,
    /// The root disk: raw, ext4 without a partition table, never to be written. A diskless image has none there.
    pub disk: PathBuf,
    /// The kernel: an ELF file with a PVH entry point.
    pub vmlinux: PathBuf,
    /// The initial RAM disk.
    pub initrd: PathBuf,
    /// What it consists of.
    pub manifest: Manifest,
}

impl Image {
    /// The kernel's command line for this image: what its manifest recommends, then `extra`, in order (where the
    /// kernel knows an argument only once, the last one counts).
    pub fn kernel_command_line(&self, extra: &[&str]) -> String {
        let mut line = self.manifest.command_line.clone();
        for argument in extra.iter().filter(|argument| !argument.is_empty()) {
            line.push(' ');
            line.push_str(argument);
        }
        line
    }
}

/// How far [`ImageStore::verify`] is: `done` of `total` bytes, in the file `file`.
#[derive(Debug, Clone, Copy)]
pub struct VerifyProgress<'a> {
    /// Name of the file that is read.
    pub file: &'a str,
    /// Bytes covered so far, of all files.
    pub done: u64,
    /// Bytes to cover, of all files, holes included.
    pub total: u64,
}

/// What [`ImageStore::remove`] did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removal {
    /// Versions that are gone, half-built ones included.
    pub removed: Vec<String>,
    /// Versions that stay because something uses them.
    pub in_use: Vec<String>,
}

/// The folder that holds all images.
#[derive(Debug, Clone)]
pub struct ImageStore {
    root: PathBuf,
    /// The folder of one user's own images.
    own: Option<PathBuf>,
}

impl ImageStore {
    /// The store in the folder `root`, which need not exist yet.
    pub fn open(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), own: None }
    }

    /// The same with the own images of the user `uid`, which nobody else sees.
    #[must_use]
    pub fn with_own(self, uid: u32) -> Self {
        let own = self.root.join(format!("{OWN_PREFIX}{uid}"));
        Self { own: Some(own), ..self }
    }

    pub(crate) fn own(&self) -> Option<&Path> {
        self.own.as_deref()
    }

    /// Whether the image `name` is a user's own.
    pub fn is_own(&self, name: &str) -> bool {
        check_name(name).is_ok() && self.own.as_ref().is_some_and(|own| own.join(name).is_dir())
    }

    /// The store's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether `name` may name an image.
    pub fn check_name(&self, name: &str) -> Result<(), ImageError> {
        check_name(name)
    }

    /// The folder of the image `name`.
    pub fn image_dir(&self, name: &str) -> PathBuf {
        let own = self.own.as_ref().map(|own| own.join(name)).filter(|own| own.is_dir());
        own.unwrap_or_else(|| self.root.join(name))
    }

    /// All versions of all images, half-built and damaged ones too, by name, the newest first.
    pub fn list(&self) -> Result<Vec<ImageInfo>, ImageError> {
        let mut infos = Vec::new();
        let mut names = folder_names(&self.root)?;
        if let Some(own) = &self.own {
            names.extend(folder_names(own)?);
        }
        names.sort();
        names.dedup();
        for name in names {
            if check_name(&name).is_err() {
                continue;
            }
            let current = self.current_version(&name);
            for entry in folder_names(&self.image_dir(&name))? {
                if entry.starts_with(REMOVE_PREFIX) {
                    continue;
                }
                infos.push(self.info(&name, &entry, current.as_deref())?);
            }
        }
        infos.sort_by(|a, b| (&a.name, b.created, &a.version).cmp(&(&b.name, a.created, &b.version)));
        Ok(infos)
    }

    /// The version of the image `name` that new VMs get, complete and undamaged as far as sizes and times show.
    /// Reads one small file; meant to be called at every start of a VM.
    pub fn current(&self, name: &str) -> Result<Image, ImageError> {
        check_name(name)?;
        match self.current_version(name) {
            Some(version) => self.version(name, &version),
            None if self.half_built(name) => Err(ImageError::Incomplete { name: name.to_owned() }),
            None => Err(ImageError::Missing { name: name.to_owned(), store: self.root.clone() }),
        }
    }

    /// One version of the image `name`, under the same conditions as [`Self::current`].
    pub fn version(&self, name: &str, version: &str) -> Result<Image, ImageError> {
        check_name(name)?;
        check_name(version)?;
        let dir = self.image_dir(name).join(version);
        let damaged = |reason: String| ImageError::Damaged {
            name: name.to_owned(),
            version: version.to_owned(),
            reason,
        };
        if !dir.is_dir() {
            let (name, version) = (name.to_owned(), version.to_owned());
            return Err(ImageError::MissingVersion { name, version, store: self.root.clone() });
        }
        let manifest = Manifest::read(&dir).map_err(|error| damaged(with_cause(&error)))?;
        if let Some(reason) = damage(&dir, &manifest) {
            return Err(damaged(reason));
        }
        Ok(Image {
            name: name.to_owned(),
            version: version.to_owned(),
            disk: dir.join(DISK_FILE),
            vmlinux: dir.join(KERNEL_FILE),
            initrd: dir.join(INITRD_FILE),
            dir,
            manifest,
        })
    }

    /// Reads every file of a version (the current one if `version` is `None`) and compares digests. A damaged
    /// version is marked, so that no VM is started from it any more; one that is well loses such a mark.
    /// Marking needs write access to the store.
    pub fn verify(
        &self,
        name: &str,
        version: Option<&str>,
        mut progress: impl FnMut(VerifyProgress<'_>),
    ) -> Result<ImageState, ImageError> {
        check_name(name)?;
        let current = self.current_version(name);
        let Some(version) = version.or(current.as_deref()) else {
            return Ok(self.current(name).map_or(ImageState::Incomplete, |_| ImageState::Ok));
        };
        check_name(version)?;
        let dir = self.image_dir(name).join(version);
        if !dir.is_dir() {
            let (name, version) = (name.to_owned(), version.to_owned());
            return Err(ImageError::MissingVersion { name, version, store: self.root.clone() });
        }
        let mark = dir.join(DAMAGE_FILE);
        let reason = match Manifest::read(&dir) {
            Ok(manifest) => differing_file(&dir, &manifest, &mut progress)?,
            Err(error) => Some(with_cause(&error)),
        };
        if let Some(reason) = reason {
            fs::write(&mark, &reason).map_err(|source| io_error("mark as damaged", &mark, source))?;
            return Ok(ImageState::Damaged(reason));
        }
        match fs::remove_file(&mark) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &mark, error)),
            _ => Ok(ImageState::Ok),
        }
    }

    /// Removes all versions of the image `name`, half-built ones too, but those of `in_use`.
    pub fn remove(&self, name: &str, in_use: &[&str]) -> Result<Removal, ImageError> {
        check_name(name)?;
        let dir = self.image_dir(name);
        let current = self.current_version(name);
        let mut removal = Removal { removed: Vec::new(), in_use: Vec::new() };
        let entries = folder_names(&dir)?;
        if entries.is_empty() {
            return Err(ImageError::Missing { name: name.to_owned(), store: self.root.clone() });
        }
        for entry in entries {
            if in_use.contains(&entry.as_str()) {
                removal.in_use.push(entry);
                continue;
            }
            if current.as_deref() == Some(&entry) {
                let link = dir.join(CURRENT_LINK);
                fs::remove_file(&link).map_err(|source| io_error("remove", &link, source))?;
            }
            remove_folder(&dir, &entry)?;
            if !entry.starts_with(REMOVE_PREFIX) {
                removal.removed.push(entry.trim_start_matches(BUILD_PREFIX).to_owned());
            }
        }
        Ok(removal)
    }

    /// What the link `current` names, if that is a plain version name.
    pub(crate) fn current_version(&self, name: &str) -> Option<String> {
        let target = fs::read_link(self.image_dir(name).join(CURRENT_LINK)).ok()?;
        let version = target.to_str()?;
        check_name(version).is_ok().then(|| version.to_owned())
    }

    fn half_built(&self, name: &str) -> bool {
        folder_names(&self.image_dir(name))
            .is_ok_and(|names| names.iter().any(|entry| entry.starts_with(BUILD_PREFIX)))
    }

    fn info(&self, name: &str, entry: &str, current: Option<&str>) -> Result<ImageInfo, ImageError> {
        let dir = self.image_dir(name).join(entry);
        let version = entry.trim_start_matches(BUILD_PREFIX);
        let mut info = ImageInfo {
            name: name.to_owned(),
            version: version.to_owned(),
            current: current == Some(entry),
            state: ImageState::Incomplete,
            size_virtual: 0,
            allocated: allocated(&dir)?,
            kernel: String::new(),
            suite: String::new(),
            created: 0,
            packages: 0,
        };
        if entry != version {
            return Ok(info);
        }
        match Manifest::read(&dir) {
            Ok(manifest) => {
                info.state = damage(&dir, &manifest).map_or(ImageState::Ok, ImageState::Damaged);
                info.size_virtual = manifest.files.get(DISK_FILE).map_or(0, |disk| disk.size);
                info.kernel = manifest.kernel;
                info.suite = manifest.suite;
                info.created = manifest.created;
                info.packages = manifest.packages.len();
            }
            Err(error) => info.state = ImageState::Damaged(with_cause(&error)),
        }
        Ok(info)
    }
}

/// Whether `name` may name an image or a version: it becomes a part of a path.
pub(crate) fn check_name(name: &str) -> Result<(), ImageError> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let good = name.len() <= MAX_NAME
        && name.bytes().next().is_some_and(plain)
        && name.bytes().all(|byte| plain(byte) || byte == b'-' || byte == b'.');
    if good {
        Ok(())
    } else {
        Err(ImageError::BadName(name.chars().take(MAX_NAME).collect::<String>().escape_debug().to_string()))
    }
}

/// What is wrong with the version in `dir`, as far as a mark, sizes and times show.
fn damage(dir: &Path, manifest: &Manifest) -> Option<String> {
    if let Ok(reason) = fs::read(dir.join(DAMAGE_FILE)) {
        return Some(String::from_utf8_lossy(&reason[..reason.len().min(300)]).into_owned());
    }
    manifest.files.iter().find_map(|(file, entry)| {
        if file.contains('/') {
            return Some(format!("its manifest lists the odd name '{}'", file.escape_debug()));
        }
        match fs::symlink_metadata(dir.join(file)) {
            Err(error) => Some(format!("{file}: {error}")),
            Ok(found) if !found.is_file() => Some(format!("{file} is no plain file")),
            Ok(found) if found.len() != entry.size => {
                Some(format!("{file} has {} bytes instead of {}", found.len(), entry.size))
            }
            Ok(found) if mtime_ns(&found) != entry.mtime_ns => Some(format!(
                "{file} was changed after the build; 'catalyst image verify' tells whether its content was"
            )),
            Ok(_) => None,
        }
    })
}

/// The first file of the version in `dir` whose content is not the one that was built. Files with the right
/// content get the time of the build again: a copied store is as good as the original.
fn differing_file(
    dir: &Path,
    manifest: &Manifest,
    progress: &mut impl FnMut(VerifyProgress<'_>),
) -> Result<Option<String>, ImageError> {
    let total = manifest.files.values().map(|entry| entry.size).sum();
    let mut done = 0;
    for (file, entry) in &manifest.files {
        let path = dir.join(file);
        if file.contains('/') {
            return Ok(damage(dir, manifest));
        }
        let found = match sha256_file(&path, entry.sparse, |bytes| {
            done += bytes;
            progress(VerifyProgress { file, done, total });
        }) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Some(format!("{file} is missing")));
            }
            Err(error) => return Err(io_error("read", &path, error)),
        };
        if found != entry.sha256 {
            return Ok(Some(format!("the content of {file} is not what was built")));
        }
        restore_mtime(&path, entry)?;
    }
    Ok(None)
}

fn restore_mtime(path: &Path, entry: &FileEntry) -> Result<(), ImageError> {
    let metadata = fs::metadata(path).map_err(|source| io_error("read", path, source))?;
    if mtime_ns(&metadata) == entry.mtime_ns {
        return Ok(());
    }
    let built = std::time::Duration::from_nanos(u64::try_from(entry.mtime_ns).unwrap_or(0));
    let file = fs::File::open(path).map_err(|source| io_error("read", path, source))?;
    file.set_modified(std::time::UNIX_EPOCH + built)
        .map_err(|source| io_error("set the time of", path, source))
}

/// Time of last change in nanoseconds since 1970.
pub(crate) fn mtime_ns(metadata: &fs::Metadata) -> i64 {
    metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec())
}

/// Names of the folders in `dir`, sorted; of none if `dir` is not there.
fn folder_names(dir: &Path) -> Result<Vec<String>, ImageError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error("read", dir, error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|source| io_error("read", dir, source))?;
        let folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if let (true, Some(name)) = (folder, entry.file_name().to_str()) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Bytes on disk of the files directly in `dir`.
fn allocated(dir: &Path) -> Result<u64, ImageError> {
    let entries = fs::read_dir(dir).map_err(|source| io_error("read", dir, source))?;
    Ok(entries.flatten().filter_map(|entry| entry.metadata().ok()).map(|found| found.blocks() * 512).sum())
}

/// Removes `dir/entry`, by another name first: a removal that is interrupted leaves no version with holes.
pub(crate) fn remove_folder(dir: &Path, entry: &str) -> Result<(), ImageError> {
    let from = dir.join(entry);
    let aside = if entry.starts_with(REMOVE_PREFIX) {
        from.clone()
    } else {
        dir.join(format!("{REMOVE_PREFIX}{entry}"))
    };
    if aside != from {
        if aside.exists() {
            fs::remove_dir_all(&aside).map_err(|source| io_error("remove", &aside, source))?;
        }
        fs::rename(&from, &aside).map_err(|source| io_error("remove", &from, source))?;
    }
    fs::remove_dir_all(&aside).map_err(|source| io_error("remove", &aside, source))
}

pub(crate) fn io_error(action: &'static str, path: &Path, source: io::Error) -> ImageError {
    ImageError::Io { action, path: path.to_owned(), source }
}

/// An error and what caused it in one line, for reasons that are kept as text.
fn with_cause(error: &ManifestError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
