//! The talk with one host after another: epochs, requests, open streams.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use catalyst_agent_protocol::{
    Channel, Control, ExecSpec, Frame, MAX_STREAMS, Problem, ProblemKind, Reply, Request, SetUpReport,
    Status, StreamChannel, VERSION,
};

use crate::container::{Keeper, Step};
use crate::exec::Manner;
use crate::folders::Folders;
use crate::forget;
use crate::outbox::Outbox;
use crate::port::Event;
use crate::set_up::Setting;
use crate::stream::Stream;
use crate::{cpu_share, exec, files, identity, notify, readiness, rest, shutdown};

/// What the command line settles.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the files of an identity go; with another root than `/` nothing but files is touched.
    pub root: PathBuf,
    /// Whether an identity sets up the network.
    pub network: bool,
    /// What keeps the container of a VM that is one.
    pub keeper: Option<Arc<Keeper>>,
    /// Whether the host of this session is the container's runtime.
    pub runtime: bool,
}

impl Config {
    /// That of a test, which changes nothing but files below a folder.
    #[cfg(test)]
    pub fn of_files(root: &std::path::Path) -> Self {
        Self { root: root.to_owned(), network: false, keeper: None, runtime: false }
    }

    /// Whether this is a test's folder, not the guest's own system.
    pub fn files_only(&self) -> bool {
        self.root != std::path::Path::new("/")
    }
}

/// All that the agent's threads share.
#[derive(Debug)]
pub struct Session {
    /// The command line.
    pub config: Config,
    /// Frames to the host.
    pub outbox: Arc<Outbox>,
    folders: Arc<Folders>,
    setting: Arc<Setting>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The epoch last greeted; none while no host that is understood is there.
    epoch: Option<u32>,
    status: Status,
    streams: HashMap<u32, Arc<Stream>>,
    /// The host has asked how far the setting up is, and hears of it.
    told_of_setting_up: bool,
}

/// Shorthand for a request that was not done.
pub fn failed(kind: ProblemKind, message: impl Into<String>) -> Reply {
    // One line, whatever a path or a name in it holds.
    let message = message.into().replace(['\n', '\r'], " ");
    Reply::Failed(Problem { kind, message: message.chars().take(1000).collect() })
}

/// The answer to a request that was not done.
fn refused(problem: Problem) -> Reply {
    failed(problem.kind, problem.message)
}

impl Session {
    /// Nobody greeted, nothing open.
    pub fn new(config: Config, outbox: Arc<Outbox>) -> Arc<Self> {
        Arc::new(Self {
            config,
            outbox,
            folders: Arc::default(),
            setting: Arc::default(),
            state: Mutex::default(),
        })
    }

    /// Takes what comes from the port.
    pub fn handle(self: &Arc<Self>, event: Event) {
        match event {
            Event::HostGone => self.drop_epoch(),
            Event::Frame(frame) if frame.channel == Channel::Control => self.control(&frame),
            Event::Frame(frame) if frame.channel == Channel::Input => self.input(frame),
            // Output comes from here and goes nowhere else.
            Event::Frame(_) => {}
        }
    }

    fn control(self: &Arc<Self>, frame: &Frame) {
        if frame.stream != 0 {
            return;
        }
        let greeted = self.lock().epoch == Some(frame.epoch);
        match serde_json::from_slice(&frame.payload) {
            Ok(Control::Hello { version, .. }) => self.hello(frame.epoch, version),
            _ if !greeted => {}
            Ok(Control::Request { id, request }) => self.request(frame.epoch, id, request),
            Ok(Control::Credit { stream, channel, bytes }) => {
                if let Some(stream) = self.stream(stream) {
                    stream.grant(channel, bytes);
                }
            }
            Ok(_) => {}
            Err(error) => {
                if let Some(id) = request_id(&frame.payload) {
                    let problem = format!("request {id} cannot be read: {error}");
                    self.reply(frame.epoch, id, failed(ProblemKind::Invalid, problem));
                }
            }
        }
    }

