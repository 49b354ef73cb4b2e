//! The first process of the process namespace that containers of a pod have together: it does nothing, and the kernel reaps what comes
//! to it when a program's children outlive it (pid_namespaces(7), "The namespace init process").

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;

use catalyst_agent_protocol::container::Process;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;

use super::launch::{clone, end};
use super::plan::REAPER;
use super::{Step, credentials, doing, root};
use crate::exec;

/// It, as the agent sees it; its end is that of all in its namespace.
#[derive(Debug)]
pub struct Reaper {
    pid: i32,
    process: OwnedFd,
}

impl Reaper {
    /// Starts one.
    pub fn start() -> io::Result<Self> {
        let null = || std::fs::File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from);
        let fds = [null()?, null()?, null()?];
        let pid = clone(&fds, REAPER, CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS)?;
        match exec::pidfd(pid) {
            Ok(process) => Ok(Self { pid, process }),
            Err(error) => {
                end(pid);
                Err(error.into())
            }
        }
    }

    /// Whether its namespace can be gone into.
    pub fn is_running(&self) -> bool {
        let mut fds = [PollFd::new(self.process.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO) == Ok(0)
    }
}

impl AsFd for Reaper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        end(self.pid);
    }
}

/// Is it, until the VM ends.
pub fn main() -> ExitCode {
    // SAFETY: numbers alone. Who is ignored as a parent has nothing to wait for (wait(2), "NOTES").
    unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
        // Containers have it in their /proc.
        libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0);
        libc::setsid();
    }
    if settle().is_err() {
        // Nobody hears it; that nothing can be started beside it is told then.
        return ExitCode::FAILURE;
    }
    loop {
        // SAFETY: it takes nothing.
        unsafe { libc::pause() };
    }
}

/// Has nothing of the VM's that a container could come to by it.
fn settle() -> Step<()> {
    let none: Option<&str> = None;
    let place = Path::new("/proc");
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .and_then(|()| mount(Some("none"), place, Some("tmpfs"), MsFlags::MS_RDONLY, none))
        .map_err(doing("mounting an empty root"))?;
    let empty = root::folder(place).map_err(doing("opening an empty root"))?;
    root::enter(empty.as_fd()).map_err(doing("changing to an empty root"))?;
    credentials::assume(&Process::default())
}
