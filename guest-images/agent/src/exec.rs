//! Commands while they run: their output, input, signals and end.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use catalyst_agent_protocol::{Control, ExecExit, ExecSpec, ProblemKind, Reply, StreamChannel, Terminal};
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
    group: i32,
    terminal: Option<OwnedFd>,
}

/// What the threads of one command share.
struct Running {
    session: Arc<Session>,
    stream: Arc<Stream>,
    /// Readable once the process has exited.
    exited: EventFd,
}

/// Starts a command as the stream's.
pub fn start(session: &Arc<Session>, stream: &Arc<Stream>, spec: &ExecSpec) -> Result<(), Reply> {
    let system = |error: Errno| failed(ProblemKind::Failed, format!("a command cannot be watched: {error}"));
    let exited = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(system)?;
    let mut spawned = spawn(&session.config.root, spec)?;
    let pid = spawned.child.id();
    let group = i32::try_from(pid).unwrap_or(i32::MAX);
    let watch = pidfd(group).map_err(|error| {
        // It could not be ended at its time: better not at all.
        let _ = spawned.child.kill();
        let _ = spawned.child.wait();
        system(error)
    })?;
    *stream.command() = Some(Handle { group, terminal: spawned.terminal.take() });
    let running = Running { session: Arc::clone(session), stream: Arc::clone(stream), exited };
    let timeout = spec.timeout_ms.map(Duration::from_millis);
    let supervised = thread::Builder::new().spawn(move || {
        // Before its output, which only this thread's children send.
        running.session.reply(running.stream.epoch, running.stream.id, Reply::Started { pid });
        running.supervise(spawned, &watch, timeout);
    });
    supervised.map(drop).map_err(|error| {
        kill(stream, libc::SIGKILL);
        failed(ProblemKind::Failed, format!("a command cannot be watched: {error}"))
    })?;
    Ok(())
}

fn pidfd(pid: i32) -> Result<OwnedFd, Errno> {
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

/// Sends a command's process group a signal.
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
    let group = command.as_ref()?.group;
    // SAFETY: kill takes two numbers; the group's leader is not reaped while the lock is held.
    Some(Errno::result(unsafe { libc::kill(-group, signal) }))
}

impl Running {
    /// Stays with the command from its start to the word of its end.
    fn supervise(&self, spawned: Spawned, watch: &OwnedFd, timeout: Option<Duration>) {
        let Spawned { mut child, input, output, errors, .. } = spawned;
        let terminal = errors.is_none();
        thread::scope(|scope| {
            if let Some(input) = input {
                scope.spawn(move || self.feed(input, terminal));
            }
            let pumps = [(Some(output), StreamChannel::Output), (errors, StreamChannel::Errors)];
            let pumps =
                pumps.map(|(file, channel)| file.map(|file| scope.spawn(move || self.pump(file, channel))));
            self.wait(watch, timeout);
            // It fails only when the counter is full, and then it is readable already.
            let _ = self.exited.write(1);
            for pump in pumps.into_iter().flatten() {
                let _ = pump.join();
            }
            // Input is waited for no more.
            self.stream.close();
        });
        let exit = self.reap(&mut child);
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
        if ending || closing || self.stream.is_closed() {
            kill(&self.stream, libc::SIGKILL);
        }
    }

    fn reap(&self, child: &mut Child) -> ExecExit {
        // Nobody signals the group after this.
        let mut command = self.stream.command();
        *command = None;
        match child.wait() {
            Ok(status) => match (status.code(), status.signal()) {
                (Some(code), _) => ExecExit::Code(code),
                (None, signal) => ExecExit::Signal(signal.unwrap_or(libc::SIGKILL)),
            },
            Err(error) => {
                eprintln!("catalyst-agent: the end of process {} is unknown: {error}", child.id());
                ExecExit::Code(255)
            }
        }
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
                Input::Closed => return,
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
