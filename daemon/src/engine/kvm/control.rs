//! A client of the monitor's control socket (`catalyst_vmm::control::protocol`).
//!
//! The process on the other side runs a guest that may have broken out of its CPU, so what it sends is bounded like any
//! hostile input: a line that is too long, no message, or an answer that nobody waits for ends the connection.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use catalyst_vmm::control::protocol::{
    Answer, Cause, Command, Event, Outcome, RamRange, Reply, Request, RunState,
};
use serde::Deserialize;
use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex as AsyncMutex, Notify, oneshot, watch};

use super::super::{Layer, sockets};

/// An answer that takes longer than this will not come.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest answer, in bytes: a saved machine, two digits a byte.
const MAX_ANSWER: u64 = 2 * catalyst_vmm::snapshot::MAX_LENGTH + 4096;
/// Most requests that wait for their answers; those that were given up wait as well.
const MAX_WAITING: usize = 16;
/// Most of a refusal's words, in characters.
const MAX_WORDS: usize = 500;

/// Why a command had no effect.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The connection failed.
    #[error("the control connection failed: {0}")]
    Io(#[from] io::Error),
    /// The connection is gone.
    #[error("the control connection is closed")]
    Closed,
    /// No answer in time, or too many are due.
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// The monitor says no.
    #[error("{0}")]
    Refused(String),
    /// An answer to something else.
    #[error("an answer that is none to the question")]
    Unfit,
}

/// Requests that wait for their answers, in their order; `None` once none will come.
type Queue = Option<VecDeque<(u64, oneshot::Sender<Outcome>)>>;
type Waiting = Arc<Mutex<Queue>>;

/// A control connection.
#[derive(Debug)]
pub struct Control {
    write: AsyncMutex<(OwnedWriteHalf, u64)>,
    waiting: Waiting,
    exit: watch::Receiver<Option<Cause>>,
    no_room: Arc<Notify>,
    reader: tokio::task::JoinHandle<()>,
}

