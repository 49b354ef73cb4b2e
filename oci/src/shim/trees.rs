//! Trees of the host's for the guest: the container's root and what is bind-mounted, and the process that serves them.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, IoSlice, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};

use catalyst_agent_protocol::container::Mount;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::stat::{Mode, mkdirat};

use crate::document::Tree;
use crate::failure::{Outcome, Tried};

/// `struct mount_attr` (`mount_setattr(2)`).
#[repr(C)]
struct Attributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// What can be said of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attribute {
    /// Nothing is written to it.
    ReadOnly,
    /// No device of it is opened, and nothing there runs as another user.
    NoDevices,
}

impl Attribute {
    /// `MOUNT_ATTR_RDONLY`; `MOUNT_ATTR_NOSUID` and `MOUNT_ATTR_NODEV`.
    fn bits(self) -> u64 {
        match self {
            Self::ReadOnly => 1,
            Self::NoDevices => 2 | 4,
        }
    }
}

/// `AT_RECURSIVE`.
const RECURSIVE: libc::c_int = 0x8000;

/// Opens a tree as a mount of its own, that is nobody else's. Into one that is only read nothing can be mounted where nothing is,
/// so these places are made first.
pub fn open(tree: &Tree, places: &[Place]) -> Outcome<OwnedFd> {
    let opened = clone(&tree.path, tree.recursive).and_then(|mount| {
        if tree.read_only {
            for place in places {
                make_place(&mount, place);
            }
            set(&mount, &[Attribute::ReadOnly])?;
        }
        Ok(mount)
    });
    opened.tried(|| format!("take {} into the container", tree.path.display()))
}

/// Where something is mounted in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    path: PathBuf,
    is_file: bool,
}

/// Where the container's mounts are, in their order; what they are, their trees say.
pub fn places(mounts: &[Mount], trees: &[Tree]) -> Vec<Place> {
    let place = |mount: &Mount| {
        let tree = trees.iter().find(|tree| mount.kind == "tree" && tree.name == mount.source);
        let is_file = tree.is_some_and(|tree| tree.path.metadata().is_ok_and(|found| !found.is_dir()));
        Place { path: PathBuf::from(&mount.destination), is_file }
    };
    mounts.iter().map(place).collect()
}

/// Makes folders on the way, and what is mounted over, where they are not there. One that cannot be made is missed when something is
/// mounted there, unless that is in another tree.
fn make_place(root: &OwnedFd, place: &Place) {
    let names: Vec<_> = place.path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
    let Ok(mut folder) = root.try_clone() else { return };
    for (at, name) in names.iter().enumerate() {
        let way: PathBuf = names[..=at].iter().collect();
        if at + 1 == names.len() && place.is_file {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
            let _ = openat(&folder, Path::new(name), flags, Mode::from_bits_truncate(0o644));
            return;
        }
        let _ = mkdirat(&folder, Path::new(name), Mode::from_bits_truncate(0o755));
        // Links in an image lead nowhere but into it.
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC);
        match openat2(root, &way, how.resolve(ResolveFlag::RESOLVE_IN_ROOT)) {
            Ok(next) => folder = next,
            Err(_) => return,
        }
    }
}

/// A mount of its own of what is there (open_tree(2)).
pub fn clone(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let recursive = if recursive { RECURSIVE.cast_unsigned() } else { 0 };
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | recursive;
    // SAFETY: the path is a string.
    let opened = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    if opened == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just opened and is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(opened).unwrap_or(-1)) })
}

/// Gives a mount attributes, and all below it.
pub fn set(mount: &OwnedFd, attributes: &[Attribute]) -> io::Result<()> {
    let set = attributes.iter().fold(0, |all, attribute| all | attribute.bits());
    let attributes = Attributes { set, clear: 0, propagation: 0, user_namespace: 0 };
    let flags = libc::AT_EMPTY_PATH | RECURSIVE;
    // SAFETY: the path is a string, and the struct is as long as is said.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<Attributes>(),
        )
    };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The process that serves the trees.
#[derive(Debug)]
pub struct Server {
    /// It.
    pub process: tokio::process::Child,
    port: UnixStream,
}

