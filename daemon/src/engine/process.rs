//! VM processes: started so that they outlive the daemon, found again without guessing.
//!
//! A VM process holds an inherited `flock` on `run/lock` in its VM's folder for as long as it
//! lives, and wrote its pid there before it became the VM program. So a daemon that was killed
//! at any moment, also right after the fork, is followed by one that finds exactly the
//! processes that live: the lock says that there is one, the pid says which, and the user it
//! runs as (no other process has it) guards against a file that was tampered with.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use catalyst_api::EngineName;
use rustix::fs::FlockOperation;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use rustix::thread::{CapabilitySet, CapabilitySets};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::cgroup::Cgroups;
use super::{EngineError, is_vm_user};
use crate::store::files;

/// How long a process may take from fork to the moment at which it has written its pid.
const PID_LIMIT: Duration = Duration::from_secs(3);
/// Names the engine of the process beside its lock.
const ENGINE_NOTE: &str = "engine";

/// A program.
#[derive(Debug)]
pub enum Program {
    /// Found in PATH.
    InPath(String),
    /// An open file: whoever runs it needs no way through the folders above it, such as a home.
    Open {
        /// The file.
        file: File,
        /// Where it was opened, for messages.
        path: PathBuf,
        /// What the process list shows.
        title: String,
    },
}

/// What is started, and with which descriptors.
#[derive(Debug)]
pub struct Launch {
    /// Whose process it is, for the next daemon.
    pub engine: EngineName,
    /// What is run.
    pub program: Program,
    /// What to do if it cannot be run.
    pub remedy: &'static str,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Descriptors that keep their numbers in the new process.
    pub fds: Vec<OwnedFd>,
    /// User and group that it runs as; it keeps no other group, and no capability but what `may_mount` gives.
    pub user: (u32, u32),
    /// How many files it may have open; else as many as the daemon.
    pub open_files: Option<u64>,
    /// A process in whose cgroups it begins; else in the daemon's.
    pub cgroup_of: Option<u32>,
    /// Let it have large pages (prctl(2), PR_SET_THP_DISABLE): quicker, but what it touches is rounded up.
    pub large_pages: bool,
    /// Leave it `CAP_SYS_ADMIN`, for a mount namespace of its own.
    pub may_mount: bool,
    /// What it writes on stdout and stderr.
    pub log: File,
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It was not started by this daemon, so its status is not known.
    Unknown,
    /// By itself, because the guest powered off.
    PoweredOff,
    /// By itself, because the guest asked for a reset: the VM is to be started again.
    Reset,
    /// By itself, and this is why.
    Told(String),
}

/// A process that runs, by descriptor: its number cannot come to mean another one.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    pidfd: AsyncFd<OwnedFd>,
    started: u64,
}

impl Process {
    /// Starts a process that holds the lock in the folder `run`.
    pub fn spawn(launch: Launch, run: &Path) -> Result<Self, EngineError> {
        let lock = lock_file(run)?;
        note_engine(run, launch.engine)?;
        let inherited: Vec<RawFd> =
            launch.fds.iter().map(AsRawFd::as_raw_fd).chain([lock.as_raw_fd()]).collect();
        let errors = launch.log.try_clone().map_err(EngineError::io("copy a log descriptor"))?;
        let mut command = launch.program.command();
        command.args(&launch.args).env_clear().current_dir("/");
        // Without it the program would be looked for in the C library's folders, not where doctor looks.
        if let Some(path) = std::env::var_os("PATH") {
            command.env("PATH", path);
        }
        command.stdin(Stdio::null()).stdout(launch.log).stderr(errors);
        let (lock_fd, user) = (lock.as_raw_fd(), launch.user);
        let cgroups = launch.cgroup_of.map(|pid| Cgroups::of_process(pid).map_err(no_cgroups(pid)));
        let cgroups = Arc::new(cgroups.transpose()?);
        let joining = Arc::clone(&cgroups);
        let may =
            May { mount: launch.may_mount, large_pages: launch.large_pages, open_files: launch.open_files };
        // SAFETY: prepare_child only makes system calls and allocates nothing, as what runs
        // between fork and exec of a threaded process must.
        unsafe {
            command.pre_exec(move || {
                joining.as_ref().as_ref().map_or(Ok(()), Cgroups::join)?;
                prepare_child(&inherited, lock_fd, user, may)
            });
        }
        let child = command.spawn().map_err(|source| match (launch.cgroup_of, &*cgroups) {
            (Some(pid), Some(cgroups)) if !cgroups.were_joined() => no_cgroups(pid)(source),
            _ => EngineError::Program { program: launch.program.to_string(), remedy: launch.remedy, source },
        })?;
        let pid = Pid::from_child(&child);
        // The child is not reaped before its pidfd says it has ended, so the number is its own.
        Self::open(pid)
    }

