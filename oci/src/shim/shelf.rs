//! Where the trees of containers that join are mounted, while the process that serves trees runs: it has no rights to mount any more.
//!
//! A thread has a mount namespace of its own with an empty root, of which that process has a copy. Both are peers: what is mounted below
//! one is there in the other (the kernel's `sharedsubtree.rst`), once that process has it in its place ([`super::trees::Server::begin`]).

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{SFlag, fstat};
use tokio::sync::oneshot;

use super::trees::{self, Attribute};
use crate::failure::{Outcome, Tried, said};

/// A folder that every system has; what is there is not needed.
const PLACE: &str = "/dev";
/// Its folders and files have nothing in them.
const SIZE: &str = "size=1m,nr_inodes=16k,mode=755";
/// `MOVE_MOUNT_F_EMPTY_PATH`.
const FROM_EMPTY_PATH: libc::c_uint = 4;
const NOTHING: Option<&str> = None;
/// Stack of the thread.
const STACK: usize = 256 * 1024;

/// The mounts. They are gone with this process.
#[derive(Debug)]
pub struct Shelf {
    work: mpsc::Sender<Work>,
}

#[derive(Debug)]
struct Work {
    folder: PathBuf,
    /// What is to be mounted; none takes all away that is.
    trees: Option<Vec<(String, OwnedFd)>>,
    done: oneshot::Sender<io::Result<()>>,
}

impl Shelf {
    /// Makes it, and the tree to serve.
    pub fn make() -> Outcome<(Self, OwnedFd)> {
        let what = || "make a place for the files of containers that join".to_owned();
        let (work, orders) = mpsc::channel::<Work>();
        let (tell, made) = mpsc::channel();
        let thread = std::thread::Builder::new().name("shelf".to_owned()).stack_size(STACK);
        let living = move || {
            if tell.send(enter()).is_err() {
                return;
            }
            while let Ok(Work { folder, trees, done }) = orders.recv() {
                // Whoever asked may have ended meanwhile.
                let _ = done.send(match trees {
                    Some(trees) => put(&folder, &trees),
                    None => take(&folder),
                });
            }
        };
        thread.spawn(living).tried(what)?;
        match made.recv() {
            Ok(entered) => Ok((Self { work }, entered.tried(what)?)),
            Err(_) => said("The thread that mounts the files of containers has ended"),
        }
    }

    /// Mounts trees in a folder of that name.
    pub async fn put(&self, name: &str, trees: Vec<(String, OwnedFd)>) -> Outcome {
        self.ask(name, Some(trees)).await.tried(|| "mount the container's files for its VM".to_owned())
    }

    /// Takes them away.
    pub async fn take(&self, name: &str) -> Outcome {
        self.ask(name, None).await.tried(|| "take the container's files away from its VM".to_owned())
    }

    async fn ask(&self, name: &str, trees: Option<Vec<(String, OwnedFd)>>) -> io::Result<()> {
        let (done, answer) = oneshot::channel();
        let work = Work { folder: Path::new("/").join(name), trees, done };
        self.work.send(work).map_err(io::Error::other)?;
        answer.await.map_err(io::Error::other)?
    }
}

/// Enters a mount namespace with nothing in it; the tree to serve.
fn enter() -> io::Result<OwnedFd> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NOTHING)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("tmpfs"), PLACE, Some("tmpfs"), flags, Some(SIZE))?;
    nix::unistd::chdir(PLACE)?;
    // So nothing of the host's is kept from being unmounted (pivot_root(2), "pivot_root(".", ".")").
    nix::unistd::pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")?;
    mount(NOTHING, "/", NOTHING, MsFlags::MS_SHARED, NOTHING)?;
    let tree = trees::clone(Path::new("/"), false)?;
    trees::set(&tree, &[Attribute::ReadOnly, Attribute::NoDevices])?;
    Ok(tree)
}

fn put(folder: &Path, trees: &[(String, OwnedFd)]) -> io::Result<()> {
    fs::create_dir(folder)?;
    let mounted = trees.iter().try_for_each(|(name, tree)| {
        let at = folder.join(name);
        let kind = SFlag::from_bits_truncate(fstat(tree.as_fd())?.st_mode & SFlag::S_IFMT.bits());
        if kind == SFlag::S_IFDIR {
            fs::create_dir(&at)?;
        } else {
            File::create_new(&at)?;
        }
        trees::set(tree, &[Attribute::NoDevices])?;
        attach(tree, &at)
    });
    if mounted.is_err() {
        // The first failure is the one that is told.
        let _ = take(folder);
    }
    mounted
}

/// Puts a mount that is nowhere yet in its place (`move_mount(2)`).
fn attach(tree: &OwnedFd, at: &Path) -> io::Result<()> {
    let at = CString::new(at.as_os_str().as_bytes())?;
    let (from, to) = (tree.as_raw_fd(), libc::AT_FDCWD);
    // SAFETY: both paths are strings.
    let moved =
        unsafe { libc::syscall(libc::SYS_move_mount, from, c"".as_ptr(), to, at.as_ptr(), FROM_EMPTY_PATH) };
    if moved == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn take(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let at = entry?.path();
        match umount2(&at, MntFlags::MNT_DETACH) {
            // It was not mounted yet.
            Err(nix::errno::Errno::EINVAL) => {}
            unmounted => unmounted?,
        }
        let removed = if at.is_dir() { fs::remove_dir(&at) } else { fs::remove_file(&at) };
        removed?;
    }
    fs::remove_dir(folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::Tree;

    #[tokio::test]
    async fn what_is_put_there_is_seen_in_the_tree_until_it_is_taken() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: mounts are root's");
            return;
        }
        let (shelf, tree) = Shelf::make().unwrap();
        // As the process that serves it has it: somewhere in another namespace.
        let (ask, asked) = mpsc::channel::<PathBuf>();
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NOTHING).unwrap();
            attach(&tree, Path::new("/mnt")).unwrap();
            tell.send(None).unwrap();
            for path in asked {
                tell.send(fs::read_to_string(Path::new("/mnt").join(path)).ok()).unwrap();
            }
        });
        let read = |path: &str| {
            ask.send(path.into()).unwrap();
            told.recv().unwrap()
        };
        assert_eq!(told.recv(), Ok(None), "it is mounted: what is put before is not seen");
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), "text").unwrap();
        let open = |path: PathBuf| {
            let tree = Tree { name: String::new(), path, recursive: true, read_only: false };
            trees::open(&tree, &[]).unwrap()
        };
        for _ in 0..2 {
            let some = vec![
                ("root".to_owned(), open(folder.path().into())),
                ("m1".to_owned(), open(folder.path().join("file"))),
            ];
            shelf.put("c1", some).await.unwrap();
            assert_eq!(read("c1/root/file").as_deref(), Some("text"));
            assert_eq!(read("c1/m1").as_deref(), Some("text"));
            assert!(shelf.put("c1", Vec::new()).await.is_err(), "the name is taken");
            shelf.take("c1").await.unwrap();
            assert_eq!((read("c1/root/file"), read("c1/m1")), (None, None));
        }
        assert!(fs::read_dir("/dev").unwrap().count() > 0, "the process itself sees what it saw");
    }
}
