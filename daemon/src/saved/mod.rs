//! Machines that were saved: a folder with memory, the state of devices, and a manifest that says what they fit.
//!
//! Such a folder is built aside and renamed into place when it is whole, and never changes after. The state is checked by
//! its digest whenever it is opened, and passed on as the copy that was checked. Memory is too long for that; its length
//! is checked, since a file that is cut short would end in SIGBUS.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use catalyst_api::EngineName;
use catalyst_images::digest::hex;
use catalyst_vmm::folders::MAX_STATE as MAX_FOLDERS;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::engine::capture::Memory;
use crate::engine::{EngineError, Fit, Saved, VmProcess};
use crate::store::{files, sparse};

/// The manifest's form.
const VERSION: u32 = 1;
/// Longest state of devices that is taken, in bytes: 32 processors take less than one MiB.
const MAX_STATE: u64 = 16 << 20;
/// Longest manifest, in bytes.
const MAX_MANIFEST: usize = 64 * 1024;
/// What a manifest begins with, before the digest of its lines.
const HEAD: &str = "catalyst-saved ";

/// Why a machine was not saved, or cannot go on.
#[derive(Debug, Error)]
pub enum SavedError {
    /// A file.
    #[error("Cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The VM process.
    #[error("Cannot save the machine")]
    Engine(#[from] EngineError),
    /// It is not whole, or not ours.
    #[error("The saved machine {path} is damaged: {why}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// What is said of a saved machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    version: u32,
    /// Whose it is.
    pub engine: EngineName,
    /// What it can go on with.
    pub fit: Fit,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// When, in seconds since 1970.
    pub created: u64,
    /// Bytes of memory that are no hole.
    pub memory_bytes: u64,
    state_bytes: u64,
    state_sha256: String,
    /// Digest of what its folders' server knew of the guest, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    folders_sha256: Option<String>,
}

/// What a machine is like when it is saved.
#[derive(Clone, Debug)]
pub struct Machine {
    /// What it can go on with.
    pub fit: Fit,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// The folder of a saved machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedDir(PathBuf);

fn failed<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> SavedError + 'a {
    move |source| SavedError::Io { what, path: path.to_owned(), source }
}

impl SavedDir {
    /// The folder at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    fn memory(&self) -> PathBuf {
        self.0.join("memory")
    }

    fn state(&self) -> PathBuf {
        self.0.join("state")
    }

    fn folders(&self) -> PathBuf {
        self.0.join("folders")
    }

    fn manifest(&self) -> PathBuf {
        self.0.join("manifest")
    }