    /// Finds the process that holds the lock in `run`, if one does; it must run as `user`. May wait
    /// for [`PID_LIMIT`].
    pub fn adopt(run: &Path, user: u32) -> Result<Option<Self>, EngineError> {
        Self::adopt_of(run, &|uid| uid == user)
    }

    fn adopt_of(run: &Path, is_user: &dyn Fn(u32) -> bool) -> Result<Option<Self>, EngineError> {
        let path = run.join("lock");
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(EngineError::io(format!("open {}", path.display()))(source)),
        };
        let held = || is_locked(&file);
        if !held() {
            return Ok(None);
        }
        let Some(pid) = written_pid(&path, &held)? else { return Ok(None) };
        let process = match Self::open(pid) {
            // It has ended; what holds its lock a moment longer is a fork that has not closed it yet.
            Err(EngineError::Io { source, .. }) if source.raw_os_error() == Some(libc::ESRCH) => {
                return Ok(None);
            }
            opened => opened?,
        };
        // Only now the number is pinned: ask again whether it was the holder's.
        if !held() {
            return Ok(None);
        }
        let path = format!("/proc/{}", pid.as_raw_nonzero());
        let metadata = fs::metadata(&path).map_err(EngineError::io(format!("read {path}")))?;
        let runs_as = std::os::unix::fs::MetadataExt::uid(&metadata);
        // /proc/PID belongs to root while the process is not dumpable (after a change of user).
        if is_user(runs_as) || (runs_as == 0 && status_uid(pid).is_some_and(is_user)) {
            Ok(Some(process))
        } else {
            let foreign =
                io::Error::other(format!("process {pid} is not this VM's", pid = pid.as_raw_nonzero()));
            Err(EngineError::io(format!("take over the process named in {}", run.display()))(foreign))
        }
    }

    /// The process that has that number now.
    pub(crate) fn open(pid: Pid) -> Result<Self, EngineError> {
        let error = |what| EngineError::io(format!("{what} process {}", pid.as_raw_nonzero()));
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK)
            .map_err(|errno| error("watch")(errno.into()))?;
        // SAFETY: the descriptor is owned by the AsyncFd and stays the same one until it is dropped.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }
            .map_err(|refused| error("watch")(refused.into()))?;
        Ok(Self { pid, pidfd, started: start_time(pid) })
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// When it was started, in seconds since 1970.
    pub fn started(&self) -> u64 {
        self.started
    }

    /// Ends it at once.
    pub fn kill(&self) -> Result<(), EngineError> {
        self.signal(Signal::KILL)
    }

    /// Asks it to end.
    pub(crate) fn terminate(&self) -> Result<(), EngineError> {
        self.signal(Signal::TERM)
    }

    fn signal(&self, signal: Signal) -> Result<(), EngineError> {
        match rustix::process::pidfd_send_signal(self.pidfd.get_ref(), signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(EngineError::io(format!("end process {}", self.pid()))(errno.into())),
        }
    }

    /// Ends it at once, and waits until it has.
    pub async fn end(&self) -> Result<(), EngineError> {
        self.kill()?;
        self.exited().await;
        Ok(())
    }

    /// Waits for its end and, if it is a child, reaps it.
    pub async fn exited(&self) -> Exit {
        // An error of the runtime means that the daemon itself is stopping.
        if self.pidfd.readable().await.is_err() {
            return Exit::Unknown;
        }
        let status = rustix::process::waitid(
            WaitId::PidFd(self.pidfd.as_fd()),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
        );
        match status {
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Exit::Code(code),
                (_, Some(signal)) => Exit::Signal(signal),
                _ => Exit::Unknown,
            },
            _ => Exit::Unknown,
        }
    }
}

