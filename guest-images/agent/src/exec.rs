//! Commands while they run: their output, input, signals and end.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use catalyst_agent_protocol::{
    Control, ExecExit, ExecSpec, Problem, ProblemKind, Reply, StreamChannel, Terminal,
};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::session::{Session, failed};
use crate::spawn::{Spawned, set_size, spawn};
use crate::stream::{Input, Stream};

/// Bytes of output in one frame at most.
const PIECE: usize = 32 * 1024;
/// How long a command's background children may go on writing to its output after its exit.
const LINGER: Duration = Duration::from_millis(200);
/// What may lie in a pipe at the exit: the largest size of one, pipe(7).
const PIPE_MAX: usize = 1024 * 1024;
/// From SIGTERM to SIGKILL.
const TERM_GRACE: Duration = Duration::from_secs(2);
/// From SIGHUP to SIGKILL.
const HANGUP_GRACE: Duration = Duration::from_secs(1);
/// End of file, as a terminal takes it.
const EOT: u8 = 4;

/// A running command, as long as its process id is surely its own.
#[derive(Debug)]
pub struct Handle {
    pid: i32,
    manner: Manner,
    terminal: Option<OwnedFd>,
}

/// Whose a program is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// The host's that asked for it: it ends with that, and all of its group.
    Command,
    /// A container's: it alone is meant by signals, and it goes on when the host is gone.
    Contained,
}

/// What the threads of one command share.
struct Running {
    session: Arc<Session>,
    stream: Arc<Stream>,
    /// Readable once the process has exited.
    exited: EventFd,
    manner: Manner,
}

/// Starts a command as the stream's.
pub fn start(session: &Arc<Session>, stream: &Arc<Stream>, spec: &ExecSpec) -> Result<(), Reply> {
    let spawned = spawn(&session.config.root, spec)?;
    run(session, stream, spawned, spec.timeout_ms, Manner::Command)
        .map_err(|problem| failed(problem.kind, problem.message))
}

/// Checks what is asked for, wherever it is to run.
pub fn check(spec: &ExecSpec) -> Result<(), Problem> {
    crate::spawn::check(spec).map_err(|reply| match reply {
        Reply::Failed(problem) => problem,
        other => Problem { kind: ProblemKind::Invalid, message: format!("{other:?}") },
    })
}

/// Stays with a program that was started, as the stream's.
pub fn run(
    session: &Arc<Session>,
    stream: &Arc<Stream>,
    mut spawned: Spawned,
    timeout_ms: Option<u64>,
    manner: Manner,
) -> Result<(), Problem> {
    let pid = spawned.pid;
    let problem = |error: &dyn std::fmt::Display| {
        // It could not be ended at its time: better not at all.
        end(pid);
        Problem { kind: ProblemKind::Failed, message: format!("a command cannot be watched: {error}") }
    };
    let exited = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map_err(|error| problem(&error))?;
    let watch = pidfd(pid).map_err(|error| problem(&error))?;
    *stream.command() = Some(Handle { pid, manner, terminal: spawned.terminal.take() });
    let running = Running { session: Arc::clone(session), stream: Arc::clone(stream), exited, manner };
    let timeout = timeout_ms.map(Duration::from_millis);
    let supervised = thread::Builder::new().spawn(move || {
        // Before its output, which only this thread's children send.
        let pid = u32::try_from(pid).unwrap_or(0);
        running.session.reply(running.stream.epoch, running.stream.id, Reply::Started { pid });
        running.supervise(spawned, &watch, timeout);
    });
    supervised.map(drop).map_err(|error| {
        *stream.command() = None;
        problem(&error)
    })
}

/// Ends a process that nobody else waits for.
fn end(pid: i32) {
    // SAFETY: kill takes two numbers; the process is not reaped yet.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    let _ = wait_for(pid);
}

/// Waits for the end of a child.
fn wait_for(pid: i32) -> Result<ExecExit, Errno> {
    let mut status = 0;
    loop {
        // SAFETY: it writes one number.
        match Errno::result(unsafe { libc::waitpid(pid, &raw mut status, 0) }) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
            Ok(_) if libc::WIFEXITED(status) => return Ok(ExecExit::Code(libc::WEXITSTATUS(status))),
            Ok(_) => return Ok(ExecExit::Signal(libc::WTERMSIG(status))),
        }
    }
}

