//! What engines share of a VM's folder: its logs, the sockets that are there whatever the engine, the process in it.

use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::process::{Exit, Process};
use super::{EngineError, sockets};
use crate::store::VmDir;
use crate::store::files::read_bounded;

/// How long a process that closed its connection may take to end.
const LAST_BREATH: Duration = Duration::from_secs(2);

/// What every VM process gets of its folder.
#[derive(Debug)]
pub struct Opened {
    /// `vm.log`, open for appending.
    pub log: File,
    /// `console.log`, open for appending.
    pub console_log: OwnedFd,
    /// Listening socket of the agent's port.
    pub agent: OwnedFd,
    /// Listening socket of the port for folders.
    pub folders: OwnedFd,
    /// Listening socket of the port of containers, where there is one.
    pub container: Option<OwnedFd>,
    /// Listening socket of the console.
    pub console: OwnedFd,
}

/// Opens the logs and listens on the sockets that every engine has, and on that of the port of containers if there is one.
pub fn open(dir: &VmDir, container: bool) -> Result<Opened, EngineError> {
    let run = dir.run();
    sockets::make_folder(&run).map_err(EngineError::io(format!("make the folder {}", run.display())))?;
    Ok(Opened {
        log: append(&dir.engine_log())?,
        console_log: append(&dir.console_log())?.into(),
        agent: listen(dir, sockets::AGENT)?,
        folders: listen(dir, sockets::FOLDERS)?,
        container: container.then(|| listen(dir, sockets::CONTAINER)).transpose()?,
        console: listen(dir, sockets::CONSOLE)?,
    })
}

/// Listens on a socket in `run/`.
pub fn listen(dir: &VmDir, name: &str) -> Result<OwnedFd, EngineError> {
    let run = dir.run();
    sockets::listen(&run, name).map_err(EngineError::io(format!("listen on {}", run.join(name).display())))
}

/// Opens a log for appending.
pub fn append(path: &Path) -> Result<File, EngineError> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(EngineError::io(format!("open the log {}", path.display())))
}

/// The process whose lock is in the folder `run` and that runs as `user`, if there is one.
pub async fn find(run: PathBuf, user: u32) -> Result<Option<Process>, EngineError> {
    if !run.join("lock").exists() {
        return Ok(None);
    }
    tokio::task::spawn_blocking(move || Process::adopt(&run, user))
        .await
        .map_err(|error| EngineError::Died(error.to_string()))?
}

/// Waits for the end of `handshake` with the process; one that dies meanwhile tells why in its log.
pub async fn first_answer<T, E: Display>(
    process: &Process,
    dir: &VmDir,
    handshake: impl Future<Output = Result<T, E>>,
) -> Result<T, EngineError> {
    let outcome = tokio::select! {
        exit = process.exited() => return Err(EngineError::Died(last_words(dir, &exit))),
        outcome = handshake => outcome,
    };
    match outcome {
        Ok(answer) => Ok(answer),
        Err(error) => {
            // A closed connection is most often a process that is ending with a message.
            if let Ok(exit) = tokio::time::timeout(LAST_BREATH, process.exited()).await {
                return Err(EngineError::Died(last_words(dir, &exit)));
            }
            Err(EngineError::Refused { what: "answer on its control socket", why: error.to_string() })
        }
    }
}

/// What a process or a disk says, as it is shown to people: 500 characters at most.
pub fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(500).collect()
}

/// The last line of the process's log, or how it ended.
pub fn last_words(dir: &VmDir, exit: &Exit) -> String {
    let log = read_bounded(&dir.engine_log(), 1 << 20).unwrap_or_default();
    let text = String::from_utf8_lossy(&log);
    match text.lines().rev().find(|line| !line.trim().is_empty()) {
        Some(line) => printable(line),
        None => exit.to_string(),
    }
}
