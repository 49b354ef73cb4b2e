//! A machine: the monitor's program with a description and descriptors, as the daemon starts it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use catalyst_vmm::boot::testing::elf;
use catalyst_vmm::control::protocol::{Answer, Cause, Event, Outcome, Reply, RunState, Stats};
use catalyst_vmm::description::{Boot, Console, Description, Protocol, VERSION};
use catalyst_vmm::memory::{Backing, GuestRam, map};

use crate::guest::{self, Guest, LONG, until};

/// RAM of every machine here, in MiB.
pub const MEMORY: u64 = 32;
/// The user that confined monitors run as; nobody has it.
pub const USER: u32 = 61_236;
const SYS_ADMIN: u32 = 21;

/// A machine that is to be started.
#[derive(Debug)]
pub struct Plan {
    pub description: Description,
    pub folder: tempfile::TempDir,
    pub memory: GuestRam,
    /// Start it as the daemon does: a user of its own, with `CAP_SYS_ADMIN` as ambient capability.
    pub as_user: bool,
    given: Vec<OwnedFd>,
}

/// `/dev/kvm`, where it opens; else the test is skipped, aloud.
pub fn kvm() -> Option<File> {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            println!("SKIPPED: /dev/kvm does not open here: {error}");
            None
        }
    }
}

/// A file that holds `bytes` and has no name.
pub fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

impl Plan {
    /// A machine that runs the program of [`guest`], with one CPU and no device.
    pub fn new() -> Option<Self> {
        Self::with_kernel(&elf(guest::program(), guest::CODE, 0x1_0000, None))
    }

    /// A machine that runs `kernel`.
    pub fn with_kernel(kernel: &[u8]) -> Option<Self> {
        let kvm = kvm()?;
        let folder = tempfile::tempdir().unwrap();
        let control = UnixListener::bind(folder.path().join("control")).unwrap();
        // SAFETY: the name is a string; the descriptor is new and nobody else's.
        let ram = unsafe { File::from_raw_fd(libc::memfd_create(c"ram".as_ptr(), libc::MFD_CLOEXEC)) };
        let memory = map(MEMORY, Backing::Shared(&ram), false).unwrap();
        let kernel = file(kernel);
        let description = Description {
            version: VERSION,
            name: "test".into(),
            cpus: 1,
            memory_mib: MEMORY,
            huge_pages: false,
            memory: Some(ram.as_raw_fd()),
            kvm: kvm.as_raw_fd(),
            control: control.as_raw_fd(),
            boot: Boot {
                kernel: kernel.as_raw_fd(),
                initrd: None,
                command_line: String::new(),
                protocol: Protocol::Auto,
            },
            disks: Vec::new(),
            nics: Vec::new(),
            uart: None,
            serial: None,
            rng: false,
            balloon: false,
            vsock: None,
            share: None,
            generation_id: None,
            confine: true,
        };
        let given = vec![kvm.into(), control.into(), ram.into(), kernel.into()];
        Some(Self { description, folder, memory, as_user: false, given })
    }

    /// Gives the monitor a descriptor; its number.
    pub fn give(&mut self, descriptor: impl Into<OwnedFd>) -> RawFd {
        let descriptor = descriptor.into();
        let number = descriptor.as_raw_fd();
        self.given.push(descriptor);
        number
    }

    /// A listening socket `name` of the machine's folder, given.
    pub fn listen(&mut self, name: &str) -> RawFd {
        let listener = UnixListener::bind(self.folder.path().join(name)).unwrap();
        self.give(listener)
    }

    /// A console with the socket `name` and the log `name`.log.
    pub fn console(&mut self, name: &str) -> Console {
        let path = self.folder.path().join(format!("{name}.log"));
        let log = File::options().create(true).append(true).open(path).unwrap();
        Console { listener: Some(self.listen(name)), log: Some(self.give(log)) }
    }

