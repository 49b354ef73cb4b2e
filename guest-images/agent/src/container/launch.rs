//! From a plan to a process in the container's namespaces, as the agent sees it.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::thread;

use catalyst_agent_protocol::ProblemKind;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, send, socketpair,
};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use super::plan::{MAX_TOLD, Plan, STAGE, START, Told};
use super::{Step, doing, problem};
use crate::spawn::{Spawned, set_nonblocking};

/// The agent's own program.
const SELF: &str = "/proc/self/exe";
/// What is tried.
const STARTING: &str = "starting a process in the container";
/// Where the numbers begin that no descriptor of the new process has.
const ASIDE: RawFd = 16;

/// What a process is started with.
#[derive(Clone, Copy, Debug)]
pub struct Shape<'a> {
    /// Namespaces that it has for itself.
    pub own: CloneFlags,
    /// A process whose fellows it is to be, where those are not the agent's.
    pub among: Option<BorrowedFd<'a>>,
    /// The first process of the container that it goes into.
    pub init: Option<BorrowedFd<'a>>,
    /// Namespaces that it goes into besides, as [`super::plan::SHARED`] has them.
    pub shared: &'a [OwnedFd],
    /// Whether it has a terminal, and with it one stream of output alone.
    pub terminal: bool,
    /// Whether input comes.
    pub stdin: bool,
}

/// A process that is about to be its program.
#[derive(Debug)]
pub struct Launched {
    /// What it is to the rest of the agent.
    pub spawned: Spawned,
    socket: OwnedFd,
}

/// A process that waits for its plan.
#[derive(Debug)]
pub struct Waiting {
    spawned: Spawned,
    socket: OwnedFd,
    plan: File,
}

/// Starts a process and waits until its program is ready to begin.
pub fn launch(plan: &Plan, shape: Shape<'_>) -> Step<Launched> {
    Waiting::start(shape).map_err(doing(STARTING))?.follow(plan)
}

impl Waiting {
    /// Its number among the agent's processes.
    pub fn pid(&self) -> i32 {
        self.spawned.pid
    }

    /// Takes away what its program will not have after all.
    pub fn without(mut self, terminal: bool, stdin: bool) -> Self {
        if terminal || !stdin {
            self.spawned.input = None;
        }
        if terminal {
            self.spawned.errors = None;
        }
        self
    }

    /// Starts it.
    pub fn start(shape: Shape<'_>) -> io::Result<Self> {
        let (socket, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let null = || File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from);
        let pipe = || nix::unistd::pipe2(OFlag::O_CLOEXEC);
        let (input, near_input) = if shape.stdin && !shape.terminal {
            pipe().map(|(far, near)| (far, Some(File::from(near))))?
        } else {
            (null()?, None)
        };
        let (near_output, output) = pipe()?;
        let (near_errors, errors) = pipe()?;
        let (text, plan) = pipe()?;
        if let Some(input) = &near_input {
            set_nonblocking(input)?;
        }
        let mut fds = vec![input, output, errors, theirs, text];
        if shape.terminal {
            // Until it has its terminal it has nothing.
            fds[..3].iter_mut().try_for_each(|fd| null().map(|null| *fd = null))?;
        }
        if let Some(init) = shape.init {
            fds.push(init.try_clone_to_owned()?);
        }
        for shared in shape.shared {
            fds.push(shared.try_clone()?);
        }
        let pid = clone_in(&fds, shape)?;
        let errors = (!shape.terminal).then(|| File::from(near_errors));
        let spawned = Spawned { pid, input: near_input, output: near_output.into(), errors, terminal: None };
        Ok(Self { spawned, socket, plan: plan.into() })
    }

    /// Gives it its plan, and waits until its program is ready to begin.
    pub fn follow(self, plan: &Plan) -> Step<Launched> {
        let Self { mut spawned, socket, plan: mut pipe } = self;
        let told = serde_json::to_vec(plan).map_err(io::Error::from).and_then(|text| pipe.write_all(&text));
        // Its end is the plan's.
        drop(pipe);
        match told.map_err(doing(STARTING)).and_then(|()| listen(&socket, &mut spawned)) {
            Ok(()) => Ok(Launched { spawned, socket }),
            Err(failure) => {
                end(spawned.pid);
                Err(failure)
            }
        }
    }

    /// Ends it.
    pub fn give_up(self) {
        end(self.spawned.pid);
    }
}

