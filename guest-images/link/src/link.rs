//! The link: greeting, requests and replies, frames to streams.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use catalyst_agent_protocol::container::MAX_NAME;
use catalyst_agent_protocol::{
    Channel, Control, Decoder, Frame, HEADER, MAX_PAYLOAD, MAX_STREAMS, Problem, Reply, Request, SetUpReport,
    StreamChannel, VERSION, encode,
};
use rand::RngCore;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};

use crate::notices::{Notice, Notices};
use crate::streams::{Arrival, Stream, StreamEnd};
use crate::{AgentError, AgentStatus, HelloInfo, tame};

/// How long the agent may take for what it is asked. Generous: a software CPU with many VMs is slow.
const ANSWER_LIMIT: Duration = Duration::from_mins(1);
/// Frames that may wait to be written.
const OUTBOX: usize = 32;

/// A link to the agent of one VM.
#[derive(Clone, Debug)]
pub struct AgentLink(Arc<Inner>);

#[derive(Debug)]
pub(crate) struct Inner {
    epoch: AtomicU32,
    next_id: AtomicU32,
    outbox: mpsc::Sender<Vec<u8>>,
    state: Mutex<State>,
    status: watch::Sender<AgentStatus>,
    notices: Notices,
}

#[derive(Debug, Default)]
struct State {
    ended: bool,
    replies: HashMap<u32, oneshot::Sender<Reply>>,
    streams: HashMap<u32, Stream>,
}

impl AgentLink {
    /// Takes over a connection to the port and says hello. The guest may answer much later.
    pub async fn connect(stream: UnixStream) -> Result<Self, AgentError> {
        let link = Self::silent(stream);
        // A daemon that was killed may have left half a frame; this completes the longest there is.
        let flush = vec![0; MAX_PAYLOAD + HEADER];
        link.0.outbox.send(flush).await.map_err(|_| AgentError::Gone("its port is closed".to_owned()))?;
        link.0.greet().await?;
        Ok(link)
    }

    /// The same for a port on which all that was ever written was written whole: a guest on a software CPU is long at what would
    /// complete a half.
    pub async fn connect_first(stream: UnixStream) -> Result<Self, AgentError> {
        let link = Self::silent(stream);
        link.0.greet().await?;
        Ok(link)
    }

    fn silent(stream: UnixStream) -> Self {
        let (read, write) = stream.into_split();
        let (outbox, frames) = mpsc::channel(OUTBOX);
        let status = AgentStatus { connected: true, ..AgentStatus::default() };
        let inner = Arc::new(Inner {
            epoch: AtomicU32::new(new_epoch()),
            next_id: AtomicU32::new(1),
            outbox,
            state: Mutex::default(),
            status: watch::Sender::new(status),
            notices: Notices::default(),
        });
        tokio::spawn(write_all(write, frames));
        let weak = Arc::downgrade(&inner);
        let reader = tokio::spawn(read_all(read, weak));
        // The reader ends with the connection; the link's last user ends the connection.
        drop(reader);
        Self(inner)
    }

    /// Notes that the guest has its identity, before its agent says so.
    pub(crate) fn note_identity(&self) {
        self.0.status.send_modify(|status| status.identity = true);
    }

    /// How the link and the guest are, now and whenever it changes.
    pub fn status(&self) -> watch::Receiver<AgentStatus> {
        self.0.status.subscribe()
    }

    pub(crate) fn listen(&self) -> mpsc::Receiver<Notice> {
        self.0.notices.listen()
    }

    pub(crate) async fn done(&self, request: Request) -> Result<(), AgentError> {
        self.done_within(request, ANSWER_LIMIT).await
    }

    pub(crate) async fn done_within(&self, request: Request, limit: Duration) -> Result<(), AgentError> {
        match self.request_within(self.0.new_id(), request, limit).await? {
            Reply::Done => Ok(()),
            _ => Err(AgentError::Unexpected),
        }
    }

