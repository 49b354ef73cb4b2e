//! The real agent on a socket, and a host that talks to it without threads.

use std::collections::{HashSet, VecDeque};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use catalyst_agent_protocol::{
    Channel, Control, Decoder, ExecExit, ExecSpec, Frame, Reply, Request, StreamChannel, VERSION, encode,
};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// The host's end and the agent.
pub struct Host {
    pub folder: PathBuf,
    pub epoch: u32,
    pub port: UnixStream,
    agent: Child,
    /// Where the agent of a container is asked by the daemon.
    pub daemon: UnixListener,
    decoder: Decoder,
    /// Frames that came while another was waited for.
    seen: VecDeque<Frame>,
    last_id: u32,
}

impl Drop for Host {
    fn drop(&mut self) {
        // In a VM they end with it.
        for child in self.children() {
            let _ = nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL);
        }
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// An exec of these words.
pub fn spec(argv: &[&str]) -> ExecSpec {
    ExecSpec { argv: argv.iter().map(ToString::to_string).collect(), ..ExecSpec::default() }
}

/// What a command left.
#[derive(Debug, Default)]
pub struct Outcome {
    pub output: Vec<u8>,
    pub errors: Vec<u8>,
    pub exit: Option<ExecExit>,
}

impl Host {
    /// Processes that the agent has started.
    fn children(&self) -> Vec<nix::unistd::Pid> {
        let threads =
            std::fs::read_dir(format!("/proc/{}/task", self.agent.id())).into_iter().flatten().flatten();
        let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
        let numbers =
            |list: String| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>();
        lists.flat_map(numbers).map(nix::unistd::Pid::from_raw).collect()
    }

    /// Starts an agent; nobody has said hello.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    pub fn start_with(env: &[(&str, &str)]) -> Self {
        Self::start_as("--port", env)
    }

    /// Starts an agent of a container, made of the trees in the folder `trees`, and greets it as the runtime.
    pub fn runtime() -> Self {
        let mut host = Self::start_as("--container-port", &[]);
        host.hello(7);
        host
    }

