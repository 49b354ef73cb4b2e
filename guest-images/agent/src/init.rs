//! The first process of a VM that has no other system than this program: it mounts what the kernel offers, loads modules, starts
//! the agent, reaps what is left behind, and turns the VM off.
//!
//! The agent is a process of its own, so that the orphans that come here are nobody's commands.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use catalyst_agent_protocol::ShutdownKind;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, chdir, chroot, fork};

use crate::{apic_timer, shutdown};

/// Where modules lie, and the file that names them in the order in which they can be loaded.
const MODULES: &str = "/modules";
const ORDER: &str = "order";
/// What the kernel offers: type, place, flags, data.
const MOUNTS: [(&str, &str, MsFlags, &str); 7] = [
    ("proc", "/proc", HARMLESS, ""),
    ("sysfs", "/sys", HARMLESS, ""),
    ("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=0755"),
    ("devpts", "/dev/pts", MsFlags::MS_NOSUID, "mode=0620,gid=5,ptmxmode=0666"),
    ("tmpfs", "/dev/shm", MsFlags::MS_NOSUID, "mode=1777"),
    ("tmpfs", "/run", MsFlags::MS_NOSUID, "mode=0755"),
    ("cgroup2", "/sys/fs/cgroup", HARMLESS, ""),
];
const HARMLESS: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);
/// Files that a program may have open: what Docker's daemon has, and with it its containers.
const MOST_FILES: u64 = 1024 * 1024;
/// How long what is not written yet may take at the end: it may wait for a host that is gone.
const WRITTEN_WITHIN: Duration = Duration::from_secs(2);

/// What ends the wait of the first process.
enum Word {
    End(ShutdownKind),
    /// A process has ended.
    Child,
}

/// Runs the VM until it is off. `agent` is what the second process does.
pub fn run(agent: impl FnOnce() -> ExitCode) -> ExitCode {
    if let Err(error) = prepare() {
        eprintln!("catalyst-agent: the system cannot be made ready: {error}");
    }
    let all = signals();
    // Before there is a child, so that none of its ends is missed.
    if let Err(error) = sigprocmask(SigmaskHow::SIG_BLOCK, Some(&all), None) {
        eprintln!("catalyst-agent: signals cannot be waited for: {error}");
    }
    // SAFETY: this process has one thread, so that the child has all of what it had.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            let _ = sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&all), None);
            let _ = nix::unistd::setsid();
            agent()
        }
        Ok(ForkResult::Parent { child }) => end(look_after(child, &all)),
        Err(error) => {
            eprintln!("catalyst-agent: the agent cannot be started: {error}");
            end(ShutdownKind::PowerOff)
        }
    }
}

fn prepare() -> io::Result<()> {
    cover_root()?;
    for (kind, place, flags, data) in MOUNTS {
        fs::create_dir_all(place)?;
        mount(Some(kind), place, Some(kind), flags, Some(data))
            .map_err(|error| io::Error::other(format!("mounting {place}: {error}")))?;
    }
    apic_timer::check();
    fs::create_dir_all("/run/catalyst")?;
    fs::write("/proc/self/oom_score_adj", "-1000")?;
    for (resource, most) in [
        (Resource::RLIMIT_NOFILE, MOST_FILES),
        (Resource::RLIMIT_NPROC, libc::RLIM_INFINITY),
        (Resource::RLIMIT_CORE, libc::RLIM_INFINITY),
    ] {
        setrlimit(resource, most, most)?;
    }
    load_modules(Path::new(MODULES))
}

/// Mounts the root over itself: the first one of all cannot be left by pivot_root(2), which a container does ("EINVAL").
fn cover_root() -> io::Result<()> {
    const NOTHING: Option<&str> = None;
    fs::create_dir_all("/root")?;
    mount(Some("/"), "/root", NOTHING, MsFlags::MS_BIND, NOTHING)?;
    chdir("/root")?;
    mount(Some("."), "/", NOTHING, MsFlags::MS_MOVE, NOTHING)?;
    chroot(".")?;
    Ok(chdir("/")?)
}

/// Loads what lies in the folder, in its order. One that fails is said, and the others are tried.
fn load_modules(folder: &Path) -> io::Result<()> {
    let order = match fs::read_to_string(folder.join(ORDER)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        order => order?,
    };
    for name in listed(&order) {
        if let Err(error) = load(&folder.join(name)) {
            eprintln!("catalyst-agent: the module {name} cannot be loaded: {error}");
        }
    }
    // Their memory is the kernel's by now.
    fs::remove_dir_all(folder)
}

