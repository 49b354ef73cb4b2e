//! Extended attributes (xattr(7)) of files that keep their owners.
//!
//! Of all names the guest has two kinds: `user.*`, which are anybody's, and `security.capability`, which stands for the same in the
//! guest as on the host. Others mean something to the host's kernel (`trusted.overlay.*`, labels, access lists, whose rules
//! the guest's kernel does not apply) and are not shown. Only files and folders have any of the two.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;

use fuse_backend_rs::api::filesystem::{GetxattrReply, ListxattrReply};
use fuse_backend_rs::passthrough::PassthroughFs;

use super::hard_link::again;

/// The name of a file's capabilities.
const CAPABILITY: &[u8] = b"security.capability";
/// What names of users begin with.
const USER: &[u8] = b"user.";
/// Longest value, and longest list of names (limits.h, `XATTR_SIZE_MAX`).
const MOST: usize = 64 * 1024;

/// What a name has, or how long it is where `size` is 0.
pub(super) fn get(
    files: &PassthroughFs<()>,
    inode: u64,
    name: &CStr,
    size: u32,
) -> io::Result<GetxattrReply> {
    check(name)?;
    let file = open(files, inode)?.ok_or_else(no_data)?;
    let value = read(|buffer, length| {
        // SAFETY: the name is a string, and the buffer as long as is said.
        unsafe { libc::fgetxattr(file.as_raw_fd(), name.as_ptr(), buffer, length) }
    })?;
    match size {
        0 => Ok(GetxattrReply::Count(u32::try_from(value.len()).unwrap_or(u32::MAX))),
        size if (size as usize) < value.len() => Err(io::Error::from_raw_os_error(libc::ERANGE)),
        _ => Ok(GetxattrReply::Value(value)),
    }
}

/// The names that the guest has, each with a zero at its end, or how long they are where `size` is 0.
pub(super) fn list(files: &PassthroughFs<()>, inode: u64, size: u32) -> io::Result<ListxattrReply> {
    let all = match open(files, inode)? {
        Some(file) => read(|buffer, length| {
            // SAFETY: the buffer is as long as is said.
            unsafe { libc::flistxattr(file.as_raw_fd(), buffer.cast(), length) }
        })?,
        None => Vec::new(),
    };
    let shown = all
        .split_inclusive(|byte| *byte == 0)
        .filter(|name| is_shown(name.strip_suffix(b"\0").unwrap_or(name)));
    let shown = shown.collect::<Vec<_>>().concat();
    match size {
        0 => Ok(ListxattrReply::Count(u32::try_from(shown.len()).unwrap_or(u32::MAX))),
        size if (size as usize) < shown.len() => Err(io::Error::from_raw_os_error(libc::ERANGE)),
        _ => Ok(ListxattrReply::Names(shown)),
    }
}

/// Gives a name a value, as setxattr(2) does by `flags`.
pub(super) fn set(
    files: &PassthroughFs<()>,
    inode: u64,
    name: &CStr,
    value: &[u8],
    flags: u32,
) -> io::Result<()> {
    check(name)?;
    let file = open(files, inode)?.ok_or_else(not_permitted)?;
    // SAFETY: the name is a string, and the value as long as is said.
    let set = unsafe {
        libc::fsetxattr(
            file.as_raw_fd(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            flags.cast_signed() & (libc::XATTR_CREATE | libc::XATTR_REPLACE),
        )
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes a name away.
pub(super) fn remove(files: &PassthroughFs<()>, inode: u64, name: &CStr) -> io::Result<()> {
    check(name)?;
    let file = open(files, inode)?.ok_or_else(no_data)?;
    // SAFETY: the name is a string.
    let removed = unsafe { libc::fremovexattr(file.as_raw_fd(), name.as_ptr()) };
    if removed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn is_shown(name: &[u8]) -> bool {
    name == CAPABILITY || (name.starts_with(USER) && name.len() > USER.len())
}

fn check(name: &CStr) -> io::Result<()> {
    if is_shown(name.to_bytes()) { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)) }
}

/// A file or folder, open for reading; `None` for what is neither, or has lost its name.
fn open(files: &PassthroughFs<()>, inode: u64) -> io::Result<Option<File>> {
    let file = match again(files, inode) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        file => file?,
    };
    let kind = file.metadata()?.file_type();
    if kind.is_symlink()
        || kind.is_fifo()
        || kind.is_socket()
        || kind.is_block_device()
        || kind.is_char_device()
    {
        return Ok(None);
    }
    let proc_self_fd: RawFd = *files.keep_fds().first().ok_or(io::ErrorKind::Unsupported)?;
    let number = CString::new(file.as_raw_fd().to_string())?;
    // SAFETY: the path is a string.
    let opened = unsafe {
        libc::openat(proc_self_fd, number.as_ptr(), libc::O_RDONLY | libc::O_NONBLOCK | libc::O_CLOEXEC)
    };
    if opened == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was just opened, and is nobody else's.
    Ok(Some(unsafe { File::from_raw_fd(opened) }))
}

/// What a system call writes, whose answer is how long that is.
fn read(call: impl FnOnce(*mut libc::c_void, usize) -> isize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0_u8; MOST];
    match usize::try_from(call(bytes.as_mut_ptr().cast(), bytes.len())) {
        Ok(length) => {
            bytes.truncate(length);
            Ok(bytes)
        }
        Err(_) => Err(io::Error::last_os_error()),
    }
}

fn no_data() -> io::Error {
    io::Error::from_raw_os_error(libc::ENODATA)
}

fn not_permitted() -> io::Error {
    io::Error::from_raw_os_error(libc::EPERM)
}