    fn hello(&self, epoch: u32, version: u32) {
        self.drop_epoch();
        self.outbox.begin(epoch);
        let agent = env!("CARGO_PKG_VERSION").to_owned();
        self.outbox.control(epoch, &Control::Hello { version: VERSION, agent });
        if version != VERSION {
            eprintln!("catalyst-agent: the host speaks version {version}, this agent {VERSION}");
            return;
        }
        // Under the lock, so that a change of the status is sent after this and not lost before.
        let mut state = self.lock();
        state.epoch = Some(epoch);
        self.outbox.control(epoch, &Control::Status(state.status));
    }

    /// Ends all that belongs to the host that was there.
    pub fn drop_epoch(&self) {
        let mut state = self.lock();
        state.epoch = None;
        state.told_of_setting_up = false;
        let streams = std::mem::take(&mut state.streams);
        drop(state);
        for stream in streams.values() {
            stream.lose();
        }
    }

    fn request(self: &Arc<Self>, epoch: u32, id: u32, request: Request) {
        if id == 0 {
            return self.reply(epoch, id, failed(ProblemKind::Invalid, "a request's id must not be 0"));
        }
        let reply = match request {
            Request::Identify(identity) => self.identify(&identity),
            Request::Exec(spec) => return self.exec(epoch, id, spec),
            Request::PutFile(spec) => return self.open(epoch, id, |stream| files::put(self, stream, spec)),
            Request::GetFile { path } => {
                return self.open(epoch, id, |stream| files::get(self, stream, &path));
            }
            Request::Resize { stream, terminal } => {
                self.with(stream, |stream| exec::resize(stream, &terminal))
            }
            Request::Signal { stream, signal } => self.with(stream, |stream| exec::signal(stream, signal)),
            Request::Close { stream } => self.with(stream, |stream| {
                stream.close();
                Reply::Done
            }),
            Request::Shutdown { kind } => {
                self.reply(epoch, id, Reply::Done);
                return shutdown::shut_down(self, kind);
            }
            Request::SetClock { unix_ns, seed } => match identity::go_on(&self.config, unix_ns, &seed) {
                Ok(()) => Reply::Done,
                Err(problem) => Reply::Failed(problem),
            },
            Request::MountFolder { folder } => {
                return self.with_folders(epoch, id, move |all| all.mount(&folder));
            }
            Request::UnmountFolder { name } => {
                return self.with_folders(epoch, id, move |all| all.unmount(&name));
            }
            Request::SetUp { instance, document } => {
                let session = Arc::clone(self);
                self.lock().told_of_setting_up = true;
                thread::spawn(move || {
                    let report = session.setting.begin(&session, &instance, document);
                    session.reply(epoch, id, report);
                });
                return;
            }
            Request::Forget => match forget::forget(&self.config) {
                Ok(()) => Reply::Done,
                Err(error) => failed(ProblemKind::Failed, format!("forgetting failed: {error}")),
            },
            Request::Rest => match rest::rest(&self.config) {
                Ok(()) => Reply::Done,
                Err(error) => failed(ProblemKind::Failed, format!("coming to rest failed: {error}")),
            },
            Request::CreateContainer { .. }
            | Request::StartContainer { .. }
            | Request::ExecContainer { .. }
            | Request::RemoveContainer { .. }
            | Request::SetNetwork(_)
            | Request::Resolved { .. } => return self.contain(epoch, id, request),
            Request::Ping => Reply::Done,
            Request::Unknown => {
                failed(ProblemKind::Unsupported, format!("this agent does not know request {id}"))
            }
        };
        self.reply(epoch, id, reply);
    }

    /// A command; where the VM is a container that runs, in that.
    fn exec(self: &Arc<Self>, epoch: u32, id: u32, spec: ExecSpec) {
        match self.config.keeper.clone().filter(|keeper| keeper.is_running()) {
            Some(keeper) => self.open_later(epoch, id, move |session, stream| {
                exec::check(&spec)?;
                let timeout = spec.timeout_ms;
                exec::run(session, stream, keeper.guest_exec(spec)?, timeout, Manner::Command)
            }),
            None => self.open(epoch, id, |stream| exec::start(self, stream, &spec)),
        }
    }