fn listed(order: &str) -> impl Iterator<Item = &str> {
    order
        .lines()
        .map(str::trim)
        .filter(|name| !name.is_empty() && !name.contains('/') && !name.starts_with('.'))
}

fn load(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    let parameters = CString::default();
    let fd = file.as_raw_fd();
    // SAFETY: an open file and a text, which outlive the call.
    let loaded = unsafe { libc::syscall(libc::SYS_finit_module, fd, parameters.as_ptr(), 0) };
    match Errno::result(loaded) {
        Ok(_) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// What the first process is told by: ends of children, and what `shutdown` asks for.
fn signals() -> SigSet {
    let mut all = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
        all.add(signal);
    }
    let mut raw = *all.as_ref();
    for kind in [ShutdownKind::PowerOff, ShutdownKind::Reboot] {
        // SAFETY: the set is a valid one, and the signals are within it.
        unsafe { libc::sigaddset(&raw mut raw, shutdown::signal_of(kind)) };
    }
    // SAFETY: it was made from a valid set.
    unsafe { SigSet::from_sigset_t_unchecked(raw) }
}

/// Reaps, and waits until the VM is to end.
fn look_after(agent: Pid, all: &SigSet) -> ShutdownKind {
    loop {
        match wait(all) {
            Word::End(kind) => return kind,
            Word::Child if agent_has_ended(agent) => {
                eprintln!("catalyst-agent: the agent has ended: the machine is turned off");
                return ShutdownKind::PowerOff;
            }
            Word::Child => {}
        }
    }
}

fn wait(all: &SigSet) -> Word {
    let mut signal = 0;
    loop {
        // SAFETY: it reads a set and writes a number.
        let waited = unsafe { libc::sigwait(all.as_ref(), &raw mut signal) };
        let kinds = [ShutdownKind::PowerOff, ShutdownKind::Reboot];
        if waited != 0 {
            continue;
        }
        match kinds.into_iter().find(|kind| shutdown::signal_of(*kind) == signal) {
            Some(kind) => return Word::End(kind),
            None if signal == libc::SIGCHLD => return Word::Child,
            None if signal == libc::SIGTERM => return Word::End(ShutdownKind::PowerOff),
            // Ctrl-Alt-Del.
            None => return Word::End(ShutdownKind::Reboot),
        }
    }
}

/// Reaps all that has ended; whether the agent is among it.
fn agent_has_ended(agent: Pid) -> bool {
    let mut ended = false;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return ended,
            Ok(status) => ended |= status.pid() == Some(agent),
            Err(_) => {}
        }
    }
}

/// Writes what is held back, for a while, and turns the VM off.
fn end(kind: ShutdownKind) -> ! {
    let (done, all_written) = std::sync::mpsc::channel();
    thread::spawn(move || {
        nix::unistd::sync();
        // Nobody waits for it any more where it took too long.
        let _ = done.send(());
    });
    let _ = all_written.recv_timeout(WRITTEN_WITHIN);
    let mode = match kind {
        ShutdownKind::PowerOff => RebootMode::RB_POWER_OFF,
        ShutdownKind::Reboot => RebootMode::RB_AUTOBOOT,
    };
    let Err(error) = reboot(mode);
    eprintln!("catalyst-agent: the machine cannot be turned off: {error}");
    // The end of the first process is the kernel's, and with it the VM's.
    std::process::exit(1)
}

/// Whether the program is the first process of a VM.
pub fn is_needed() -> bool {
    std::process::id() == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_files_of_their_folder_in_order() {
        let order = "virtio.ko\nvirtio_mmio.ko\n\n../../etc/passwd\n.hidden\n virtio_net.ko \n";
        assert_eq!(listed(order).collect::<Vec<_>>(), ["virtio.ko", "virtio_mmio.ko", "virtio_net.ko"]);
    }

    #[test]
    fn a_system_without_modules_goes_on_and_one_with_them_keeps_none() {
        let folder = tempfile::tempdir().unwrap();
        let modules = folder.path().join("modules");
        load_modules(&modules).unwrap();
        fs::create_dir(&modules).unwrap();
        fs::write(modules.join(ORDER), "missing.ko\n").unwrap();
        load_modules(&modules).unwrap();
        assert!(!modules.exists());
    }

    #[test]
    fn the_first_process_hears_what_shutdown_says() {
        let all = signals();
        for kind in [ShutdownKind::PowerOff, ShutdownKind::Reboot] {
            // SAFETY: the set is a valid one.
            assert_eq!(unsafe { libc::sigismember(all.as_ref(), shutdown::signal_of(kind)) }, 1);
        }
        assert!(all.contains(Signal::SIGCHLD));
    }
}
