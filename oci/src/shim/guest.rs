//! What is running in the guest: the container's program and others.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use catalyst_agent_link::{AgentError, AgentLink, ExecControl, ExecSession, ProblemKind, Terminal};
use catalyst_agent_protocol::container::Process;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::refused;
use crate::console;
use crate::daemon::Daemon;
use crate::exec::PASSED_ON;
use crate::failure::{Failure, Outcome, Tried, chain, said};
use crate::stdio::{Ended, feed, relay};
use crate::wire::Status;

/// How long a program may take to end by SIGKILL before its VM is ended.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// Descriptors of a program.
#[derive(Debug)]
pub struct Stdio {
    /// Its input, unless none will come.
    pub input: Option<File>,
    /// Its output.
    pub output: File,
    /// Its errors; a terminal has none.
    pub errors: Option<File>,
}

impl Stdio {
    /// This process's own, or a terminal that is sent to the engine.
    pub fn of(input: File, console_socket: Option<&Path>, terminal: Option<&Terminal>) -> Outcome<Self> {
        let take = |number| console::inherited(number).tried(|| format!("take over descriptor {number}"));
        match (console_socket, terminal) {
            (Some(socket), Some(_)) => {
                let slave = console::open(socket, terminal)?;
                let input = slave.try_clone().tried(|| "take over the terminal".to_owned())?;
                Ok(Self { input: Some(input), output: slave, errors: None })
            }
            (_, Some(_)) => Ok(Self { input: Some(input), output: take(1)?, errors: None }),
            (_, None) => {
                let input = Some(input).filter(|input| !console::is_null(input));
                Ok(Self { input, output: take(1)?, errors: Some(take(2)?) })
            }
        }
    }

    /// Joins a program in the guest and its descriptors; its control, and its end.
    pub fn attach(self, session: ExecSession) -> std::io::Result<(ExecControl, impl Future<Output = Ended>)> {
        let (stdin, control, events) = session.split();
        match self.input {
            Some(input) => feed(stdin, input)?,
            None => drop(stdin),
        }
        let relayed = relay(events, self.output, self.errors);
        let ended = async { relayed.await.unwrap_or_else(|error| Ended::Lost(error.to_string())) };
        Ok((control, ended))
    }
}

/// Whose programs run in the guest.
#[derive(Debug)]
pub struct Of {
    /// The container's name there.
    pub name: String,
    /// The process on the host that stands for it.
    pub pid: u32,
}

/// The guest, as a container has it.
#[derive(Debug)]
pub struct Guest {
    link: AgentLink,
    of: Of,
    daemon: Daemon,
    vm: String,
    ended: mpsc::UnboundedSender<Ended>,
    /// Where the last words of a VM go.
    complaints: Option<File>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    status: Status,
    stdio: Option<Stdio>,
    program: Option<Arc<ExecControl>>,
    terminal: Option<File>,
    others: BTreeSet<u32>,
    /// Signals that came while it stood still.
    held: Vec<i32>,
}

