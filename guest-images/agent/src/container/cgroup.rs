//! The container's cgroup (the kernel's cgroup-v2.rst), and word of what the kernel ends in it when memory is short.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use catalyst_agent_protocol::Control;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::session::Session;

/// What the container's is called.
const NAME: &str = "container";
/// How long the end of what is in it is waited for.
const END_LIMIT: Duration = Duration::from_secs(10);
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

/// That of one that joins, by its name.
pub fn of_joined(top: &Path, name: &str) -> PathBuf {
    top.join(format!("{NAME}-{name}"))
}

/// What a container may have at most; 0 is as much as there is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Processes.
    pub processes: u64,
    /// Memory in bytes.
    pub memory: u64,
}

/// Makes a container's cgroup, or has one that is there limit it so.
pub fn make(cgroup: &Path, limits: Limits) -> io::Result<()> {
    match fs::create_dir(cgroup) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let most = |limit: u64| if limit == 0 { "max".to_owned() } else { limit.to_string() };
    fs::write(cgroup.join("pids.max"), most(limits.processes))?;
    fs::write(cgroup.join("memory.max"), most(limits.memory))?;
    fs::write(cgroup.join("memory.oom.group"), "0")
}

/// Ends what is in a container's cgroup, and removes that.
pub fn remove(cgroup: &Path) -> io::Result<()> {
    fs::write(cgroup.join("cgroup.kill"), "1")?;
    let events = File::open(cgroup.join("cgroup.events"))?;
    let until = Instant::now() + END_LIMIT;
    loop {
        let mut text = [0; 512];
        let count = std::os::unix::fs::FileExt::read_at(&events, &mut text, 0)?;
        if text[..count].starts_with(b"populated 0") {
            return fs::remove_dir(cgroup);
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "its processes do not end"));
        }
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Tells the runtime when the kernel has ended one of a container's programs.
pub struct Watch {
    container: String,
    events: PathBuf,
    /// Its end ends the watching.
    _lives: io::PipeWriter,
    told: Mutex<u64>,
    session: Arc<Session>,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("events", &self.events).finish_non_exhaustive()
    }
}

impl Watch {
    /// Begins to watch the cgroup of a container, until this is dropped.
    pub fn begin(container: String, cgroup: &Path, session: &Arc<Session>) -> io::Result<Arc<Self>> {
        let events = cgroup.join("memory.events");
        let (ended, lives) = io::pipe()?;
        let session = Arc::clone(session);
        let watch = Arc::new(Self { container, events, _lives: lives, told: Mutex::new(0), session });
        let (path, watching) = (watch.events.clone(), Arc::downgrade(&watch));
        thread::spawn(move || {
            if let Err(error) = wait(&path, &ended, &watching) {
                eprintln!("catalyst-agent: {} cannot be watched: {error}", path.display());
            }
        });
        Ok(watch)
    }

    /// Tells what was not told yet, so that it comes before the end of a program that is about to be told.
    pub fn look(&self) {
        let count = fs::read_to_string(&self.events).map_or(0, |text| kills(&text));
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if count > *told {
            *told = count;
            self.session.tell(&Control::OutOfMemory { container: self.container.clone() });
        }
    }
}

fn wait(events: &Path, ended: &io::PipeReader, watch: &Weak<Watch>) -> io::Result<()> {
    let file = File::open(events)?;
    loop {
        match watch.upgrade() {
            Some(watch) => watch.look(),
            None => return Ok(()),
        }
        let mut fds = [(file.as_fd(), PollFlags::POLLPRI), (ended.as_fd(), PollFlags::POLLIN)]
            .map(|(fd, events)| PollFd::new(fd, events));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        if fds[1].any() == Some(true) {
            return Ok(());
        }
        // What has changed is not told again once it was read through this descriptor.
        let mut text = [0; 512];
        std::os::unix::fs::FileExt::read_at(&file, &mut text, 0)?;
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
        let cgroup = of_joined(top.path(), "c1");
        for (limit, written) in [(100, "100"), (0, "max")] {
            make(&cgroup, Limits { processes: limit, memory: limit }).unwrap();
            for name in ["pids.max", "memory.max"] {
                assert_eq!(fs::read_to_string(cgroup.join(name)).unwrap(), written);
            }
        }
    }
}
