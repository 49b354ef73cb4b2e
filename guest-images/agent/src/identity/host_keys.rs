//! The SSH host keys, and the sshd that reads them once, when it starts.
//!
//! Starting sshd is most of what a copy does until it greets. So in a template sshd has started already, as far as its
//! first key: that is a FIFO there, and sshd waits for somebody to write it ([`park`]). It goes on with the keys of the copy.
//! A copy of a guest whose sshd is past that has it start anew.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use catalyst_agent_protocol::{HostKey, Problem};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

use super::{Step, doing};
use crate::files::replace;
use crate::session::Config;

/// The key that sshd reads first.
const FIRST: &str = "etc/ssh/ssh_host_ed25519_key";
/// Where sshd writes its pid when it listens.
const RUN: &str = "/run";
const PID_FILE: &str = "sshd.pid";
/// How long an sshd that has new keys may take until it tells that it listens; one that has not told by then is tried.
const LISTENS_WITHIN: Duration = Duration::from_secs(5);

/// An sshd that was given new keys.
#[must_use]
pub struct Restarting(Inotify);

impl Restarting {
    fn watch() -> nix::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        inotify.add_watch(RUN, AddWatchFlags::IN_CLOSE_WRITE)?;
        Ok(Self(inotify))
    }

    /// Waits until it tells that it listens: then it writes its pid to a file. Whether it did.
    pub fn wait(self) -> bool {
        let begun = Instant::now();
        while let Some(left) = LISTENS_WITHIN.checked_sub(begun.elapsed()) {
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return false,
            }
            let events = self.0.read_events().unwrap_or_default();
            if events.iter().any(|event| event.name.as_deref() == Some(OsStr::new(PID_FILE))) {
                return true;
            }
        }
        false
    }
}

/// Starts sshd anew, as far as its first key.
pub fn park(config: &Config) -> io::Result<()> {
    let path = config.root.join(FIRST);
    fs::remove_file(&path)?;
    mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
    let status = Command::new("systemctl").args(["--no-block", "restart", "ssh.service"]).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("systemctl restart: {status}"))) }
}

/// Writes the keys. If an sshd runs that has others, it gets these.
pub fn apply(config: &Config, keys: &[HostKey]) -> Step<Option<Restarting>> {
    let first = config.root.join(FIRST);
    let parked = fs::symlink_metadata(&first).is_ok_and(|about| about.file_type().is_fifo());
    let door = if parked { open_door(&first).map_err(doing("opening sshd's door"))? } else { None };
    let mut changed = false;
    for key in keys {
        changed |= write(config, key)?;
    }
    if config.files_only() || !changed {
        return Ok(None);
    }
    let restarting = Restarting::watch().map_err(doing("watching for sshd"))?;
    let told = match door {
        Some(mut door) => {
            let key = fs::read(&first).map_err(doing("reading the first SSH host key"))?;
            door.write_all(&key).map(|()| true)
        }
        None => hang_up(),
    };
    let told = told.map_err(doing("giving sshd its keys"))?;
    Ok(told.then_some(restarting))
}

/// The FIFO, if sshd waits behind it.
fn open_door(path: &Path) -> io::Result<Option<fs::File>> {
    match OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path) {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        opened => opened.map(Some),
    }
}

/// Writes a key; whether it was another before.
fn write(config: &Config, key: &HostKey) -> Result<bool, Problem> {
    let folder = config.root.join("etc/ssh");
    let private = folder.join(format!("ssh_host_{}_key", key.kind));
    let public = folder.join(format!("ssh_host_{}_key.pub", key.kind));
    let line = |text: &str| format!("{}\n", text.trim_end());
    let own = line(&key.private);
    let is_file = fs::symlink_metadata(&private).is_ok_and(|about| about.is_file());
    let same = is_file && fs::read(&private).is_ok_and(|old| old == own.as_bytes());
    replace(&private, own.as_bytes(), 0o600, None)
        .and_then(|()| replace(&public, line(&key.public).as_bytes(), 0o644, None))
        .map_err(doing("writing the SSH host keys"))?;
    Ok(!same)
}

/// Has a running sshd start anew (sshd(8), SIGHUP); whether there is one. Sessions live on.
fn hang_up() -> io::Result<bool> {
    let pid_file = Path::new(RUN).join(PID_FILE);
    let Some(pid) = fs::read_to_string(pid_file).ok().and_then(|text| text.trim().parse::<i32>().ok()) else {
        return Ok(false);
    };
    let comm = PathBuf::from(format!("/proc/{pid}/comm"));
    if pid <= 1 || !fs::read_to_string(comm).is_ok_and(|name| name == "sshd\n") {
        return Ok(false);
    }
    match kill(Pid::from_raw(pid), Signal::SIGHUP) {
        Err(Errno::ESRCH) => Ok(false),
        sent => sent.map(|()| true).map_err(io::Error::from),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::thread;

    use super::*;

    #[test]
    fn behind_a_fifo_that_nobody_reads_no_sshd_waits() {
        let folder = std::env::temp_dir().join(format!("catalyst-agent-door-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("door");
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        assert!(open_door(&path).unwrap().is_none());
        let reader = thread::spawn({
            let path = path.clone();
            move || {
                let mut key = String::new();
                fs::File::open(path).unwrap().read_to_string(&mut key).unwrap();
                key
            }
        });
        let mut door = loop {
            if let Some(door) = open_door(&path).unwrap() {
                break door;
            }
            thread::yield_now();
        };
        door.write_all(b"key\n").unwrap();
        drop(door);
        assert_eq!(reader.join().unwrap(), "key\n");
        fs::remove_dir_all(folder).unwrap();
    }
}
