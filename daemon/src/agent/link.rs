//! The link: greeting, requests and replies, frames to streams.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use catalyst_agent_protocol::{
    Channel, Control, Decoder, Frame, Identity, MAX_PAYLOAD, MAX_STREAMS, Problem, Reply, Request,
    ShutdownKind, StreamChannel, VERSION, encode,
};
use rand::RngCore;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};

use super::streams::{Arrival, Stream, StreamEnd};
use super::{AgentError, AgentStatus, HelloInfo, tame};

/// How long the agent may take for what it is asked. Generous: a software CPU with many VMs is slow.
const ANSWER_LIMIT: Duration = Duration::from_mins(1);
/// Frames that may wait to be written.
const OUTBOX: usize = 32;

/// A link to the agent of one VM.
#[derive(Clone, Debug)]
pub struct AgentLink(Arc<Inner>);

#[derive(Debug)]
pub(super) struct Inner {
    epoch: AtomicU32,
    next_id: AtomicU32,
    outbox: mpsc::Sender<Vec<u8>>,
    state: Mutex<State>,
    status: watch::Sender<AgentStatus>,
}

#[derive(Debug, Default)]
struct State {
    replies: HashMap<u32, oneshot::Sender<Reply>>,
    streams: HashMap<u32, Stream>,
}

impl AgentLink {
    /// Takes over a connection to the port and says hello. The guest may answer much later.
    pub async fn connect(stream: UnixStream) -> Result<Self, AgentError> {
        let (read, write) = stream.into_split();
        let (outbox, frames) = mpsc::channel(OUTBOX);
        let status = AgentStatus { connected: true, ..AgentStatus::default() };
        let inner = Arc::new(Inner {
            epoch: AtomicU32::new(new_epoch()),
            next_id: AtomicU32::new(1),
            outbox,
            state: Mutex::default(),
            status: watch::Sender::new(status),
        });
        tokio::spawn(write_all(write, frames));
        let weak = Arc::downgrade(&inner);
        let reader = tokio::spawn(read_all(read, weak));
        // The reader ends with the connection; the link's last user ends the connection.
        drop(reader);
        inner.greet().await?;
        Ok(Self(inner))
    }

    /// How the link and the guest are, now and whenever it changes.
    pub fn status(&self) -> watch::Receiver<AgentStatus> {
        self.0.status.subscribe()
    }

    /// Gives the guest its identity; returns when it is applied. Time and random bytes are filled in here.
    pub async fn identify(&self, identity: &Identity) -> Result<(), AgentError> {
        let mut seed = [0_u8; 32];
        rand::rng().fill_bytes(&mut seed);
        let identity = Identity {
            unix_ns: unix_ns(),
            seed: seed.iter().map(|byte| format!("{byte:02x}")).collect(),
            ..identity.clone()
        };
        self.done(Request::Identify(Box::new(identity))).await?;
        self.0.status.send_modify(|status| status.identity = true);
        Ok(())
    }

    /// Asks the guest to shut down; returns when it has begun.
    pub async fn shutdown(&self, kind: ShutdownKind) -> Result<(), AgentError> {
        self.done(Request::Shutdown { kind }).await
    }

    /// Sets the guest's clock to the host's.
    pub async fn set_clock(&self) -> Result<(), AgentError> {
        self.done(Request::SetClock { unix_ns: unix_ns() }).await
    }

    /// Returns when the agent answers.
    pub async fn ping(&self) -> Result<(), AgentError> {
        self.done(Request::Ping).await
    }

    pub(super) async fn done(&self, request: Request) -> Result<(), AgentError> {
        match self.request(self.0.new_id(), request).await? {
            Reply::Done => Ok(()),
            _ => Err(AgentError::Unexpected),
        }
    }

    /// Opens a stream whose number is that of the request.
    pub(super) async fn open(&self, request: Request) -> Result<(Reply, StreamEnd), AgentError> {
        let id = self.0.new_id();
        let (stream, end) = Stream::new(id);
        {
            let mut state = self.0.state();
            if state.streams.len() >= MAX_STREAMS {
                return Err(AgentError::TooManyStreams);
            }
            state.streams.insert(id, stream);
        }
        match self.request(id, request).await {
            Ok(reply) => Ok((reply, end)),
            Err(error) => {
                self.0.state().streams.remove(&id);
                Err(error)
            }
        }
    }

