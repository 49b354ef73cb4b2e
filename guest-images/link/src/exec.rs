//! Commands in the guest.

use std::sync::Arc;

use bytes::Bytes;
use catalyst_agent_protocol::{ExecExit, ExecSpec, INITIAL_CREDIT, Reply, Request, StreamChannel, Terminal};
use tokio::sync::{Semaphore, mpsc};

use crate::streams::Arrival;
use crate::{AgentError, AgentLink};

/// Data goes in pieces of at most this many bytes, so that streams take turns.
pub(crate) const PIECE: usize = 32 * 1024;
/// Credit is given back when this much was consumed.
pub(crate) const GRANT_AT: u32 = INITIAL_CREDIT / 4;

/// What comes from a command.
#[derive(Debug)]
pub enum ExecEvent {
    /// Standard output, or output of the terminal.
    Stdout(Bytes),
    /// Standard error.
    Stderr(Bytes),
    /// It has ended; the last event.
    Exit(ExecExit),
    /// The agent or the guest is gone; the last event.
    Lost(String),
}

/// A command that runs; dropped, it is ended.
#[derive(Debug)]
pub struct ExecSession {
    stdin: ExecStdin,
    control: ExecControl,
    events: ExecEvents,
}

/// Its standard input.
#[derive(Debug)]
pub struct ExecStdin {
    link: AgentLink,
    stream: u32,
    credit: Arc<Semaphore>,
    open: bool,
}

/// Its terminal and signals.
#[derive(Debug)]
pub struct ExecControl {
    link: AgentLink,
    stream: u32,
}

/// What comes from it. Dropped, the command is ended.
#[derive(Debug)]
pub struct ExecEvents {
    link: AgentLink,
    stream: u32,
    arrivals: mpsc::UnboundedReceiver<Arrival>,
    output_consumed: u32,
    errors_consumed: u32,
}

impl AgentLink {
    /// Starts a command; returns when it runs.
    pub async fn exec(&self, spec: ExecSpec) -> Result<ExecSession, AgentError> {
        self.run(Request::Exec(spec)).await
    }

    pub(crate) async fn run(&self, request: Request) -> Result<ExecSession, AgentError> {
        let (reply, end) = self.open(request).await?;
        let Reply::Started { .. } = reply else {
            self.close(end.id);
            return Err(AgentError::Unexpected);
        };
        let stream = end.id;
        Ok(ExecSession {
            stdin: ExecStdin { link: self.clone(), stream, credit: end.input, open: true },
            control: ExecControl { link: self.clone(), stream },
            events: ExecEvents {
                link: self.clone(),
                stream,
                arrivals: end.arrivals,
                output_consumed: 0,
                errors_consumed: 0,
            },
        })
    }
}

impl ExecSession {
    /// The parts, for those who use them side by side.
    pub fn split(self) -> (ExecStdin, ExecControl, ExecEvents) {
        (self.stdin, self.control, self.events)
    }
}

impl ExecStdin {
    /// Sends input; waits while the command does not read it.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), AgentError> {
        send_with_credit(&self.link, self.stream, &self.credit, &bytes).await
    }

    /// Bytes that can be sent at once.
    #[cfg(test)]
    pub(crate) fn available_credit(&self) -> usize {
        self.credit.available_permits()
    }

    /// Ends the input. Dropping it does so too, without saying whether it worked.
    pub async fn close(mut self) -> Result<(), AgentError> {
        self.open = false;
        self.link.send_data(self.stream, &[]).await
    }
}

impl Drop for ExecStdin {
    fn drop(&mut self) {
        if self.open {
            self.link.end_input(self.stream);
        }
    }
}

pub(crate) async fn send_with_credit(
    link: &AgentLink,
    stream: u32,
    credit: &Semaphore,
    bytes: &[u8],
) -> Result<(), AgentError> {
    for piece in bytes.chunks(PIECE) {
        let wanted = u32::try_from(piece.len()).unwrap_or(u32::MAX);
        let permits = credit.acquire_many(wanted).await;
        permits.map_err(|_| AgentError::Gone("the stream has ended".to_owned()))?.forget();
        link.send_data(stream, piece).await?;
    }
    Ok(())
}

impl ExecControl {
    /// Gives the terminal another size.
    pub async fn resize(&self, rows: u16, cols: u16) -> Result<(), AgentError> {
        let terminal = Terminal { rows, cols, term: None };
        self.link.done(Request::Resize { stream: self.stream, terminal }).await
    }

    /// Sends a signal.
    pub async fn signal(&self, signal: i32) -> Result<(), AgentError> {
        self.link.done(Request::Signal { stream: self.stream, signal }).await
    }
}

impl ExecEvents {
    /// The next event; `None` after the last. What it gives is consumed: the command may write more.
    pub async fn next(&mut self) -> Option<ExecEvent> {
        loop {
            return Some(match self.arrivals.recv().await? {
                Arrival::Output(bytes) => {
                    self.consume(StreamChannel::Output, bytes.len());
                    ExecEvent::Stdout(bytes)
                }
                Arrival::Errors(bytes) => {
                    self.consume(StreamChannel::Errors, bytes.len());
                    ExecEvent::Stderr(bytes)
                }
                Arrival::OutputEnd => continue,
                Arrival::Exited(exit) => ExecEvent::Exit(exit),
                Arrival::Lost(why) => ExecEvent::Lost(why),
            });
        }
    }

    // Waits for nothing: an event that was taken from the queue must reach whoever asked for it.
    fn consume(&mut self, channel: StreamChannel, length: usize) {
        let consumed = match channel {
            StreamChannel::Errors => &mut self.errors_consumed,
            _ => &mut self.output_consumed,
        };
        *consumed += u32::try_from(length).unwrap_or(u32::MAX);
        if *consumed >= GRANT_AT {
            let bytes = std::mem::take(consumed);
            self.link.grant(self.stream, channel, bytes);
        }
    }
}

impl Drop for ExecEvents {
    fn drop(&mut self) {
        self.link.close(self.stream);
    }
}