    /// Opens a stream whose number is that of the request.
    pub(crate) async fn open(&self, request: Request) -> Result<(Reply, StreamEnd), AgentError> {
        let id = self.0.new_id();
        let (stream, end) = Stream::new(id);
        self.0.state().add(id, stream)?;
        // If the answer does not come, or nobody waits for it any more, the guest is told to end it.
        let mut opening = Opening { link: self, id, opened: false };
        let reply = self.request(id, request).await;
        if let Err(AgentError::Refused { .. }) = reply {
            self.0.state().streams.remove(&id);
        }
        let reply = reply?;
        opening.opened = true;
        Ok((reply, end))
    }

    /// Opens a stream and sends its request, but leaves the reply for later.
    pub(crate) async fn open_upload(
        &self,
        request: Request,
    ) -> Result<(oneshot::Receiver<Reply>, StreamEnd), AgentError> {
        let id = self.0.new_id();
        let (stream, end) = Stream::new(id);
        let receiver = {
            let mut state = self.0.state();
            state.add(id, stream)?;
            let (sender, receiver) = oneshot::channel();
            state.replies.insert(id, sender);
            receiver
        };
        self.0.send_control(&Control::Request { id, request }).await?;
        Ok((receiver, end))
    }

    /// Asks something that has an answer of its own.
    pub(crate) async fn ask(&self, request: Request, limit: Duration) -> Result<Reply, AgentError> {
        self.request_within(self.0.new_id(), request, limit).await
    }

    async fn request(&self, id: u32, request: Request) -> Result<Reply, AgentError> {
        self.request_within(id, request, ANSWER_LIMIT).await
    }

    async fn request_within(&self, id: u32, request: Request, limit: Duration) -> Result<Reply, AgentError> {
        let (sender, receiver) = oneshot::channel();
        {
            let mut state = self.0.state();
            if state.ended {
                return Err(AgentError::Gone("its port is closed".to_owned()));
            }
            state.replies.insert(id, sender);
        }
        let sent = self.0.send_control(&Control::Request { id, request }).await;
        if let Err(error) = sent {
            self.0.state().replies.remove(&id);
            return Err(error);
        }
        let reply = tokio::time::timeout(limit, receiver).await;
        self.0.state().replies.remove(&id);
        match reply {
            Ok(Ok(reply)) => accept(reply),
            Ok(Err(_)) => Err(AgentError::Gone("it ended or started anew".to_owned())),
            Err(_) => Err(AgentError::Timeout(limit.as_secs())),
        }
    }

    /// Sends data on a stream, waiting for the guest's credit.
    pub(crate) async fn send_data(&self, stream: u32, bytes: &[u8]) -> Result<(), AgentError> {
        self.0.send(stream, Channel::Input, bytes).await
    }

    /// Lets the guest send more.
    pub(crate) fn grant(&self, stream: u32, channel: StreamChannel, bytes: u32) {
        let Some(()) = self.0.state().streams.get_mut(&stream).map(|stream| stream.grant(channel, bytes))
        else {
            return;
        };
        self.soon(|link| async move {
            // If the link is gone, so is the stream.
            let _ = link.0.send_control(&Control::Credit { stream, channel, bytes }).await;
        });
    }

    /// Ends the input of a stream, from where nothing can be waited for.
    pub(crate) fn end_input(&self, stream: u32) {
        if self.0.state().streams.contains_key(&stream) {
            self.soon(|link| async move { drop(link.send_data(stream, &[]).await) });
        }
    }

    /// Sends something in a task of its own.
    fn soon<F: Future<Output = ()> + Send + 'static>(&self, send: impl FnOnce(Self) -> F) {
        // Without a runtime the daemon is ending, and with it the link.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(send(self.clone()));
        }
    }

    /// Ends a stream on both sides, if it is still open; from where nothing can be waited for.
    pub(crate) fn close(&self, stream: u32) {
        if self.0.state().streams.remove(&stream).is_none() {
            return;
        }
        self.soon(|link| async move { drop(link.done(Request::Close { stream }).await) });
    }
}

/// A stream whose request is under way.
struct Opening<'a> {
    link: &'a AgentLink,
    id: u32,
    opened: bool,
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        if !self.opened {
            self.link.close(self.id);
        }
    }
}

