//! Trees that the caller has opened, mounted by this process itself below its root.
//!
//! A tree is a mount that is nowhere yet (open_tree(2) with `OPEN_TREE_CLONE`), or a file or folder by a descriptor with `O_PATH`,
//! of which a mount is made. What is at its root is a folder or a single file.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::path::Path;
use std::str::FromStr;

use super::{FoldersError, failed};
use crate::devices::fs::mounting;

/// Most trees; the numbers of files tell so many mounts apart.
pub const MAX_TREES: usize = 200;
/// Longest name of a tree.
const MAX_NAME: usize = 64;
/// Files that may be open, if the kernel's own limit (proc_sys_fs(5), `nr_open`) is as it most often is.
const MANY: u64 = 1 << 20;
/// `MOVE_MOUNT_F_EMPTY_PATH` of move_mount(2).
const FROM_EMPTY_PATH: libc::c_uint = 4;

/// A tree as the command line has it: `NAME=FD`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// Its name below the root.
    pub name: String,
    /// The descriptor.
    pub fd: RawFd,
}

impl FromStr for Tree {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, fd) = text.split_once('=').ok_or("a tree is NAME=FD")?;
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let good = (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(is_plain);
        if !good || name.starts_with('.') {
            return Err(
                "a tree's name is 1 to 64 letters, digits, '.', '_', '-', and does not begin with '.'",
            );
        }
        match fd.parse() {
            Ok(fd) if fd > 2 => Ok(Self { name: name.to_owned(), fd }),
            _ => Err("a tree's descriptor is a number from 3 on"),
        }
    }
}

/// A tree that is mounted nowhere yet.
#[derive(Debug)]
pub(super) struct Detached {
    name: String,
    mount: File,
}

/// Takes the trees over. Call it in the caller's mount namespace: of a file or folder a mount is made only there.
pub(super) fn take(trees: Vec<Tree>) -> Result<Vec<Detached>, FoldersError> {
    if trees.len() > MAX_TREES {
        return Err(failed("serve so many trees; 200 are the most")(io::ErrorKind::InvalidInput.into()));
    }
    let detached = |tree: Tree| {
        // SAFETY: the caller gave the descriptor to this process alone.
        let given = unsafe { File::from_raw_fd(tree.fd) };
        let mount = match mounting::clone_of(&given) {
            Ok(mount) => mount,
            // It is mounted nowhere, and so is itself what is wanted.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => given,
            Err(error) => return Err(failed("make a mount of a tree")(error)),
        };
        mounting::guard(&mount).map_err(failed("keep devices of a tree from being opened"))?;
        Ok(Detached { name: tree.name, mount })
    };
    trees.into_iter().map(detached).collect()
}

/// Mounts them below the root folder of the process's own namespace, and lets nothing more be made in that.
pub(super) fn mount(trees: &[Detached]) -> Result<(), FoldersError> {
    for Detached { name, mount } in trees {
        let path = Path::new("/").join(name);
        let is_folder = mount.metadata().map_err(failed("look at a tree"))?.is_dir();
        let made = if is_folder { std::fs::create_dir(&path) } else { File::create_new(&path).map(drop) };
        made.map_err(failed("make the place of a tree, whose name must be its own"))?;
        let path = CString::new(format!("/{name}")).map_err(|error| failed("name a tree")(error.into()))?;
        // SAFETY: both paths are strings.
        let moved = unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                mount.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_FDCWD,
                path.as_ptr(),
                FROM_EMPTY_PATH,
            )
        };
        if moved == -1 {
            return Err(failed("mount a tree")(io::Error::last_os_error()));
        }
    }
    // Its rights over files would let it write even there.
    let root = File::open("/").map_err(failed("open the root"))?;
    mounting::write_protect(&root).map_err(failed("protect the root"))
}

/// Each file that the guest remembers is one open here: lets there be many, as far as the kernel does.
pub(super) fn allow_many_files() {
    let limit = libc::rlimit { rlim_cur: MANY, rlim_max: MANY };
    // SAFETY: the kernel reads the struct. Where it refuses, there are as many as before.
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_a_plain_name_and_a_descriptor() {
        assert_eq!("root=7".parse(), Ok(Tree { name: "root".into(), fd: 7 }));
        for bad in
            ["root", "=7", "..=7", "a/b=7", "root=2", "root=x", "root=7=8", &format!("{}=7", "a".repeat(65))]
        {
            assert!(bad.parse::<Tree>().is_err(), "{bad}");
        }
    }
}
