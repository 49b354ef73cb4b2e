//! Unix sockets in a VM's `run/` folder, whatever the length of its path.
//!
//! A socket address holds 108 bytes (unix(7)) and a state folder can be longer, so sockets are
//! named through `/proc/self/fd`: the folder's descriptor stands for its path.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use tokio::net::UnixStream;

/// The agent's port.
pub const AGENT: &str = "agent.sock";
/// The port for folders of the host.
pub const FOLDERS: &str = "folders.sock";
/// The port by which the runtime of a container speaks with the agent.
pub const CONTAINER: &str = "container.sock";

fn open_folder(run: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(run)
}

fn short_path(folder: &File, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()))
}

/// Listens on `run/name`; what stood there before is removed.
pub fn listen(run: &Path, name: &str) -> io::Result<OwnedFd> {
    let folder = open_folder(run)?;
    let path = short_path(&folder, name);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    Ok(UnixListener::bind(path)?.into())
}

/// Connects to `run/name`.
pub async fn connect(run: &Path, name: &str) -> io::Result<UnixStream> {
    let folder = open_folder(run)?;
    UnixStream::connect(short_path(&folder, name)).await
}