impl State {
    fn add(&mut self, id: u32, stream: Stream) -> Result<(), AgentError> {
        if self.streams.len() >= MAX_STREAMS {
            return Err(AgentError::TooManyStreams);
        }
        self.streams.insert(id, stream);
        Ok(())
    }
}

pub(crate) fn accept(reply: Reply) -> Result<Reply, AgentError> {
    match reply {
        Reply::Failed(Problem { kind, message }) => {
            Err(AgentError::Refused { kind, message: tame(&message, 500) })
        }
        reply => Ok(reply),
    }
}

/// What a guest says of its setting up, as one line.
pub(crate) fn tamed(report: &SetUpReport) -> SetUpReport {
    SetUpReport { state: report.state, message: tame(&report.message, 1000) }
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
                        "it speaks version {version} of the protocol, this program {VERSION}"
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
            Control::SetUp(report) => {
                self.status.send_modify(|status| status.set_up = Some(tamed(&report)));
            }
            Control::Resolve { query, tcp, message } => {
                self.notices.tell(Notice::Resolve { query, tcp, message: message.0 })?;
            }
            // What no container can be called is no news of one.
            Control::OutOfMemory { container } if container.len() > MAX_NAME => {}
            Control::OutOfMemory { container } => self.notices.tell(Notice::OutOfMemory(container))?,
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
            self.lose("the guest started anew", false);
            self.status.send_modify(|status| {
                *status = AgentStatus { connected: true, ..AgentStatus::default() };
            });
        }
        self.greet().await.map_err(|error| error.to_string())
    }

    /// Ends everything that was under way.
    fn lose(&self, why: &str, for_good: bool) {
        let state = std::mem::replace(&mut *self.state(), State { ended: for_good, ..State::default() });
        for stream in state.streams.into_values() {
            stream.arrive(Arrival::Lost(why.to_owned()));
        }
    }
}

fn new_epoch() -> u32 {
    // 0 is the epoch of a guest that was not greeted.
    rand::rng().next_u32().max(1)
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
        inner.lose(&why, true);
        inner.status.send_replace(AgentStatus::default());
    }
}

#[cfg(test)]
mod tests {
    use catalyst_agent_protocol::{ExecSpec, INITIAL_CREDIT, Status};
    use rand::Rng;

    use super::*;

    /// A guest that is played by hand.
    struct Guest {
        stream: UnixStream,
        decoder: Decoder,
        epoch: u32,
    }

    impl Guest {
        async fn next(&mut self) -> Frame {
            let mut buffer = vec![0; 4096];
            loop {
                if let Some(frame) = self.decoder.next_frame() {
                    return frame;
                }
                let length = self.stream.read(&mut buffer).await.unwrap();
                assert!(length > 0, "the host has gone");
                self.decoder.push(&buffer[..length]);
            }
        }

        async fn next_control(&mut self) -> Control {
            loop {
                let frame = self.next().await;
                if frame.channel == Channel::Control {
                    self.epoch = frame.epoch;
                    return serde_json::from_slice(&frame.payload).unwrap();
                }
            }
        }

        async fn send(&mut self, stream: u32, channel: Channel, payload: &[u8]) {
            let bytes = encode(self.epoch, stream, channel, payload).unwrap();
            self.stream.write_all(&bytes).await.unwrap();
        }

        async fn say(&mut self, message: &Control) {
            self.send(0, Channel::Control, &serde_json::to_vec(message).unwrap()).await;
        }
    }

