//! Paths in a container's root, seen from outside: however its links point, nothing beyond the root is reached.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{Mode, SFlag, fstat, fstatat, mkdirat};

/// Links on one way, as many as the kernel follows (path_resolution(7)).
const MAX_LINKS: usize = 40;
/// Parts of one way, those of links among them.
const MAX_PARTS: usize = 4096;

/// What is made where nothing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Make {
    /// Nothing.
    Nothing,
    /// A folder, and those above it.
    Folder,
    /// An empty file, and the folders above it.
    File,
}

/// Opens (`O_PATH`) what `path` leads to below `root`.
pub fn open(root: BorrowedFd<'_>, path: &Path, make: Make) -> io::Result<OwnedFd> {
    // The folders from the root to where the way is; `..` goes back by one, and never beyond the first.
    let mut way: Vec<OwnedFd> = vec![root.try_clone_to_owned()?];
    let mut rest: VecDeque<OsString> = parts(path);
    let (mut links, mut steps) = (0, 0);
    while let Some(part) = rest.pop_front() {
        steps += 1;
        if steps > MAX_PARTS {
            return Err(Errno::ENAMETOOLONG.into());
        }
        if part == ".." {
            if way.len() > 1 {
                way.pop();
            }
            continue;
        }
        let here = way.last().ok_or(io::ErrorKind::NotFound)?;
        let next = match step(here.as_fd(), &part) {
            Err(Errno::ENOENT) if make != Make::Nothing => {
                let file = make == Make::File && rest.is_empty();
                create(here.as_fd(), &part, file)?;
                step(here.as_fd(), &part)?
            }
            next => next?,
        };
        if kind(next.as_fd())? != SFlag::S_IFLNK {
            way.push(next);
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(Errno::ELOOP.into());
        }
        let target = PathBuf::from(readlinkat(&next, "")?);
        if target.is_absolute() {
            way.truncate(1);
        }
        for part in parts(&target).into_iter().rev() {
            rest.push_front(part);
        }
    }
    way.pop().ok_or_else(|| io::ErrorKind::NotFound.into())
}

fn parts(path: &Path) -> VecDeque<OsString> {
    let named = |component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    };
    path.components().filter_map(named).collect()
}

fn step(folder: BorrowedFd<'_>, name: &OsString) -> nix::Result<OwnedFd> {
    openat(folder, name.as_os_str(), OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
}

fn create(folder: BorrowedFd<'_>, name: &OsString, file: bool) -> nix::Result<()> {
    let made = if file {
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        openat(folder, name.as_os_str(), flags, Mode::from_bits_truncate(0o644)).map(drop)
    } else {
        mkdirat(folder, name.as_os_str(), Mode::from_bits_truncate(0o755))
    };
    // Somebody on the host was quicker.
    if made == Err(Errno::EEXIST) { Ok(()) } else { made }
}

fn kind(fd: BorrowedFd<'_>) -> nix::Result<SFlag> {
    Ok(SFlag::from_bits_truncate(fstat(fd)?.st_mode & SFlag::S_IFMT.bits()))
}

/// The permission bits.
pub fn mode(fd: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(fstat(fd)?.st_mode & 0o7777)
}

/// Whether the folder has such an entry, if only a link that leads nowhere.
pub fn has(folder: BorrowedFd<'_>, name: &str) -> bool {
    fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok()
}

/// A path by which system calls that know none but paths reach an open file.
pub fn path_of(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Whether a path of the runtime's is one: absolute, without NUL.
pub fn is_absolute(path: &str) -> bool {
    path.starts_with('/')
        && !path.as_bytes().contains(&0)
        && Path::new(path).as_os_str().as_bytes().len() < 4096
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::symlink;

    use super::*;

    struct Root(tempfile::TempDir);

    impl Root {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        /// Where a path of the root leads to, as one from its outside.
        fn find(&self, path: &str, make: Make) -> io::Result<PathBuf> {
            let fd = open(File::open(self.0.path())?.as_fd(), Path::new(path), make)?;
            fs::read_link(path_of(fd.as_fd()))
        }
    }

    #[test]
    fn links_that_lead_out_stay_in() {
        let root = Root::new();
        let top = root.0.path();
        fs::create_dir_all(top.join("etc/deep")).unwrap();
        symlink("/etc", top.join("absolute")).unwrap();
        symlink("../../../../etc", top.join("etc/up")).unwrap();
        for path in ["/absolute/deep", "/etc/up/deep", "/../../etc/deep", "etc/./deep/../deep"] {
            assert_eq!(root.find(path, Make::Nothing).unwrap(), top.join("etc/deep"), "{path}");
        }
        assert_eq!(root.find("/..", Make::Nothing).unwrap(), top);
        let missing = root.find("/absolute/passwd", Make::Nothing).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound, "the machine's own has one");
    }

    #[test]
    fn what_is_missing_is_made_where_links_lead() {
        let root = Root::new();
        let top = root.0.path();
        symlink("/run/resolve/stub.conf", top.join("resolv.conf")).unwrap();
        let made = root.find("/resolv.conf", Make::File).unwrap();
        assert_eq!(made, top.join("run/resolve/stub.conf"));
        assert!(made.is_file());
        assert!(root.find("/a/b/c", Make::Folder).unwrap().is_dir());
        assert_eq!(root.find("/a/b/c", Make::File).unwrap(), top.join("a/b/c"), "what is there stays");
        let through = root.find("/run/resolve/stub.conf/below", Make::Folder).unwrap_err();
        assert_eq!(through.raw_os_error(), Some(libc::ENOTDIR));
    }

    #[test]
    fn rings_of_links_end() {
        let root = Root::new();
        symlink("b", root.0.path().join("a")).unwrap();
        symlink("a", root.0.path().join("b")).unwrap();
        let error = root.find("/a", Make::Folder).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }
}