fn no_cgroups(of: u32) -> impl FnOnce(io::Error) -> EngineError {
    EngineError::io(format!("put the VM process into the cgroups of process {of}"))
}

/// Whether a process holds the lock in `run`.
pub fn is_held(run: &Path) -> bool {
    File::open(run.join("lock")).is_ok_and(|file| is_locked(&file))
}

fn is_locked(file: &File) -> bool {
    rustix::fs::flock(file, FlockOperation::NonBlockingLockShared).is_err()
}

/// Ends the process that holds the lock in `run`, if one does, and waits for its end; it must be one of a VM.
pub fn end_holder(run: &Path) -> Result<(), EngineError> {
    let Some(process) = Process::adopt_of(run, &is_vm_user)? else { return Ok(()) };
    tokio::runtime::Handle::current().block_on(process.end())
}

impl Program {
    fn command(&self) -> Command {
        match self {
            Self::InPath(name) => Command::new(name),
            Self::Open { file, title, .. } => {
                let mut command = Command::new(format!("/proc/self/fd/{}", file.as_raw_fd()));
                command.arg0(OsStr::new(title));
                command
            }
        }
    }
}

impl std::fmt::Display for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::InPath(name) => f.write_str(name),
            Self::Open { path, .. } => path.display().fmt(f),
        }
    }
}

/// Notes in `run` whose process it will be. Who calls has the lock: the note of a process that lives is true.
fn note_engine(run: &Path, engine: EngineName) -> Result<(), EngineError> {
    let path = run.join(ENGINE_NOTE);
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let written = options.open(&path).and_then(|mut file| file.write_all(engine.to_string().as_bytes()));
    written.map_err(EngineError::io(format!("write {}", path.display())))
}

/// The engine of the process that holds the lock in `run`; that of earlier versions where there is no note.
pub fn noted_engine(run: &Path) -> EngineName {
    match files::read_bounded(&run.join(ENGINE_NOTE), 16) {
        Ok(text) if text == EngineName::Kvm.to_string().as_bytes() => EngineName::Kvm,
        _ => EngineName::Qemu,
    }
}

/// The pid that the holder of the lock has written; `None` if it has ended meanwhile. Between fork
/// and exec, which takes a moment, there is none yet.
fn written_pid(path: &Path, held: &dyn Fn() -> bool) -> Result<Option<Pid>, EngineError> {
    let begun = Instant::now();
    loop {
        let text =
            files::read_bounded(path, 32).map_err(EngineError::io(format!("read {}", path.display())))?;
        let pid = std::str::from_utf8(&text).ok().and_then(|text| text.trim().parse().ok());
        if let Some(pid) = pid.and_then(Pid::from_raw) {
            return Ok(Some(pid));
        }
        if !held() {
            return Ok(None);
        }
        if begun.elapsed() > PID_LIMIT {
            let empty = io::Error::other("it is locked by a process whose number it does not hold");
            return Err(EngineError::io(format!("read {}", path.display()))(empty));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Opens `run/lock` with an exclusive lock that the next process inherits.
fn lock_file(run: &Path) -> Result<File, EngineError> {
    let path = run.join("lock");
    let error = || EngineError::io(format!("lock {}", path.display()));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path)
        .map_err(error())?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let pid = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
            return Err(EngineError::Running(pid.unwrap_or(0)));
        }
        Err(errno) => return Err(error()(errno.into())),
    }
    file.set_len(0).map_err(error())?;
    Ok(file)
}