    async fn pair() -> (AgentLink, Guest) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let link = AgentLink::connect(ours).await.unwrap();
        (link, Guest { stream: theirs, decoder: Decoder::new(), epoch: 0 })
    }

    async fn greeted() -> (AgentLink, Guest) {
        let (link, mut guest) = pair().await;
        assert!(matches!(guest.next_control().await, Control::Hello { .. }));
        guest.say(&Control::Hello { version: VERSION, agent: "test\n".into() }).await;
        link.status().wait_for(|status| status.hello.is_some()).await.unwrap();
        (link, guest)
    }

    async fn running() -> (AgentLink, Guest, crate::ExecSession, u32) {
        let (link, mut guest) = greeted().await;
        let asking = tokio::spawn({
            let link = link.clone();
            async move { link.exec(ExecSpec { argv: vec!["x".into()], ..ExecSpec::default() }).await }
        });
        let Control::Request { id, request: Request::Exec(_) } = guest.next_control().await else { panic!() };
        guest.say(&Control::Reply { id, reply: Reply::Started { pid: 1 } }).await;
        let session = asking.await.unwrap().unwrap();
        (link, guest, session, id)
    }

    async fn ended(link: &AgentLink) {
        let limit = Duration::from_secs(20);
        let mut status = link.status();
        tokio::time::timeout(limit, status.wait_for(|status| !status.connected)).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn what_a_guest_says_of_itself_is_tamed() {
        let (link, mut guest) = greeted().await;
        assert_eq!(link.status().borrow().hello.as_ref().unwrap().agent_version, "test ");
        guest.say(&Control::Status(Status { identity: true, ssh: true, docker: false })).await;
        let mut status = link.status();
        let status = status.wait_for(|status| status.ssh).await.unwrap();
        assert!(status.identity && !status.docker);
    }

    #[tokio::test]
    async fn a_guest_that_sends_more_than_its_credit_loses_its_link() {
        let (link, mut guest, _session, id) = running().await;
        let piece = vec![0; MAX_PAYLOAD];
        for _ in 0..=INITIAL_CREDIT as usize / MAX_PAYLOAD {
            guest.send(id, Channel::Output, &piece).await;
        }
        ended(&link).await;
        let late = link.ping().await.unwrap_err();
        assert!(matches!(late, AgentError::Gone(_)), "{late}");
    }

    #[tokio::test]
    async fn an_end_that_comes_twice_ends_the_link() {
        let (link, mut guest, _session, id) = running().await;
        guest.send(id, Channel::Output, b"").await;
        guest.send(id, Channel::Output, b"").await;
        ended(&link).await;
    }

    #[tokio::test]
    async fn credit_that_was_never_used_is_not_added() {
        let (_link, mut guest, session, id) = running().await;
        for _ in 0..100 {
            guest.say(&Control::Credit { stream: id, channel: StreamChannel::Input, bytes: u32::MAX }).await;
        }
        guest.send(id, Channel::Output, b"seen").await;
        let (stdin, _control, mut events) = session.split();
        assert!(matches!(events.next().await, Some(crate::ExecEvent::Stdout(_))));
        assert_eq!(stdin.available_credit(), INITIAL_CREDIT as usize);
    }

    #[tokio::test]
    async fn a_guest_that_starts_anew_is_greeted_in_a_new_epoch_and_its_commands_are_lost() {
        let (link, mut guest, session, _id) = running().await;
        let before = guest.epoch;
        guest.epoch = 0;
        guest.say(&Control::Up).await;
        assert!(matches!(guest.next_control().await, Control::Hello { .. }));
        assert_ne!(guest.epoch, before);
        assert!(link.status().borrow().hello.is_none());
        let (_stdin, _control, mut events) = session.split();
        assert!(matches!(events.next().await, Some(crate::ExecEvent::Lost(_))));
    }

    #[tokio::test]
    async fn a_command_nobody_wants_any_more_is_closed() {
        let (_link, mut guest, session, id) = running().await;
        drop(session);
        loop {
            if let Control::Request { request: Request::Close { stream }, .. } = guest.next_control().await {
                assert_eq!(stream, id);
                return;
            }
        }
    }

    #[tokio::test]
    async fn random_bytes_and_random_messages_are_survived() {
        for round in 0..50 {
            let (link, mut guest) = greeted().await;
            let mut bytes = vec![0_u8; 20_000];
            rand::rng().fill_bytes(&mut bytes);
            for chunk in bytes.chunks(700) {
                let sent = if round % 2 == 0 {
                    chunk.to_vec()
                } else {
                    let channel = [Channel::Control, Channel::Output, Channel::Errors, Channel::Input];
                    let channel = channel[rand::rng().random_range(0..4)];
                    encode(guest.epoch, rand::rng().random_range(0..4), channel, chunk).unwrap()
                };
                // The host may have ended the link.
                if guest.stream.write_all(&sent).await.is_err() {
                    break;
                }
            }
            drop(guest);
            ended(&link).await;
        }
    }
}
