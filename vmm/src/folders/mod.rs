//! `catalyst-vmm folders`: serves folders of the host to a guest by FUSE messages, over a port.
//!
//! A process of its own beside the VM's, whatever the engine: it runs as the owner of the files, in a mount namespace whose empty
//! root the daemon mounts folders into. In the guest the agent passes on what the kernel asks of its FUSE file system.
//!
//! ```text
//! guest: program ── kernel ── /dev/fuse ── agent ── port ══ VM process ══ socket ── this process ── the host's files
//! ```
//! What the guest has from here (the numbers of files that it knows, what it has open, messages that may be under way) can be saved,
//! and another process goes on from there: so a VM is suspended, cloned and put back with folders mounted and files open.
//!
//! With [`Serving::KeepingOwners`] it serves what its caller has opened, as root, and files keep their owners: a container's root and volumes.
//!
//! - `link`: the port: greetings, messages that arrive once and in order.
//! - `numbers`: the guest's numbers for files and open files, and what is saved of them.
//! - `fuse`: where numbers stand in messages.
//! - `serve`: the loop.
//! - `trees`: what the caller has opened.

mod fuse;
mod link;
mod numbers;
#[cfg(test)]
mod owners_tests;
mod serve;
#[cfg(test)]
mod tests;
mod trees;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use serde::{Deserialize, Serialize};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::confine::{self, ConfineError, Filters, Role, SeccompError};
use crate::devices::fs::{Files, FsError, Unrooted};
pub use link::Saved;
pub use trees::Tree;

/// Longest saved state that is taken, in bytes.
pub const MAX_STATE: u64 = 64 << 20;

/// What the process is asked on its control socket, each as a line of JSON; the answer is one, too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Request {
    /// These folders are mounted below the root: whom their files belong to in the guest.
    Owners {
        /// All of them.
        folders: Vec<FolderOwner>,
    },
    /// Say that it serves.
    Ready,
    /// Say what another process needs to go on from here. The port is left alone until the connection ends: what is on its way to
    /// the guest must not come to it while its memory is copied.
    Save,
}

/// Whom the files of a folder belong to in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FolderOwner {
    /// The folder's name below the root.
    pub name: String,
    /// User in the guest.
    pub uid: u32,
    /// Group in the guest.
    pub gid: u32,
}

/// An answer on the control socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It was done.
    Done,
    /// What was asked for.
    Saved(Box<Saved>),
    /// It was not done, and why.
    Failed(String),
}

/// The descriptors that the process gets.
#[derive(Clone, Copy, Debug)]
pub struct Descriptors {
    /// Connected stream socket of the port; where trees are served, a stream socket by which that comes (unix(7), SCM_RIGHTS) when
    /// there is a VM: all else is ready by then, which a byte on it says.
    pub port: RawFd,
    /// Listening stream socket, for [`Request`]s. Only trees are served without one.
    pub control: Option<RawFd>,
    /// A file with what an earlier process saved.
    pub state: Option<RawFd>,
}

/// How files are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Serving {
    /// As the user of this process, in what is mounted by the caller below the root.
    AsOneUser,
    /// As whoever they belong to, in these trees.
    KeepingOwners(Vec<Tree>),
}

/// Why folders cannot be served, or not any more.
#[derive(Debug, thiserror::Error)]
pub enum FoldersError {
    /// A descriptor or a socket.
    #[error("Cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// File sharing.
    #[error("Cannot serve the folders")]
    Fs(#[from] FsError),
    /// Confinement.
    #[error("Cannot confine the process")]
    Confine(#[from] ConfineError),
    /// No mount namespace of its own.
    #[error("Folders are served in a mount namespace of their own: CAP_SYS_ADMIN is missing")]
    NoNamespace,
    /// System call filter.
    #[error("Cannot confine the process's thread")]
    Seccomp(#[from] SeccompError),
    /// The saved state.
    #[error("The saved state of folders is damaged")]
    State(#[source] serde_json::Error),
    /// The guest's side broke the rules.
    #[error("The guest broke the protocol of folders: {0}")]
    Guest(&'static str),
}

pub(crate) fn failed(what: &'static str) -> impl FnOnce(io::Error) -> FoldersError {
    move |source| FoldersError::Io { what, source }
}

/// Serves folders until the VM's process closes the port.
pub fn run(descriptors: Descriptors, serving: Serving) -> Result<(), FoldersError> {
    confine::share_one_heap();
    // SAFETY: the caller gave the descriptor to this process alone.
    let port = unsafe { UnixStream::from_raw_fd(descriptors.port) };
    // SAFETY: as above.
    let control = descriptors.control.map(|fd| unsafe { UnixListener::from_raw_fd(fd) });
    // SAFETY: as above.
    let state = descriptors.state.map(|fd| read_state(unsafe { File::from_raw_fd(fd) })).transpose()?;
    let answers = fuse::Pipe::new().map_err(failed("make a pipe"))?;
    let unrooted = Unrooted::open()?;
    let filters = Filters::compile()?;
    let trees = match serving {
        Serving::AsOneUser => None,
        Serving::KeepingOwners(trees) => Some(trees::take(trees)?),
    };
    let root = confine::enter_namespace()?.ok_or(FoldersError::NoNamespace)?;
    let Some(trees) = trees else {
        confine::drop_privileges(&[&root])?;
        let files = Files::serving(unrooted.at(&root)?)?;
        let server = serve::Server::new(files, answers, port, control, state)?;
        filters.install(Role::Folders)?;
        return server.run();
    };
    trees::mount(&trees)?;
    trees::allow_many_files();
    drop(trees);
    confine::keep_owners(&[&root])?;
    let files = Files::keeping_owners(unrooted.at(&root)?)?;
    let port = awaited(port)?;
    let server = serve::Server::new(files, answers, port, control, state)?.with_all_known();
    filters.install(Role::Trees)?;
    server.run()
}

/// Says that the trees are in their places, and waits for the port.
fn awaited(mut socket: UnixStream) -> Result<UnixStream, FoldersError> {
    let wait = failed("wait for the port");
    if let Err(error) = socket.write_all(&[0]) {
        return Err(wait(error));
    }
    match socket.recv_with_fd(&mut [0]) {
        Ok((_, Some(port))) => Ok(UnixStream::from(OwnedFd::from(port))),
        Ok((_, None)) => Err(wait(io::ErrorKind::UnexpectedEof.into())),
        Err(error) => Err(wait(error.into())),
    }
}

fn read_state(file: File) -> Result<Saved, FoldersError> {
    let mut bytes = Vec::new();
    file.take(MAX_STATE).read_to_end(&mut bytes).map_err(failed("read the saved state of folders"))?;
    serde_json::from_slice(&bytes).map_err(FoldersError::State)
}
