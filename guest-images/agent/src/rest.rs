//! Coming to rest, so that a copy of the guest's memory is small and its disk whole.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::num::NonZeroUsize;
use std::process::Command;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

use crate::cpu_share;
use crate::identity::host_keys;
use crate::session::Config;

/// The argument with which the program fills free memory and ends.
pub const FILL: &str = "--fill-free-memory";
/// Memory that is left free meanwhile, so that nothing else is pushed out, in KiB.
const LEFT_KIB: usize = 24 * 1024;
const PAGE: usize = 4096;

/// Has sshd wait for the keys of the next guest, writes out what is held back, and fills free memory with zeros. The next guest's
/// agent comes first in it.
pub fn rest(config: &Config) -> io::Result<()> {
    // A VM that is a container has no sshd, and no other service to go before.
    if !config.files_only() && config.keeper.is_none() {
        host_keys::park()?;
        cpu_share::go_first();
    }
    nix::unistd::sync();
    if config.files_only() {
        return Ok(());
    }
    // In a process of its own, whose end gives all of it back, and which is the first to go if memory is short.
    let status = Command::new("/proc/self/exe").arg(OsStr::new(FILL)).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("filling free memory: {status}"))) }
}

/// Fills free memory with zeros. The kernel clears each page that it gives out; one that is only read would be the page
/// of zeros that all share, so each is written.
pub fn fill() -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", "1000")?;
    let text = fs::read_to_string("/proc/meminfo")?;
    let Some(length) = free_kib(&text).and_then(|kib| NonZeroUsize::new(kib.saturating_sub(LEFT_KIB) * 1024))
    else {
        return Ok(());
    };
    let (protection, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE);
    // SAFETY: a new mapping, to which nothing refers but what follows.
    let start = unsafe { mmap_anonymous(None, length, protection, flags | MapFlags::MAP_NORESERVE)? };
    for offset in (0..length.get()).step_by(PAGE) {
        // SAFETY: the offset lies in the mapping.
        unsafe { start.cast::<u8>().add(offset).write_volatile(0) };
    }
    Ok(())
}

/// `MemFree` of proc_meminfo(5).
fn free_kib(text: &str) -> Option<usize> {
    text.lines()
        .find_map(|line| line.strip_prefix("MemFree:")?.trim().strip_suffix("kB")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_is_what_the_kernel_says() {
        assert_eq!(free_kib("MemTotal:  1000 kB\nMemFree:     814 kB\n"), Some(814));
        assert_eq!(free_kib("MemFree: lots"), None);
    }
}
