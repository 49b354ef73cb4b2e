//! What can go wrong with Docker's daemon.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::access::unix_socket::UnixSocketError;
use crate::engine::EngineError;
use crate::network::NetworkError;

/// Docker's daemon was not brought up, or not taken down.
#[derive(Debug, Error)]
pub enum DockerError {
    /// The owner is not to become root by it.
    #[error(
        "Whoever may use Docker's daemon can do as root does on this machine, which '{owner}' may not: let root start it \
         (sudo catalyst docker up), or make '{owner}' a member of the group docker and start Catalyst's daemon anew"
    )]
    NotAllowed {
        /// The owner's name.
        owner: String,
    },
    /// Who asks cannot be told.
    #[error("Cannot find out whether root asks for Docker's daemon")]
    Peer(#[from] crate::access::peer::PeerError),
    /// The network, or a program that is missing.
    #[error("Docker's daemon cannot be started")]
    Network(#[from] NetworkError),
    /// A file.
    #[error("Cannot {what} {} for Docker's daemon", .path.display())]
    File {
        /// "write", "make"…
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The owner's settings.
    #[error("{} holds no settings of Docker's daemon: {reason}", .path.display())]
    Settings {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// Its socket.
    #[error("Docker's daemon has no socket")]
    Socket(#[from] UnixSocketError),
    /// It was not started.
    #[error("Cannot run {}", .program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It cannot be watched or ended.
    #[error("Docker's daemon cannot be taken in hand")]
    Process(#[from] EngineError),
    /// It ended at once.
    #[error("Docker's daemon did not start; its log {} says: {said}", .log.display())]
    Ended {
        /// The log.
        log: PathBuf,
        /// What it says of that.
        said: String,
    },
    /// It is not ready in time.
    #[error("Docker's daemon was not ready within {seconds} s and was ended; its log {} says: {said}", .log.display())]
    Slow {
        /// How long was waited.
        seconds: u64,
        /// The log.
        log: PathBuf,
        /// What it says of that.
        said: String,
    },
    /// Catalyst's daemon stops.
    #[error("The daemon is stopping; try again")]
    Stopping,
}
