//! How a VM's process began, noted beside its lock for the next daemon.

use std::fs;
use std::path::{Path, PathBuf};

use catalyst_api::StartMode;
use serde::{Deserialize, Serialize};

use super::{StoreError, VmDir, files};

/// Longest note, in bytes.
const MAX_SIZE: usize = 1024;

/// What a process began with. Its VM's file may say something else since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Began {
    /// How.
    pub mode: StartMode,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
}

impl VmDir {
    fn began_file(&self) -> PathBuf {
        self.run().join("began")
    }

    fn begins_file(&self) -> PathBuf {
        self.path().join("begins")
    }

    /// Notes how the process that is about to be started begins.
    pub fn note_begins(&self, began: Began) -> Result<(), StoreError> {
        files::remove_file(&self.began_file()).map_err(StoreError::write(self.began_file()))?;
        let path = self.begins_file();
        files::write_json(&path, &began, 0o600).map_err(StoreError::write(path))
    }

    /// Notes that it has begun: it runs.
    pub fn note_began(&self) -> Result<(), StoreError> {
        let path = self.began_file();
        fs::rename(self.begins_file(), &path).map_err(StoreError::write(path))
    }

    /// How the process that runs began; `None` where nothing was noted, as by earlier versions.
    pub fn began(&self) -> Option<Began> {
        read(&self.began_file())
    }

    /// How the process begins that was started and does not run yet.
    pub fn begins(&self) -> Option<Began> {
        read(&self.begins_file())
    }
}

fn read(path: &Path) -> Option<Began> {
    serde_json::from_slice(&files::read_bounded(path, MAX_SIZE).ok()?).ok()
}