    /// Makes the folder and its files, which nothing is in yet.
    pub fn begin(&self) -> Result<(File, File), SavedError> {
        DirBuilder::new().mode(0o700).create(&self.0).map_err(failed("make the folder", &self.0))?;
        let make = |path: PathBuf| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create_new(true).mode(0o600);
            options.open(&path).map_err(failed("make", &path))
        };
        Ok((make(self.memory())?, make(self.state())?))
    }

    /// Writes the manifest: from then on the folder is whole. Everything in it is synced.
    pub fn finish(
        &self,
        engine: EngineName,
        machine: Machine,
        (memory, state): (&File, &File),
        folders: Option<&[u8]>,
    ) -> Result<Manifest, SavedError> {
        if let Some(folders) = folders {
            let path = self.folders();
            files::write_new(&path, folders, 0o600).map_err(failed("write", &path))?;
        }
        let state_path = self.state();
        let bytes = read_state(state, &state_path)?;
        let length = memory.metadata().map_err(failed("look at", &self.0))?.len();
        let manifest = Manifest {
            version: VERSION,
            engine,
            fit: machine.fit,
            cpus: machine.cpus,
            memory_mib: machine.memory_mib,
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            memory_bytes: sparse::allocated(memory, 0, length).map_err(failed("look at", &self.0))?,
            state_bytes: bytes.len() as u64,
            state_sha256: hex(&Sha256::digest(&bytes)),
            folders_sha256: folders.map(|folders| hex(&Sha256::digest(folders))),
        };
        let path = self.manifest();
        let text = serde_json::to_string_pretty(&manifest).map_err(io::Error::from);
        let text = text.map(|text| format!("{HEAD}{}\n{text}\n", hex(&Sha256::digest(format!("{text}\n")))));
        text.and_then(|text| {
            memory.sync_all()?;
            state.sync_all()?;
            files::write_new(&path, text.as_bytes(), 0o600)?;
            files::sync_folder(&self.0)
        })
        .map_err(failed("write", &path))?;
        Ok(manifest)
    }

    /// Reads the manifest.
    pub fn read(&self) -> Result<Manifest, SavedError> {
        let path = self.manifest();
        let damaged = |why: &str| SavedError::Damaged { path: path.clone(), why: why.to_owned() };
        let bytes = files::read_bounded(&path, MAX_MANIFEST).map_err(failed("read", &path))?;
        let text = String::from_utf8(bytes).map_err(|_| damaged("it is no text"))?;
        let rest = text.strip_prefix(HEAD).ok_or_else(|| damaged("it is none of ours"))?;
        let (digest, body) = rest.split_once('\n').ok_or_else(|| damaged("it is cut short"))?;
        if digest != hex(&Sha256::digest(body)) {
            return Err(damaged("its digest does not fit"));
        }
        let manifest: Manifest = serde_json::from_str(body).map_err(|error| damaged(&error.to_string()))?;
        if manifest.version != VERSION {
            return Err(damaged(&format!("it is of version {}, this is {VERSION}", manifest.version)));
        }
        Ok(manifest)
    }

    /// Opens what a VM goes on from. `frozen`: others may do so too.
    pub fn open(&self, manifest: &Manifest, frozen: bool) -> Result<Saved, SavedError> {
        let path = self.state();
        let damaged =
            |path: &Path, why: &str| SavedError::Damaged { path: path.to_owned(), why: why.to_owned() };
        let bytes = read_state(&open(&path)?, &path)?;
        if bytes.len() as u64 != manifest.state_bytes || hex(&Sha256::digest(&bytes)) != manifest.state_sha256
        {
            return Err(damaged(&path, "its digest does not fit"));
        }
        let state = in_memory(&bytes).map_err(failed("copy", &path))?;
        let path = self.memory();
        let memory = open(&path)?;
        if memory.metadata().map_err(failed("look at", &path))?.len() != manifest.memory_mib << 20 {
            return Err(damaged(&path, "it is not as long as the memory was"));
        }
        Ok(Saved { memory, frozen, state })
    }

    /// What the folders' server of the machine knew of its guest.
    pub fn open_folders(&self, manifest: &Manifest) -> Result<Option<Vec<u8>>, SavedError> {
        let Some(digest) = &manifest.folders_sha256 else { return Ok(None) };
        let path = self.folders();
        let longest = usize::try_from(MAX_FOLDERS).unwrap_or(usize::MAX);
        let bytes = files::read_bounded(&path, longest).map_err(failed("read", &path))?;
        if hex(&Sha256::digest(&bytes)) != *digest {
            return Err(SavedError::Damaged { path, why: "its digest does not fit".to_owned() });
        }
        Ok(Some(bytes))
    }
}

/// Copies what the process's memory has in common with files into `out`, which is empty; gives the memory back.
pub async fn copy_files(source: Memory, out: &File) -> Result<Memory, SavedError> {
    in_background(out, move |out| source.copy_files(out).map(|()| source)).await
}

/// Writes a machine that stands still to its files; what its memory has in common with files must be there already
/// ([`copy_files`]).
pub async fn save(
    process: &dyn VmProcess,
    source: Memory,
    (memory, state): (&File, &File),
) -> Result<(), SavedError> {
    process.save(state.try_clone().map_err(EngineError::io("copy a descriptor"))?).await?;
    in_background(memory, move |out| source.copy_own(out)).await
}

/// Copies memory to `out` where it may take its time.
async fn in_background<T: Send + 'static>(
    out: &File,
    copy: impl FnOnce(&File) -> io::Result<T> + Send + 'static,
) -> Result<T, SavedError> {
    let out = out.try_clone().map_err(EngineError::io("copy a descriptor"))?;
    let copied = tokio::task::spawn_blocking(move || copy(&out)).await;
    let copied = copied.map_err(io::Error::other).and_then(|copied| copied);
    Ok(copied.map_err(EngineError::io("copy the VM's memory"))?)
}

