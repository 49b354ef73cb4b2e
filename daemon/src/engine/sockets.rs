//! Unix sockets in a VM's `run/` folder, whatever the length of its path.
//!
//! A socket address holds 108 bytes (unix(7)) and a state folder can be longer, so sockets are
//! named through `/proc/self/fd`: the folder's descriptor stands for its path.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// The agent's port.
pub const AGENT: &str = "agent.sock";
/// The port for folders of the host.
pub const FOLDERS: &str = "folders.sock";
/// The port of containers.
pub const CONTAINER: &str = "container.sock";
/// The serial console.
pub const CONSOLE: &str = "console.sock";

/// Makes `run` if need be (mode 0700).
pub fn make_folder(run: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(run) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

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

/// Sends a message that is short enough to go at once, and a descriptor with it (unix(7), SCM_RIGHTS).
pub async fn send_with(stream: &UnixStream, message: &[u8], descriptor: &OwnedFd) -> io::Result<()> {
    let sent = stream
        .async_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let descriptors = [descriptor.as_fd()];
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
            Ok(sendmsg(stream, &[IoSlice::new(message)], &mut control, SendFlags::NOSIGNAL)?)
        })
        .await?;
    if sent == message.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_path_longer_than_a_socket_address_works() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("x".repeat(150));
        make_folder(&run).unwrap();
        make_folder(&run).unwrap();
        let _first = listen(&run, AGENT).unwrap();
        let _second = listen(&run, AGENT).unwrap();
        connect(&run, AGENT).await.unwrap();
        assert!(connect(&run, CONSOLE).await.is_err());
    }
}