    /// Starts the monitor with whatever text as description.
    pub fn start_text(self, text: &[u8]) -> Machine {
        let Self { folder, memory, as_user, given, .. } = self;
        let description = file(text);
        let stderr = tempfile::tempfile().unwrap();
        // Where another user may execute it, too.
        let program = File::open(env!("CARGO_BIN_EXE_catalyst-vmm")).unwrap();
        let mut inherited: Vec<RawFd> = given.iter().map(AsRawFd::as_raw_fd).collect();
        inherited.extend([description.as_raw_fd(), program.as_raw_fd()]);
        let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
        command
            .args(["run", "--description-fd", &description.as_raw_fd().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr.try_clone().unwrap());
        // SAFETY: system calls only.
        unsafe {
            command.pre_exec(move || {
                for &descriptor in &inherited {
                    check(libc::fcntl(descriptor, libc::F_SETFD, 0).into())?;
                }
                if as_user { become_user() } else { Ok(()) }
            });
        }
        let child = command.spawn().unwrap();
        Machine { child, control: None, guest: Guest::new(memory), folder, stderr }
    }

    /// Starts the monitor and connects to it. The guest runs when this returns, and the end will be told.
    pub fn start(self) -> Machine {
        let text = serde_json::to_vec(&self.description).unwrap();
        let mut machine = self.start_text(&text);
        machine.control = Some(machine.connect());
        until("the guest runs", || machine.state() == RunState::Running);
        machine
    }
}

fn check(returned: i64) -> std::io::Result<()> {
    if returned == -1 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Becomes [`USER`] with one ambient capability, as the daemon starts monitors. It takes root.
fn become_user() -> std::io::Result<()> {
    let header = [0x2008_0522_u32, 0];
    let admin = 1_u32 << SYS_ADMIN;
    let sets = [admin, admin, admin, 0, 0, 0];
    // SAFETY: the header and both halves of the sets are there; the rest are numbers.
    unsafe {
        check(libc::prctl(libc::PR_SET_KEEPCAPS, 1).into())?;
        check(libc::setgroups(0, std::ptr::null()).into())?;
        check(libc::setresgid(USER, USER, USER).into())?;
        check(libc::setresuid(USER, USER, USER).into())?;
        check(libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()))?;
        check(libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, SYS_ADMIN, 0, 0).into())?;
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())
    }
}

/// A running monitor. Dropped, it is killed.
#[derive(Debug)]
pub struct Machine {
    pub child: Child,
    control: Option<Control>,
    pub guest: Guest,
    pub folder: tempfile::TempDir,
    stderr: File,
}

impl Machine {
    /// One more connection to the control socket, in the folder's backlog if the monitor is not there yet.
    pub fn connect(&self) -> Control {
        Control::connect(&self.folder.path().join("control"))
    }

    /// Connects to a socket of the folder.
    pub fn client(&self, name: &str) -> UnixStream {
        client(&self.folder.path().join(name))
    }

    /// What a log of the folder holds.
    pub fn log(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.folder.path().join(format!("{name}.log"))).unwrap()
    }

    /// The first control connection.
    pub fn control(&mut self) -> &mut Control {
        self.control.as_mut().unwrap()
    }

    /// Commands it, and expects that it is done.
    pub fn command(&mut self, command: &str) {
        assert_eq!(self.control().ask(command), Outcome::Ok(Answer::Done), "{command}");
    }

    /// Whether it runs.
    pub fn state(&mut self) -> RunState {
        match self.control().ask("state") {
            Outcome::Ok(Answer::State(state)) => state,
            other => panic!("{other:?}"),
        }
    }

    /// What has happened.
    pub fn stats(&mut self) -> Stats {
        match self.control().ask("stats") {
            Outcome::Ok(Answer::Stats(stats)) => *stats,
            other => panic!("{other:?}"),
        }
    }

    /// Waits for its end: the exit status, and what it said on standard error.
    pub fn wait(&mut self) -> (std::process::ExitStatus, String) {
        let mut ended = None;
        until("the monitor ends", || {
            ended = self.child.try_wait().unwrap();
            ended.is_some()
        });
        (ended.unwrap(), self.said())
    }

    /// What it said on standard error so far, but for what it says of an old kernel before all else.
    pub fn said(&self) -> String {
        let mut text = String::new();
        let mut file = self.stderr.try_clone().unwrap();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text.split_inclusive('\n').filter(|line| !line.contains("Landlock is older than")).collect()
    }

    /// Expects that it ends for this cause: event and exit status.
    pub fn ends(mut self, cause: Cause) -> String {
        assert_eq!(self.control().event(), Event::Exit { cause }, "{}", self.said());
        let (status, said) = self.wait();
        assert_eq!(status.code(), Some(cause.exit_status().into()), "{said}");
        said
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("the monitor: {:?}, it said: {}", self.child.try_wait(), self.said());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client of the control socket.
#[derive(Debug)]
pub struct Control {
    pub stream: BufReader<UnixStream>,
    last: u64,
}

impl Control {
    fn connect(path: &std::path::Path) -> Self {
        Self { stream: BufReader::new(client(path)), last: 0 }
    }

    /// Sends a command and reads the reply.
    pub fn ask(&mut self, command: &str) -> Outcome {
        self.last += 1;
        let id = self.last;
        writeln!(self.stream.get_mut(), "{{\"id\":{id},\"command\":\"{command}\"}}").unwrap();
        let line = self.line();
        let reply: Reply = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"));
        assert_eq!(reply.id, id);
        reply.outcome
    }

    /// The next event.
    pub fn event(&mut self) -> Event {
        let line = self.line();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }

    /// The next line; empty at the end.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        line
    }
}

/// Connects to a socket; reads and writes do not wait for ever.
pub fn client(path: &std::path::Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.set_write_timeout(Some(LONG)).unwrap();
    stream
}

/// Exactly so many bytes.
pub fn read_exact(mut from: impl Read, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes).unwrap();
    bytes
}