    /// Opens a stream and sends its request, but leaves the reply for later.
    pub(super) async fn open_upload(
        &self,
        request: Request,
    ) -> Result<(oneshot::Receiver<Reply>, StreamEnd), AgentError> {
        let id = self.0.new_id();
        let (stream, end) = Stream::new(id);
        let receiver = {
            let mut state = self.0.state();
            if state.streams.len() >= MAX_STREAMS {
                return Err(AgentError::TooManyStreams);
            }
            state.streams.insert(id, stream);
            let (sender, receiver) = oneshot::channel();
            state.replies.insert(id, sender);
            receiver
        };
        self.0.send_control(&Control::Request { id, request }).await?;
        Ok((receiver, end))
    }

    async fn request(&self, id: u32, request: Request) -> Result<Reply, AgentError> {
        let (sender, receiver) = oneshot::channel();
        self.0.state().replies.insert(id, sender);
        let sent = self.0.send_control(&Control::Request { id, request }).await;
        if let Err(error) = sent {
            self.0.state().replies.remove(&id);
            return Err(error);
        }
        let reply = tokio::time::timeout(ANSWER_LIMIT, receiver).await;
        self.0.state().replies.remove(&id);
        match reply {
            Ok(Ok(reply)) => accept(reply),
            Ok(Err(_)) => Err(AgentError::Gone("it ended or started anew".to_owned())),
            Err(_) => Err(AgentError::Timeout(ANSWER_LIMIT.as_secs())),
        }
    }

    /// Sends data on a stream, waiting for the guest's credit.
    pub(super) async fn send_data(&self, stream: u32, bytes: &[u8]) -> Result<(), AgentError> {
        self.0.send(stream, Channel::Input, bytes).await
    }

    /// Lets the guest send more.
    pub(super) async fn grant(&self, stream: u32, channel: StreamChannel, bytes: u32) {
        if let Some(state) = self.0.state().streams.get_mut(&stream) {
            state.grant(channel, bytes);
        }
        // If the link is gone, so is the stream.
        let _ = self.0.send_control(&Control::Credit { stream, channel, bytes }).await;
    }

    /// Ends a stream on both sides, if it is still open; from where nothing can be waited for.
    pub(super) fn close(&self, stream: u32) {
        if self.0.state().streams.remove(&stream).is_none() {
            return;
        }
        let link = self.clone();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { link.done(Request::Close { stream }).await });
        }
    }
}

