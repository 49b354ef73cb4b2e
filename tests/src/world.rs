//! A world of its own for a test: network namespace, state folder, daemon.

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// `SO_NETNS_COOKIE` of include/uapi/asm-generic/socket.h; the libc crate does not have it everywhere.
const SO_NETNS_COOKIE: libc::c_int = 71;

static COUNT: AtomicU32 = AtomicU32::new(0);

/// How long anything may take before a test gives up on it: a limit against hanging, not a promise.
pub const HANG: Duration = Duration::from_mins(5);

/// See the module. Everything is undone when it is dropped, also after a panic.
#[derive(Debug)]
pub struct World {
    netns: String,
    folder: TempDir,
    daemon: Option<Child>,
    /// Which daemon of several `catalyst` speaks to, as `HOST:PORT`; by default localhost:8080.
    pub host: Option<String>,
    /// The folder of the images that daemons of this world use.
    pub images: PathBuf,
    /// Words before the daemon's command line, such as `env NAME=VALUE`; what they start must become the daemon.
    pub wrapper: Vec<OsString>,
    user: Option<u32>,
}

/// What a command did.
#[derive(Debug)]
pub struct Ran {
    /// Its exit status.
    pub status: ExitStatus,
    /// What it wrote on stdout.
    pub stdout: String,
    /// What it wrote on stderr.
    pub stderr: String,
}

/// What the daemon answered.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status; 0 if there was no answer.
    pub status: u16,
    /// The body.
    pub body: String,
}

impl Ran {
    /// Its exit code, 128 and more for a signal.
    pub fn code(&self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Stdout without its last line break, of a command that must have succeeded.
    #[track_caller]
    pub fn ok(&self) -> &str {
        assert!(self.status.success(), "exit {}: {}{}", self.code(), self.stdout, self.stderr);
        self.stdout.trim_end_matches('\n')
    }

    /// The one line of an error, of a command that must have failed with `code`: no panic, no Rust in it.
    #[track_caller]
    pub fn error(&self, code: i32) -> &str {
        assert_eq!(self.code(), code, "{}{}", self.stdout, self.stderr);
        let lines: Vec<&str> =
            self.stderr.lines().filter(|line| !line.starts_with("Info:") && !line.is_empty()).collect();
        let text = lines.first().copied().unwrap_or_default();
        assert!(text.starts_with("Error:") || text.starts_with("error:"), "no error line: {}", self.stderr);
        for rust in ["panicked", "unwrap", "Err(", "Some(", "RUST_BACKTRACE", "Os {"] {
            assert!(!self.stderr.contains(rust), "Rust in it: {}", self.stderr);
        }
        text
    }
}

impl Answer {
    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("no JSON ({e}): {}", self.body))
    }
}

/// The folder of the programs under test.
pub fn programs() -> PathBuf {
    if let Some(folder) = std::env::var_os("CATALYST_BIN") {
        return folder.into();
    }
    // target/<profile>/deps/e2e-… or target/<profile>/bench
    let own = std::env::current_exe().expect("the test has a path");
    let folder = own.ancestors().find(|path| path.join("catalyst-daemon").exists());
    folder.expect("catalyst-daemon is built beside the test: make build").to_owned()
}

/// The engine under test, `qemu` or `kvm`.
pub fn engine() -> String {
    std::env::var("CATALYST_TEST_ENGINE").unwrap_or_else(|_| "qemu".to_owned())
}

/// The folder of the images.
pub fn image_dir() -> PathBuf {
    std::env::var_os("CATALYST_IMAGE_DIR").map_or_else(|| "/var/lib/catalyst/images".into(), Into::into)
}