    fn start_as(option: &str, env: &[(&str, &str)]) -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("catalyst-agent-{}-{number}", std::process::id()));
        std::fs::create_dir_all(folder.join("root")).unwrap();
        let path = folder.join("port");
        let listener = UnixListener::bind(&path).unwrap();
        let mut agent = Command::new(env!("CARGO_BIN_EXE_catalyst-agent"));
        agent.args(["--no-network", option]).arg(&path).arg("--root").arg(folder.join("root"));
        // The daemon's port is another's; nobody is asked over it here.
        let daemon = UnixListener::bind(folder.join("daemon")).unwrap();
        if option == "--container-port" {
            std::fs::create_dir_all(folder.join("root/run/catalyst")).unwrap();
            agent.arg("--port").arg(folder.join("daemon")).arg("--trees").arg(folder.join("trees"));
        }
        let agent = agent.envs(env.iter().copied()).spawn().unwrap();
        let port = listener.accept().unwrap().0;
        port.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut host = Self {
            folder,
            epoch: 0,
            port,
            agent,
            daemon,
            decoder: Decoder::new(),
            seen: VecDeque::new(),
            last_id: 0,
        };
        assert_eq!(host.control(), Control::Up);
        host
    }

    /// Starts an agent and says hello.
    pub fn greeted() -> Self {
        let mut host = Self::start();
        host.hello(7);
        host
    }

    pub fn hello(&mut self, epoch: u32) {
        self.epoch = epoch;
        self.seen.clear();
        self.send(&Control::Hello { version: VERSION, agent: String::new() });
        // What is of the epoch before is dropped, as a host does.
        let hello = self.next(|frame| frame.epoch == epoch);
        let hello = serde_json::from_slice(&hello.payload).unwrap();
        assert!(matches!(hello, Control::Hello { version: VERSION, .. }), "{hello:?}");
        self.seen.clear();
        assert!(matches!(self.control(), Control::Status(_)));
    }

    pub fn send(&mut self, message: &Control) {
        self.send_frame(0, Channel::Control, &serde_json::to_vec(message).unwrap());
    }

    pub fn send_frame(&mut self, stream: u32, channel: Channel, payload: &[u8]) {
        self.port.write_all(&encode(self.epoch, stream, channel, payload).unwrap()).unwrap();
    }

    pub fn next(&mut self, wanted: impl Fn(&Frame) -> bool) -> Frame {
        if let Some(at) = self.seen.iter().position(&wanted) {
            return self.seen.remove(at).unwrap();
        }
        loop {
            let frame = self.read_frame();
            if wanted(&frame) {
                return frame;
            }
            self.seen.push_back(frame);
        }
    }

    fn read_frame(&mut self) -> Frame {
        let mut buffer = vec![0; 65536];
        loop {
            if let Some(frame) = self.decoder.next_frame() {
                return frame;
            }
            let count = self.port.read(&mut buffer).unwrap();
            assert_ne!(count, 0, "the agent ended");
            self.decoder.push(&buffer[..count]);
        }
    }

    /// The next control message.
    pub fn control(&mut self) -> Control {
        let epoch = self.epoch;
        let frame = self.next(|frame| frame.channel == Channel::Control && frame.epoch == epoch);
        serde_json::from_slice(&frame.payload).unwrap()
    }

    /// Sends a request and returns its number.
    pub fn ask(&mut self, request: Request) -> u32 {
        self.last_id += 1;
        self.send(&Control::Request { id: self.last_id, request });
        self.last_id
    }

    pub fn reply(&mut self, wanted: u32) -> Reply {
        let frame =
            self.next(|frame| matches!(parse(frame), Some(Control::Reply { id, .. }) if id == wanted));
        match parse(&frame) {
            Some(Control::Reply { reply, .. }) => reply,
            other => panic!("{other:?}"),
        }
    }

    pub fn request(&mut self, request: Request) -> Reply {
        let id = self.ask(request);
        self.reply(id)
    }

    /// Starts a command; its stream and process id.
    pub fn exec(&mut self, spec: ExecSpec) -> (u32, u32) {
        let id = self.ask(Request::Exec(spec));
        match self.reply(id) {
            Reply::Started { pid } => (id, pid),
            other => panic!("{other:?}"),
        }
    }

    /// Sends all input as credit allows, grants credit for all output, until the command ends.
    pub fn finish(&mut self, stream: u32, mut input: &[u8]) -> Outcome {
        let mut credit = catalyst_agent_protocol::INITIAL_CREDIT as usize;
        let mut outcome = Outcome::default();
        let mut ends = HashSet::new();
        while outcome.exit.is_none() {
            while !input.is_empty() && credit > 0 {
                let (now, later) = input.split_at(input.len().min(credit).min(50_000));
                self.send_frame(stream, Channel::Input, now);
                credit -= now.len();
                input = later;
                if input.is_empty() {
                    self.send_frame(stream, Channel::Input, &[]);
                }
            }
            let frame = self.next(|frame| frame.stream == stream || is_of(frame, stream));
            match (frame.channel, parse(&frame)) {
                (_, Some(Control::Credit { bytes, .. })) => credit += bytes as usize,
                (_, Some(Control::Exited { exit, .. })) => outcome.exit = Some(exit),
                (channel, _) if frame.payload.is_empty() => {
                    assert!(ends.insert(channel), "{channel:?} ends twice");
                }
                (channel, _) => {
                    let (sink, channel) = match channel {
                        Channel::Output => (&mut outcome.output, StreamChannel::Output),
                        _ => (&mut outcome.errors, StreamChannel::Errors),
                    };
                    sink.extend(&frame.payload);
                    let bytes = u32::try_from(frame.payload.len()).unwrap();
                    self.send(&Control::Credit { stream, channel, bytes });
                }
            }
        }
        assert!(ends.contains(&Channel::Output), "no end of the output before the exit");
        outcome
    }

    pub fn run(&mut self, spec: ExecSpec, input: &[u8]) -> Outcome {
        let (stream, _) = self.exec(spec);
        self.finish(stream, input)
    }
}

/// The control message of a frame that is one.
pub fn parse(frame: &Frame) -> Option<Control> {
    let control = (frame.channel == Channel::Control).then_some(&frame.payload)?;
    Some(serde_json::from_slice(control).unwrap())
}

fn is_of(frame: &Frame, wanted: u32) -> bool {
    match parse(frame) {
        Some(Control::Credit { stream, .. } | Control::Exited { stream, .. }) => stream == wanted,
        _ => false,
    }
}