/// What a child may.
#[derive(Clone, Copy)]
struct May {
    mount: bool,
    large_pages: bool,
    open_files: Option<u64>,
}

/// Runs in the child: own session, descriptors kept, privileges gone, pid into the lock file.
fn prepare_child(inherited: &[RawFd], lock: RawFd, (user, group): (u32, u32), may: May) -> io::Result<()> {
    let mut digits = [0_u8; 16];
    let mut cursor = io::Cursor::new(&mut digits[..]);
    write!(cursor, "{}", rustix::process::getpid().as_raw_nonzero())?;
    let length = usize::try_from(cursor.position()).unwrap_or(0);
    // SAFETY: plain system calls on descriptors and numbers that are valid in this process.
    unsafe {
        check(libc::setsid())?;
        for &fd in inherited {
            check(libc::fcntl(fd, libc::F_SETFD, 0))?;
        }
        let limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        check(libc::setrlimit(libc::RLIMIT_CORE, &raw const limit))?;
        if let Some(most) = may.open_files {
            let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
            // Where even root may not have as many, it has as many as the daemon.
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
        if !may.large_pages {
            check(libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0))?;
        }
        if libc::geteuid() == 0 {
            // Else the change of user takes all capabilities.
            rustix::thread::set_keep_capabilities(may.mount)?;
            check(libc::setgroups(0, std::ptr::null()))?;
            check(libc::setresgid(group, group, group))?;
            check(libc::setresuid(user, user, user))?;
            if may.mount {
                keep_only(CapabilitySet::SYS_ADMIN)?;
            }
        }
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        // Last: whoever reads it finds the process as the user that it is told by.
        check(libc::write(lock, digits.as_ptr().cast(), length))?;
    }
    Ok(())
}

/// Gives up all capabilities but one, which also the next program gets (capabilities(7), "Ambient").
fn keep_only(capability: CapabilitySet) -> io::Result<()> {
    let sets = CapabilitySets { effective: capability, permitted: capability, inheritable: capability };
    rustix::thread::set_capabilities(None, sets)?;
    rustix::thread::configure_capability_in_ambient_set(capability, true)?;
    Ok(())
}

fn check<T: PartialOrd + Default + Copy>(result: T) -> io::Result<()> {
    if result < T::default() { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The real user of a process, from the `Uid:` line of proc_pid_status(5).
pub(crate) fn status_uid(pid: Pid) -> Option<u32> {
    let text = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).ok()?;
    text.lines().find_map(|line| line.strip_prefix("Uid:")?.split_whitespace().next()?.parse().ok())
}

/// The fields of proc_pid_stat(5) from the third on. The second, the name, may hold anything; the last ')' ends it.
pub(super) fn stat_fields(stat: &str) -> Option<std::str::SplitWhitespace<'_>> {
    Some(stat.rsplit_once(')')?.1.split_whitespace())
}

/// When a process was started, in seconds since 1970 (fields 22 of proc_pid_stat(5) and btime
/// of proc_stat(5)); 0 if it cannot be told.
fn start_time(pid: Pid) -> u64 {
    let ticks = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
        stat_fields(&stat)?.nth(19)?.parse::<u64>().ok()
    };
    let boot = || {
        let stat = fs::read_to_string("/proc/stat").ok()?;
        stat.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse::<u64>().ok())
    };
    match (boot(), ticks()) {
        (Some(boot), Some(ticks)) => boot + ticks / rustix::param::clock_ticks_per_second(),
        _ => 0,
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(0) | Self::PoweredOff => f.write_str("the guest powered off"),
            Self::Code(code) => write!(f, "the VM process ended with exit code {code}"),
            Self::Signal(signal) => write!(f, "the VM process was ended by signal {signal}"),
            Self::Unknown => f.write_str("the VM process ended"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::Told(why) => f.write_str(why),
        }
    }
}