impl World {
    /// A namespace with loopback, and an empty state folder. No daemon yet.
    pub fn empty() -> Self {
        if !nix::unistd::geteuid().is_root() {
            super::skip("network namespaces need root");
        }
        let number = COUNT.fetch_add(1, Ordering::SeqCst);
        let netns = format!("cat-{}-{number}", std::process::id());
        run(Command::new("ip").args(["netns", "add", &netns]));
        let folder = tempfile::Builder::new().prefix("catalyst-test-").tempdir().expect("a temporary folder");
        run(Command::new("chmod").arg("755").arg(folder.path()));
        let world = Self {
            netns,
            folder,
            daemon: None,
            host: None,
            images: image_dir(),
            wrapper: Vec::new(),
            user: None,
        };
        run(world.command("ip").args(["link", "set", "lo", "up"]));
        // A new namespace does what the machine does.
        run(world.command("sh").args(["-c", "echo 0 > /proc/sys/net/ipv4/ip_forward"]));
        world
    }

    /// The same with a daemon.
    pub fn new() -> Self {
        let mut world = Self::empty();
        world.start_daemon();
        world
    }

    /// The same for an unprivileged owner: `catalyst` runs as `uid`, whose home is in the world.
    pub fn owned_by(uid: u32) -> Self {
        let mut world = Self::empty();
        world.give_to(uid);
        world.start_daemon();
        world
    }

    /// Makes `uid` the owner of a world that has no daemon yet.
    pub fn give_to(&mut self, uid: u32) {
        let world = self;
        world.user = Some(uid);
        let home = world.path("home");
        fs::create_dir(&home).expect("a home");
        std::os::unix::fs::chown(&home, Some(uid), Some(uid)).expect("a home of the user's");
        let state = world.state_dir();
        fs::create_dir(&state).expect("a state folder");
        std::os::unix::fs::chown(&state, Some(uid), Some(uid)).expect("a state folder of the user's");
    }

    /// A path in the world's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The state folder.
    pub fn state_dir(&self) -> PathBuf {
        self.path("state")
    }

    /// The folder of a VM.
    pub fn vm_dir(&self, id: &str) -> PathBuf {
        self.state_dir().join("vms").join(id)
    }

    /// The network namespace.
    pub fn netns(&self) -> &str {
        &self.netns
    }

