//! The daemon's Unix socket: mode 0600, the owner's.
//!
//! It lies in a folder of the owner's, and a root daemon makes it: so everything goes through a descriptor of that
//! folder, and nothing is followed or changed that is not the socket just made.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat, renameat};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, fstatat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, geteuid, unlinkat};
use tokio::net::UnixListener;

use super::owner::Owner;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// Why there is no Unix socket.
#[derive(Debug, thiserror::Error)]
pub enum UnixSocketError {
    /// The path names no file in a folder.
    #[error("{} does not name a file", path.display())]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// The folder does not open.
    #[error("cannot open the folder of {}", path.display())]
    Folder {
        /// The socket's path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: Errno,
    },
    /// Something else lies there, which is left alone.
    #[error("{} is there and is not a socket: move it away", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Another daemon serves it.
    #[error("{} is served by another program, likely a daemon with the same state folder: stop that one", path.display())]
    Served {
        /// The path.
        path: PathBuf,
    },
    /// A step failed.
    #[error("{step} failed for {}", path.display())]
    Step {
        /// What was tried.
        step: &'static str,
        /// The path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// A listening Unix socket, whose file is removed when it is dropped.
#[derive(Debug)]
pub(super) struct UnixSocket {
    listener: UnixListener,
    folder: OwnedFd,
    name: OsString,
    /// Device and inode of the file, so that no other is removed.
    file: (u64, u64),
}

/// A socket that was just made and listens, with what its file is known by.
struct Made {
    socket: OwnedFd,
    folder: OwnedFd,
    name: OsString,
    file: (u64, u64),
}

/// Listens at `path` for another program, which the descriptor is for; the file stays until somebody removes it.
pub(crate) fn listen_for_another(path: &Path, owner: &Owner) -> Result<OwnedFd, UnixSocketError> {
    make(path, owner).map(|made| made.socket)
}

fn make(path: &Path, owner: &Owner) -> Result<Made, UnixSocketError> {
    let step =
        |step, source: Errno| UnixSocketError::Step { step, path: path.to_owned(), source: source.into() };
    let (folder, name) = open_folder(path)?;
    check_free(&folder, &name, path)?;
    let aside = aside_name(&name);
    remove_leftover(&folder, &aside).map_err(|source| step("removing a leftover", source))?;

    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket =
        socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(|error| step("socket", error))?;
    // The file takes the descriptor's mode (unix_bind in net/unix/af_unix.c): it is never open to others.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|error| step("fchmod", error))?;
    let address = address_in(&folder, &aside).map_err(|error| step("naming the socket", error))?;
    bind(socket.as_raw_fd(), &address).map_err(|error| step("bind", error))?;
    let file = own(&folder, &aside, owner).map_err(|error| step("giving the socket to its owner", error))?;
    let backlog = Backlog::new(BACKLOG).unwrap_or(Backlog::MAXCONN);
    listen(&socket, backlog).map_err(|error| step("listen", error))?;
    renameat(&folder, aside.as_os_str(), &folder, name.as_os_str()).map_err(|error| step("rename", error))?;
    Ok(Made { socket, folder, name, file })
}

impl UnixSocket {
    /// Listens at `path`. A socket there that nobody serves is replaced at once, without a moment in which there is
    /// none.
    pub(super) fn bind(path: &Path, owner: &Owner) -> Result<Self, UnixSocketError> {
        let Made { socket, folder, name, file } = make(path, owner)?;
        let listener = UnixListener::from_std(socket.into()).map_err(|source| UnixSocketError::Step {
            step: "registering the socket",
            path: path.to_owned(),
            source,
        })?;
        Ok(Self { listener, folder, name, file })
    }

    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        let is_ours = fstatat(&self.folder, self.name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| identity(&stat) == self.file);
        if is_ours {
            // A file that stays behind is replaced by the next daemon.
            let _ = unlinkat(&self.folder, self.name.as_os_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

fn open_folder(path: &Path) -> Result<(OwnedFd, OsString), UnixSocketError> {
    let Some(name) = path.file_name() else { return Err(UnixSocketError::Path { path: path.to_owned() }) };
    let folder = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let flags = OFlag::O_DIRECTORY | OFlag::O_PATH | OFlag::O_CLOEXEC;
    let folder = open(folder, flags, Mode::empty())
        .map_err(|source| UnixSocketError::Folder { path: path.to_owned(), source })?;
    Ok((folder, name.to_owned()))
}

/// Nothing is there, or a socket that nobody listens to.
fn check_free(folder: &OwnedFd, name: &OsStr, path: &Path) -> Result<(), UnixSocketError> {
    let step = |source: Errno| UnixSocketError::Step {
        step: "looking at what is there",
        path: path.to_owned(),
        source: source.into(),
    };
    match fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Err(Errno::ENOENT) => return Ok(()),
        Err(error) => return Err(step(error)),
        Ok(stat) if !is_socket(&stat) => return Err(UnixSocketError::NotASocket { path: path.to_owned() }),
        Ok(_) => {}
    }
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(step)?;
    match connect(probe.as_raw_fd(), &address_in(folder, name).map_err(step)?) {
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(()),
        // EAGAIN: so busy that its queue is full.
        Ok(()) | Err(Errno::EAGAIN) => Err(UnixSocketError::Served { path: path.to_owned() }),
        Err(error) => Err(step(error)),
    }
}

/// Gives the socket file just made to the owner, through a descriptor of that very file. Its device and inode.
fn own(folder: &OwnedFd, name: &OsStr, owner: &Owner) -> nix::Result<(u64, u64)> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = openat(folder, name, flags, Mode::empty())?;
    let stat = fstat(&file)?;
    // A daemon whose threads act as the owner has made it the owner's already. Else the folder's owner could have put
    // another file in its place; that one is not given away.
    let owned = stat.st_uid == owner.uid;
    if !is_socket(&stat) || stat.st_nlink != 1 || !(owned || stat.st_uid == geteuid().as_raw()) {
        return Err(Errno::ESTALE);
    }
    if !owned {
        let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
        fchownat(file.as_fd(), "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)?;
    }
    Ok(identity(&stat))
}

fn remove_leftover(folder: &OwnedFd, name: &OsStr) -> nix::Result<()> {
    match unlinkat(folder, name, UnlinkatFlags::NoRemoveDir) {
        Err(Errno::ENOENT) => Ok(()),
        result => result,
    }
}

/// The name under which the socket is made before it is renamed into its place.
fn aside_name(name: &OsStr) -> OsString {
    let mut aside = OsString::from(".");
    aside.push(name);
    aside.push(format!(".{}", std::process::id()));
    aside
}

/// The address of `name` in the open folder: however long the folder's path is, it fits (unix(7): 108 bytes).
fn address_in(folder: &OwnedFd, name: &OsStr) -> nix::Result<UnixAddr> {
    let mut path = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()));
    path.push(name);
    UnixAddr::new(&path)
}

fn is_socket(stat: &FileStat) -> bool {
    stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFSOCK.bits()
}

fn identity(stat: &FileStat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    fn owner(uid: u32) -> Owner {
        Owner { uid, gid: uid, name: "someone".to_owned(), home: PathBuf::from("/"), groups: vec![uid] }
    }

    fn me() -> Owner {
        owner(geteuid().as_raw())
    }

    #[tokio::test]
    async fn the_socket_is_the_owner_s_alone_and_goes_with_its_daemon() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("daemon.sock");
        let someone = if geteuid().is_root() { owner(65534) } else { me() };
        let bound = UnixSocket::bind(&path, &someone).unwrap();
        let found = std::fs::symlink_metadata(&path).unwrap();
        assert_eq!((found.mode() & 0o7777, found.uid(), found.gid()), (0o600, someone.uid, someone.gid));
        assert!(std::os::unix::net::UnixStream::connect(&path).is_ok());
        drop(bound);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_served_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("daemon.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let bound = UnixSocket::bind(&path, &me()).unwrap();
        assert!(matches!(UnixSocket::bind(&path, &me()), Err(UnixSocketError::Served { .. })));
        assert!(std::os::unix::net::UnixStream::connect(&path).is_ok());
        drop(bound);
    }

    #[tokio::test]
    async fn other_files_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        std::fs::write(&file, "kept").unwrap();
        symlink(&file, &link).unwrap();
        for path in [&file, &link, &folder.path().to_path_buf()] {
            let result = UnixSocket::bind(path, &me());
            assert!(matches!(result, Err(UnixSocketError::NotASocket { .. })), "{result:?}");
        }
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "kept");
        assert!(matches!(UnixSocket::bind(Path::new("/"), &me()), Err(UnixSocketError::Path { .. })));
        let nowhere = UnixSocket::bind(&folder.path().join("no/such/folder"), &me());
        assert!(matches!(nowhere, Err(UnixSocketError::Folder { .. })), "{nowhere:?}");
    }

    #[tokio::test]
    async fn a_long_path_serves_too() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("x".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let path = deep.join("daemon.sock");
        let bound = UnixSocket::bind(&path, &me()).unwrap();
        assert!(path.symlink_metadata().is_ok());
        drop(bound);
        assert!(path.symlink_metadata().is_err());
    }

    #[tokio::test]
    async fn a_successor_s_socket_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("daemon.sock");
        let bound = UnixSocket::bind(&path, &me()).unwrap();
        std::fs::remove_file(&path).unwrap();
        let successor = std::os::unix::net::UnixListener::bind(&path).unwrap();
        drop(bound);
        assert!(path.symlink_metadata().is_ok());
        drop(successor);
    }
}