impl Server {
    /// Gives it the VM's port, once it has the trees in their places.
    pub async fn begin(&self, port: &impl AsRawFd) -> Outcome {
        let what = || "hear of the process that serves the container's files".to_owned();
        let own = self.port.try_clone().tried(what)?;
        let ready = tokio::task::spawn_blocking(move || (&own).read_exact(&mut [0])).await;
        ready.map_err(io::Error::other).tried(what)?.tried(what)?;
        let rights = [port.as_raw_fd()];
        let sent = sendmsg::<()>(
            self.port.as_raw_fd(),
            &[IoSlice::new(&[0])],
            &[ControlMessage::ScmRights(&rights)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        sent.map(drop).tried(|| "give the container's files to its VM".to_owned())
    }
}

/// Starts the process that serves the trees, which makes itself ready until there is a VM; it ends with the VM's port, and with this
/// process.
pub fn serve(trees: &[(String, OwnedFd)], log: File) -> Outcome<Server> {
    let (ours, port) = UnixStream::pair().tried(|| "make a socket".to_owned())?;
    let program = sibling("catalyst-vmm");
    let mut command = tokio::process::Command::new(&program);
    command.args(["folders", "--keep-owners", "--port-fd"]).arg(port.as_raw_fd().to_string());
    let mut passed = vec![port.as_raw_fd()];
    for (name, tree) in trees {
        command.arg("--tree").arg(format!("{name}={}", tree.as_raw_fd()));
        passed.push(tree.as_raw_fd());
    }
    command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).stderr(log);
    command.kill_on_drop(true);
    let prepare = move || {
        // SAFETY: system calls without memory, between fork and exec.
        let failed = unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == -1
                || passed.iter().any(|descriptor| libc::fcntl(*descriptor, libc::F_SETFD, 0) == -1)
        };
        if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(prepare) };
    let process = command.spawn();
    let process =
        process.tried(|| format!("run {}, which serves the container's files", program.display()))?;
    Ok(Server { process, port: ours })
}

/// A program of ours: beside this one, as built, or in `../lib/catalyst`, as installed; else as PATH has it.
pub fn sibling(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    let folder = own.parent().map(std::path::Path::to_path_buf).unwrap_or_default();
    let places = [folder.join(name), folder.join("../lib/catalyst").join(name)];
    places.into_iter().find(|place| place.exists()).unwrap_or_else(|| PathBuf::from(name))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_tree_that_is_only_read_cannot_be_written() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: mounts are root's");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let of =
            |read_only| Tree { name: "t".into(), path: folder.path().into(), recursive: true, read_only };
        let make = |tree: &Tree, name: &str| {
            let mount = open(tree, &[]).unwrap();
            let flags = nix::fcntl::OFlag::O_CREAT | nix::fcntl::OFlag::O_WRONLY;
            nix::fcntl::openat(mount.as_fd(), name, flags, nix::sys::stat::Mode::S_IRUSR).map(|_| ())
        };
        make(&of(false), "made").unwrap();
        assert_eq!(make(&of(true), "not"), Err(nix::errno::Errno::EROFS));
        assert!(folder.path().join("made").exists());
        let missing = Tree { path: folder.path().join("missing"), ..of(false) };
        assert!(crate::failure::chain(&open(&missing, &[]).unwrap_err()).contains("missing"));
    }
    #[test]
    fn what_is_mounted_into_a_tree_that_is_only_read_has_its_place() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: mounts are root's");
            return;
        }
        let (folder, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::os::unix::fs::symlink(outside.path(), folder.path().join("out")).unwrap();
        std::os::unix::fs::symlink("/in", folder.path().join("link")).unwrap();
        std::fs::create_dir(folder.path().join("in")).unwrap();
        let file = Tree { name: "m1".into(), path: "/etc/passwd".into(), recursive: false, read_only: false };
        let mount = |destination: &str, source: &str| Mount {
            destination: destination.into(),
            kind: if source.is_empty() { "tmpfs".into() } else { "tree".into() },
            source: source.into(),
            options: Vec::new(),
        };
        let mounts = [mount("/a/b", ""), mount("/link/c", ""), mount("/out/d", ""), mount("/etc/f", "m1")];
        let places = places(&mounts, &[file]);
        let tree = Tree { name: "root".into(), path: folder.path().into(), recursive: true, read_only: true };
        open(&tree, &places).unwrap();
        let has = |name: &str| folder.path().join(name).symlink_metadata().is_ok();
        assert!(has("a/b") && has("in/c") && folder.path().join("etc/f").is_file());
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0, "a link led out of the tree");
    }
}
