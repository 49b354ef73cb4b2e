//! Waiting, bounded, for a VM that is still starting: by the daemon's events.

use std::time::{Duration, Instant};

use catalyst_api::{ErrorCode, GuestStatus, Vm, VmState};

use crate::client::{Client, ClientError};
use crate::error::CliError;
use crate::events::EventsError;
use crate::progress::Board;

/// Why waiting ended without what was waited for.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum WaitError {
    /// Nothing will come of a VM in this state.
    #[error("VM '{id}' is {state}{}; {}", because(.reason.as_ref()), remedy(.id, *.state))]
    NotRunning {
        /// The VM.
        id: String,
        /// Its state.
        state: VmState,
        /// What the daemon says of it.
        reason: Option<String>,
    },
    /// It stopped under our eyes.
    #[error("VM '{id}' became {state} while it was waited for{}; see catalyst logs {id}", because(.reason.as_ref()))]
    Stopped {
        /// The VM.
        id: String,
        /// Its state.
        state: VmState,
        /// What the daemon says of it.
        reason: Option<String>,
    },
    /// Nobody wanted to wait.
    #[error("VM '{id}' has no address yet ({known}); wait for it with: catalyst guest getip {id} --wait")]
    NotYet {
        /// The VM.
        id: String,
        /// What is known of the guest.
        known: &'static str,
    },
    /// Too late.
    #[error(
        "VM '{id}' was given {seconds} s for {what}, which was not enough ({known}); wait longer with --timeout, or see catalyst logs {id}"
    )]
    TimeOver {
        /// The VM.
        id: String,
        /// What was waited for.
        what: &'static str,
        /// How long.
        seconds: u64,
        /// What is known of the guest.
        known: &'static str,
    },
}

fn because(reason: Option<&String>) -> String {
    reason.map(|reason| format!(" ({reason})")).unwrap_or_default()
}

fn remedy(id: &str, state: VmState) -> String {
    match state {
        VmState::PoweredOff | VmState::Suspended => format!("start it with: catalyst vmpower on {id}"),
        VmState::Paused => format!("let it go on with: catalyst vmpower unpause {id}"),
        VmState::Blocked => format!("see: catalyst vm show {id}"),
        _ => format!("when that is done, start it with: catalyst vmpower on {id}"),
    }
}

/// Refuses a VM that neither runs nor is being started.
pub fn running(vm: &Vm) -> Result<(), WaitError> {
    match vm.state {
        VmState::PoweringOn | VmState::PoweredOn => Ok(()),
        state => Err(WaitError::NotRunning { id: vm.id.clone(), state, reason: vm.reason.clone() }),
    }
}

/// How far a guest has come, for people.
pub const fn stage(guest: &GuestStatus) -> &'static str {
    match guest {
        GuestStatus { ssh: true, docker: true, .. } => "ssh and docker answer",
        GuestStatus { ssh: true, .. } => "ssh answers, docker does not yet",
        GuestStatus { docker: true, .. } => "docker answers, ssh does not yet",
        GuestStatus { identity: true, .. } => "it has its address, ssh and docker do not answer yet",
        GuestStatus { agent: true, .. } => "its agent answers, it has no address yet",
        _ => "it is booting",
    }
}

/// What to wait for, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Wait<'a> {
    /// The daemon.
    pub client: &'a Client,
    /// The VM.
    pub id: &'a str,
    /// What is waited for, in a few words.
    pub what: &'static str,
    /// How long at most.
    pub limit: Duration,
}

impl Wait<'_> {
    /// Asks `check` for the VM as it is, and again after each of its events, until that gives
    /// a value. An answer of "guest not ready" counts as not yet. Fails at once where the VM
    /// does not run.
    pub fn until<T>(
        &self,
        board: &Board,
        mut check: impl FnMut(&Vm) -> Result<Option<T>, ClientError>,
    ) -> Result<T, CliError> {
        let deadline = Instant::now() + self.limit;
        let mut vm = self.client.vm(self.id)?;
        running(&vm)?;
        if let Some(value) = not_yet_is_none(check(&vm))? {
            return Ok(value);
        }
        let line = board.spinner(format!("{}: waiting for {}", self.id, self.what));
        let mut events = None;
        loop {
            // The subscription comes before the question, so that nothing happens between them unseen.
            match &mut events {
                None => events = Some(self.subscribe(deadline, &vm)?),
                Some(stream) => match stream.next() {
                    Ok(_) => {}
                    Err(EventsError::TimeOver) => return Err(self.time_over(&vm).into()),
                    Err(EventsError::Client(error)) => return Err(error.into()),
                },
            }
            vm = self.client.vm(self.id)?;
            self.still_running(&vm)?;
            line.say(&format!("{}: waiting for {}, {}", self.id, self.what, stage(&vm.guest)));
            if let Some(value) = not_yet_is_none(check(&vm))? {
                return Ok(value);
            }
        }
    }

    fn subscribe(&self, deadline: Instant, vm: &Vm) -> Result<crate::events::Events, CliError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(self.time_over(vm).into());
        }
        Ok(self.client.events(Some(self.id), Some(left))?)
    }

    fn still_running(&self, vm: &Vm) -> Result<(), WaitError> {
        match vm.state {
            VmState::PoweringOn | VmState::PoweredOn => Ok(()),
            state => Err(WaitError::Stopped { id: self.id.to_owned(), state, reason: vm.reason.clone() }),
        }
    }

    fn time_over(&self, vm: &Vm) -> WaitError {
        WaitError::TimeOver {
            id: self.id.to_owned(),
            what: self.what,
            seconds: self.limit.as_secs(),
            known: stage(&vm.guest),
        }
    }
}

fn not_yet_is_none<T>(result: Result<Option<T>, ClientError>) -> Result<Option<T>, ClientError> {
    match result {
        Err(error) if error.is(ErrorCode::GuestNotReady) => Ok(None),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_that_is_off_says_how_to_start_it() {
        let error = WaitError::NotRunning { id: "web1".to_owned(), state: VmState::PoweredOff, reason: None };
        assert_eq!(error.to_string(), "VM 'web1' is powered off; start it with: catalyst vmpower on web1");
    }

    #[test]
    fn the_reason_is_told() {
        let reason = Some("the VM process was killed".to_owned());
        let error = WaitError::Stopped { id: "web1".to_owned(), state: VmState::PoweredOff, reason };
        assert!(
            error.to_string().contains("powered off while it was waited for (the VM process was killed)")
        );
    }

    #[test]
    fn stages_follow_the_guest() {
        let mut guest = GuestStatus::default();
        assert_eq!(stage(&guest), "it is booting");
        guest.agent = true;
        assert!(stage(&guest).contains("no address yet"));
        guest.identity = true;
        guest.ssh = true;
        assert!(stage(&guest).contains("docker does not"));
        guest.docker = true;
        assert_eq!(stage(&guest), "ssh and docker answer");
    }
}