impl From<std::process::ExitStatus> for Exit {
    fn from(status: std::process::ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(code),
            (_, Some(signal)) => Self::Signal(signal),
            _ => Self::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(folder: &Path, args: &[&str]) -> Launch {
        Launch {
            large_pages: true,
            engine: EngineName::Kvm,
            program: Program::InPath(args[0].to_owned()),
            remedy: "install it: sudo apt-get install it",
            args: args[1..].iter().map(OsString::from).collect(),
            fds: vec![],
            user: (65534, 65534),
            may_mount: false,
            open_files: None,
            cgroup_of: None,
            log: File::create(folder.join("log")).unwrap(),
        }
    }

    #[tokio::test]
    async fn a_process_is_found_again_by_its_lock_and_only_while_it_lives() {
        let run = tempfile::tempdir().unwrap();
        assert!(Process::adopt(run.path(), 65534).unwrap().is_none());
        let first = Process::spawn(launch(run.path(), &["/bin/sleep", "60"]), run.path()).unwrap();
        let again = Process::adopt(run.path(), 65534).unwrap().unwrap();
        assert_eq!(first.pid(), again.pid());
        assert!(again.started() > 1_600_000_000);
        assert_eq!(noted_engine(run.path()), EngineName::Kvm);
        let second = Process::spawn(launch(run.path(), &["/bin/sleep", "60"]), run.path());
        assert!(matches!(second, Err(EngineError::Running(pid)) if pid == first.pid()));
        again.kill().unwrap();
        assert_eq!(first.exited().await, Exit::Signal(9));
        assert!(Process::adopt(run.path(), 65534).unwrap().is_none());
    }

    #[tokio::test]
    async fn a_process_of_another_user_is_not_taken_over() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: needs root to start a process as another user");
            return;
        }
        let run = tempfile::tempdir().unwrap();
        let process = Process::spawn(launch(run.path(), &["/bin/sleep", "60"]), run.path()).unwrap();
        assert!(Process::adopt(run.path(), 65533).is_err());
        process.kill().unwrap();
        process.exited().await;
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named_with_the_remedy() {
        let run = tempfile::tempdir().unwrap();
        let error = Process::spawn(launch(run.path(), &["/no/such/program"]), run.path()).unwrap_err();
        assert!(error.to_string().contains("/no/such/program") && error.to_string().contains("apt-get"));
        assert!(Process::adopt(run.path(), 65534).unwrap().is_none());
    }

    #[tokio::test]
    async fn it_runs_without_root_and_without_groups() {
        let run = tempfile::tempdir().unwrap();
        let script = "id -u; id -G; grep -c '0000000000000000' /proc/self/status";
        let process = Process::spawn(launch(run.path(), &["/bin/sh", "-c", script]), run.path()).unwrap();
        assert_eq!(process.exited().await, Exit::Code(0));
        if rustix::process::geteuid().is_root() {
            let text = fs::read_to_string(run.path().join("log")).unwrap();
            assert!(text.starts_with("65534\n65534\n"), "{text}");
        }
    }

    /// The capability sets of a process that was started so, by name.
    async fn capabilities(may_mount: bool) -> Vec<(String, String)> {
        let run = tempfile::tempdir().unwrap();
        let mut launch = launch(run.path(), &["/bin/grep", "^Cap", "/proc/self/status"]);
        launch.may_mount = may_mount;
        let process = Process::spawn(launch, run.path()).unwrap();
        assert_eq!(process.exited().await, Exit::Code(0));
        let text = fs::read_to_string(run.path().join("log")).unwrap();
        let pairs = text.lines().filter_map(|line| line.split_once(":\t"));
        pairs
            .filter(|(set, _)| *set != "CapBnd")
            .map(|(set, bits)| (set.to_owned(), bits.to_owned()))
            .collect()
    }