impl Drop for Control {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Message {
    Event(Event),
    Reply(Reply),
}

fn lock(waiting: &Waiting) -> MutexGuard<'_, Queue> {
    // Nothing panics while it holds the lock; if it did, the queue would still be whole.
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Control {
    /// Speaks on `stream`. The monitor sends no greeting.
    pub fn new(stream: UnixStream) -> Self {
        let (read, write) = stream.into_split();
        let waiting: Waiting = Arc::new(Mutex::new(Some(VecDeque::new())));
        let (told, exit) = watch::channel(None);
        let no_room = Arc::new(Notify::new());
        let reading = read_all(BufReader::new(read), Arc::clone(&waiting), told, Arc::clone(&no_room));
        let reader = tokio::spawn(reading);
        Self { write: AsyncMutex::new((write, 0)), waiting, exit, no_room, reader }
    }

    /// Whether the guest runs.
    pub async fn state(&self) -> Result<RunState, ControlError> {
        self.state_within(ANSWER_TIMEOUT).await
    }

    /// The same with a limit of its own, for a monitor that is starting.
    pub async fn state_within(&self, limit: Duration) -> Result<RunState, ControlError> {
        match within(limit, self.ask(Command::State)).await? {
            Answer::State(state) => Ok(state),
            _ => Err(ControlError::Unfit),
        }
    }

    /// A command that is answered with nothing but that it is done.
    pub async fn tell(&self, command: Command) -> Result<(), ControlError> {
        match within(ANSWER_TIMEOUT, self.ask(command)).await? {
            Answer::Done => Ok(()),
            _ => Err(ControlError::Unfit),
        }
    }

    /// The machine, which stands, but for its memory.
    pub async fn saved(&self) -> Result<Vec<u8>, ControlError> {
        match within(ANSWER_TIMEOUT, self.ask(Command::Save)).await? {
            Answer::Saved(digits) => from_hex(&digits).ok_or(ControlError::Unfit),
            _ => Err(ControlError::Unfit),
        }
    }

    /// Where RAM lies.
    pub async fn ram(&self) -> Result<Vec<RamRange>, ControlError> {
        match within(ANSWER_TIMEOUT, self.ask(Command::Ram)).await? {
            Answer::Ram(ranges) => Ok(ranges),
            _ => Err(ControlError::Unfit),
        }
    }

    /// Gives the first disk another file, and its file until now others to lie on, if there are any.
    pub async fn switch_disk(&self, overlay: &OwnedFd, below: &[Layer]) -> Result<(), ControlError> {
        for layer in below {
            self.give(Command::DiskLayer(layer.format), &layer.file).await?;
        }
        self.give(Command::SwitchDisk, overlay).await
    }

    /// A command that has a descriptor with it.
    async fn give(&self, command: Command, descriptor: &OwnedFd) -> Result<(), ControlError> {
        match within(ANSWER_TIMEOUT, self.ask_with(command, Some(descriptor))).await? {
            Answer::Done => Ok(()),
            _ => Err(ControlError::Unfit),
        }
    }

    /// Why the monitor said that it ends, if it did.
    pub fn exit(&self) -> Option<Cause> {
        *self.exit.borrow()
    }

    /// Waits until the monitor said that it paused the machine for want of room.
    pub async fn no_room(&self) {
        self.no_room.notified().await;
    }

    /// Waits until everything that was sent before the connection closed was read.
    pub async fn drained(&self) {
        let mut exit = self.exit.clone();
        // An error says that the reader has ended, which is what is waited for.
        while exit.changed().await.is_ok() {}
    }

    async fn ask(&self, command: Command) -> Result<Answer, ControlError> {
        self.ask_with(command, None).await
    }

    async fn ask_with(&self, command: Command, descriptor: Option<&OwnedFd>) -> Result<Answer, ControlError> {
        let (sender, receiver) = oneshot::channel();
        {
            let mut guard = self.write.lock().await;
            let (write, last) = &mut *guard;
            *last += 1;
            let request = Request { id: *last, command };
            let mut line = serde_json::to_vec(&request).map_err(io::Error::from)?;
            line.push(b'\n');
            match lock(&self.waiting).as_mut() {
                None => return Err(ControlError::Closed),
                Some(queue) if queue.len() >= MAX_WAITING => {
                    return Err(ControlError::Timeout(ANSWER_TIMEOUT));
                }
                Some(queue) => queue.push_back((request.id, sender)),
            }
            // So few lines fit into the socket's buffer, also where the other side does not read.
            match descriptor {
                None => write.write_all(&line).await?,
                Some(descriptor) => sockets::send_with(write.as_ref(), &line, descriptor).await?,
            }
        }
        match receiver.await {
            Ok(Outcome::Ok(answer)) => Ok(answer),
            Ok(Outcome::Error(why)) => {
                let plain = why.chars().filter(|c| !c.is_control()).take(MAX_WORDS).collect();
                Err(ControlError::Refused(plain))
            }
            Err(_) => Err(ControlError::Closed),
        }
    }
}

/// The bytes that two hexadecimal digits each stand for.
fn from_hex(digits: &str) -> Option<Vec<u8>> {
    let pair = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    digits.len().is_multiple_of(2).then(|| digits.as_bytes().chunks(2).map(pair).collect()).flatten()
}

async fn within<T>(
    limit: Duration,
    asked: impl Future<Output = Result<T, ControlError>>,
) -> Result<T, ControlError> {
    tokio::time::timeout(limit, asked).await.unwrap_or(Err(ControlError::Timeout(limit)))
}

/// The next message; `None` at the end of the connection, and where the other side breaks the protocol.
async fn read_message(read: &mut BufReader<OwnedReadHalf>) -> Option<Message> {
    let mut line = Vec::new();
    read.take(MAX_ANSWER).read_until(b'\n', &mut line).await.ok()?;
    if line.is_empty() {
        return None;
    }
    let message = line.strip_suffix(b"\n").and_then(|line| serde_json::from_slice(line).ok());
    if message.is_none() {
        tracing::warn!(bytes = line.len(), "a VM process sent what is no message on its control socket");
    }
    message
}

async fn read_all(
    mut read: BufReader<OwnedReadHalf>,
    waiting: Waiting,
    told: watch::Sender<Option<Cause>>,
    no_room: Arc<Notify>,
) {
    while let Some(message) = read_message(&mut read).await {
        match message {
            Message::Event(Event::NoRoom) => no_room.notify_one(),
            Message::Event(Event::Exit { cause }) => {
                told.send_replace(Some(cause));
                // Nothing comes after it.
                break;
            }
            Message::Reply(reply) => {
                let due = lock(&waiting).as_mut().and_then(VecDeque::pop_front);
                match due {
                    // Whoever asked may have given up.
                    Some((id, sender)) if id == reply.id => drop(sender.send(reply.outcome)),
                    _ => {
                        tracing::warn!(id = reply.id, "a VM process answered what it was not asked");
                        break;
                    }
                }
            }
        }
    }
    *lock(&waiting) = None;
    // The other half may live on; whoever still writes shall see that nobody reads. It may be gone already.
    let stream: &UnixStream = read.get_ref().as_ref();
    let _ = rustix::net::shutdown(stream, rustix::net::Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client, and the other end of its connection.
    fn pair() -> (Control, BufReader<UnixStream>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Control::new(ours), BufReader::new(theirs))
    }

    async fn request(peer: &mut BufReader<UnixStream>) -> Request {
        let mut line = String::new();
        peer.read_line(&mut line).await.unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// What a question gets where the peer sends `answer` to it and nothing after.
    async fn answered(answer: &str) -> Result<RunState, ControlError> {
        let (control, mut peer) = pair();
        let serve = async {
            request(&mut peer).await;
            // The client may have closed already.
            let _ = peer.write_all(answer.as_bytes()).await;
            let _ = peer.shutdown().await;
        };
        let (state, ()) = tokio::join!(control.state(), serve);
        state
    }

    #[tokio::test]
    async fn each_question_gets_its_answer_in_order() {
        let (control, mut peer) = pair();
        let serve = async {
            let mut asked = Vec::new();
            for _ in 0..3 {
                asked.push(request(&mut peer).await);
            }
            for Request { id, command } in asked {
                let reply = match command {
                    Command::State => format!("{{\"id\":{id},\"ok\":{{\"state\":\"paused\"}}}}\n"),
                    Command::Pause => format!("{{\"id\":{id},\"ok\":\"done\"}}\n"),
                    _ => format!("{{\"id\":{id},\"error\":\"the guest \\u001b[2J sleeps\"}}\n"),
                };
                peer.write_all(reply.as_bytes()).await.unwrap();
            }
        };
        let (state, pause, resume, ()) =
            tokio::join!(control.state(), control.tell(Command::Pause), control.tell(Command::Resume), serve);
        assert_eq!(state.unwrap(), RunState::Paused);
        pause.unwrap();
        assert_eq!(resume.unwrap_err().to_string(), "the guest [2J sleeps");
    }

    #[tokio::test]
    async fn the_cause_of_the_end_is_kept_after_the_connection() {
        let (control, mut peer) = pair();
        peer.write_all(b"{\"event\":\"exit\",\"cause\":\"reset\"}\n").await.unwrap();
        drop(peer);
        control.drained().await;
        assert_eq!(control.exit(), Some(Cause::Reset));
        assert!(matches!(control.state().await, Err(ControlError::Closed)));
    }

    #[tokio::test]
    async fn what_is_no_answer_ends_the_connection() {
        for answer in [
            "hello\n",
            "{}\n",
            "[]\n",
            "\n",
            "{\"id\":1}\n",
            "{\"id\":1,\"ok\":\"soon\"}\n",
            "{\"id\":2,\"ok\":{\"state\":\"running\"}}\n",
            "{\"id\":0,\"error\":\"what?\"}\n",
            "{\"event\":\"exit\",\"cause\":\"boredom\"}\n",
            "{\"id\":1,\"ok\":{\"state\":\"running\"}}",
            "\u{fffd}\n",
        ] {
            assert!(matches!(answered(answer).await, Err(ControlError::Closed)), "{answer:?}");
        }
        assert!(matches!(answered("{\"id\":1,\"ok\":\"done\"}\n").await, Err(ControlError::Unfit)));
    }

    #[tokio::test]
    async fn an_answer_that_nobody_waits_for_ends_the_connection() {
        let (control, mut peer) = pair();
        while peer.write_all(b"{\"id\":1,\"ok\":\"done\"}\n").await.is_ok() {}
        assert!(matches!(control.state().await, Err(ControlError::Closed)));
    }

    #[tokio::test]
    async fn an_endless_line_is_refused_at_the_bound() {
        let (control, mut peer) = pair();
        let mut sent = 0;
        while peer.write_all(&[b' '; 4096]).await.is_ok() {
            sent += 4096;
        }
        assert!(sent < MAX_ANSWER + (1 << 24), "{sent} bytes were taken");
        assert!(matches!(control.state().await, Err(ControlError::Closed)));
    }

    #[tokio::test]
    async fn a_peer_that_neither_reads_nor_answers_costs_no_more_than_a_few_requests() {
        let (control, _peer) = pair();
        for _ in 0..3 * MAX_WAITING {
            let given_up = control.state_within(Duration::from_millis(1)).await;
            assert!(matches!(given_up, Err(ControlError::Timeout(_))));
        }
        assert_eq!(lock(&control.waiting).as_ref().unwrap().len(), MAX_WAITING);
        assert!(matches!(control.state().await, Err(ControlError::Timeout(_))));
    }
}
