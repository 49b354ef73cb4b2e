//! A mount namespace of the process's own with an empty root.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr;

use super::{ConfineError, check, privilege};

/// `FSCONFIG_SET_STRING` of fsconfig(2).
const SET_STRING: libc::c_uint = 1;
/// `FSCONFIG_CMD_CREATE`.
const CREATE: libc::c_uint = 6;
/// `MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC` of fsmount(2).
const ATTRIBUTES: libc::c_uint = 0x2 | 0x4 | 0x8;
/// `FSOPEN_CLOEXEC` and `FSMOUNT_CLOEXEC`.
const CLOEXEC: libc::c_uint = 1;
/// `MOVE_MOUNT_F_EMPTY_PATH` of move_mount(2).
const FROM_EMPTY_PATH: libc::c_uint = 4;
/// Who owns the root if the monitor is root itself: nobody.
const NOBODY: &CStr = c"65534";

/// Puts the process into a mount namespace of its own, whose root is an empty folder, and returns that folder
/// (`O_PATH`). Without `CAP_SYS_ADMIN` there is none, and nothing happens but a line on stderr.
///
/// The folder takes folders and mounts from outside: enter the namespace by setns(2) and `/proc/PID/ns/mnt`. The
/// monitor itself cannot write there, once it has dropped its capabilities. Call it before there are other threads,
/// which would stay where they are.
pub fn enter_namespace() -> Result<Option<File>, ConfineError> {
    if !privilege::has_sys_admin()? {
        eprintln!(
            "catalyst-vmm: without CAP_SYS_ADMIN the monitor stays in the host's mount namespace; \
             no share can be added while it runs"
        );
        return Ok(None);
    }
    // SAFETY: no memory is involved.
    let returned = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    check("make a mount namespace", returned.into())?;
    // SAFETY: the path is a string; the other pointers may be null for a change of propagation.
    let returned = unsafe {
        libc::mount(ptr::null(), c"/".as_ptr(), ptr::null(), libc::MS_REC | libc::MS_PRIVATE, ptr::null())
    };
    check("part the namespace's mounts from the host's", returned.into())?;
    let root = empty_file_system()?;
    pivot(&root)?;
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
    // SAFETY: the path is a string.
    let opened = unsafe { libc::open(c"/".as_ptr(), flags) };
    check("open the namespace's root", opened.into())?;
    // SAFETY: the descriptor was just opened and is nobody else's.
    Ok(Some(unsafe { File::from_raw_fd(opened) }))
}

/// A small tmpfs that is mounted nowhere yet. It holds folders for mounts, and nothing else.
fn empty_file_system() -> Result<File, ConfineError> {
    // SAFETY: the name is a string.
    let context = unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), CLOEXEC) };
    let context = opened("make a tmpfs", context)?;
    // SAFETY: no memory is involved.
    let is_root = unsafe { libc::geteuid() } == 0;
    // Not the monitor's own user's, so that it cannot write there.
    let owner = if is_root { NOBODY } else { c"0" };
    let options =
        [(c"size", c"64k"), (c"nr_inodes", c"1024"), (c"mode", c"0755"), (c"uid", owner), (c"gid", owner)];
    for (key, value) in options {
        configure(&context, SET_STRING, key.as_ptr(), value.as_ptr())?;
    }
    configure(&context, CREATE, ptr::null(), ptr::null())?;
    // SAFETY: no memory is involved.
    let mount = unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), CLOEXEC, ATTRIBUTES) };
    opened("make a mount of a tmpfs", mount)
}

fn configure(
    context: &File,
    command: libc::c_uint,
    key: *const libc::c_char,
    value: *const libc::c_char,
) -> Result<(), ConfineError> {
    // SAFETY: key and value are strings, or null where the command takes none.
    let returned = unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) };
    check("configure a tmpfs", returned).map(drop)
}

/// Makes `root` the root of the namespace, and lets go of the old one with all that is mounted below it.
fn pivot(root: &File) -> Result<(), ConfineError> {
    // A mount must be somewhere to become the root: over the old root.
    // SAFETY: both paths are strings.
    let returned = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            root.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            c"/".as_ptr(),
            FROM_EMPTY_PATH,
        )
    };
    check("mount the new root", returned)?;
    // SAFETY: no memory is involved.
    let returned = unsafe { libc::fchdir(root.as_raw_fd()) };
    check("enter the new root", returned.into())?;
    // With the same place for both the old root lies on top of the new one (pivot_root(2), notes).
    // SAFETY: both paths are strings.
    let returned = unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) };
    check("change to the new root", returned)?;
    // SAFETY: the path is a string.
    let returned = unsafe { libc::umount2(c".".as_ptr(), libc::MNT_DETACH) };
    check("let go of the old root", returned.into())?;
    // SAFETY: the path is a string.
    let returned = unsafe { libc::chdir(c"/".as_ptr()) };
    check("enter the new root", returned.into()).map(drop)
}

fn opened(what: &'static str, returned: libc::c_long) -> Result<File, ConfineError> {
    let descriptor = check(what, returned)?;
    let descriptor = i32::try_from(descriptor)
        .map_err(|_| ConfineError::System { what, source: io::ErrorKind::InvalidData.into() })?;
    // SAFETY: the descriptor was just opened and is nobody else's.
    Ok(unsafe { File::from_raw_fd(descriptor) })
}
