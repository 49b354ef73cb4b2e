//! What a container finds in `/dev`: the OCI runtime specification, "Default Devices" and "/dev symbolic links".

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::stat::{Mode, SFlag, makedev, mknodat};
use nix::unistd::{UnlinkatFlags, symlinkat, unlinkat};

use super::inside::{self, Make};

/// Names with their numbers (the kernel's devices.txt).
const DEVICES: [(&str, u64, u64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
const LINKS: [(&str, &str); 6] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
    ("ptmx", "pts/ptmx"),
];

/// Makes them in the root; what is there already stays. The terminals' own multiplexer, which a root may have brought, does not:
/// it would be that of another instance of devpts.
pub fn make(root: BorrowedFd<'_>) -> io::Result<()> {
    let dev = inside::open(root, Path::new("/dev"), Make::Folder)?;
    let there = |made: nix::Result<()>| if made == Err(Errno::EEXIST) { Ok(()) } else { made };
    for (name, major, minor) in DEVICES {
        let mode = Mode::from_bits_truncate(0o666);
        there(mknodat(&dev, name, SFlag::S_IFCHR, mode, makedev(major, minor)))?;
    }
    if inside::has(dev.as_fd(), "ptmx") {
        unlinkat(&dev, "ptmx", UnlinkatFlags::NoRemoveDir)?;
    }
    for (name, to) in LINKS {
        there(symlinkat(to, &dev, name))?;
    }
    Ok(())
}
