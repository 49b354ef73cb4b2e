//! Waiting for processes by an event: pidfd_open(2), not by looking again and again.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// A process that is waited for.
#[derive(Debug)]
pub struct Watched {
    descriptor: OwnedFd,
}

impl Watched {
    /// Watches the process `pid`; `None` if there is none or it cannot be watched.
    pub fn new(pid: u32) -> Option<Self> {
        let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
        let descriptor = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        Some(Self { descriptor })
    }

    /// Watches the process `pid` if its command is called `name` (at most 15 characters):
    /// a pid told by a daemon in another pid namespace is another process here.
    pub fn named(pid: u32, name: &str) -> Option<Self> {
        let watched = Self::new(pid)?;
        let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        (comm.trim_end() == name).then_some(watched)
    }

    /// Waits until the process has ended; false if it has not within `limit`.
    pub fn ended_within(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.descriptor.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Err(Errno::EINTR) => {}
                Ok(count) => return count > 0,
                Err(_) => return false,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_is_seen_to_live_and_to_end() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let watched = Watched::new(child.id()).unwrap();
        assert!(!watched.ended_within(Duration::from_millis(20)));
        drop(child.stdin.take());
        assert!(watched.ended_within(Duration::from_secs(10)));
        child.wait().unwrap();
    }

    #[test]
    fn a_name_that_does_not_fit_is_not_watched() {
        assert!(Watched::named(std::process::id(), "surely-not-this").is_none());
        assert!(Watched::new(0).is_none());
    }
}
