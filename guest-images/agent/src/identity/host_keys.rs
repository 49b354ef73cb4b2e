//! The SSH host keys, and the sshd that reads them once, when it starts.
//!
//! Starting sshd is most of what a copy does until it greets. So in a template sshd has started already, as far as its
//! configuration, which includes a file: that is a FIFO there, and sshd waits for somebody to write it ([`park`]). It goes on
//! when the keys of the copy are there. A copy of a guest whose sshd is past that has it start anew.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use catalyst_agent_protocol::{HostKey, Identity, Problem};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

use super::{Step, doing};
use crate::files::Put;
use crate::session::Config;

/// What sshd's configuration includes, before it reads its keys.
const DOOR: &str = "/run/catalyst/sshd.conf";
/// Where sshd writes its pid when it listens.
const RUN: &str = "/run";
const PID_FILE: &str = "sshd.pid";
/// What it is called, and calls itself when it listens.
const NAME: &str = "sshd\n";
const LISTENER: &[u8] = b"[listener]";
/// How long an sshd that has new keys may take until it tells that it listens; one that has not told by then is tried.
const LISTENS_WITHIN: Duration = Duration::from_secs(5);

/// An sshd that was given new keys.
#[must_use]
pub struct Restarting {
    told: Inotify,
    /// It listened when it was given them, and may do so for a while with those of before.
    listened: bool,
}

impl Restarting {
    fn watch() -> nix::Result<Self> {
        let told = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        told.add_watch(RUN, AddWatchFlags::IN_CLOSE_WRITE)?;
        Ok(Self { told, listened: false })
    }

    /// Whether it may answer with the keys of before.
    pub fn has_old_keys(&self) -> bool {
        self.listened
    }

    /// Waits until it tells that it listens: then it writes its pid to a file. Whether it did.
    pub fn wait(&mut self) -> bool {
        let begun = Instant::now();
        while let Some(left) = LISTENS_WITHIN.checked_sub(begun.elapsed()) {
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.told.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return false,
            }
            let events = self.told.read_events().unwrap_or_default();
            if events.iter().any(|event| event.name.as_deref() == Some(OsStr::new(PID_FILE))) {
                self.listened = false;
                return true;
            }
        }
        false
    }

    /// Has a running sshd start anew (sshd(8), SIGHUP); whether there is one. Sessions live on.
    ///
    /// One that is just starting ends by the signal, and may have read the keys of before: it is waited for.
    fn hang_up(&mut self, may_be_starting: bool) -> io::Result<bool> {
        let found = listening().or_else(|| {
            let told = may_be_starting && runs(Path::new("/proc")) && self.wait();
            told.then(listening).flatten()
        });
        let Some(pid) = found else { return Ok(false) };
        match kill(pid, Signal::SIGHUP) {
            Err(Errno::ESRCH) => Ok(false),
            sent => sent.map(|()| true).map_err(io::Error::from),
        }
    }
}

/// Starts sshd anew, as far as its configuration.
pub fn park() -> io::Result<()> {
    let door = Path::new(DOOR);
    if let Some(folder) = door.parent() {
        fs::create_dir_all(folder)?;
    }
    match fs::remove_file(door) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => mkfifo(door, Mode::S_IRUSR | Mode::S_IWUSR)?,
    }
    let status = Command::new("systemctl").args(["--no-block", "restart", "ssh.service"]).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("systemctl restart: {status}"))) }
}

/// Writes the keys. If an sshd runs that has others, it gets these. In a copy that may be one that was just starting.
pub fn apply(config: &Config, identity: &Identity, put: Put) -> Step<Option<Restarting>> {
    let mut changed = false;
    for key in &identity.host_keys {
        changed |= write(config, key, put)?;
    }
    if config.files_only() || !changed {
        return Ok(None);
    }
    let mut restarting = Restarting::watch().map_err(doing("watching for sshd"))?;
    let waits = open_door(Path::new(DOOR)).map_err(doing("opening sshd's door"))?;
    restarting.listened =
        !waits && restarting.hang_up(identity.clone).map_err(doing("giving sshd its keys"))?;
    Ok((waits || restarting.listened).then_some(restarting))
}

