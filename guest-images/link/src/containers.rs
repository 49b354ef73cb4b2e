//! What the agent of a VM that is one container, or has those of a pod, is asked.

use std::time::Duration;

use catalyst_agent_protocol::container::{Container, DOCUMENT, MAX_INLINE, Network, Process};
use catalyst_agent_protocol::{Content, FileSpec, Request};
use tokio::sync::mpsc;

use crate::requests::{seed, unix_ns};
use crate::{AgentError, AgentLink, ExecSession, Notice};

/// How long a container may take until it is ready: its files come from the host.
const CREATE_LIMIT: Duration = Duration::from_mins(2);

impl AgentLink {
    /// Makes a container ready, all but its program's start. Time and random bytes are filled in here.
    pub async fn create_container(&self, container: &Container) -> Result<(), AgentError> {
        let container = Container { unix_ns: unix_ns(), seed: seed(), ..container.clone() };
        let text = serde_json::to_string(&container).map_err(|error| AgentError::Io(error.into()))?;
        let document = if text.len() <= MAX_INLINE {
            Some(text)
        } else {
            let size = text.len() as u64;
            let spec = FileSpec { path: DOCUMENT.to_owned(), mode: 0o600, owner: None, size };
            self.put_file(spec, text.as_bytes()).await?;
            None
        };
        self.done_within(Request::CreateContainer { document }, CREATE_LIMIT).await
    }

    /// Starts the program of a container; returns when it runs.
    pub async fn start_container(&self, name: &str) -> Result<ExecSession, AgentError> {
        self.run(Request::StartContainer { name: name.to_owned() }).await
    }

    /// Runs another program in a container; returns when it runs.
    pub async fn exec_container(&self, name: &str, process: Process) -> Result<ExecSession, AgentError> {
        self.run(Request::ExecContainer { name: name.to_owned(), process: Box::new(process) }).await
    }

    /// Ends a container and forgets it; returns when nothing of it is left.
    pub async fn remove_container(&self, name: &str) -> Result<(), AgentError> {
        self.done(Request::RemoveContainer { name: name.to_owned() }).await
    }

    /// Gives the container another network.
    pub async fn set_network(&self, network: Network) -> Result<(), AgentError> {
        self.done(Request::SetNetwork(network)).await
    }

    /// Answers [`Notice::Resolve`].
    pub async fn resolved(&self, query: u32, message: Vec<u8>) -> Result<(), AgentError> {
        self.done(Request::Resolved { query, message: Content(message) }).await
    }

    /// What the agent says without being asked, from now on.
    pub fn notices(&self) -> mpsc::Receiver<Notice> {
        self.listen()
    }
}