impl Guest {
    /// The guest of a container that is ready; how it ends comes by the channel.
    pub fn new(
        link: AgentLink,
        of: Of,
        daemon: Daemon,
        vm: String,
        stdio: Stdio,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<Ended>) {
        let (ended, ends) = mpsc::unbounded_channel();
        let complaints = stdio.errors.as_ref().unwrap_or(&stdio.output).try_clone().ok();
        let terminal = if stdio.errors.is_none() { stdio.output.try_clone().ok() } else { None };
        let state = State {
            status: Status::Created,
            stdio: Some(stdio),
            program: None,
            terminal,
            others: BTreeSet::new(),
            held: Vec::new(),
        };
        (Arc::new(Self { link, of, daemon, vm, ended, complaints, state: Mutex::new(state) }), ends)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock; if it did, the state would still be whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How it is, and the processes that stand for programs: this one, and those of others.
    pub fn status(&self) -> (Status, Vec<u32>) {
        let state = self.state();
        let mut pids = vec![self.of.pid];
        pids.extend(&state.others);
        (state.status, pids)
    }

    /// Starts the container's program.
    pub async fn start(&self) -> Outcome {
        let stdio = {
            let mut state = self.state();
            match state.stdio.take().filter(|_| state.status == Status::Created) {
                Some(stdio) => stdio,
                None => return said(format!("cannot start a container that is {}", state.status)),
            }
        };
        let session = self.link.start_container(&self.of.name).await;
        let session =
            session.map_err(|source| Failure::Agent { what: "start the container's program", source })?;
        let (control, end) = stdio.attach(session).tried(|| "pass on what the program says".to_owned())?;
        let control = Arc::new(control);
        {
            let mut state = self.state();
            state.program = Some(Arc::clone(&control));
            state.status = Status::Running;
        }
        let ended = self.ended.clone();
        tokio::spawn(async move {
            // Whoever waits ends this process.
            let _ = ended.send(end.await);
        });
        self.resize().await;
        Ok(())
    }

    /// Sends the container's program a signal.
    pub async fn kill(self: &Arc<Self>, signal: i32) -> Outcome {
        let program = {
            let mut state = self.state();
            match state.status {
                Status::Created | Status::Creating => {
                    if is_deadly(signal) {
                        self.end_by(signal);
                    }
                    return Ok(());
                }
                Status::Paused if signal == libc::SIGKILL => {
                    self.end_by(signal);
                    return Ok(());
                }
                Status::Paused => {
                    state.held.push(signal);
                    return Ok(());
                }
                Status::Running | Status::Stopped => state.program.clone(),
            }
        };
        let Some(program) = program else { return said("container not running") };
        if signal == libc::SIGKILL {
            // Not the guest itself: its descriptors are to be closed when the program has ended.
            let ended = self.ended.clone();
            tokio::spawn(async move {
                tokio::time::sleep(KILL_LIMIT).await;
                let _ = ended.send(ended_by(signal));
            });
        }
        match program.signal(signal).await {
            Ok(()) => Ok(()),
            Err(AgentError::Refused { kind: ProblemKind::NotFound, .. } | AgentError::Gone(_)) => {
                said("container not running: its program has ended")
            }
            Err(source) => Err(Failure::Agent { what: "send the signal", source }),
        }
    }

    fn end_by(&self, signal: i32) {
        let _ = self.ended.send(ended_by(signal));
    }

    /// Has the VM stand still, or go on.
    pub async fn pause(self: &Arc<Self>, still: bool) -> Outcome {
        let (before, after, operation) = if still {
            (Status::Running, Status::Paused, "pause")
        } else {
            (Status::Paused, Status::Running, "unpause")
        };
        if !self.of.name.is_empty() {
            return said(
                "A container in the VM of another cannot be paused alone: pause the one that has the VM",
            );
        }
        {
            let status = self.state().status;
            if status != before {
                return said(format!("a container that is {status} cannot {operation}"));
            }
        }
        let (daemon, vm) = (self.daemon.clone(), self.vm.clone());
        let done = tokio::task::spawn_blocking(move || daemon.power(&vm, operation)).await;
        done.map_err(std::io::Error::other).tried(|| format!("{operation} the VM"))??;
        let held = {
            let mut state = self.state();
            state.status = after;
            if still { Vec::new() } else { std::mem::take(&mut state.held) }
        };
        for signal in held {
            self.kill(signal).await?;
        }
        Ok(())
    }

    /// Starts another program.
    pub async fn exec(
        &self,
        process: Process,
        stdio: Stdio,
    ) -> Outcome<(ExecControl, impl Future<Output = Ended> + use<>)> {
        let status = self.state().status;
        if status != Status::Running {
            return said(format!("cannot exec in a container that is {status}"));
        }
        let args = process.args.clone();
        let session = self.link.exec_container(&self.of.name, process).await;
        let session = session.map_err(|error| refused("run the program", &args, error))?;
        stdio.attach(session).tried(|| "pass on what the program says".to_owned())
    }

    /// Notes that a process stands for another program, or no longer.
    pub fn note(&self, pid: u32, runs: bool) {
        let mut state = self.state();
        if runs {
            state.others.insert(pid);
        } else {
            state.others.remove(&pid);
        }
    }

    /// Tells the guest of the terminal's size, if that is known.
    pub async fn resize(&self) {
        let (program, size) = {
            let state = self.state();
            (state.program.clone(), state.terminal.as_ref().and_then(console::size))
        };
        if let (Some(program), Some((rows, cols))) = (program, size) {
            // A program that has ended needs none.
            let _ = program.resize(rows, cols).await;
        }
    }

    /// Passes on the signals that come to this process.
    pub fn forward_signals(self: &Arc<Self>) -> std::io::Result<()> {
        for number in PASSED_ON {
            let mut signals = signal(SignalKind::from_raw(number))?;
            let guest = Arc::clone(self);
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    // Nobody waits for an answer.
                    let _ = guest.kill(number).await;
                }
            });
        }
        let mut changes = signal(SignalKind::window_change())?;
        let guest = Arc::clone(self);
        tokio::spawn(async move {
            while changes.recv().await.is_some() {
                guest.resize().await;
            }
        });
        Ok(())
    }

    /// Says something where the program's errors go.
    pub fn complain(&self, words: &str) {
        if let Some(mut file) = self.complaints.as_ref() {
            // Nobody may read it.
            let _ = file.write_all(format!("{words}\r\n").as_bytes());
        }
    }
}

fn ended_by(signal: i32) -> Ended {
    Ended::Exit(catalyst_agent_link::ExecExit::Signal(signal))
}

/// Whether a program that does nothing about the signal ends by it (signal(7)).
pub fn is_deadly(signal: i32) -> bool {
    ![
        libc::SIGCHLD,
        libc::SIGCONT,
        libc::SIGURG,
        libc::SIGWINCH,
        libc::SIGSTOP,
        libc::SIGTSTP,
        libc::SIGTTIN,
        libc::SIGTTOU,
    ]
    .contains(&signal)
}

/// What a failure is told as.
pub fn told(failure: &Failure) -> crate::wire::Answer {
    crate::wire::Answer::Failed(chain(failure))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_that_has_not_started_ends_by_what_ends_programs() {
        for signal in [libc::SIGKILL, libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, 34] {
            assert!(is_deadly(signal), "{signal}");
        }
        for signal in [libc::SIGCHLD, libc::SIGWINCH, libc::SIGCONT, libc::SIGSTOP] {
            assert!(!is_deadly(signal), "{signal}");
        }
    }
}
