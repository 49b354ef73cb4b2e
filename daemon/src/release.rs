//! What a package does before it is removed: it ends the daemons of this machine, and takes away of the images what no VM
//! stands on. VMs are their owners', and so is what they stand on: both stay.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use catalyst_images::{ImageError, ImageStore};
use rustix::fs::FlockOperation;
use thiserror::Error;

use crate::images::state_folders;
use crate::store::{Store, StoreError, files};
use crate::warm::WarmStates;

/// Where daemons keep what lasts until the host's next start.
const RUN: &str = "/run/catalyst";
/// Longest wait for a daemon's answer.
const ANSWER: Duration = Duration::from_mins(3);
/// How much of it is read, in bytes.
const MAX_ANSWER: u64 = 64 << 10;

/// What is to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Release {
    /// Images and warm states that no VM stands on.
    Images,
    /// The daemons that run, with their guests and networks; then the same.
    All,
}

/// Why something stays that should have gone.
#[derive(Debug, Error)]
pub enum ReleaseError {
    /// What VMs there are is not known.
    #[error(
        "The VMs in '{}' cannot be looked at, so all images stay; \
         if they are gone for good, remove {} too", .folder.display(), .note.display()
    )]
    Unknown {
        /// A state folder.
        folder: PathBuf,
        /// The file that says it is one.
        note: PathBuf,
    },
    /// A folder of VMs.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A warm state.
    #[error("Cannot remove warm states of the image in {}", .folder.display())]
    Warm {
        /// The image's folder.
        folder: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A daemon does not end.
    #[error("The daemon of '{}' cannot be stopped; stop it, then try again", .folder.display())]
    Daemon {
        /// Its state folder.
        folder: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// An image's version, and the warm state of it whose disk a VM needs.
type Standing = (String, String, Option<String>);

/// Does it, for the images in `image_dir` and the daemons that use them.
pub fn run(what: Release, image_dir: &Path) -> Result<(), ReleaseError> {
    let store = ImageStore::open(image_dir);
    if what == Release::All {
        for (folder, _) in state_folders(&store) {
            stop(&folder, image_dir).map_err(|source| ReleaseError::Daemon { folder, source })?;
        }
    }
    let used = standing(&store)?;
    for image in store.list()? {
        let (name, version) = (&image.name, &image.version);
        let keep: Vec<&str> =
            used.iter().filter(|(of, _, _)| of == name).map(|(_, version, _)| version.as_str()).collect();
        if keep.contains(&version.as_str()) {
            let Ok(image) = store.version(name, version) else { continue };
            let disks = used.iter().filter(|(of, at, _)| (of, at) == (name, version));
            let disks: Vec<&str> = disks.filter_map(|(_, _, warm)| warm.as_deref()).collect();
            let released = WarmStates::of(&image).release(&disks);
            released.map_err(|source| ReleaseError::Warm { folder: image.dir, source })?;
        } else if store.image_dir(name).is_dir() {
            store.remove(name, &keep)?;
        }
    }
    // Locks, notes and downloads of builds: of no use without a daemon.
    if used.is_empty() && what == Release::All {
        let failed = |source| ReleaseError::Warm { folder: image_dir.to_owned(), source };
        files::remove_folder(image_dir).map_err(failed)?;
    }
    Ok(())
}

/// What the VMs of all state folders stand on.
fn standing(store: &ImageStore) -> Result<Vec<Standing>, ReleaseError> {
    let mut all = Vec::new();
    for (folder, note) in state_folders(store) {
        if !folder.is_dir() {
            // Where the folder above it is there, it was removed; else it may lie on what is not mounted now.
            if folder.parent().is_some_and(Path::is_dir) {
                continue;
            }
            return Err(ReleaseError::Unknown { folder, note });
        }
        for dir in Store::open_existing(&folder).scan()? {
            // One that is registered in place, or whose file cannot be used, stands on no image that is known.
            let Ok((_, config)) = dir.read() else { continue };
            all.push((config.template, config.version, dir.chain()?.warm));
        }
    }
    Ok(all)
}

/// Stops the daemon of a state folder with its guests and its network. What a daemon that has ended left running is taken over
/// by another one first.
fn stop(folder: &Path, image_dir: &Path) -> io::Result<()> {
    let Ok(lock) =
        OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(folder.join("daemon.lock"))
    else {
        return Ok(());
    };
    if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
        // Nothing of this start of the host.
        if !fs::read_dir(RUN).is_ok_and(|mut entries| entries.next().is_some()) {
            return Ok(());
        }
        rustix::fs::flock(&lock, FlockOperation::Unlock)?;
        let mut daemon = Command::new(std::env::current_exe()?);
        daemon.args(["--background", "--no-warming", "--listen", "127.0.0.1:0", "--owner"]);
        daemon.arg(lock.metadata()?.uid().to_string()).arg("--state-dir").arg(folder);
        daemon.arg("--image-dir").arg(image_dir).stdout(Stdio::null());
        if !daemon.status()?.success() {
            return Err(io::Error::other("what is left running cannot be taken over"));
        }
    }
    request(folder, "POST /v1/daemon/stop?vms=true")?;
    ended(lock)
}

/// Waits until the daemon has let its lock go.
fn ended(lock: File) -> io::Result<()> {
    let (done, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // Nobody waits any more for an answer that comes too late: then the process is ending.
        let _ = done.send(rustix::fs::flock(&lock, FlockOperation::LockExclusive));
    });
    match wait.recv_timeout(ANSWER) {
        Ok(locked) => Ok(locked?),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Makes a request without a body at a daemon's socket; an error of the daemon's is one.
fn request(folder: &Path, what: &str) -> io::Result<()> {
    let mut stream = UnixStream::connect(folder.join("catalyst.sock"))?;
    stream.set_read_timeout(Some(ANSWER))?;
    write!(stream, "{what} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    match answer.split(' ').nth(1) {
        Some(status) if status.starts_with('2') => Ok(()),
        _ => Err(io::Error::other(answer.lines().last().unwrap_or_default().to_owned())),
    }
}
