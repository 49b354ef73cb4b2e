//! The first process of a program in a container, from its beginning until it is that program.
//!
//! It is the agent's program begun anew ([`super::launch`]), with one thread and no other's memory. Nothing is printed here: what is
//! written goes to the container's output.

use std::fs::File;
use std::io::{self, IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::ExitCode;

use catalyst_agent_protocol::ProblemKind;
use catalyst_agent_protocol::container::{Container, Process};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::pty::PtyMaster;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::socket::{ControlMessage, MsgFlags, recv, sendmsg};
use nix::sys::stat::{SFlag, fstat};

use super::plan::{self, INIT, PLAN, Plan, SHARED, SOCKET, START, Task, Told};
use super::program::{self, Program};
use super::{Step, credentials, doing, problem, root};
use crate::spawn::{open_terminal, set_size};

/// What an end that has no other code is told by, as shells do for programs that cannot be run.
const NOT_RUN: u8 = 126;

/// Does what the plan says; the program's own process, if all goes well.
pub fn main() -> ExitCode {
    let socket = inherited(SOCKET);
    let told = prepare(&socket).and_then(|program| {
        tell(&socket, &Told::Ready, None).map_err(doing("telling the agent"))?;
        if !is_to_start(&socket) {
            return Err(problem(ProblemKind::Failed, "the agent went away"));
        }
        settle_signals().map_err(doing("resetting signals"))?;
        Err(program::not_begun(&program, program.execute()))
    });
    let Err::<(), _>(problem) = told else { return ExitCode::from(NOT_RUN) };
    // Without the agent nobody wants to know.
    let _ = tell(&socket, &Told::Failed(problem), None);
    ExitCode::from(NOT_RUN)
}

/// A descriptor that the agent has left at this number.
fn inherited(number: RawFd) -> OwnedFd {
    // SAFETY: the agent has put it there for this alone; each number is taken once.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    // The program does not get it. It fails only for what is not open, which the first use of it tells.
    let _ = fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
    fd
}

fn tell(socket: &OwnedFd, told: &Told, terminal: Option<RawFd>) -> io::Result<()> {
    let text = serde_json::to_vec(told)?;
    let fds: Vec<RawFd> = terminal.into_iter().collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let rights = if fds.is_empty() { &rights[..0] } else { &rights };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&text)], rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

fn is_to_start(socket: &OwnedFd) -> bool {
    let mut word = [0; 16];
    loop {
        match recv(socket.as_raw_fd(), &mut word, MsgFlags::empty()) {
            Err(nix::errno::Errno::EINTR) => {}
            Ok(count) => return &word[..count] == START,
            Err(_) => return false,
        }
    }
}

/// What the agent ignores or holds back is nothing to the program.
fn settle_signals() -> io::Result<()> {
    for signal in 1..=64 {
        // SAFETY: the default needs no handler. It fails for numbers that are not to be changed, which are so already.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    Ok(sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?)
}

fn prepare(socket: &OwnedFd) -> Step<Program> {
    let mut text = Vec::new();
    File::from(inherited(PLAN)).read_to_end(&mut text).map_err(doing("reading the plan"))?;
    let plan: Plan = serde_json::from_slice(&text).map_err(doing("reading the plan"))?;
    // Permissions of what is made in the root are given in full. The program's mask comes with its rights.
    // SAFETY: numbers alone.
    unsafe {
        libc::umask(0);
        // Who is in the container already cannot look into this process.
        libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0);
        libc::setsid();
        libc::setpriority(libc::PRIO_PROCESS, 0, 0);
    }
    if let Some(cgroup) = &plan.cgroup {
        std::fs::write(cgroup.join("cgroup.procs"), "0").map_err(doing("joining the container's cgroup"))?;
    }
    match plan.task {
        Task::Create { document, trees, shares } => {
            if shares {
                share()?;
            }
            create(socket, &plan::container(&document)?, &trees)
        }
        Task::Join(process) => {
            join(&process)?;
            become_program(socket, &process, false, || Ok(()))
        }
        Task::Guest { spec, capabilities } => {
            join(&Process::default())?;
            let process = program::of_guest(spec, capabilities)?;
            become_program(socket, &process, false, || Ok(()))
        }
    }
}

