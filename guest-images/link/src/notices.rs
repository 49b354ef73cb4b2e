//! What the agent of a container says without being asked.

use std::sync::Mutex;

use catalyst_agent_protocol::container::MAX_QUERY;
use tokio::sync::mpsc;

/// As many may wait to be heard; what is more is lost, since a guest is not to fill the host's memory.
const WAITING: usize = 256;

/// Something that the guest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A program asks for a name.
    Resolve {
        /// Which question it is, for the answer.
        query: u32,
        /// Whether it came by TCP.
        tcp: bool,
        /// The DNS message, at most [`MAX_QUERY`] bytes.
        message: Vec<u8>,
    },
    /// The kernel has ended a program since memory was short.
    OutOfMemory(String),
}

/// Who hears of notices: nobody, until somebody asks.
#[derive(Debug, Default)]
pub(crate) struct Notices(Mutex<Option<mpsc::Sender<Notice>>>);

impl Notices {
    /// Whoever asked before hears nothing more.
    pub(crate) fn listen(&self) -> mpsc::Receiver<Notice> {
        let (sender, receiver) = mpsc::channel(WAITING);
        *self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(sender);
        receiver
    }

    /// Passes one on; an error is what a guest must not say.
    pub(crate) fn tell(&self, notice: Notice) -> Result<(), String> {
        if let Notice::Resolve { message, .. } = &notice
            && message.len() > MAX_QUERY
        {
            return Err(format!("it sent a DNS message of {} bytes", message.len()));
        }
        let sender = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(sender) = sender.as_ref() {
            // One that is lost is asked for again.
            let _ = sender.try_send(notice);
        }
        Ok(())
    }
}
