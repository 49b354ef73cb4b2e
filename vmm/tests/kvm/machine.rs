//! A machine: the monitor's program with a description and descriptors, as the daemon starts it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use catalyst_vmm::boot::testing::elf;
use catalyst_vmm::control::protocol::{Answer, Cause, Event, Outcome, RamRange, Reply, RunState, Stats};
use catalyst_vmm::description::{Boot, Console, Description, Protocol, VERSION};
use catalyst_vmm::memory::{Backing, GuestRam, map};

use crate::guest::{self, Guest, LONG, Ram, until};

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
    /// None for a machine whose memory is its own.
    pub memory: Option<GuestRam>,
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
            boot: Some(Boot {
                kernel: kernel.as_raw_fd(),
                initrd: None,
                command_line: String::new(),
                protocol: Protocol::Auto,
            }),
            restore: None,
            paused: false,
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
        Some(Self { description, folder, memory: Some(memory), as_user: false, given })
    }

    /// A machine that goes on from what was saved of one with no device, and stands. Its memory file is open for reading
    /// only.
    pub fn restoring(snapshot: &Snapshot) -> Self {
        let mut plan = Self::new().unwrap();
        let path = format!("/proc/self/fd/{}", snapshot.memory.as_raw_fd());
        let memory = plan.give(File::open(path).unwrap());
        let state = plan.give(file(&snapshot.state));
        plan.memory = None;
        let description = &mut plan.description;
        (description.boot, description.memory, description.restore) = (None, Some(memory), Some(state));
        description.paused = true;
        plan
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
        // What is mapped by nobody else is reached when the monitor has told where it is.
        let memory =
            memory.map_or_else(|| Ram::Process(tempfile::tempfile().unwrap(), Vec::new()), Ram::Mapped);
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

    /// Starts the monitor of a machine that stands, and connects to it.
    pub fn start_paused(self) -> Machine {
        let text = serde_json::to_vec(&self.description).unwrap();
        let mut machine = self.start_text(&text);
        machine.control = Some(machine.connect());
        assert_eq!(machine.state(), RunState::Paused, "{}", machine.said());
        machine
    }

    /// The same, with what the test knows of the guest that was saved.
    pub fn go_on(self, guest: &Guest) -> Machine {
        let mut machine = self.start_paused();
        machine.reach(guest);
        machine
    }
}

/// What was saved of a machine, and a copy of its memory.
#[derive(Debug)]
pub struct Snapshot {
    pub state: Vec<u8>,
    pub memory: File,
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

    /// Makes the first control connection.
    pub fn connect_control(&mut self) {
        self.control = Some(self.connect());
    }

    /// Reaches its memory, in which `guest` goes on.
    pub fn reach(&mut self, guest: &Guest) {
        let ranges = self.ram();
        let path = format!("/proc/{}/mem", self.child.id());
        let memory = File::options().read(true).write(true).open(path).unwrap();
        self.guest = guest.again(Ram::Process(memory, ranges));
    }

    /// Where its memory lies.
    pub fn ram(&mut self) -> Vec<RamRange> {
        match self.control().ask("ram") {
            Outcome::Ok(Answer::Ram(ranges)) => ranges,
            other => panic!("{other:?}"),
        }
    }

    /// Pauses and saves it, and copies its memory as the daemon does.
    pub fn save(&mut self) -> Snapshot {
        self.command("pause");
        let state = match self.control().ask("save") {
            Outcome::Ok(Answer::Saved(digits)) => bytes(&digits),
            other => panic!("{other:?}: {}", self.said()),
        };
        let process = File::open(format!("/proc/{}/mem", self.child.id())).unwrap();
        let memory = tempfile::tempfile().unwrap();
        let mut end = 0;
        for range in self.ram() {
            let mut chunk = vec![0; 1 << 20];
            for at in (0..range.length).step_by(chunk.len()) {
                process.read_exact_at(&mut chunk, range.host + at).unwrap();
                memory.write_all_at(&chunk, end + at).unwrap();
            }
            end += range.length;
        }
        Snapshot { state, memory }
    }

    /// Pages of guest memory that are this process's alone (proc_pid_smaps(5)).
    pub fn private_pages(&mut self) -> u64 {
        let starts: Vec<String> = self.ram().iter().map(|range| format!("{:x}-", range.host)).collect();
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", self.child.id())).unwrap();
        let (mut is_ram, mut kib, mut seen) = (false, 0, 0);
        for line in smaps.lines() {
            let first = line.split_whitespace().next().unwrap();
            if !first.ends_with(':') {
                is_ram = starts.iter().any(|start| first.starts_with(start));
                seen += u64::from(is_ram);
            } else if is_ram && first == "Anonymous:" {
                kib += line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap();
            }
        }
        assert_eq!(seen, starts.len() as u64, "{smaps}");
        kib / 4
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
            // Perhaps it is just about to say why.
            std::thread::sleep(std::time::Duration::from_millis(200));
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

    /// Sends a command, a word or JSON, and reads the reply.
    pub fn ask(&mut self, command: &str) -> Outcome {
        self.last += 1;
        let id = self.last;
        let command = if command.starts_with('{') { command.into() } else { format!("\"{command}\"") };
        writeln!(self.stream.get_mut(), "{{\"id\":{id},\"command\":{command}}}").unwrap();
        let line = self.line();
        let reply: Reply = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"));
        assert_eq!(reply.id, id);
        reply.outcome
    }

    /// The same with a descriptor.
    pub fn ask_with(&mut self, command: &str, file: &File) -> Outcome {
        let line = format!("{{\"id\":99,\"command\":{command}}}\n");
        self.stream.get_ref().send_with_fd(line.as_bytes(), file.as_raw_fd()).unwrap();
        let line = self.line();
        let reply: Reply = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"));
        assert_eq!(reply.id, 99);
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

/// Bytes of two hexadecimal digits each.
fn bytes(digits: &str) -> Vec<u8> {
    let pair = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
    (0..digits.len()).step_by(2).map(pair).collect()
}