impl Launched {
    /// Lets the program begin.
    pub fn begin(self) -> Step<Spawned> {
        let Self { spawned, socket } = self;
        let told = send(socket.as_raw_fd(), START, MsgFlags::MSG_NOSIGNAL)
            .map_err(io::Error::from)
            .and_then(|_| hear(&socket))
            .map_err(doing("starting the program"));
        let failure = match told {
            // Its end of the socket went with the process's old program.
            Ok(None) => return Ok(spawned),
            Ok(Some((Told::Failed(problem), _))) => problem,
            Ok(Some(_)) => problem(ProblemKind::Failed, "the program's process said what it should not"),
            Err(failure) => failure,
        };
        end(spawned.pid);
        Err(failure)
    }

    /// Ends the process, which has not begun its program.
    pub fn give_up(self) {
        end(self.spawned.pid);
    }
}

/// Ends a process that is not a program yet.
pub fn end(pid: i32) {
    let pid = Pid::from_raw(pid);
    // It is not reaped yet: the number is its own.
    let _ = kill(pid, Signal::SIGKILL);
    let _ = waitpid(pid, None);
}

/// Takes what the process says until it is ready.
fn listen(socket: &OwnedFd, spawned: &mut Spawned) -> Step<()> {
    loop {
        let told = hear(socket).map_err(doing("hearing of the container's process"))?;
        match told {
            Some((Told::Ready, _)) => return Ok(()),
            Some((Told::Failed(problem), _)) => return Err(problem),
            Some((Told::Terminal, Some(master))) => {
                take_terminal(spawned, master).map_err(doing("taking the container's terminal"))?;
            }
            Some((Told::Terminal, None)) | None => {
                return Err(problem(ProblemKind::Failed, "the container's process ended early"));
            }
        }
    }
}

fn take_terminal(spawned: &mut Spawned, master: OwnedFd) -> io::Result<()> {
    let output = File::from(master.try_clone()?);
    set_nonblocking(&output)?;
    spawned.input = Some(output.try_clone()?);
    spawned.output = output;
    spawned.terminal = Some(master);
    Ok(())
}

/// The next word, with what came with it; none when the other end is closed.
fn hear(socket: &OwnedFd) -> io::Result<Option<(Told, Option<OwnedFd>)>> {
    let mut text = vec![0; MAX_TOLD];
    let mut space = nix::cmsg_space!(RawFd);
    let (count, fd) = loop {
        let mut parts = [IoSliceMut::new(&mut text)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received = match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Err(Errno::EINTR) => continue,
            received => received?,
        };
        let mut fds = Vec::new();
        for message in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(rights) = message {
                // SAFETY: the kernel has just made them, for this process.
                fds.extend(rights.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        break (received.bytes, fds.pop());
    };
    if count == 0 {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(&text[..count])?, fd)))
}

/// Which processes a new one is among is said by the thread that makes it: one of its own, where that is not the agent's
/// (pid_namespaces(7), "setns(2)").
fn clone_in(fds: &[OwnedFd], shape: Shape<'_>) -> io::Result<i32> {
    let Some(among) = shape.among else { return clone(fds, STAGE, shape.own) };
    let in_thread = || {
        setns(among, CloneFlags::CLONE_NEWPID)?;
        clone(fds, STAGE, shape.own)
    };
    thread::scope(|scope| scope.spawn(in_thread).join())
        .unwrap_or_else(|_| Err(io::Error::other("a thread ended early")))
}

/// Makes a process of the agent's program, with one argument, in which these descriptors are 0, 1, 2 and so on.
pub fn clone(fds: &[OwnedFd], role: &str, own: CloneFlags) -> io::Result<i32> {
    // Where nothing is overwritten before it was copied.
    let aside = fds.iter().map(|fd| {
        let copy = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(ASIDE))?;
        // SAFETY: the descriptor is new and nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(copy) })
    });
    let aside: Vec<OwnedFd> = aside.collect::<io::Result<_>>()?;
    let numbers: Vec<RawFd> = aside.iter().map(AsRawFd::as_raw_fd).collect();
    let program = CString::new(SELF)?;
    let arguments = [CString::new("catalyst-agent")?, CString::new(role)?];
    let arguments = [arguments[0].as_ptr(), arguments[1].as_ptr(), std::ptr::null()];
    let environment = [std::ptr::null()];
    let flags = own.bits() | libc::SIGCHLD;
    // SAFETY: without CLONE_VM the child has a copy of all memory, and of all threads this one alone, so that locks may be held for
    // ever there: it makes system calls alone, on what was made before. Zeros stand for a stack and numbers that are not wanted.
    unsafe {
        let pid = libc::syscall(libc::SYS_clone, flags, 0_usize, 0_usize, 0_usize, 0_usize);
        if pid == 0 {
            for (from, to) in numbers.iter().zip(0..) {
                if libc::dup2(*from, to) < 0 {
                    libc::_exit(127);
                }
            }
            libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr());
            libc::_exit(127);
        }
        let pid = Errno::result(pid)?;
        i32::try_from(pid).map_err(io::Error::other)
    }
}