fn open(path: &Path) -> Result<File, SavedError> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed("open", path))?;
    if fs::metadata(path).is_ok_and(|about| about.is_file()) {
        Ok(file)
    } else {
        Err(SavedError::Damaged { path: path.to_owned(), why: "it is not a regular file".to_owned() })
    }
}

/// The whole state in a file, which is named in errors; one that is empty or too long is none.
pub fn read_state(mut state: &File, path: &Path) -> Result<Vec<u8>, SavedError> {
    use std::io::Seek;
    let mut bytes = Vec::new();
    state
        .rewind()
        .and_then(|()| state.take(MAX_STATE + 1).read_to_end(&mut bytes))
        .map_err(failed("read", path))?;
    if bytes.is_empty() || bytes.len() as u64 > MAX_STATE {
        let why = format!("it is empty or longer than {MAX_STATE} bytes");
        return Err(SavedError::Damaged { path: path.to_owned(), why });
    }
    Ok(bytes)
}

/// A file in memory with these bytes, to be read from its beginning.
pub fn in_memory(bytes: &[u8]) -> io::Result<OwnedFd> {
    use std::io::Seek;
    let mut file = File::from(memfd_create("state", MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file.into())
}

/// A memfd that can be sealed.
pub fn new_memory() -> io::Result<File> {
    Ok(memfd_create("catalyst-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?.into())
}

/// Seals a memfd: nobody can write it, or make it longer or shorter, any more.
pub fn seal(memory: impl AsFd) -> io::Result<()> {
    Ok(fcntl_add_seals(memory, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(folder: &Path) -> (SavedDir, Manifest) {
        let dir = SavedDir::new(folder.join("saved"));
        let (memory, mut state) = dir.begin().unwrap();
        memory.set_len(128 << 20).unwrap();
        state.write_all(b"state of devices").unwrap();
        let fit = Fit { program: "p 1".into(), machine: 1, processor: String::new(), tsc_khz: 1 };
        let machine = Machine { fit, cpus: 1, memory_mib: 128 };
        let manifest =
            dir.finish(EngineName::Qemu, machine, (&memory, &state), Some(b"what was open")).unwrap();
        (dir, manifest)
    }

    #[test]
    fn what_is_saved_opens_and_says_what_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let (dir, manifest) = saved(folder.path());
        assert_eq!(dir.read().unwrap(), manifest);
        let mut text = String::new();
        File::from(dir.open(&manifest, true).unwrap().state).read_to_string(&mut text).unwrap();
        assert_eq!(text, "state of devices");
    }

    #[test]
    fn any_single_bit_that_flipped_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let (dir, manifest) = saved(folder.path());
        for path in [dir.manifest(), dir.state(), dir.folders()] {
            let whole = fs::read(&path).unwrap();
            for bit in 0..whole.len() * 8 {
                let mut bytes = whole.clone();
                bytes[bit / 8] ^= 1 << (bit % 8);
                fs::write(&path, bytes).unwrap();
                let opened = dir
                    .read()
                    .and_then(|manifest| dir.open(&manifest, true).and(dir.open_folders(&manifest)));
                assert!(matches!(opened, Err(SavedError::Damaged { .. })), "{path:?}, bit {bit}");
            }
            fs::write(&path, whole).unwrap();
        }
        dir.open(&manifest, true).unwrap();
    }

    #[test]
    fn memory_that_is_cut_short_and_a_state_without_end_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (dir, manifest) = saved(folder.path());
        let memory = OpenOptions::new().write(true).open(dir.memory()).unwrap();
        memory.set_len((128 << 20) - 1).unwrap();
        let error = dir.open(&manifest, true).unwrap_err().to_string();
        assert!(error.contains("memory") && error.contains("not as long"), "{error}");
        memory.set_len(128 << 20).unwrap();
        OpenOptions::new().write(true).open(dir.state()).unwrap().set_len(MAX_STATE + 1).unwrap();
        assert!(matches!(dir.open(&manifest, true), Err(SavedError::Damaged { .. })));
    }
}
