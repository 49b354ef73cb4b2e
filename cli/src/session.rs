//! A terminal session over a WebSocket: one loop over the socket, standard input and signals.

use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use tungstenite::Message;

use crate::error::PlainIo;
use crate::link::{Link, LinkError};
use crate::output::OutputError;

/// How much of standard input is read at once, in bytes.
const CHUNK: usize = 32 << 10;
/// Exit code of a program whose reader has gone, as shells tell it: 128 plus SIGPIPE.
pub const READER_GONE: u8 = 141;

/// What ended a session before its time.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The connection.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The terminal.
    #[error("cannot use the terminal")]
    Terminal(#[source] PlainIo),
    /// Standard output or standard error.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// The guest's side.
    #[error(transparent)]
    Guest(#[from] catalyst_api::ApiError),
    /// A request that cannot be put into JSON.
    #[error("cannot put the command into JSON")]
    Json(#[from] serde_json::Error),
}

impl From<io::Error> for SessionError {
    fn from(error: io::Error) -> Self {
        Self::Terminal(PlainIo(error))
    }
}

/// Whether a session goes on, or with which exit code it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It goes on.
    On,
    /// It ends with this exit code.
    End(u8),
}

/// What a kind of session does with what happens.
pub trait Peer {
    /// A message of the daemon.
    fn message(&mut self, link: &mut Link, message: Message) -> Result<Step, SessionError>;
    /// Bytes of standard input.
    fn input(&mut self, link: &mut Link, data: &[u8]) -> Result<Step, SessionError>;
    /// Standard input has ended.
    fn input_end(&mut self, link: &mut Link) -> Result<(), SessionError>;
    /// A signal came.
    fn signal(&mut self, link: &mut Link, signal: Signal) -> Result<Step, SessionError>;
}

/// Runs a session to its end; standard input is read if `attached`. Returns the exit code.
pub fn run(
    link: &mut Link,
    signals: &SignalFd,
    attached: bool,
    peer: &mut impl Peer,
) -> Result<u8, SessionError> {
    match run_to_end(link, signals, attached, peer) {
        Err(SessionError::Output(OutputError::Gone)) => Ok(READER_GONE),
        other => other,
    }
}

fn run_to_end(
    link: &mut Link,
    signals: &SignalFd,
    mut attached: bool,
    peer: &mut impl Peer,
) -> Result<u8, SessionError> {
    let mut buffer = vec![0; CHUNK];
    loop {
        while let Some(message) = link.receive()? {
            if let Step::End(code) = peer.message(link, message)? {
                return Ok(code);
            }
        }
        // Pongs that reading has queued, and what was left over.
        link.flush()?;
        let ready = wait(link, signals, attached)?;
        if ready.signal {
            while let Some(signal) = next_signal(signals)? {
                if let Step::End(code) = peer.signal(link, signal)? {
                    return Ok(code);
                }
            }
        }
        if ready.input {
            match read_stdin(&mut buffer)? {
                None => {}
                Some(0) => {
                    attached = false;
                    peer.input_end(link)?;
                }
                Some(count) => {
                    if let Step::End(code) = peer.input(link, &buffer[..count])? {
                        return Ok(code);
                    }
                }
            }
        }
    }
}

/// What can be read now.
struct Ready {
    signal: bool,
    input: bool,
}

fn wait(link: &Link, signals: &SignalFd, attached: bool) -> Result<Ready, SessionError> {
    let stdin = io::stdin();
    let mut socket = PollFlags::POLLIN;
    if link.is_full() {
        socket |= PollFlags::POLLOUT;
    }
    let mut fds = vec![PollFd::new(link.as_fd(), socket), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
    // No more is read than the daemon takes: this is what holds back whoever writes to us.
    if attached && !link.is_full() {
        fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
    }
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => return Err(io::Error::from(error).into()),
    }
    let happened = |index: usize| fds.get(index).and_then(PollFd::any).unwrap_or(false);
    Ok(Ready { signal: happened(1), input: happened(2) })
}

fn next_signal(signals: &SignalFd) -> Result<Option<Signal>, SessionError> {
    let info = signals.read_signal().map_err(io::Error::from)?;
    Ok(info.and_then(|info| Signal::try_from(i32::try_from(info.ssi_signo).ok()?).ok()))
}

/// Reads what is there, past std's buffer, which poll cannot see. `None`: nothing after all.
fn read_stdin(buffer: &mut [u8]) -> Result<Option<usize>, SessionError> {
    match nix::unistd::read(io::stdin(), buffer) {
        Ok(count) => Ok(Some(count)),
        Err(Errno::EINTR | Errno::EAGAIN) => Ok(None),
        // A terminal that was hung up.
        Err(Errno::EIO) => Ok(Some(0)),
        Err(error) => Err(io::Error::from(error).into()),
    }
}
