//! Snapshots on disk: `snapshots/<id>/` in the VM's folder.
//!
//! ```text
//! snapshots/<id>/snapshot.json   name, when, where it comes from, what its disk stands on
//! snapshots/<id>/saved/          its memory and devices ([`crate::saved`]), if it has them
//! restoring/                     what the VM is to be made of; there while that is being done
//! ```
//! The disk of a snapshot is the layers that its chain names; they lie in the VM's folder ([`super::layers`]). A snapshot is
//! built aside and renamed into place. Going back to one is decided by one rename, that of `restoring`: whatever comes
//! between, [`VmDir::finish_restoring`] does the rest, as often as need be.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Chain, StoreError, VmDir, chain, files, io_error};

/// Longest description, in bytes.
const MAX_SIZE: usize = 128 * 1024;
const FOLDER: &str = "snapshots";
/// Snapshots that are being made, or removed, and a state that is being put together, start with these.
const NEW: &str = ".new-";
const GONE: &str = ".gone-";
const RESTORING_ASIDE: &str = ".restoring";
/// In `restoring`: that the VM knows who it is.
const NAMED: &str = "named";
/// In `restoring`: that the machine that is suspended is to be given up.
const GIVE_UP: &str = "give-up";

/// What is kept of a snapshot besides memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// The folder's name.
    pub id: String,
    /// What the user calls it.
    pub name: String,
    /// What the user says of it.
    pub description: String,
    /// Counts up within the VM. The order in which they were made: `created` may be the same for several, and clocks are set back.
    pub number: u64,
    /// When, in seconds since 1970.
    pub created: u64,
    /// The id of the snapshot that the VM came from.
    pub parent: Option<String>,
    /// What the disk stands on, all of it read-only.
    pub chain: Chain,
    /// The guest was a copy that did not know yet who it is.
    pub unnamed: bool,
    /// The VM ran; one that goes back there runs on.
    pub ran: bool,
}

impl VmDir {
    fn snapshots_folder(&self) -> PathBuf {
        self.path().join(FOLDER)
    }

    /// The folder of a snapshot.
    pub fn snapshot(&self, id: &str) -> PathBuf {
        self.snapshots_folder().join(id)
    }

    /// The memory and devices of a snapshot, if it has them.
    pub fn snapshot_saved(&self, id: &str) -> PathBuf {
        self.snapshot(id).join("saved")
    }

    /// All snapshots, the oldest first.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>, StoreError> {
        let folder = self.snapshots_folder();
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(io_error("read the folder", &folder))?,
        };
        let mut all = Vec::new();
        for entry in entries {
            let entry = entry.map_err(io_error("read the folder", &folder))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if chain::is_plain(&name) {
                all.push(read(&entry.path(), name)?);
            }
        }
        all.sort_by_key(|snapshot: &Snapshot| snapshot.number);
        Ok(all)
    }

    /// Makes a folder aside for a snapshot; [`VmDir::keep_snapshot`] puts it into place.
    pub fn begin_snapshot(&self, id: &str) -> Result<PathBuf, StoreError> {
        let aside = self.snapshots_folder().join(format!("{NEW}{id}"));
        make_folder(&aside)?;
        Ok(aside)
    }

    /// Puts a snapshot that was built `aside` into place.
    pub fn keep_snapshot(&self, aside: &Path, snapshot: &Snapshot) -> Result<(), StoreError> {
        write(aside, snapshot)?;
        let folder = self.snapshots_folder();
        fs::rename(aside, self.snapshot(&snapshot.id))
            .and_then(|()| files::sync_folder(&folder))
            .map_err(io_error("put into place the snapshot", aside))
    }

    /// Takes a snapshot away; those that came from it come from where it did. Its layers stay until they are collected.
    pub fn forget_snapshot(&self, gone: &Snapshot) -> Result<(), StoreError> {
        for mut child in self.snapshots()? {
            if child.parent.as_ref() == Some(&gone.id) {
                child.parent.clone_from(&gone.parent);
                self.rewrite_snapshot(&child)?;
            }
        }
        let mut chain = self.chain()?;
        if chain.at.as_ref() == Some(&gone.id) {
            chain.at.clone_from(&gone.parent);
            self.write_chain(&chain)?;
        }
        let aside = self.snapshots_folder().join(format!("{GONE}{}", gone.id));
        fs::rename(self.snapshot(&gone.id), &aside).map_err(io_error("remove", &aside))?;
        files::sync_folder(&self.snapshots_folder()).map_err(io_error("sync", &aside))?;
        fs::remove_dir_all(&aside).map_err(io_error("remove", &aside))
    }

    /// Writes what is kept of a snapshot anew.
    pub fn rewrite_snapshot(&self, snapshot: &Snapshot) -> Result<(), StoreError> {
        write(&self.snapshot(&snapshot.id), snapshot)
    }

    /// There while the VM is being made what a snapshot was.
    pub fn restoring(&self) -> PathBuf {
        self.path().join("restoring")
    }

    /// Puts aside what the VM was when the snapshot was made; `fill` makes an empty overlay on its disk. The VM stays as it is
    /// until [`VmDir::decide_restoring`].
    pub fn prepare_restoring(
        &self,
        snapshot: &Snapshot,
        fill: impl FnOnce(&Path) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let aside = self.path().join(RESTORING_ASIDE);
        remove_folder(&aside)?;
        let built = || {
            make_folder(&aside)?;
            fill(&aside.join("disk.qcow2"))?;
            let chain = Chain { at: Some(snapshot.id.clone()), ..snapshot.chain.clone() };
            chain::write(&aside.join(chain::FILE), &chain)?;
            let mark = |name: &str| {
                let path = aside.join(name);
                files::write_new(&path, b"", 0o600).map_err(io_error("write", &path))
            };
            mark(if snapshot.unnamed { "unnamed" } else { NAMED })?;
            mark(GIVE_UP)?;
            let saved = self.snapshot_saved(&snapshot.id);
            if saved.exists() {
                link_folder(&saved, &aside.join("suspended"))?;
            }
            files::sync_folder(&aside).map_err(io_error("sync", &aside))
        };
        built().inspect_err(|_| {
            let _ = remove_folder(&aside);
        })
    }

    /// Makes the VM, which has no process, what was put aside.
    pub fn decide_restoring(&self) -> Result<(), StoreError> {
        let aside = self.path().join(RESTORING_ASIDE);
        fs::rename(&aside, self.restoring()).map_err(io_error("decide on", &aside))?;
        files::sync_folder(self.path()).map_err(io_error("sync", self.path()))?;
        self.finish_restoring()
    }

    /// Does what is left of a restoring that was decided, if there is one.
    pub fn finish_restoring(&self) -> Result<(), StoreError> {
        let from = self.restoring();
        if !from.exists() {
            return Ok(());
        }
        if from.join(GIVE_UP).exists() {
            self.forget_suspended()?;
            remove_file(&from.join(GIVE_UP))?;
        }
        move_in(&from.join("suspended"), &self.suspended())?;
        if from.join(NAMED).exists() {
            remove_file(&self.unnamed())?;
            remove_file(&from.join(NAMED))?;
        }
        move_in(&from.join("unnamed"), &self.unnamed())?;
        move_in(&from.join("disk.qcow2"), &self.disk())?;
        move_in(&from.join(chain::FILE), &self.path().join(chain::FILE))?;
        files::sync_folder(self.path()).map_err(io_error("sync", self.path()))?;
        remove_folder(&from)
    }

    /// Takes away what was left of making, removing and restoring when a daemon was killed.
    pub fn sweep_snapshots(&self) -> Result<(), StoreError> {
        remove_folder(&self.path().join(RESTORING_ASIDE))?;
        let Ok(entries) = fs::read_dir(self.snapshots_folder()) else { return Ok(()) };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(NEW) || name.starts_with(GONE) {
                remove_folder(&entry.path())?;
            }
        }
        Ok(())
    }
}

