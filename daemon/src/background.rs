//! `--background`, and telling whoever started the daemon that it is ready or why not.

use std::error::Error;
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use catalyst_daemon::http::error::plain;
use catalyst_daemon::privilege::as_root;

/// Names the descriptor on which the daemon in the background says how it went.
const READY_FD: &str = "CATALYST_READY_FD";
const READY: &str = "ready";
/// The folder where a daemon in the background writes its log, where no other is set.
const LOG_DIR: &str = "/var/log";
/// The log.
const LOG: &str = "catalyst-daemon.log";

static TOLD: Mutex<bool> = Mutex::new(false);

/// Starts this program again in a session of its own and returns when it is ready. A log folder that is set is the
/// owner's, and nothing is done in it that the thread's file system user may not.
pub fn start(log_dir: Option<&Path>) -> Result<(), Box<dyn Error>> {
    let (mut told, teller) = io::pipe()?;
    let path = log_dir.unwrap_or(Path::new(LOG_DIR)).join(LOG);
    let open = || {
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(0o640).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        options.open(&path)
    };
    let log = match log_dir {
        Some(folder) => std::fs::create_dir_all(folder).and_then(|()| open()),
        None => as_root(open),
    };
    let log = match log {
        Ok(file) => Stdio::from(file),
        Err(error) if log_dir.is_none() && error.kind() == io::ErrorKind::PermissionDenied => Stdio::null(),
        Err(error) => {
            return Err(
                format!("Cannot open the log {}: {}", path.display(), plain(&error.to_string())).into()
            );
        }
    };
    let shown = path.display();
    let teller = OwnedFd::from(teller);
    let number = teller.as_raw_fd();
    let mut command = Command::new(std::env::current_exe()?);
    command.args(std::env::args_os().skip(1).filter(|arg| arg != "--background"));
    command.env(READY_FD, number.to_string()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    // SAFETY: only system calls, on a descriptor that is open in the child.
    unsafe {
        command.pre_exec(move || {
            if libc::setsid() < 0 || libc::fcntl(number, libc::F_SETFD, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let child = command.spawn()?;
    drop(teller);
    let mut text = String::new();
    told.read_to_string(&mut text)?;
    match text.trim() {
        READY => {
            println!("catalyst-daemon runs in the background (pid {}); its log is {shown}", child.id());
            Ok(())
        }
        "" => Err(format!("The daemon ended without a word; see {shown}").into()),
        error => Err(error.to_owned().into()),
    }
}

/// Says that the daemon listens: to `--background` and to systemd (sd_notify(3)).
pub fn tell_ready() {
    tell(READY);
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let sent = UnixDatagram::unbound().and_then(|datagram| datagram.send_to(b"READY=1", socket));
    if let Err(error) = sent {
        tracing::warn!(%error, "cannot tell systemd that the daemon is ready");
    }
}

/// Says why the daemon did not start.
pub fn tell_failure(message: &str) {
    tell(message);
}

fn tell(text: &str) {
    let Ok(mut told) = TOLD.lock() else { return };
    if std::mem::replace(&mut *told, true) {
        return;
    }
    let Some(number) = std::env::var(READY_FD).ok().and_then(|text| text.parse::<RawFd>().ok()) else {
        return;
    };
    // SAFETY: the descriptor was opened for this by `start` and nobody else uses it; it is
    // closed when it was used, once.
    let mut pipe = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(number) });
    // Whoever waited for it may be gone.
    let _ = pipe.write_all(text.as_bytes());
}
