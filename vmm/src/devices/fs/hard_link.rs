//! Hard links, where linkat(2) does not take a descriptor alone.
//!
//! Before Linux 6.10 `AT_EMPTY_PATH` takes CAP_DAC_READ_SEARCH there, which the process has not: the answer is ENOENT. A descriptor's link
//! in /proc/self/fd needs no right, but the crate keeps its descriptors to itself, so the file is opened again where it is now.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use fuse_backend_rs::api::filesystem::{Context, FileSystem};
use fuse_backend_rs::passthrough::PassthroughFs;

/// Makes `name` in the folder `parent` another name of the file `inode`. ENOENT if either was moved or lost its name meanwhile.
pub(super) fn make(files: &PassthroughFs<()>, inode: u64, parent: u64, name: &CStr) -> io::Result<()> {
    let file = again(files, inode)?;
    let folder = again(files, parent)?;
    let proc_self_fd = *files.keep_fds().first().ok_or(io::ErrorKind::Unsupported)?;
    let number = CString::new(file.as_raw_fd().to_string())?;
    // SAFETY: descriptors are open, and strings end in zero.
    let made = unsafe {
        libc::linkat(
            proc_self_fd,
            number.as_ptr(),
            folder.as_raw_fd(),
            name.as_ptr(),
            libc::AT_SYMLINK_FOLLOW,
        )
    };
    if made == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The same file or folder, by the path that it has now.
pub(super) fn again(files: &PassthroughFs<()>, inode: u64) -> io::Result<File> {
    let path = CString::new(files.readlinkat_proc_file(inode)?.as_os_str().as_bytes())?;
    // SAFETY: the path ends in zero.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC) };
    if fd == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was just opened, and is nobody else's.
    let opened = unsafe { File::from_raw_fd(fd) };
    let found = opened.metadata()?;
    let (meant, _) = files.getattr(&Context::new(), inode, None)?;
    // Something else may have come to that path since.
    if (found.dev(), found.ino()) == (meant.st_dev, meant.st_ino) {
        Ok(opened)
    } else {
        Err(io::Error::from_raw_os_error(libc::ENOENT))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::devices::fs::ShareRoot;

    #[test]
    fn a_file_gets_a_second_name_by_where_it_is_now() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("a"), "text").unwrap();
        let files = ShareRoot::folder(&fs::File::open(folder.path()).unwrap()).unwrap().files;
        let inode = files.lookup(&Context::new(), 1, c"a").unwrap().inode;
        fs::rename(at("a"), at("moved")).unwrap();
        make(&files, inode, 1, c"b").unwrap();
        assert_eq!(fs::metadata(at("b")).unwrap().ino(), fs::metadata(at("moved")).unwrap().ino());
        let exists = make(&files, inode, 1, c"b").unwrap_err();
        assert_eq!(exists.raw_os_error(), Some(libc::EEXIST));
    }

    #[test]
    fn a_link_to_a_link_names_the_link() {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("nowhere", folder.path().join("a")).unwrap();
        let files = ShareRoot::folder(&fs::File::open(folder.path()).unwrap()).unwrap().files;
        let inode = files.lookup(&Context::new(), 1, c"a").unwrap().inode;
        make(&files, inode, 1, c"b").unwrap();
        assert_eq!(fs::read_link(folder.path().join("b")).unwrap().to_str(), Some("nowhere"));
    }

    #[test]
    fn what_lost_its_name_gets_none() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a"), "old").unwrap();
        let files = ShareRoot::folder(&fs::File::open(folder.path()).unwrap()).unwrap().files;
        let inode = files.lookup(&Context::new(), 1, c"a").unwrap().inode;
        fs::remove_file(folder.path().join("a")).unwrap();
        // As the kernel names what is gone: a trap for who trusts the path alone.
        fs::write(folder.path().join("a (deleted)"), "another").unwrap();
        let gone = make(&files, inode, 1, c"b").unwrap_err();
        assert_eq!(gone.raw_os_error(), Some(libc::ENOENT));
        assert!(!folder.path().join("b").exists());
    }
}