fn create(socket: &OwnedFd, container: &Container, trees: &Path) -> Step<Program> {
    if !container.process.stdin {
        // One that was made in advance has a pipe.
        let null = File::open("/dev/null");
        let taken = null.and_then(|null| Ok(nix::unistd::dup2_stdin(null)?));
        taken.map_err(doing("giving the program no input"))?;
    }
    credentials::set_oom_score(&container.process)?;
    // The cgroup that it is in by now is the top of what it sees (cgroup_namespaces(7)).
    unshare(CloneFlags::CLONE_NEWCGROUP).map_err(doing("making a cgroup namespace"))?;
    if !container.hostname.is_empty() {
        nix::unistd::sethostname(&container.hostname).map_err(doing("setting the host name"))?;
    }
    if !container.domainname.is_empty() {
        set_domain_name(&container.domainname).map_err(doing("setting the domain name"))?;
    }
    root::build(container, trees)?;
    become_program(socket, &container.process, true, || root::finish(container))
}

/// Goes into the namespaces of IPC and names that the agent has opened.
fn share() -> Step<()> {
    for (number, kind) in [(SHARED, CloneFlags::CLONE_NEWIPC), (SHARED + 1, CloneFlags::CLONE_NEWUTS)] {
        setns(inherited(number), kind).map_err(doing("going into namespaces that others have too"))?;
    }
    Ok(())
}

fn set_domain_name(name: &str) -> io::Result<()> {
    // SAFETY: it reads so many bytes, which outlive the call.
    let set = unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) };
    Ok(nix::errno::Errno::result(set).map(drop)?)
}

/// Goes into the container that the agent has named.
fn join(process: &Process) -> Step<()> {
    credentials::set_oom_score(process)?;
    let spaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    setns(inherited(INIT), spaces).map_err(doing("going into the container"))
}

/// All that is left when this process is in its container. `finish` is done when nothing more is made in the root.
fn become_program(
    socket: &OwnedFd,
    process: &Process,
    console: bool,
    finish: impl FnOnce() -> Step<()>,
) -> Step<Program> {
    if process.terminal.is_some() {
        take_terminal(socket, process, console)?;
    } else {
        own_pipes(process.uid).map_err(doing("giving the program its input and output"))?;
    }
    finish()?;
    let entered = program::enter_folder(process)?;
    credentials::assume(process)?;
    if !entered {
        program::enter_folder_as_user(process)?;
    }
    program::find(process)
}

/// A terminal of the container's own, for this session; its near end is the agent's.
fn take_terminal(socket: &OwnedFd, process: &Process, console: bool) -> Step<()> {
    let Some(terminal) = &process.terminal else { return Ok(()) };
    let (master, slave) = open_terminal().map_err(doing("opening a terminal in the container's /dev/pts"))?;
    set_size(&master, terminal).map_err(doing("setting the terminal's size"))?;
    let owned = nix::unistd::fchown(&slave, Some(process.uid.into()), None);
    owned.map_err(doing("giving the user the terminal"))?;
    tell(socket, &Told::Terminal, Some(master.as_raw_fd())).map_err(doing("telling the agent"))?;
    if console {
        root::console(&name_of(master).map_err(doing("naming the terminal"))?)?;
    }
    // SAFETY: numbers alone. This process leads a session that has no terminal.
    let taken = nix::errno::Errno::result(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) });
    taken.map_err(doing("taking the terminal"))?;
    let all = nix::unistd::dup2_stdin(&slave)
        .and_then(|()| nix::unistd::dup2_stdout(&slave))
        .and_then(|()| nix::unistd::dup2_stderr(&slave));
    all.map_err(doing("taking the terminal"))
}

fn name_of(master: OwnedFd) -> io::Result<std::path::PathBuf> {
    // SAFETY: the descriptor is that of a terminal's master, and is given away here.
    let master = unsafe { PtyMaster::from_owned_fd(master) };
    Ok(nix::pty::ptsname_r(&master)?.into())
}

/// A program opens its own output by `/dev/stdout`, for which a pipe must be its user's.
fn own_pipes(uid: u32) -> io::Result<()> {
    let (input, output, errors) = (io::stdin(), io::stdout(), io::stderr());
    for fd in [input.as_fd(), output.as_fd(), errors.as_fd()] {
        if SFlag::from_bits_truncate(fstat(fd)?.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFIFO {
            nix::unistd::fchown(fd, Some(uid.into()), None)?;
        }
    }
    Ok(())
}