    #[tokio::test]
    async fn it_keeps_no_capability_or_only_that_to_mount() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: needs root to have capabilities to give");
            return;
        }
        for (may_mount, wanted) in [(false, "0000000000000000"), (true, "0000000000200000")] {
            let sets = capabilities(may_mount).await;
            assert_eq!(sets.len(), 4, "{sets:?}");
            assert!(sets.iter().all(|(_, bits)| bits == wanted), "{may_mount}: {sets:?}");
        }
    }

    /// A folder in a hierarchy of cgroups, with a process in it.
    struct Elsewhere {
        folders: Vec<PathBuf>,
        process: std::process::Child,
    }

    impl Elsewhere {
        fn new() -> Self {
            let process = Command::new("/bin/sleep").arg("60").spawn().unwrap();
            let name = format!("catalyst-test-{}", process.id());
            let roots = ["pids", "freezer", "systemd", "unified", ""]
                .map(|name| Path::new("/sys/fs/cgroup").join(name));
            let join = |root: PathBuf| {
                let folder = root.join(&name);
                let joined = root.join("cgroup.procs").exists()
                    && fs::create_dir(&folder).is_ok()
                    && fs::write(folder.join("cgroup.procs"), process.id().to_string()).is_ok();
                joined.then_some(folder)
            };
            Self { folders: roots.into_iter().filter_map(join).collect(), process }
        }
    }

    impl Drop for Elsewhere {
        fn drop(&mut self) {
            let _ = self.process.kill();
            let _ = self.process.wait();
            for folder in &self.folders {
                let _ = fs::remove_dir(folder);
            }
        }
    }

    #[tokio::test]
    async fn it_begins_in_the_cgroups_of_another_process() {
        let elsewhere = Elsewhere::new();
        if elsewhere.folders.is_empty() {
            println!(
                "SKIPPED: needs a hierarchy of cgroups below /sys/fs/cgroup in which folders can be made"
            );
            return;
        }
        let of = |pid: u32| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let run = tempfile::tempdir().unwrap();
        let mut launch = launch(run.path(), &["/bin/cat", "/proc/self/cgroup"]);
        launch.cgroup_of = Some(elsewhere.process.id());
        let process = Process::spawn(launch, run.path()).unwrap();
        assert_eq!(process.exited().await, Exit::Code(0));
        let began = fs::read_to_string(run.path().join("log")).unwrap();
        assert_eq!(began, of(elsewhere.process.id()));
        assert_ne!(began, of(std::process::id()));
    }

    #[tokio::test]
    async fn the_cgroups_of_a_process_that_is_gone_are_an_error_that_names_them() {
        let run = tempfile::tempdir().unwrap();
        let mut gone = Command::new("/bin/true").spawn().unwrap();
        gone.wait().unwrap();
        let launch = Launch { cgroup_of: Some(gone.id()), ..launch(run.path(), &["/bin/sleep", "60"]) };
        let error = Process::spawn(launch, run.path()).unwrap_err();
        assert!(error.to_string().contains("cgroups of process"), "{error}");
        assert!(!is_held(run.path()));
    }

    #[tokio::test]
    async fn an_open_program_runs_although_its_folder_is_closed_to_its_user() {
        use std::os::unix::fs::PermissionsExt;
        let run = tempfile::tempdir().unwrap();
        let folder = run.path().join("closed");
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
        let path = folder.join("grep");
        fs::copy("/bin/grep", &path).unwrap();
        let mut launch = launch(run.path(), &["", "-z", "^web1", "/proc/self/cmdline"]);
        launch.program =
            Program::Open { file: File::open(&path).unwrap(), path, title: "web1's program".to_owned() };
        let process = Process::spawn(launch, run.path()).unwrap();
        assert_eq!(process.exited().await, Exit::Code(0));
        assert!(fs::read_to_string(run.path().join("log")).unwrap().starts_with("web1's program"));
    }
}
