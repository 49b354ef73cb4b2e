//! The daemon's side of shares: mounts a folder of the host into the mount namespace of the process that serves it.
//!
//! Nothing is mounted in the caller's namespace: the mount is made detached, its IDs are mapped, and a child process
//! that enters the monitor's namespace puts it in its place.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// `MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC` would keep a guest from nothing: the monitor executes
/// nothing. The first two are set all the same.
const ATTRIBUTES: u64 = 0x2 | 0x4;
/// `MOUNT_ATTR_RDONLY`.
const READ_ONLY: u64 = 0x1;
/// `MOUNT_ATTR_IDMAP`.
const IDMAP: u64 = 0x0010_0000;
/// `MOVE_MOUNT_F_EMPTY_PATH`.
const FROM_EMPTY_PATH: libc::c_uint = 4;

/// `struct mount_attr`.
#[repr(C)]
struct Attributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// A detached mount of `folder`, without what is mounted below it; perhaps for reading only. With `owner` and `monitor`, files of the user
/// `owner` are seen as the user `monitor`'s, and what that one makes belongs to `owner`; an error of `EINVAL` says
/// that the file system cannot do it.
pub fn clone_mount(folder: &Path, read_only: bool, map: Option<(u32, u32)>) -> io::Result<File> {
    let path = CString::new(folder.as_os_str().as_bytes())?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: the path is a string.
    let tree = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let tree = file(tree)?;
    let namespace = map.map(|(owner, monitor)| user_namespace(owner, monitor)).transpose()?;
    let (idmap, user_namespace) = match &namespace {
        Some(namespace) => (IDMAP, u64::from(namespace.as_raw_fd().cast_unsigned())),
        None => (0, 0),
    };
    let set = ATTRIBUTES | idmap | if read_only { READ_ONLY } else { 0 };
    set_attributes(&tree, set, user_namespace, 0)?;
    Ok(tree)
}

/// A detached mount of what a descriptor stands for, with what is mounted below it. `EINVAL` where it is of another mount namespace
/// or, before Linux 6.15, itself a detached mount.
pub(crate) fn clone_of(folder: &File) -> io::Result<File> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    let flags = flags | (libc::AT_EMPTY_PATH | libc::AT_RECURSIVE).cast_unsigned();
    // SAFETY: the path is a string.
    file(unsafe { libc::syscall(libc::SYS_open_tree, folder.as_raw_fd(), c"".as_ptr(), flags) })
}

/// Lets no device of a mount and of all below it be opened, and nothing there run as another user.
pub(crate) fn guard(tree: &File) -> io::Result<()> {
    set_attributes(tree, ATTRIBUTES, 0, libc::AT_RECURSIVE)
}

/// Lets nobody write to the mount that a folder is the root of.
pub(crate) fn write_protect(tree: &File) -> io::Result<()> {
    set_attributes(tree, READ_ONLY, 0, 0)
}

fn set_attributes(tree: &File, set: u64, user_namespace: u64, flags: libc::c_int) -> io::Result<()> {
    let attributes = Attributes { set, clear: 0, propagation: 0, user_namespace };
    // SAFETY: the path is a string, and the struct is as long as is said.
    let returned = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            &raw const attributes,
            size_of::<Attributes>(),
        )
    };
    if returned == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Puts `tree` at the folder `name`, which is made, of the namespace's root.
pub fn attach(tree: &File, namespace: &File, name: &CStr) -> io::Result<()> {
    let tree = tree.as_raw_fd();
    in_namespace(namespace, || {
        // SAFETY: both paths are strings.
        unsafe {
            if libc::mkdir(name.as_ptr(), 0o755) == -1 {
                return -1;
            }
            libc::syscall(
                libc::SYS_move_mount,
                tree,
                c"".as_ptr(),
                libc::AT_FDCWD,
                name.as_ptr(),
                FROM_EMPTY_PATH,
            )
        }
    })
}

/// Takes the share away, whoever has files of it open.
pub fn detach(namespace: &File, name: &CStr) -> io::Result<()> {
    // SAFETY: the path is a string.
    in_namespace(namespace, || unsafe {
        if libc::umount2(name.as_ptr(), libc::MNT_DETACH) == -1 {
            -1
        } else {
            libc::rmdir(name.as_ptr()).into()
        }
    })
}

/// Runs `work` in a child process in another mount namespace: a process with threads cannot enter one. It must make
/// system calls only.
fn in_namespace(namespace: &File, work: impl FnOnce() -> libc::c_long) -> io::Result<()> {
    let namespace = namespace.as_raw_fd();
    // SAFETY: the child makes system calls and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: no memory is involved, but for where errno is.
        unsafe {
            let failed = libc::setns(namespace, libc::CLONE_NEWNS) == -1 || work() == -1;
            libc::_exit(if failed { *libc::__errno_location() } else { 0 });
        }
    }
    match wait(child)? {
        0 => Ok(()),
        number => Err(io::Error::from_raw_os_error(number)),
    }
}

/// A user namespace in which the user and group `owner` are the host's `monitor`.
fn user_namespace(owner: u32, monitor: u32) -> io::Result<File> {
    let mut ends: [RawFd; 2] = [0; 2];
    // SAFETY: the kernel fills the array.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both were just opened and are nobody else's.
    let (mut told, tell) = unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) };
    // SAFETY: the child makes system calls and waits for its end.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: the byte is there; nothing else is touched.
        unsafe {
            let made = libc::unshare(libc::CLONE_NEWUSER) == 0;
            libc::write(tell.as_raw_fd(), [u8::from(made)].as_ptr().cast(), 1);
            libc::pause();
            libc::_exit(0);
        }
    }
    let mapped = (|| {
        let mut made = [0];
        io::Read::read_exact(&mut told, &mut made)?;
        let line = format!("{owner} {monitor} 1\n");
        fs::write(format!("/proc/{child}/uid_map"), &line)?;
        fs::write(format!("/proc/{child}/gid_map"), &line)?;
        File::open(format!("/proc/{child}/ns/user"))
    })();
    // SAFETY: the child is ours and not waited for yet.
    unsafe { libc::kill(child, libc::SIGKILL) };
    wait(child)?;
    mapped
}

fn wait(child: libc::pid_t) -> io::Result<i32> {
    if child == -1 {
        return Err(io::Error::last_os_error());
    }
    let mut status = 0;
    // SAFETY: the kernel fills the number.
    while unsafe { libc::waitpid(child, &raw mut status, 0) } == -1 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { libc::EIO })
}

fn file(returned: libc::c_long) -> io::Result<File> {
    if returned == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just opened and is nobody else's.
    Ok(unsafe { File::from_raw_fd(i32::try_from(returned).unwrap_or(-1)) })
}