fn read(folder: &Path, id: String) -> Result<Snapshot, StoreError> {
    let path = folder.join("snapshot.json");
    let bytes = files::read_bounded(&path, MAX_SIZE).map_err(io_error("read", &path))?;
    let snapshot: Snapshot =
        serde_json::from_slice(&bytes).map_err(|error| io_error("understand", &path)(error.into()))?;
    chain::check(&snapshot.chain).map_err(io_error("understand", &path))?;
    Ok(Snapshot { id, ..snapshot })
}

fn write(folder: &Path, snapshot: &Snapshot) -> Result<(), StoreError> {
    let path = folder.join("snapshot.json");
    files::write_json(&path, snapshot, 0o600).map_err(io_error("write", &path))
}

fn make_folder(path: &Path) -> Result<(), StoreError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_error("make the folder", path))
}

/// Makes a folder whose files are those of another.
fn link_folder(from: &Path, to: &Path) -> Result<(), StoreError> {
    make_folder(to)?;
    for entry in fs::read_dir(from).map_err(io_error("read the folder", from))? {
        let entry = entry.map_err(io_error("read the folder", from))?;
        fs::hard_link(entry.path(), to.join(entry.file_name())).map_err(io_error("link", &entry.path()))?;
    }
    files::sync_folder(to).map_err(io_error("sync", to))
}

fn move_in(from: &Path, to: &Path) -> Result<(), StoreError> {
    files::move_in(from, to).map_err(io_error("put into place", to))
}

fn remove_file(path: &Path) -> Result<(), StoreError> {
    files::remove_file(path).map_err(io_error("remove", path))
}

fn remove_folder(path: &Path) -> Result<(), StoreError> {
    files::remove_folder(path).map_err(io_error("remove", path))
}

/// Links the files of a saved machine, which never change, into the folder of a snapshot that is being made.
pub fn link_saved(from: &Path, aside: &Path) -> Result<(), StoreError> {
    link_folder(from, &aside.join("saved"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::{Store, VmId};
    use super::*;

    #[test]
    fn snapshots_of_one_second_are_told_in_the_order_they_were_made() {
        let state = tempfile::tempdir().unwrap();
        let dir = Store::open(state.path()).unwrap().dir(&VmId::parse("web1").unwrap());
        let made = ["f", "c", "e", "a", "d", "b"];
        for (number, id) in (0..).zip(made) {
            let aside = dir.begin_snapshot(id).unwrap();
            let snapshot = Snapshot {
                id: id.to_owned(),
                name: id.to_owned(),
                description: String::new(),
                number,
                created: 1,
                parent: None,
                chain: Chain::default(),
                unnamed: false,
                ran: false,
            };
            dir.keep_snapshot(&aside, &snapshot).unwrap();
        }
        let told: Vec<String> = dir.snapshots().unwrap().into_iter().map(|snapshot| snapshot.id).collect();
        assert_eq!(told, made);
    }
}
