//! The SSH host keys, and the sshd that reads them once, when it starts.
//!
//! Starting sshd is most of what a copy does until it greets. So in a template sshd has started already, as far as its
//! first key: that is a FIFO there, and sshd waits for somebody to write it ([`park`]). It goes on with the keys of the copy.
//! A copy of a guest whose sshd is past that has it start anew.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use catalyst_agent_protocol::{HostKey, Problem};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

use super::{Step, doing};
use crate::files::replace;
use crate::session::Config;

/// The key that sshd reads first.
const FIRST: &str = "etc/ssh/ssh_host_ed25519_key";
const PID_FILE: &str = "/run/sshd.pid";
/// The sockets of the guest (proc(5), `/proc/net/tcp`).
const SOCKETS: [&str; 2] = ["/proc/net/tcp", "/proc/net/tcp6"];
/// How long an sshd that has new keys may take until it listens; it is not waited for any longer.
const LISTENS_WITHIN: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(5);

/// An sshd that was given new keys.
#[must_use]
pub struct Restarting {
    /// Its sockets before.
    before: BTreeSet<u64>,
}

impl Restarting {
    /// Waits until it listens. No event tells of that.
    pub fn wait(self) {
        let begun = Instant::now();
        while begun.elapsed() < LISTENS_WITHIN {
            let now = listening();
            if !now.is_empty() && now.is_disjoint(&self.before) {
                return;
            }
            thread::sleep(PAUSE);
        }
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
    let before = listening();
    let told = match door {
        Some(mut door) => {
            let key = fs::read(&first).map_err(doing("reading the first SSH host key"))?;
            door.write_all(&key).map(|()| true)
        }
        None => hang_up(),
    };
    let told = told.map_err(doing("giving sshd its keys"))?;
    Ok(told.then_some(Restarting { before }))
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
    let Some(pid) = fs::read_to_string(PID_FILE).ok().and_then(|text| text.trim().parse::<i32>().ok()) else {
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

fn listening() -> BTreeSet<u64> {
    SOCKETS.iter().flat_map(|path| on_port_22(&fs::read_to_string(path).unwrap_or_default())).collect()
}

/// Inodes of the sockets that listen on port 22.
fn on_port_22(table: &str) -> Vec<u64> {
    let inode = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let ours = fields.get(1)?.ends_with(":0016") && *fields.get(3)? == "0A";
        ours.then(|| fields.get(9)?.parse().ok()).flatten()
    };
    table.lines().filter_map(inode).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
        0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 18521 1 0 100 0 0 10 0\n   \
        1: 0100007F:0016 0100007F:C001 01 00000000:00000000 00:00000000 00000000     0        0 18522 1 0 100 0 0 10 0\n   \
        2: 00000000:1600 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 18523 1 0 100 0 0 10 0\n";

    #[test]
    fn who_listens_on_the_port_of_ssh_is_found() {
        assert_eq!(on_port_22(TABLE), [18521]);
        assert!(on_port_22("cut: short").is_empty());
    }

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
            thread::sleep(PAUSE);
        };
        door.write_all(b"key\n").unwrap();
        drop(door);
        assert_eq!(reader.join().unwrap(), "key\n");
        fs::remove_dir_all(folder).unwrap();
    }
}
