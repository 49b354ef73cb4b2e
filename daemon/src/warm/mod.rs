//! Warm states of templates: a template that was booted once, brought to rest, saved and stopped for good. New VMs go on
//! from it.
//!
//! They lie beside the image's files, `warm/<name>/`: the saved machine, and `disk.qcow2`, on which the disks of VMs that
//! went on from it stand. One that was replaced keeps its disk for these.

pub mod make;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use catalyst_api::EngineName;
use catalyst_images::Image;
use rustix::fs::FlockOperation;

use crate::engine::Fit;
use crate::privilege::as_root;
use crate::saved::{Manifest, SavedDir, SavedError};

/// Where they lie beside the image's files.
pub const FOLDER: &str = "warm";
/// The disk of one.
pub const DISK: &str = "disk.qcow2";
/// Folders that are being made start with this.
const NEW: &str = ".new-";

/// The warm states of one image.
#[derive(Clone, Debug)]
pub struct WarmStates(PathBuf);

/// One of them.
#[derive(Clone, Debug)]
pub struct Warm {
    /// The folder's name, by which VMs' disks refer to it.
    pub name: String,
    /// What it says of itself.
    pub manifest: Manifest,
    path: PathBuf,
}

impl WarmStates {
    /// Those of `image`.
    pub fn of(image: &Image) -> Self {
        Self(image.disk.parent().unwrap_or(Path::new("/")).join(FOLDER))
    }

    /// All that are whole, and what keeps the others from being used; the newest first.
    pub fn list(&self) -> (Vec<Warm>, Vec<SavedError>) {
        let (mut all, mut damaged) = (Vec::new(), Vec::new());
        let entries = as_root(|| fs::read_dir(&self.0).into_iter().flatten().flatten().collect::<Vec<_>>());
        for entry in entries {
            let Ok(name) = entry.file_name().into_string() else { continue };
            let path = entry.path();
            if name.starts_with('.') || as_root(|| !path.join("manifest").exists()) {
                continue;
            }
            match as_root(|| SavedDir::new(&path).read()) {
                Ok(manifest) => all.push(Warm { name, manifest, path }),
                Err(error) => damaged.push(error),
            }
        }
        all.sort_by_key(|warm| std::cmp::Reverse(warm.manifest.created));
        (all, damaged)
    }

    /// The newest for a VM of that size on that engine. What does not fit is passed over with a word in the log.
    pub fn find(&self, engine: EngineName, fit: &Fit, cpus: u32, memory_mib: u64) -> Option<Warm> {
        let (all, damaged) = self.list();
        for error in damaged {
            let reason = crate::http::error::chain(&error).join(": ");
            tracing::warn!(reason, "a warm state is passed over");
        }
        let sized = |warm: &Warm| {
            let Manifest { engine: own, cpus: has, memory_mib: mib, .. } = &warm.manifest;
            (*own, *has, *mib) == (engine, cpus, memory_mib)
        };
        all.into_iter().filter(sized).find(|warm| match fit.refuses(&warm.manifest.fit) {
            None => true,
            Some(why) => {
                tracing::info!(warm = warm.name, %why, "a warm state is passed over");
                false
            }
        })
    }

    /// The disk of one that was there, whether or not it can still be gone on from.
    pub fn disk(&self, name: &str) -> PathBuf {
        self.0.join(name).join(DISK)
    }

    /// Makes the folder if need be, and takes the right to make a warm state; `None` while another has it.
    fn lock(&self) -> io::Result<Option<File>> {
        as_root(|| {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(&self.0)?;
            let mut options = OpenOptions::new();
            let file =
                options.write(true).create(true).truncate(false).mode(0o600).open(self.0.join(".lock"))?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => Ok(Some(file)),
                Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })
    }

    /// Takes away what is left of a making that did not come to its end, and the memory of those that `replacement`
    /// replaces; whoever calls has the lock.
    fn sweep(&self, replacement: Option<&Warm>) -> io::Result<()> {
        as_root(|| {
            for entry in fs::read_dir(&self.0)?.flatten() {
                if entry.file_name().to_string_lossy().starts_with(NEW) {
                    fs::remove_dir_all(entry.path())?;
                }
            }
            let Some(new) = replacement else { return Ok(()) };
            let alike = |old: &Manifest| {
                (old.engine, old.cpus, old.memory_mib)
                    == (new.manifest.engine, new.manifest.cpus, new.manifest.memory_mib)
            };
            for old in self.list().0.into_iter().filter(|old| old.name != new.name && alike(&old.manifest)) {
                old.forget_memory()?;
            }
            Ok(())
        })
    }

    /// Removes all of them, but for the disks of those in `used`, on which VMs stand. Nothing is removed while one is made.
    pub fn release(&self, used: &[&str]) -> io::Result<()> {
        let Some(_lock) = self.lock()? else { return Ok(()) };
        self.sweep(None)?;
        as_root(|| {
            for entry in fs::read_dir(&self.0)?.flatten().filter(|entry| entry.path().is_dir()) {
                if !used.iter().any(|name| entry.file_name() == *name) {
                    fs::remove_dir_all(entry.path())?;
                }
            }
            self.list().0.iter().try_for_each(Warm::forget_memory)
        })
    }
}

impl Warm {
    /// Leaves its disk alone, for VMs that stand on it.
    fn forget_memory(&self) -> io::Result<()> {
        ["manifest", "state", "memory"].into_iter().try_for_each(|file| fs::remove_file(self.path.join(file)))
    }

    /// Opens it for a VM to go on from.
    pub fn open(&self) -> Result<crate::engine::Saved, SavedError> {
        as_root(|| SavedDir::new(&self.path).open(&self.manifest, true))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
