//! Engine `kvm` against processes that speak the monitor's protocol, well and badly.
//!
//! This program is both: the tests, and (as `run --description-fd N`) the process that they start. The VM's name says
//! how that behaves. The true monitor is tested with true guests in `tests/e2e/`.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use catalyst_api::EngineName;
use catalyst_daemon::engine::kvm::KvmEngine;
use catalyst_daemon::engine::qemu::QemuEngine;
use catalyst_daemon::engine::{
    Engine, EngineError, Engines, Exit, Layer, Nic, StartSpec, VmProcess, sockets,
};
use catalyst_daemon::store::{Store, VmDir, VmId};
use catalyst_vmm::control::protocol::{Answer, Cause, Command, Event, Outcome, Reply, Request, RunState};
use catalyst_vmm::description::{Description, Format};

/// A user that owns nothing.
const USER: u32 = 65534;
/// Nothing here takes long.
const HANG: Duration = Duration::from_mins(1);

/// A test: its name and what it does.
type Test = (&'static str, fn() -> std::pin::Pin<Box<dyn Future<Output = ()>>>);

const TESTS: &[Test] = &[
    ("a_vm_runs_pauses_and_ends_by_its_power_button", || Box::pin(lives())),
    ("a_process_that_is_found_again_is_spoken_to_and_tells_why_it_ends", || Box::pin(found_again())),
    ("a_monitor_that_dies_at_once_is_told_by_its_last_words", || Box::pin(dies())),
    ("a_monitor_that_speaks_nonsense_is_ended", || Box::pin(speaks_nonsense())),
    ("one_that_hangs_is_found_and_can_be_ended", || Box::pin(hangs())),
    ("a_program_that_is_not_there_is_named_with_the_remedy", || Box::pin(no_program())),
];

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [run, flag, fd] = words.as_slice()
        && (run, flag) == (&"run".to_owned(), &"--description-fd".to_owned())
    {
        return monitor(fd.parse().unwrap());
    }
    if !Path::new("/dev/kvm").exists() {
        println!("SKIPPED: there is no /dev/kvm to pass on");
        return;
    }
    let filters: Vec<&String> = words.iter().filter(|word| !word.starts_with('-')).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    for (name, test) in TESTS {
        if filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str())) {
            // A panic ends the program with a status of its own.
            runtime.block_on(async { tokio::time::timeout(HANG, test()).await }).expect(name);
            println!("test {name} ... ok");
        }
    }
}

// The tests' side.

/// An engine with a store that has one VM, `name`.
struct Bench {
    _folder: tempfile::TempDir,
    dir: VmDir,
    engine: KvmEngine,
}

impl Bench {
    fn new(name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let dir = Store::open(folder.path()).unwrap().dir(&VmId::parse(name).unwrap());
        std::fs::create_dir_all(dir.path()).unwrap();
        Self { _folder: folder, dir, engine: KvmEngine::new(std::env::current_exe().unwrap()) }
    }

    fn spec(&self) -> StartSpec {
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        StartSpec {
            dir: self.dir.clone(),
            cpus: 1,
            memory_mib: 128,
            kernel: null(),
            initrd: null(),
            command_line: "quiet".to_owned(),
            command_line_software_cpu: String::new(),
            kernel_hz: 0,
            layers: vec![
                Layer { file: null(), format: Format::Qcow2 },
                Layer { file: null(), format: Format::Raw },
            ],
            nics: vec![Nic { tap: null(), mac: [2, 0, 0, 0, 0, 1] }],
            container: false,
            user: USER,
            cid: 3,
            from: None,
            cgroup_of: None,
        }
    }

    async fn start(&self) -> Arc<dyn VmProcess> {
        let started = self.engine.start(self.spec()).await;
        let vm = started.unwrap_or_else(|error| panic!("{error}: {}", self.log()));
        vm.resume().await.unwrap();
        vm
    }

    /// The process as the next daemon finds it, which has chosen the other engine.
    async fn adopt(&self) -> Option<Arc<dyn VmProcess>> {
        let kvm = Arc::new(KvmEngine::new("/no/such/program".into()));
        let engines =
            Engines::new(EngineName::Qemu, String::new(), true, kvm, Arc::new(QemuEngine::default()));
        engines.adopt(self.dir.clone(), user()).await.unwrap()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.engine_log()).unwrap_or_default()
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whom the process runs as.
fn user() -> u32 {
    if is_root() { USER } else { rustix::process::getuid().as_raw() }
}

async fn lives() {
    let bench = Bench::new("well");
    let vm = bench.start().await;
    assert_eq!(vm.engine(), EngineName::Kvm);
    assert!(vm.is_running().await.unwrap());
    for socket in [sockets::AGENT, sockets::CONSOLE, "vsock.sock"] {
        sockets::connect(&bench.dir.run(), socket).await.unwrap();
    }
    let command_line = std::fs::read_to_string(format!("/proc/{}/cmdline", vm.pid())).unwrap();
    assert!(command_line.starts_with("catalyst-vmm [well]\0run\0"), "{command_line:?}");
    if is_root() {
        let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert!(status.contains(&format!("{set}:\t0000000000200000")), "{status}");
        }
        assert!(status.contains("NoNewPrivs:\t1") && status.contains("Groups:\t \n"), "{status}");
    }
    vm.pause().await.unwrap();
    assert!(!vm.is_running().await.unwrap());
    vm.resume().await.unwrap();
    assert!(vm.is_running().await.unwrap());
    let second = bench.engine.start(bench.spec()).await;
    assert!(matches!(second, Err(EngineError::Running(pid)) if pid == vm.pid()));
    vm.power_button().await.unwrap();
    assert_eq!(vm.exited().await, Exit::PoweredOff);
    assert!(bench.adopt().await.is_none());
}