    /// What a runtime asks of the VM that is its container. Most of it waits for others, and keeps nobody else waiting.
    fn contain(self: &Arc<Self>, epoch: u32, id: u32, request: Request) {
        let Some(keeper) = self.config.keeper.clone().filter(|_| self.config.runtime) else {
            let problem = "containers are asked for over a port of their own";
            return self.reply(epoch, id, failed(ProblemKind::Unsupported, problem));
        };
        match request {
            Request::CreateContainer { document } => {
                self.later(epoch, id, move |session| keeper.create(session, document));
            }
            Request::StartContainer { name } => {
                self.open_later(epoch, id, move |session, stream| keeper.start(session, stream, &name));
            }
            Request::ExecContainer { name, process } => self
                .open_later(epoch, id, move |session, stream| keeper.exec(session, stream, &name, *process)),
            Request::RemoveContainer { name } => self.later(epoch, id, move |_| keeper.remove(&name)),
            Request::SetNetwork(network) => self.later(epoch, id, move |_| keeper.set_network(&network)),
            Request::Resolved { query, message } => {
                keeper.resolved(query, &message.0);
                self.reply(epoch, id, Reply::Done);
            }
            _ => {}
        }
    }

    /// Does something in a thread of its own and answers when it is done.
    fn later(
        self: &Arc<Self>,
        epoch: u32,
        id: u32,
        act: impl FnOnce(&Arc<Self>) -> Step<()> + Send + 'static,
    ) {
        let session = Arc::clone(self);
        thread::spawn(move || {
            let reply = act(&session).map_or_else(refused, |()| Reply::Done);
            session.reply(epoch, id, reply);
        });
    }

    /// Opens a stream and begins what it is for in a thread of its own, which answers.
    fn open_later(
        self: &Arc<Self>,
        epoch: u32,
        id: u32,
        start: impl FnOnce(&Arc<Self>, &Arc<Stream>) -> Step<()> + Send + 'static,
    ) {
        let stream = match self.insert(epoch, id) {
            Ok(stream) => stream,
            Err(reply) => return self.reply(epoch, id, reply),
        };
        let session = Arc::clone(self);
        thread::spawn(move || {
            if let Err(problem) = start(&session, &stream) {
                session.finish(&stream);
                session.reply(epoch, id, refused(problem));
            }
        });
    }

    /// What waits for the host's side of folders, or for programs' files, keeps nobody else waiting.
    fn with_folders(
        self: &Arc<Self>,
        epoch: u32,
        id: u32,
        act: impl FnOnce(&Arc<Folders>) -> Result<(), Problem> + Send + 'static,
    ) {
        if self.config.keeper.is_some() {
            // The port for folders carries the container's own trees.
            let problem = "a VM that is a container takes no folders: mount volumes into the container";
            return self.reply(epoch, id, failed(ProblemKind::Unsupported, problem));
        }
        self.later(epoch, id, move |session| act(&session.folders));
    }

    fn identify(self: &Arc<Self>, identity: &catalyst_agent_protocol::Identity) -> Reply {
        if self.config.keeper.is_some() {
            // Name and network are the container's, and nobody logs in.
            return match identity::go_on(&self.config, identity.unix_ns, &identity.seed) {
                Ok(()) => {
                    self.set_status(|status| status.identity = true);
                    Reply::Done
                }
                Err(problem) => Reply::Failed(problem),
            };
        }
        match identity::apply(&self.config, identity) {
            Ok(restarting) => {
                if let Some(mut sshd) = restarting {
                    self.set_status(|status| status.ssh = false);
                    let session = Arc::clone(self);
                    thread::spawn(move || {
                        let listens = sshd.wait();
                        cpu_share::take_turns();
                        if !listens {
                            readiness::wait_for_ssh();
                        }
                        session.set_status(|status| status.ssh = true);
                    });
                } else if identity.clone && !self.config.files_only() {
                    cpu_share::take_turns();
                }
                if self.set_status(|status| status.identity = true) {
                    notify::ready();
                    if !self.config.files_only() {
                        readiness::watch(self);
                    }
                }
                self.setting.go_on(self);
                Reply::Done
            }
            Err(problem) => Reply::Failed(problem),
        }
    }

    /// Whether the guest has its identity, and with it its network.
    pub fn is_identified(&self) -> bool {
        self.lock().status.identity
    }

    /// Tells a host that has asked how far the setting up is.
    pub fn tell_set_up(&self, report: SetUpReport) {
        let state = self.lock();
        if let Some(epoch) = state.epoch.filter(|_| state.told_of_setting_up) {
            self.outbox.control(epoch, &Control::SetUp(report));
        }
    }

