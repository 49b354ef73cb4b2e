//! Processes held by a pidfd (`pidfd_open(2)`): what is done to one is done to it, and to no successor of its pid.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

/// A process, alive or ended.
#[derive(Debug)]
pub(crate) struct Process {
    pub pid: i32,
    pidfd: OwnedFd,
}

impl Process {
    /// The process that has that pid now.
    pub fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: plain system call; a descriptor that it returns is new and nobody else's.
        let pidfd = unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
            match libc::c_int::try_from(fd) {
                Ok(fd) if fd >= 0 => OwnedFd::from_raw_fd(fd),
                _ => return Err(io::Error::last_os_error()),
            }
        };
        Ok(Self { pid, pidfd })
    }

    /// A copy of the descriptor, which becomes readable when the process ends.
    pub fn pidfd(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }

    /// Waits for its end for at most that long (up to a minute); whether it has ended.
    pub fn ended_within(&self, time: Duration) -> bool {
        let milliseconds = u16::try_from(time.as_millis()).unwrap_or(u16::MAX);
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, PollTimeout::from(milliseconds)) {
                Err(Errno::EINTR) => {}
                other => return other.is_ok_and(|ready| ready > 0),
            }
        }
    }

    /// Sends the signal; to a process that has ended it is none.
    pub fn signal(&self, signal: Signal) {
        // SAFETY: plain system call on an open descriptor; the null pointer means "no siginfo"
        // (pidfd_send_signal(2)).
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                signal as libc::c_int,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            );
        }
    }
}
