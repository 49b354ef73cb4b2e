//! The host's side of the agent: one link to a virtio-serial port of a VM.
//!
//! What the guest sends is untrusted: frames are bounded by the protocol, data by the credit that
//! was granted, texts by their length here; a guest that does otherwise loses its link.

mod containers;
mod exec;
mod file;
mod link;
mod notices;
mod requests;
pub mod sockets;
mod streams;

use std::io;

use catalyst_agent_protocol::SetUpReport;
use thiserror::Error;

pub use crate::notices::Notice;
pub use catalyst_agent_protocol::container;
pub use catalyst_agent_protocol::{
    ExecExit, ExecSpec, FileSpec, Folder, HostKey, Identity, ProblemKind, ShutdownKind, Terminal,
};
pub use exec::{ExecControl, ExecEvent, ExecEvents, ExecSession, ExecStdin};
pub use file::FileStream;
pub use link::AgentLink;

/// Why the agent did not do what it was asked.
#[derive(Debug, Error)]
pub enum AgentError {
    /// The connection failed.
    #[error("the connection to the agent failed")]
    Io(#[from] io::Error),
    /// The connection ended, or the guest started anew.
    #[error("the agent is gone: {0}")]
    Gone(String),
    /// No answer in time.
    #[error("the agent did not answer within {0} s")]
    Timeout(u64),
    /// The agent says no.
    #[error("{message}")]
    Refused {
        /// Which kind of problem.
        kind: ProblemKind,
        /// The agent's words, cut to one line of at most 500 characters.
        message: String,
    },
    /// The agent answered something else than what was asked.
    #[error("the agent gave an answer that does not fit")]
    Unexpected,
    /// More than a message holds.
    #[error("the request has more than {} bytes", catalyst_agent_protocol::MAX_PAYLOAD)]
    TooLarge,
    /// Too many at once.
    #[error("{} commands and files are open in the guest; end some", catalyst_agent_protocol::MAX_STREAMS)]
    TooManyStreams,
}

/// What the agent said when it was greeted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HelloInfo {
    /// The epoch that both sides are in; another one is another boot or another link.
    pub epoch: u32,
    /// Version of the agent, at most 64 characters.
    pub agent_version: String,
}

/// How the link and the guest are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AgentStatus {
    /// The link is there; never again once it is not.
    pub connected: bool,
    /// The agent has answered the greeting.
    pub hello: Option<HelloInfo>,
    /// The identity is applied.
    pub identity: bool,
    /// sshd accepts connections.
    pub ssh: bool,
    /// dockerd answers.
    pub docker: bool,
    /// How far the guest's setting up is, where it said so since it was asked.
    pub set_up: Option<SetUpReport>,
}

/// One line of at most `limit` characters of what a guest says.
fn tame(text: &str, limit: usize) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(limit).collect()
}