    /// A command in the namespace, as root.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.netns]).arg(program);
        // Nothing of the machine's own settings leaks in.
        for name in ["CATALYST_HOST", "CATALYST_STATE_DIR", "XDG_DATA_HOME", "SUDO_UID"] {
            command.env_remove(name);
        }
        // The images are everybody's, and so are their warm states.
        command.env("HOME", self.folder.path()).env("CATALYST_NO_WARMING", "true");
        command
    }

    /// Starts the daemon and waits until it listens.
    pub fn start_daemon(&mut self) {
        let owner = self.user.map(|uid| uid.to_string());
        match owner {
            Some(owner) => self.start_daemon_with(&["--owner", &owner]),
            None => self.start_daemon_with(&[]),
        }
    }

    /// Starts the daemon with more arguments and waits until it listens.
    pub fn start_daemon_with(&mut self, args: &[&str]) {
        let child = self.spawn_daemon(args);
        self.daemon = Some(child);
        let started = Instant::now();
        while self.curl("GET", "/v1/version", None).status != 200 {
            let ended = self.daemon.as_mut().and_then(|daemon| daemon.try_wait().ok().flatten());
            assert!(ended.is_none(), "the daemon has ended: {}", self.daemon_log());
            assert!(started.elapsed() < HANG, "no daemon: {}", self.daemon_log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Starts a daemon without waiting for it; its log is `daemon.log` in the world's folder.
    pub fn spawn_daemon(&self, args: &[&str]) -> Child {
        let log =
            fs::OpenOptions::new().append(true).create(true).open(self.path("daemon.log")).expect("a log");
        let mut command = self.daemon_command();
        command.arg("--state-dir").arg(self.state_dir()).arg("--image-dir").arg(&self.images);
        if !args.contains(&"--engine") {
            command.args(["--engine", &engine()]);
        }
        command.args(["--log", "info"]).args(args).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("a log")).stderr(log).spawn().expect("the daemon starts")
    }

    /// `catalyst-daemon` without arguments, in the world's wrapper.
    pub fn daemon_command(&self) -> Command {
        let program = programs().join("catalyst-daemon").into_os_string();
        let mut words = self.wrapper.iter().cloned().chain([program]);
        let mut command = self.command(words.next().unwrap_or_default());
        command.args(words);
        command
    }

    /// The daemon's log.
    pub fn daemon_log(&self) -> String {
        fs::read_to_string(self.path("daemon.log")).unwrap_or_default()
    }

    /// The daemon's process id, which `ip netns exec` has become.
    pub fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().expect("a daemon runs").id()
    }

    /// Kills the daemon with `kill -9`.
    pub fn kill_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().expect("the daemon can be killed");
            daemon.wait().expect("the daemon ends");
        }
    }

    /// Stops the daemon with SIGTERM and gives its exit status.
    pub fn stop_daemon(&mut self) -> ExitStatus {
        let mut daemon = self.daemon.take().expect("a daemon runs");
        let pid = i32::try_from(daemon.id()).expect("a pid");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM)
            .expect("a signal");
        daemon.wait().expect("the daemon ends")
    }

    /// `catalyst ARGS` as a command, not yet run.
    pub fn catalyst_command(&self, args: &[&str]) -> Command {
        let program = programs().join("catalyst");
        let mut command = match self.user {
            Some(uid) => {
                let mut command = self.command("setpriv");
                let (uid, home) = (uid.to_string(), self.path("home"));
                command.args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "--"]).arg(program);
                command.env("HOME", home);
                command
            }
            None => self.command(program),
        };
        if let Some(host) = &self.host {
            command.env("CATALYST_HOST", host);
        }
        // Worlds have VMs of the same names at daemons of the same address.
        let runtime = if self.user.is_some() { self.path("home") } else { self.path("runtime") };
        let _ = fs::create_dir(&runtime);
        command.env("XDG_RUNTIME_DIR", runtime);
        if !args.contains(&"--timeout") {
            // What it waits by itself is for machines that are not busy.
            command.args(["--timeout", &long_enough()]);
        }
        command.args(args);
        command
    }

    /// Runs `catalyst ARGS`.
    pub fn catalyst(&self, args: &[&str]) -> Ran {
        let mut ran = ran(self.catalyst_command(args));
        if ran.stderr.contains("which was not enough") {
            ran.stderr += &self.all_vms();
        }
        ran
    }

    /// For a guest that was waited for in vain: what each VM has written to its console last, how its threads are (proc(5), "stat"), and
    /// what the daemon logged last.
    fn all_vms(&self) -> String {
        const LAST: usize = 500;
        let mut told = Vec::new();
        for vm in fs::read_dir(self.state_dir().join("vms")).into_iter().flatten().flatten() {
            let console = fs::read(vm.path().join("console.log")).unwrap_or_default();
            let last = String::from_utf8_lossy(&console[console.len().saturating_sub(LAST)..]).into_owned();
            let id = vm.file_name().to_string_lossy().into_owned();
            told.push(format!("{id}: console of {} bytes, ends {last:?}", console.len()));
            let Some(pid) = self.vm_pid(&id) else { continue };
            for thread in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
                let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
                told.push(stat.split(' ').take(15).collect::<Vec<_>>().join(" "));
            }
        }
        let log = self.daemon_log();
        let lines: Vec<&str> = log.lines().collect();
        told.extend(lines[lines.len().saturating_sub(12)..].iter().map(|line| (*line).to_owned()));
        told.join("\n")
    }

    /// Runs `catalyst ARGS` with `input` on its stdin.
    pub fn catalyst_with_input(&self, args: &[&str], input: &[u8]) -> Ran {
        let mut command = self.catalyst_command(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("catalyst starts");
        let mut stdin = child.stdin.take().expect("a pipe");
        let input = input.to_vec();
        let writer = std::thread::spawn(move || {
            // A command that does not read all of it closes the pipe.
            let _ = stdin.write_all(&input);
        });
        let output = child.wait_with_output().expect("catalyst ends");
        writer.join().expect("the writer ends");
        output.into()
    }

    /// A request by curl.
    pub fn curl(&self, method: &str, path: &str, body: Option<&str>) -> Answer {
        self.curl_with(&["-X", method], path, body.map(str::as_bytes))
    }

    /// A request by curl with more options; a body goes through its stdin.
    pub fn curl_with(&self, options: &[&str], path: &str, body: Option<&[u8]>) -> Answer {
        let host = self.host.as_deref().unwrap_or("localhost:8080");
        let mut command = self.command("curl");
        command.args(["-s", "--path-as-is", "--max-time", &long_enough(), "-w", "\n%{http_code}"]);
        command.args(options);
        if body.is_some() {
            command.args(["--data-binary", "@-"]);
        }
        command.arg(format!("http://{host}{path}"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("curl starts");
        if let (Some(mut stdin), Some(body)) = (child.stdin.take(), body) {
            // The daemon may answer before it has read all.
            let _ = stdin.write_all(body);
        }
        let output = child.wait_with_output().expect("curl ends");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (body, status) = text.rsplit_once('\n').unwrap_or(("", "0"));
        Answer { status: status.parse().unwrap_or(0), body: body.to_owned() }
    }

    /// The pid of a VM's process, from `vm show`.
    pub fn vm_pid(&self, id: &str) -> Option<u32> {
        let vm = self.curl("GET", &format!("/v1/vms/{id}"), None).json();
        vm["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok())
    }

    /// The file of the memory from which VMs of the usual size go on; it is made if it is not there.
    ///
    /// # Panics
    /// If it cannot be made.
    #[track_caller]
    pub fn warm(&self) -> PathBuf {
        let fitting = || {
            let template = self.curl("GET", "/v1/templates/lumen", None).json();
            let warm = template["warm"].as_array()?.iter().find(|warm| {
                warm["fits"] == true && (&warm["cpus"], &warm["memory_mib"]) == (&1.into(), &1024.into())
            })?;
            let version = self.images.join("lumen").join(template["version"].as_str()?);
            Some(version.join("warm").join(warm["name"].as_str()?).join("memory"))
        };
        if fitting().is_none() {
            let made = self.catalyst(&["template", "warm"]);
            let by_another = made.stderr.contains("is being made already");
            assert!(made.status.success() || by_another, "{}{}", made.stdout, made.stderr);
            wait_until("a template is warm", patience(), || fitting().is_some());
        }
        fitting().expect("it was made just now")
    }

    /// Waits for a state of a VM.
    #[track_caller]
    pub fn wait_for_state(&self, id: &str, state: &str, limit: Duration) {
        let started = Instant::now();
        loop {
            let vm = self.curl("GET", &format!("/v1/vms/{id}"), None);
            if vm.status == 200 && vm.json()["state"] == state {
                return;
            }
            assert!(started.elapsed() < limit, "'{id}' is not {state} after {limit:?}: {}", vm.body);
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("--- the daemon's log ---\n{}--- end ---", self.daemon_log());
        }
        self.kill_daemon();
        kill_vm_processes(&self.state_dir());
        for entry in fs::read_dir(self.folder.path()).into_iter().flatten().flatten() {
            kill_vm_processes(&entry.path());
        }
        // What still runs in the namespace (dnsmasq) was started by the daemon of this world.
        let pids = Command::new("ip").args(["netns", "pids", &self.netns]).output();
        let pids =
            pids.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        for pid in pids.lines().filter_map(|line| line.trim().parse().ok()) {
            kill(pid);
        }
        if let Some(cookie) = namespace_cookie(&self.netns) {
            let _ = fs::remove_dir_all(format!("/run/catalyst/netns-{cookie}"));
        }
        self.forget_in_image_store();
        let _ = Command::new("ip").args(["netns", "del", &self.netns]).status();
    }
}

impl World {
    /// Daemons note their state folders beside the images; those of this world are going.
    fn forget_in_image_store(&self) {
        let notes = fs::read_dir(self.images.join(".users")).into_iter().flatten().flatten();
        for note in notes {
            let path = fs::read_to_string(note.path()).unwrap_or_default();
            if Path::new(&path).starts_with(self.folder.path()) {
                let _ = fs::remove_file(note.path());
            }
        }
    }
}

/// The number by which daemons name what they keep of a namespace in /run (socket(7), SO_NETNS_COOKIE).
fn namespace_cookie(name: &str) -> Option<u64> {
    let namespace = fs::File::open(Path::new("/run/netns").join(name)).ok()?;
    // A thread of its own changes its namespace and ends.
    let asked = std::thread::spawn(move || {
        nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET).ok()?;
        let socket = std::net::UdpSocket::bind(("127.0.0.1", 0)).ok()?;
        let (mut cookie, mut length) = (0_u64, libc::socklen_t::try_from(size_of::<u64>()).ok()?);
        // SAFETY: the pointers are to a number of the length that is given, which lives during the call.
        let result = unsafe {
            libc::getsockopt(
                std::os::fd::AsRawFd::as_raw_fd(&socket),
                libc::SOL_SOCKET,
                SO_NETNS_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut length,
            )
        };
        (result == 0).then_some(cookie)
    });
    asked.join().ok().flatten()
}

/// Ends the VM processes of a state folder, by the pids in their lock files.
fn kill_vm_processes(state_dir: &Path) {
    let vms = fs::read_dir(state_dir.join("vms")).into_iter().flatten().flatten();
    for vm in vms {
        let pid: Option<i32> =
            fs::read_to_string(vm.path().join("run/lock")).ok().and_then(|text| text.trim().parse().ok());
        // The number is this VM's only while its command line names it.
        if let Some(pid) = pid
            && vm_name(i32::unsigned_abs(pid)).is_some()
        {
            kill(pid);
        }
    }
}

/// The VM that a process runs, whatever the engine; `None` for other processes.
pub fn vm_name(pid: u32) -> Option<String> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let mut words = text.split('\0');
    let program = words.next()?;
    if program.contains("qemu") {
        let name = words.find_map(|word| word.strip_prefix("guest=")?.split(',').next())?;
        return Some(name.to_owned());
    }
    Some(program.strip_prefix("catalyst-vmm [")?.strip_suffix(']')?.to_owned())
}

fn kill(pid: i32) {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
}

/// Waits until `fact` holds: a limit against hanging, not a promise, unless the caller says so.
#[track_caller]
pub fn wait_until(what: &str, limit: Duration, mut fact: impl FnMut() -> bool) {
    let started = Instant::now();
    while !fact() {
        assert!(started.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs a command that must succeed.
#[track_caller]
pub fn run(command: &mut Command) {
    let output = command.output().expect("the command starts");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// [`HANG`], and longer on engine kvm: that is the lab's, as a rule, whose processor is emulated.
pub fn patience() -> Duration {
    if engine() == "kvm" { HANG * 3 } else { HANG }
}

/// As a program's own limit, in seconds: it comes before [`patience`] ends, so that its words are heard.
pub fn long_enough() -> String {
    (patience().as_secs() - 20).to_string()
}

/// Runs a command, bounded by [`patience`].
pub fn ran(mut command: Command) -> Ran {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().expect("the command starts");
    let pid = i32::try_from(child.id()).expect("a pid");
    let (done, watch) = std::sync::mpsc::channel::<()>();
    let guard = std::thread::spawn(move || {
        if watch
            .recv_timeout(patience())
            .is_err_and(|error| error == std::sync::mpsc::RecvTimeoutError::Timeout)
        {
            kill(pid);
        }
    });
    let output = child.wait_with_output().expect("the command ends");
    drop(done);
    guard.join().expect("the guard ends");
    output.into()
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}