/// A descriptor that is readable when the process has ended.
pub fn pidfd(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: pidfd_open takes two numbers and returns a new descriptor, close-on-exec.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let fd = i32::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Gives a command's terminal another size.
pub fn resize(stream: &Stream, terminal: &Terminal) -> Reply {
    let command = stream.command();
    let Some(master) = command.as_ref().and_then(|handle| handle.terminal.as_ref()) else {
        return failed(ProblemKind::NotFound, format!("stream {} has no terminal", stream.id));
    };
    match set_size(master, terminal) {
        Ok(()) => Reply::Done,
        Err(error) => failed(ProblemKind::Failed, format!("the terminal cannot be resized: {error}")),
    }
}

/// Sends a command's process group a signal, or a container's program.
pub fn signal(stream: &Stream, signal: i32) -> Reply {
    if !(1..=64).contains(&signal) {
        return failed(ProblemKind::Invalid, format!("{signal} is no signal: 1 to 64 are"));
    }
    match kill(stream, signal) {
        None => failed(ProblemKind::NotFound, format!("stream {} has no running command", stream.id)),
        Some(Ok(_)) => Reply::Done,
        Some(Err(error)) => failed(ProblemKind::Failed, format!("signal {signal} cannot be sent: {error}")),
    }
}

/// `None` once the process is reaped: its number may be another's then.
fn kill(stream: &Stream, signal: i32) -> Option<Result<i32, Errno>> {
    let command = stream.command();
    let Handle { pid, manner, .. } = command.as_ref()?;
    let whom = if *manner == Manner::Command { -pid } else { *pid };
    // SAFETY: kill takes two numbers; the process, the leader of its group, is not reaped while the lock is held.
    Some(Errno::result(unsafe { libc::kill(whom, signal) }))
}

impl Running {
    /// Stays with the command from its start to the word of its end.
    fn supervise(&self, spawned: Spawned, watch: &OwnedFd, timeout: Option<Duration>) {
        let Spawned { pid, input, output, errors, .. } = spawned;
        let terminal = errors.is_none();
        let exit = thread::scope(|scope| {
            if let Some(input) = input {
                scope.spawn(move || self.feed(input, terminal));
            }
            let pumps = [(Some(output), StreamChannel::Output), (errors, StreamChannel::Errors)];
            let pumps =
                pumps.map(|(file, channel)| file.map(|file| scope.spawn(move || self.pump(file, channel))));
            self.wait(watch, timeout);
            // The end of a container waits for all of its processes to be reaped, and that must not wait for output.
            let early = (self.manner == Manner::Contained).then(|| self.reap(pid));
            // It fails only when the counter is full, and then it is readable already.
            let _ = self.exited.write(1);
            for pump in pumps.into_iter().flatten() {
                let _ = pump.join();
            }
            // Input is waited for no more.
            self.stream.close();
            early
        });
        let exit = exit.unwrap_or_else(|| self.reap(pid));
        if let Some(keeper) = self.session.config.keeper.as_ref().filter(|_| self.manner == Manner::Contained)
        {
            // What has ended it is told before its end.
            keeper.look_for_kills();
        }
        self.session.finish(&self.stream);
        let message = Control::Exited { stream: self.stream.id, exit };
        self.session.outbox.control(self.stream.epoch, &message);
    }

    /// Waits for the exit; ends the command when its time is over or its stream closed.
    fn wait(&self, watch: &OwnedFd, timeout: Option<Duration>) {
        let mut until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut ending = false;
        let mut closing = false;
        loop {
            let mut fds = [watch.as_fd(), self.stream.closed_fd()].map(readable);
            let watched = if closing { 1 } else { 2 };
            let waited = poll(&mut fds[..watched], remaining(until));
            if waited.is_err_and(|error| error != Errno::EINTR) || is_ready(&fds[0]) {
                break;
            }
            if !closing && is_ready(&fds[1]) {
                closing = true;
                if self.is_left() {
                    continue;
                }
                kill(&self.stream, libc::SIGHUP);
                until = Some(Instant::now() + HANGUP_GRACE);
            } else if until.is_some_and(|until| until <= Instant::now()) {
                let signal = if ending || closing { libc::SIGKILL } else { libc::SIGTERM };
                kill(&self.stream, signal);
                until = (signal == libc::SIGTERM).then(|| Instant::now() + TERM_GRACE);
                ending = true;
            }
        }
        // The leader is gone but not reaped, so that the group is still its own. What of the
        // group outlived the hangup or the timeout does not outlive this.
        if (ending || closing || self.stream.is_closed()) && self.manner == Manner::Command {
            kill(&self.stream, libc::SIGKILL);
        }
    }

    /// Whether a container's program has lost its host, and goes on.
    fn is_left(&self) -> bool {
        self.manner == Manner::Contained && self.stream.is_lost()
    }

    fn reap(&self, pid: i32) -> ExecExit {
        // Nobody signals it or its group after this.
        let mut command = self.stream.command();
        *command = None;
        wait_for(pid).unwrap_or_else(|error| {
            eprintln!("catalyst-agent: the end of process {pid} is unknown: {error}");
            ExecExit::Code(255)
        })
    }

    /// Sends output as credit allows, then its end.
    ///
    /// The end is the end of the pipe. But a child left in the background may hold the pipe for
    /// ever; so after the exit only what comes within [`LINGER`] and what the pipe held is read.
    fn pump(&self, mut file: File, channel: StreamChannel) {
        let mut buffer = vec![0; PIECE];
        let mut exit: Option<Instant> = None;
        let mut late = 0;
        while let Some(credit) = self.stream.credit(channel) {
            if exit.is_none() && is_exited(&self.exited) {
                exit = Some(Instant::now());
            }
            let over = exit.is_some_and(|exit| exit.elapsed() >= LINGER);
            if over && late > PIPE_MAX {
                break;
            }
            match self.wait_for_output(file.as_fd(), exit) {
                Waited::Ready => {}
                Waited::Exited => continue,
                Waited::Over => break,
            }
            let room = credit.min(PIECE);
            let count = match file.read(&mut buffer[..room]) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {
                    continue;
                }
                // EIO: nobody has the terminal open any more.
                Err(_) => break,
            };
            if exit.is_some() {
                late += count;
            }
            self.stream.spend(channel, count);
            if !self.session.outbox.data(self.stream.epoch, self.stream.id, channel.into(), &buffer[..count])
            {
                break;
            }
        }
        self.session.outbox.data(self.stream.epoch, self.stream.id, channel.into(), &[]);
        if self.is_left() {
            self.drain(file);
        }
    }

    fn wait_for_exit(&self) {
        while !is_exited(&self.exited) {
            let _ = poll(&mut [readable(self.exited.as_fd())], PollTimeout::NONE);
        }
    }

    /// Reads what nobody wants any more, so that the program neither waits nor ends for want of a reader.
    fn drain(&self, mut file: File) {
        let mut buffer = vec![0; PIECE];
        loop {
            match self.wait_for_output(file.as_fd(), None) {
                Waited::Ready => match file.read(&mut buffer) {
                    Ok(0) => return,
                    Err(error) if !matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {
                        return;
                    }
                    _ => {}
                },
                Waited::Exited if !is_exited(&self.exited) => {}
                _ => return,
            }
        }
    }

    fn wait_for_output(&self, file: BorrowedFd<'_>, exit: Option<Instant>) -> Waited {
        let mut fds = [readable(file), readable(self.exited.as_fd())];
        let waited = match exit {
            None => poll(&mut fds, PollTimeout::NONE),
            Some(exit) => poll(&mut fds[..1], remaining(exit.checked_add(LINGER))),
        };
        match waited {
            Err(Errno::EINTR) => Waited::Exited,
            Ok(_) if is_ready(&fds[0]) => Waited::Ready,
            Ok(0) | Err(_) => Waited::Over,
            Ok(_) => Waited::Exited,
        }
    }

    /// Writes input to the command as it comes. What it will not take is consumed all the same,
    /// so that the host is not stalled by a command that reads nothing more.
    fn feed(&self, file: File, terminal: bool) {
        let mut file = Some(file);
        let mut line_open = false;
        loop {
            match self.stream.input() {
                Input::Closed => {
                    if self.is_left() {
                        // No end of its input: it may go on when it meets one.
                        self.wait_for_exit();
                    }
                    return;
                }
                Input::End => {
                    // In the middle of a line one EOT only hands over the line.
                    let ends = if line_open { [EOT; 2].as_slice() } else { &[EOT] };
                    if let Some(file) = file.as_mut().filter(|_| terminal) {
                        self.write(file, ends);
                    }
                    return;
                }
                Input::Bytes(bytes) => {
                    line_open = bytes.last() != Some(&b'\n');
                    if file.as_mut().is_some_and(|file| !self.write(file, &bytes)) {
                        file = None;
                    }
                    self.session.credit_input(&self.stream, bytes.len());
                }
            }
        }
    }

    /// Writes all; false if that will never be.
    fn write(&self, file: &mut File, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            match file.write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let writable = PollFd::new(file.as_fd(), PollFlags::POLLOUT);
                    let mut fds = [writable, readable(self.exited.as_fd())];
                    match poll(&mut fds, PollTimeout::NONE) {
                        Ok(_) if is_ready(&fds[1]) => return false,
                        Ok(_) | Err(Errno::EINTR) => {}
                        Err(_) => return false,
                    }
                }
                Err(_) => return false,
            }
        }
        true
    }
}

enum Waited {
    /// There is something to read, if only the end.
    Ready,
    /// The process has exited.
    Exited,
    /// Nothing came in time.
    Over,
}

fn readable(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}

fn is_ready(fd: &PollFd<'_>) -> bool {
    fd.any().unwrap_or(true)
}

fn is_exited(exited: &EventFd) -> bool {
    let mut fds = [readable(exited.as_fd())];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// From now to an instant, rounded up: a wait that ends early would only be begun again.
fn remaining(until: Option<Instant>) -> PollTimeout {
    let Some(until) = until else { return PollTimeout::NONE };
    let left = until.saturating_duration_since(Instant::now()).as_micros().div_ceil(1000);
    PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
}
