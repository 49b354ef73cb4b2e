//! Memory that was short in the guest, told to the engine: it hears of it from the container's cgroup, which knows nothing of guests.
//!
//! So the cgroup is brought to the same end: its limit is set to little more than what is used, and a child that takes more is ended by
//! the host's kernel, which tells the engine (`Documentation/admin-guide/cgroup-v1/memory.rst`, section 10; `cgroup-v2.rst`,
//! `memory.events`).

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Containers of a VM for which memory was short, by their names there.
#[derive(Debug, Default)]
pub struct Short(Mutex<BTreeSet<String>>);

impl Short {
    fn all(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that it was.
    pub fn note(&self, name: String) {
        // What a guest may make up is not kept beyond measure.
        let mut all = self.all();
        if all.len() < MOST_SHORT {
            all.insert(name);
        }
    }

    /// Whether it was, since this was asked last.
    pub fn take(&self, name: &str) -> bool {
        self.all().remove(name)
    }
}

/// Most names that are kept.
const MOST_SHORT: usize = 1024;
/// How long the engine is left to hear of it before the container's end, which could be told first: Docker's daemon forgets what it hears
/// after that, and with it that memory was short. Nothing tells that it has heard.
const HEARD_WITHIN: Duration = Duration::from_millis(250);
/// What the child may take before it is ended, and what it takes.
const ROOM: u64 = 4 << 20;
const TAKEN: usize = 64 << 20;
/// Smallest page there is.
const PAGE: usize = 4096;
/// Usage and limit in either version.
const FILES: [(&str, &str); 2] =
    [("memory.usage_in_bytes", "memory.limit_in_bytes"), ("memory.current", "memory.max")];

/// Tells it. Nothing of the container is to run any more: what is to is the VM's process at most, which is left alone.
pub fn tell(cgroup: &[PathBuf]) -> io::Result<()> {
    let Some((usage, limit)) = find(cgroup) else { return Ok(()) };
    let used: u64 = std::fs::read_to_string(usage)?.trim().parse().map_err(io::Error::other)?;
    std::fs::write(limit, (used + ROOM).to_string())?;
    take()?;
    std::thread::sleep(HEARD_WITHIN);
    Ok(())
}

fn find(cgroup: &[PathBuf]) -> Option<(PathBuf, PathBuf)> {
    let both = |folder: &Path, (usage, limit): (&str, &str)| (folder.join(usage), folder.join(limit));
    let all = cgroup.iter().flat_map(|folder| FILES.map(|files| both(folder, files)));
    all.into_iter().find(|(usage, limit)| usage.exists() && limit.exists())
}

/// Has a child take memory until it is ended, as the first that the kernel ends.
fn take() -> io::Result<()> {
    // SAFETY: the child makes system calls, writes to memory of its own, and ends.
    let child = unsafe { libc::fork() };
    if child == -1 {
        return Err(io::Error::last_os_error());
    }
    if child == 0 {
        // SAFETY: strings end with zero; the mapping is as long as what is written of it.
        unsafe {
            let file = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            libc::write(file, c"1000".as_ptr().cast(), 4);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let memory = libc::mmap(ptr::null_mut(), TAKEN, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            if memory != libc::MAP_FAILED {
                for at in (0..TAKEN).step_by(PAGE) {
                    memory.cast::<u8>().add(at).write_volatile(1);
                }
            }
            libc::_exit(0);
        }
    }
    // SAFETY: the child is ours and not waited for yet.
    unsafe { libc::waitpid(child, ptr::null_mut(), 0) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_comes_close_to_what_is_used() {
        let folder = tempfile::tempdir().unwrap();
        assert!(tell(&[folder.path().to_owned()]).is_ok(), "without a controller there is nobody to tell");
        for (name, text) in [("memory.current", "1048576\n"), ("memory.max", "max\n")] {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        tell(&["/nowhere".into(), folder.path().to_owned()]).unwrap();
        let limit = std::fs::read_to_string(folder.path().join("memory.max")).unwrap();
        assert_eq!(limit, ((1 << 20) + ROOM).to_string());
    }
}