async fn found_again() {
    let bench = Bench::new("resets");
    let first = bench.start().await;
    let again = bench.adopt().await.expect("it lives");
    assert_eq!((again.engine(), again.pid()), (EngineName::Kvm, first.pid()));
    again.pause().await.unwrap();
    assert!(!first.is_running().await.unwrap());
    again.power_button().await.unwrap();
    // Only the first is told the status: it reaps the child.
    assert_eq!(first.exited().await, Exit::Reset);
    assert_eq!(again.exited().await, Exit::Reset);
    assert!(again.is_running().await.is_err());
    // The folder is free for the next.
    let next = bench.start().await;
    next.kill().unwrap();
    assert_eq!(next.exited().await, Exit::Signal(9));
}

async fn dies() {
    let bench = Bench::new("dies");
    match bench.engine.start(bench.spec()).await {
        Err(EngineError::Died(words)) => assert_eq!(words, "catalyst-vmm: the kernel is no kernel"),
        other => panic!("{:?}", other.err()),
    }
}

async fn speaks_nonsense() {
    let bench = Bench::new("nonsense");
    let error = bench.engine.start(bench.spec()).await.err().unwrap();
    assert!(matches!(error, EngineError::Refused { .. }), "{error}");
    assert!(bench.adopt().await.is_none());
}

async fn hangs() {
    let bench = Bench::new("well");
    let first = bench.start().await;
    let pid = rustix::process::Pid::from_raw(first.pid().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let again = bench.adopt().await.expect("it lives");
    assert!(again.pause().await.is_err());
    again.kill().unwrap();
    assert_eq!(first.exited().await, Exit::Signal(9));
}

async fn no_program() {
    let mut bench = Bench::new("well");
    bench.engine = KvmEngine::new("/no/such/program".into());
    let error = bench.engine.start(bench.spec()).await.err().unwrap().to_string();
    assert!(error.contains("/no/such/program") && error.contains("make install"), "{error}");
}

// The monitor's side.

/// Whether it is paused, and who is to be told of the end.
type Guest = Arc<Mutex<(bool, Vec<UnixStream>)>>;

fn monitor(fd: i32) {
    // SAFETY: the descriptor was passed on for this, and nobody else uses it.
    let mut file = unsafe { File::from_raw_fd(fd) };
    let mut text = Vec::new();
    file.read_to_end(&mut text).unwrap();
    let description = Description::from_json(&text).unwrap();
    for (field, fd) in description.descriptors() {
        // SAFETY: the call only looks whether the number is open.
        assert!(unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0, "{field} is not open");
    }
    if description.name == "dies" {
        eprintln!("catalyst-vmm: the kernel is no kernel");
        std::process::exit(1);
    }
    // SAFETY: as above.
    let listener = UnixListener::from(unsafe { OwnedFd::from_raw_fd(description.control) });
    let guest = Guest::default();
    for stream in listener.incoming() {
        let (guest, name) = (Arc::clone(&guest), description.name.clone());
        std::thread::spawn(move || serve(&stream.unwrap(), &guest, &name));
    }
}

fn serve(mut stream: &UnixStream, guest: &Guest, name: &str) {
    guest.lock().unwrap().1.push(stream.try_clone().unwrap());
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { return };
        let Request { id, command } = serde_json::from_str(&line).unwrap();
        let answer = match (name, command) {
            ("nonsense", _) => {
                stream.write_all(b"{\"id\":1,\"ok\":\n").unwrap();
                continue;
            }
            (_, Command::State) => {
                let paused = guest.lock().unwrap().0;
                Answer::State(if paused { RunState::Paused } else { RunState::Running })
            }
            (_, Command::Pause | Command::Resume) => {
                guest.lock().unwrap().0 = command == Command::Pause;
                Answer::Done
            }
            _ => Answer::Done,
        };
        let reply = Reply { id, outcome: Outcome::Ok(answer) };
        stream.write_all(&[serde_json::to_vec(&reply).unwrap(), b"\n".to_vec()].concat()).unwrap();
        if command == Command::PowerButton {
            let cause = if name == "resets" { Cause::Reset } else { Cause::PowerOff };
            let event = [serde_json::to_vec(&Event::Exit { cause }).unwrap(), b"\n".to_vec()].concat();
            for mut told in &guest.lock().unwrap().1 {
                told.write_all(&event).unwrap();
            }
            std::process::exit(cause.exit_status().into());
        }
    }
}