/// Takes the FIFO away, and lets the sshd go on that waits behind it; whether one does.
fn open_door(path: &Path) -> io::Result<bool> {
    let writer = match OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path) {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => None,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        opened => Some(opened?),
    };
    // Before it reads the end: it may read all of its configuration again.
    fs::remove_file(path)?;
    Ok(writer.is_some())
}

/// Writes a key; whether it was another before.
fn write(config: &Config, key: &HostKey, put: Put) -> Result<bool, Problem> {
    let folder = config.root.join("etc/ssh");
    let private = folder.join(format!("ssh_host_{}_key", key.kind));
    let public = folder.join(format!("ssh_host_{}_key.pub", key.kind));
    let line = |text: &str| format!("{}\n", text.trim_end());
    let own = line(&key.private);
    let same = fs::read(&private).is_ok_and(|old| old == own.as_bytes());
    put(&private, own.as_bytes(), 0o600, None)
        .and_then(|()| put(&public, line(&key.public).as_bytes(), 0o644, None))
        .map_err(doing("writing the SSH host keys"))?;
    Ok(!same)
}

/// The sshd that listens, and has told so.
fn listening() -> Option<Pid> {
    let text = fs::read_to_string(Path::new(RUN).join(PID_FILE)).ok()?;
    let pid = text.trim().parse().ok().filter(|pid| *pid > 1)?;
    fs::read_to_string(format!("/proc/{pid}/comm"))
        .is_ok_and(|name| name == NAME)
        .then_some(Pid::from_raw(pid))
}

/// Whether an sshd runs besides those that have a session, by proc(5).
fn runs(processes: &Path) -> bool {
    let entries = fs::read_dir(processes).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().as_encoded_bytes()[0].is_ascii_digit()).any(|entry| {
        let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        // One that has a session says whose.
        read("comm") == NAME.as_bytes() && {
            let words = read("cmdline");
            !words.starts_with(b"sshd: ") || words.windows(LISTENER.len()).any(|part| part == LISTENER)
        }
    })
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn an_sshd_that_starts_or_listens_runs_and_one_that_has_a_session_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let process = folder.path().join("17");
        fs::create_dir(&process).unwrap();
        fs::create_dir(folder.path().join("self")).unwrap();
        let with = |comm: &str, words: &str| {
            fs::write(process.join("comm"), comm).unwrap();
            fs::write(process.join("cmdline"), words).unwrap();
            runs(folder.path())
        };
        assert!(with("sshd\n", "/usr/sbin/sshd\0-D\0"));
        assert!(with("sshd\n", "sshd: /usr/sbin/sshd -D [listener] 0 of 10-100 startups"));
        assert!(!with("sshd\n", "sshd: catalyst [priv]"));
        assert!(!with("(sshd)\n", "(sshd)"), "it has read nothing yet");
        assert!(!with("sh\n", "sh\0/usr/sbin/sshd\0"));
    }

    #[test]
    fn behind_a_door_that_nobody_waits_at_there_is_no_sshd_and_it_opens_once() {
        let folder = std::env::temp_dir().join(format!("catalyst-agent-door-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("door");
        assert!(!open_door(&path).unwrap(), "there is none");
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        assert!(!open_door(&path).unwrap(), "nobody waits");
        assert!(!path.exists());
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        let reader = thread::spawn({
            let path = path.clone();
            move || (fs::read_to_string(&path).unwrap(), path.exists())
        });
        // It keeps the reader waiting, which is there now.
        let writer = loop {
            match OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&path) {
                Ok(writer) => break writer,
                Err(_) => thread::yield_now(),
            }
        };
        assert!(open_door(&path).unwrap());
        drop(writer);
        assert_eq!(reader.join().unwrap(), (String::new(), false));
        let _ = fs::remove_dir_all(folder);
    }
}
