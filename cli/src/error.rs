//! Everything that can end a command, and how it is told: one line, each cause once.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::client::ClientError;
use crate::host::HostError;
use crate::launch::LaunchError;
use crate::output::OutputError;
use crate::session::SessionError;
use crate::tasks::TaskError;
use crate::wait::WaitError;

/// What ended a command.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// A file of settings cannot be used.
    #[error(transparent)]
    Config(#[from] catalyst_api::config::ConfigError),
    /// `--host` is none.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The daemon did not do it.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// No daemon could be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// What was waited for did not come.
    #[error(transparent)]
    Wait(#[from] WaitError),
    /// A terminal session failed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A task failed.
    #[error(transparent)]
    Task(#[from] TaskError),
    /// Nothing more can be printed.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// `ssh` could not be run.
    #[error(transparent)]
    Ssh(#[from] crate::commands::ssh::SshError),
    /// A file of the user's.
    #[error("cannot read the {what} in {}", path.display())]
    File {
        /// What is in it.
        what: &'static str,
        /// It.
        path: PathBuf,
        /// Why not.
        source: PlainIo,
    },
    /// `~/.ssh` could not be changed.
    #[error(transparent)]
    SshFiles(#[from] crate::ssh_files::SshFilesError),
    /// Docker's client did not do it.
    #[error(transparent)]
    Docker(#[from] crate::commands::docker::DockerError),
    /// The daemon took the request to stop and did not.
    #[error(
        "the daemon (pid {pid}) has not ended within {seconds} s; see its log, or end it with: kill {pid}"
    )]
    StillRunning {
        /// Its process.
        pid: u32,
        /// How long was waited.
        seconds: u64,
    },
    /// What was given cannot be used.
    #[error("{0}")]
    Use(String),
    /// The errors have been printed; only the exit code is left.
    #[error("failed")]
    Told,
}

impl CliError {
    /// The line for stderr, or `None` where there is nothing left to say.
    pub fn line(&self) -> Option<String> {
        match self {
            Self::Told | Self::Output(OutputError::Gone) => None,
            other => Some(chain(other)),
        }
    }

    /// The exit code: a reader that has gone is no failure.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Output(OutputError::Gone) => 0,
            Self::Host(_) | Self::Config(_) | Self::Use(_) => 2,
            _ => 1,
        }
    }
}

/// `error` and its causes, nearest first, each once.
pub fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        next = cause.source();
    }
    line
}

/// What the kernel calls the failure, without its number.
pub fn plain_io(error: &io::Error) -> String {
    match (error.raw_os_error(), error.kind()) {
        (Some(number), _) => Errno::from_raw(number).desc().to_lowercase(),
        (None, io::ErrorKind::UnexpectedEof) => "the other side closed it".to_owned(),
        (None, _) => error.to_string(),
    }
}

/// An [`io::Error`] that tells itself without its number; for use as a source.
#[derive(Debug, thiserror::Error)]
#[error("{}", plain_io(.0))]
pub struct PlainIo(pub io::Error);

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open the door")]
    struct Outer(#[source] PlainIo);

    #[test]
    fn a_chain_names_each_cause_once_and_no_numbers() {
        let error = Outer(PlainIo(io::Error::from_raw_os_error(111)));
        assert_eq!(chain(&error), "cannot open the door: connection refused");
    }

    #[test]
    fn a_reader_that_left_is_no_failure() {
        let gone = CliError::from(OutputError::from(io::Error::from(io::ErrorKind::BrokenPipe)));
        assert_eq!((gone.line(), gone.exit_code()), (None, 0));
    }
}
