//! How a VM's process began, noted beside its lock for the next daemon.

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
    fn began_file(&self) -> std::path::PathBuf {
        self.run().join("began")
    }

    /// Notes how the process began.
    pub fn note_began(&self, began: Began) -> Result<(), StoreError> {
        let path = self.began_file();
        let text = serde_json::to_vec(&began).map_err(std::io::Error::from);
        text.and_then(|text| files::write_atomically(&path, &text, 0o600)).map_err(StoreError::write(path))
    }

    /// Takes the note away, before another process begins.
    pub fn forget_began(&self) -> Result<(), StoreError> {
        match std::fs::remove_file(self.began_file()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(StoreError::write(self.began_file())(error))
            }
            _ => Ok(()),
        }
    }

    /// What was noted; `None` where nothing was, as by earlier versions.
    pub fn began(&self) -> Option<Began> {
        serde_json::from_slice(&files::read_bounded(&self.began_file(), MAX_SIZE).ok()?).ok()
    }
}