    /// Opens a stream; `start` answers the request, now or later, unless it returns the answer.
    fn open(self: &Arc<Self>, epoch: u32, id: u32, start: impl FnOnce(&Arc<Stream>) -> Result<(), Reply>) {
        let opened =
            self.insert(epoch, id).and_then(|stream| start(&stream).inspect_err(|_| self.finish(&stream)));
        if let Err(reply) = opened {
            self.reply(epoch, id, reply);
        }
    }

    fn insert(&self, epoch: u32, id: u32) -> Result<Arc<Stream>, Reply> {
        let mut state = self.lock();
        if state.streams.contains_key(&id) {
            return Err(failed(ProblemKind::Invalid, format!("stream {id} is open already")));
        }
        if state.streams.len() >= MAX_STREAMS {
            let message = format!("{MAX_STREAMS} streams are open: close one first");
            return Err(failed(ProblemKind::Busy, message));
        }
        let stream = Stream::new(epoch, id)
            .map_err(|error| failed(ProblemKind::Failed, format!("stream {id} cannot be opened: {error}")))?;
        let stream = Arc::new(stream);
        state.streams.insert(id, Arc::clone(&stream));
        Ok(stream)
    }

    fn input(&self, frame: Frame) {
        let known = self.lock().epoch == Some(frame.epoch);
        let Some(stream) = self.stream(frame.stream).filter(|_| known) else { return };
        if !stream.feed(frame.payload) {
            eprintln!("catalyst-agent: stream {} is closed: its input exceeded its credit", stream.id);
            stream.close();
        }
    }

    /// Forgets a stream that has ended; its number is free again.
    pub fn finish(&self, stream: &Arc<Stream>) {
        stream.close();
        let mut state = self.lock();
        if state.streams.get(&stream.id).is_some_and(|open| Arc::ptr_eq(open, stream)) {
            state.streams.remove(&stream.id);
        }
    }

    /// Answers a request.
    pub fn reply(&self, epoch: u32, id: u32, reply: Reply) {
        self.outbox.control(epoch, &Control::Reply { id, reply });
    }

    /// Grants a stream's sender of input as many bytes as were consumed.
    pub fn credit_input(&self, stream: &Stream, consumed: usize) {
        stream.input_consumed(consumed);
        let bytes = u32::try_from(consumed).unwrap_or(u32::MAX);
        let credit = Control::Credit { stream: stream.id, channel: StreamChannel::Input, bytes };
        self.outbox.control(stream.epoch, &credit);
    }

    /// Says something to the host, if one is there.
    pub fn tell(&self, message: &Control) -> bool {
        let epoch = self.lock().epoch;
        epoch.is_some_and(|epoch| self.outbox.control(epoch, message))
    }

    /// Changes the status and tells the host; false if it was so already.
    pub fn set_status(&self, change: impl FnOnce(&mut Status)) -> bool {
        let mut state = self.lock();
        let before = state.status;
        change(&mut state.status);
        if state.status == before {
            return false;
        }
        if let Some(epoch) = state.epoch {
            self.outbox.control(epoch, &Control::Status(state.status));
        }
        true
    }

    fn stream(&self, id: u32) -> Option<Arc<Stream>> {
        self.lock().streams.get(&id).cloned()
    }

    fn with(&self, id: u32, act: impl FnOnce(&Stream) -> Reply) -> Reply {
        match self.stream(id) {
            Some(stream) => act(&stream),
            None => failed(ProblemKind::NotFound, format!("no stream {id} is open")),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The id of a request that cannot be read otherwise.
fn request_id(payload: &[u8]) -> Option<u32> {
    let value: serde_json::Value = serde_json::from_slice(payload).ok()?;
    (value.get("type")? == "request").then_some(())?;
    u32::try_from(value.get("id")?.as_u64()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_request_has_an_id_to_answer() {
        assert_eq!(request_id(br#"{"type":"request","id":7,"request":{"do":"exec"}}"#), Some(7));
        assert_eq!(request_id(br#"{"type":"reply","id":7}"#), None);
        assert_eq!(request_id(br#"{"type":"request","id":-1}"#), None);
        assert_eq!(request_id(b"[1"), None);
    }
}