pub(super) fn accept(reply: Reply) -> Result<Reply, AgentError> {
    match reply {
        Reply::Failed(Problem { kind, message }) => {
            Err(AgentError::Refused { kind, message: tame(&message, 500) })
        }
        reply => Ok(reply),
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock; if it did, the maps would still be whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn new_id(&self) -> u32 {
        loop {
            let id = self.next_id.fetch_add(1, Ordering::Relaxed);
            if id != 0 && !self.state().streams.contains_key(&id) {
                return id;
            }
        }
    }

    async fn greet(&self) -> Result<(), AgentError> {
        self.send_control(&Control::Hello { version: VERSION, agent: String::new() }).await
    }

    async fn send_control(&self, message: &Control) -> Result<(), AgentError> {
        let text = serde_json::to_vec(message).map_err(|error| AgentError::Io(error.into()))?;
        self.send(0, Channel::Control, &text).await
    }

    async fn send(&self, stream: u32, channel: Channel, payload: &[u8]) -> Result<(), AgentError> {
        let epoch = self.epoch.load(Ordering::Relaxed);
        let bytes = encode(epoch, stream, channel, payload).map_err(|_| AgentError::TooLarge)?;
        let gone = |_| AgentError::Gone("its port is closed".to_owned());
        self.outbox.send(bytes).await.map_err(gone)
    }

    async fn receive(&self, frame: Frame) -> Result<(), String> {
        if frame.channel == Channel::Control {
            let message: Control = serde_json::from_slice(&frame.payload)
                .map_err(|error| format!("it sent a message that is none: {error}"))?;
            if matches!(message, Control::Up) {
                return self.guest_came_up().await;
            }
            if frame.epoch == self.epoch.load(Ordering::Relaxed) {
                self.control(message)?;
            }
            return Ok(());
        }
        if frame.epoch != self.epoch.load(Ordering::Relaxed) {
            return Ok(());
        }
        let channel = match frame.channel {
            Channel::Output => StreamChannel::Output,
            Channel::Errors => StreamChannel::Errors,
            Channel::Input | Channel::Control => StreamChannel::Input,
        };
        match self.state().streams.get_mut(&frame.stream) {
            Some(stream) => stream.data(channel, frame.payload).map_err(str::to_owned),
            // It was closed here and the guest does not know yet.
            None => Ok(()),
        }
    }

    fn control(&self, message: Control) -> Result<(), String> {
        match message {
            Control::Hello { version, agent } => {
                if version != VERSION {
                    return Err(format!(
                        "it speaks version {version} of the protocol, this daemon {VERSION}"
                    ));
                }
                let epoch = self.epoch.load(Ordering::Relaxed);
                let hello = HelloInfo { epoch, agent_version: tame(&agent, 64) };
                self.status.send_modify(|status| status.hello = Some(hello));
            }
            Control::Reply { id, reply } => {
                if let Some(waiting) = self.state().replies.remove(&id) {
                    // Whoever asked may have given up.
                    let _ = waiting.send(reply);
                }
            }
            Control::Credit { stream, bytes, .. } => {
                if let Some(stream) = self.state().streams.get(&stream) {
                    stream.credited(bytes);
                }
            }
            Control::Status(now) => {
                self.status.send_if_modified(|status| {
                    let before = status.clone();
                    (status.identity, status.ssh, status.docker) = (now.identity, now.ssh, now.docker);
                    *status != before
                });
            }
            Control::Exited { stream, exit } => {
                if let Some(stream) = self.state().streams.remove(&stream) {
                    stream.arrive(Arrival::Exited(exit));
                }
            }
            Control::Up | Control::Request { .. } => {
                return Err("it sent what only the host sends".to_owned());
            }
        }
        Ok(())
    }

    /// The guest has opened its port: for the first time, or after it started anew.
    async fn guest_came_up(&self) -> Result<(), String> {
        let greeted = self.status.borrow().hello.is_some();
        if greeted {
            self.epoch.store(new_epoch(), Ordering::Relaxed);
            self.lose("the guest started anew");
            self.status.send_modify(|status| {
                *status = AgentStatus { connected: true, ..AgentStatus::default() };
            });
        }
        self.greet().await.map_err(|error| error.to_string())
    }

    /// Ends everything that was under way.
    fn lose(&self, why: &str) {
        let state = std::mem::take(&mut *self.state());
        for stream in state.streams.into_values() {
            stream.arrive(Arrival::Lost(why.to_owned()));
        }
    }
}

fn new_epoch() -> u32 {
    // 0 is the epoch of a guest that was not greeted.
    rand::rng().next_u32().max(1)
}

fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

async fn write_all(mut write: OwnedWriteHalf, mut frames: mpsc::Receiver<Vec<u8>>) {
    while let Some(frame) = frames.recv().await {
        if write.write_all(&frame).await.is_err() {
            return;
        }
    }
}

async fn read_all(mut read: OwnedReadHalf, link: std::sync::Weak<Inner>) {
    let mut decoder = Decoder::new();
    let mut buffer = vec![0_u8; MAX_PAYLOAD];
    let why = loop {
        let length = match read.read(&mut buffer).await {
            Ok(0) => break "its port was closed".to_owned(),
            Ok(length) => length,
            Err(error) => break format!("its port failed: {error}"),
        };
        let Some(inner) = link.upgrade() else { return };
        decoder.push(&buffer[..length]);
        let mut failed = None;
        while let Some(frame) = decoder.next_frame() {
            if let Err(why) = inner.receive(frame).await {
                failed = Some(why);
                break;
            }
        }
        if let Some(why) = failed {
            tracing::warn!(why, "the agent broke the protocol");
            break why;
        }
    };
    if let Some(inner) = link.upgrade() {
        inner.lose(&why);
        inner.status.send_replace(AgentStatus::default());
    }
}
