//! The container's cgroup (the kernel's cgroup-v2.rst), and word of what the kernel ends in it when memory is short.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use catalyst_agent_protocol::Control;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::session::Session;

/// What the container's is called.
const NAME: &str = "container";
/// What is counted for it, and shared out in it.
const CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// Has the controllers count for what is below the top; one that this kernel has not is missed where it is used.
pub fn enable(top: &Path) {
    for name in CONTROLLERS {
        let _ = fs::write(top.join("cgroup.subtree_control"), format!("+{name}"));
    }
}

/// The container's cgroup.
pub fn of_container(top: &Path) -> PathBuf {
    top.join(NAME)
}

/// Makes the container's cgroup; 0 processes are as many as there can be.
pub fn make(top: &Path, most_processes: u64) -> io::Result<PathBuf> {
    let cgroup = of_container(top);
    match fs::create_dir(&cgroup) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let most = if most_processes == 0 { "max".to_owned() } else { most_processes.to_string() };
    fs::write(cgroup.join("pids.max"), most)?;
    fs::write(cgroup.join("memory.oom.group"), "0")?;
    Ok(cgroup)
}

/// Tells the runtime when the kernel has ended one of the container's programs.
pub struct Watch {
    events: PathBuf,
    told: Mutex<u64>,
    session: Arc<Session>,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("events", &self.events).finish_non_exhaustive()
    }
}

impl Watch {
    /// Begins to watch a cgroup.
    pub fn begin(cgroup: &Path, session: &Arc<Session>) -> Arc<Self> {
        let events = cgroup.join("memory.events");
        let watch = Arc::new(Self { events, told: Mutex::new(0), session: Arc::clone(session) });
        let watching = Arc::clone(&watch);
        thread::spawn(move || {
            if let Err(error) = watching.wait() {
                eprintln!("catalyst-agent: {} cannot be watched: {error}", watching.events.display());
            }
        });
        watch
    }

    /// Tells what was not told yet, so that it comes before the end of a program that is about to be told.
    pub fn look(&self) {
        let count = fs::read_to_string(&self.events).map_or(0, |text| kills(&text));
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if count > *told {
            *told = count;
            self.session.tell(&Control::OutOfMemory);
        }
    }

    fn wait(&self) -> io::Result<()> {
        let file = File::open(&self.events)?;
        loop {
            self.look();
            let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            // What has changed is not told again once it was read through this descriptor.
            let mut text = [0; 512];
            std::os::unix::fs::FileExt::read_at(&file, &mut text, 0)?;
        }
    }
}

/// `oom_kill` of memory.events.
fn kills(text: &str) -> u64 {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_kills_are_counted() {
        assert_eq!(kills("low 0\nhigh 3\nmax 4\noom 5\noom_kill 2\noom_group_kill 7\n"), 2);
        assert_eq!(kills("low 0\n"), 0);
    }

    #[test]
    fn a_cgroup_has_its_limit() {
        let top = tempfile::tempdir().unwrap();
        for (limit, written) in [(100, "100"), (0, "max")] {
            let cgroup = make(top.path(), limit).unwrap();
            assert_eq!(fs::read_to_string(cgroup.join("pids.max")).unwrap(), written);
        }
    }
}
