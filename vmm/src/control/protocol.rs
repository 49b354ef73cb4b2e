//! What goes over the control socket: lines of JSON, one message each.
//!
//! A client sends [`Request`]s, `{"id":1,"command":"pause"}`, and gets one [`Reply`] each in order,
//! `{"id":1,"ok":…}` or `{"id":1,"error":"…"}`. Between them it may get [`Event`]s, `{"event":"exit",…}`. A line that is
//! longer than [`MAX_LINE`] or no request ends the connection after an error with id 0. Several clients may be connected.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::description::Format;

use crate::virtio::counters::Counted;

/// Longest line, in bytes, with its end.
pub const MAX_LINE: usize = 4096;
/// Most clients at a time; who comes after is closed at once.
pub const MAX_CLIENTS: usize = 16;

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Comes back in the reply.
    pub id: u64,
    /// What to do.
    pub command: Command,
}

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Whether the guest runs: [`Answer::State`].
    State,
    /// Stops the virtual CPUs, then the devices; replied to when they stand. Paused already is fine.
    Pause,
    /// Lets them go on.
    Resume,
    /// Presses the power button; what the guest does is its own affair.
    PowerButton,
    /// Ends the process, [`Cause::Quit`]; replied to before.
    Quit,
    /// What has happened so far: [`Answer::Stats`].
    Stats,
    /// What the machine is while it stands, but for its memory and the content of its disks: [`Answer::Saved`]. It must
    /// be paused. Images of disks are whole on the disk when it is answered.
    Save,
    /// Where RAM lies in this process: [`Answer::Ram`].
    Ram,
    /// The first disk goes on in another file, the descriptor that comes with the request's line (unix(7), SCM_RIGHTS): an
    /// empty qcow2 on what the disk was until now. The machine must be paused.
    SwitchDisk,
    /// Before [`Self::SwitchDisk`], once for each layer, the uppermost first: what the file that the disk has until now lies on from then
    /// on, a descriptor that comes with the request's line. All of them hold together what it lay on before.
    DiskLayer(Format),
    /// Puts the cables of all NICs in (true), or pulls them out.
    SetLink(bool),
    /// After the reply the connection is the first serial port's terminal, in both directions, and no control
    /// connection any more.
    AttachConsole,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The request's, or 0 where there was none to be read.
    pub id: u64,
    /// What it was, or what went wrong.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It was done.
    Ok(Answer),
    /// It was not: why, for people.
    Error(String),
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It is done.
    Done,
    /// Whether the guest runs.
    State(RunState),
    /// What has happened so far.
    Stats(Box<Stats>),
    /// The machine as a file ([`crate::snapshot`]), two hexadecimal digits a byte.
    Saved(String),
    /// The ranges of RAM, from low addresses to high ones.
    Ram(Vec<RamRange>),
}

/// A range of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamRange {
    /// Its first guest physical address.
    pub guest: u64,
    /// Where that lies in the monitor's process (proc_pid_mem(5), proc_pid_pagemap(5)).
    pub host: u64,
    /// Its bytes.
    pub length: u64,
}

/// Whether the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Virtual CPUs and devices run.
    Running,
    /// They stand.
    Paused,
}

/// What the monitor says by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The machine has paused itself: the file system of a disk's image has no room. Told to go on, it tries again what
    /// did not fit.
    NoRoom,
    /// The process is about to end; the connection closes after this.
    Exit {
        /// Why.
        cause: Cause,
    },
}

/// Why the monitor ends. Each has an exit status of its own, for who has no connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The guest switched itself off (ACPI S5): exit status 0.
    PowerOff,
    /// The guest asked for a reset (ACPI, keyboard controller): exit status 10.
    Reset,
    /// A virtual CPU met a triple fault, the guest's crash or its crude way to reset: exit status 11.
    TripleFault,
    /// KVM or a device could not go on; standard error says why: exit status 12.
    Failure,
    /// Asked for by control socket: exit status 13.
    Quit,
}

impl Cause {
    /// The process's exit status.
    pub fn exit_status(self) -> u8 {
        match self {
            Self::PowerOff => 0,
            Self::Reset => 10,
            Self::TripleFault => 11,
            Self::Failure => 12,
            Self::Quit => 13,
        }
    }

    /// The cause that an exit status stands for.
    pub fn from_exit_status(status: i32) -> Option<Self> {
        [Self::PowerOff, Self::Reset, Self::TripleFault, Self::Failure, Self::Quit]
            .into_iter()
            .find(|cause| i32::from(cause.exit_status()) == status)
    }
}

/// What has happened since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Exits of all virtual CPUs to the monitor, by kind. What KVM handles by itself is not counted.
    pub exits: BTreeMap<String, u64>,
    /// What each virtio device did, by name: `disk0`, `nic0`, `serial`, `rng`, `balloon`, `vsock`, `share`.
    pub devices: BTreeMap<String, Counted>,
    /// Memory.
    pub memory: MemoryStats,
}

/// Where memory is, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryStats {
    /// RAM that the guest was given.
    pub ram: u64,
    /// Of it, what is resident in this process.
    pub ram_resident: u64,
    /// Resident memory of this process without the guest's RAM.
    pub overhead: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_look_as_documented() {
        let request: Request = serde_json::from_str(r#"{"id":1,"command":"power-button"}"#).unwrap();
        assert_eq!(request, Request { id: 1, command: Command::PowerButton });
        let reply = |outcome| serde_json::to_string(&Reply { id: 1, outcome }).unwrap();
        assert_eq!(reply(Outcome::Ok(Answer::Done)), r#"{"id":1,"ok":"done"}"#);
        assert_eq!(
            reply(Outcome::Ok(Answer::State(RunState::Paused))),
            r#"{"id":1,"ok":{"state":"paused"}}"#
        );
        assert_eq!(reply(Outcome::Error("no".into())), r#"{"id":1,"error":"no"}"#);
        let request: Request = serde_json::from_str(r#"{"id":2,"command":{"set-link":true}}"#).unwrap();
        assert_eq!(request.command, Command::SetLink(true));
        assert_eq!(reply(Outcome::Ok(Answer::Saved("0a".into()))), r#"{"id":1,"ok":{"saved":"0a"}}"#);
        let range = RamRange { guest: 0, host: 4096, length: 8192 };
        assert_eq!(
            reply(Outcome::Ok(Answer::Ram(vec![range]))),
            r#"{"id":1,"ok":{"ram":[{"guest":0,"host":4096,"length":8192}]}}"#
        );
        let event = serde_json::to_string(&Event::Exit { cause: Cause::TripleFault }).unwrap();
        assert_eq!(event, r#"{"event":"exit","cause":"triple-fault"}"#);
    }

    #[test]
    fn every_cause_has_an_exit_status_of_its_own() {
        for cause in [Cause::PowerOff, Cause::Reset, Cause::TripleFault, Cause::Failure, Cause::Quit] {
            assert_eq!(Cause::from_exit_status(i32::from(cause.exit_status())), Some(cause));
        }
        assert_eq!(Cause::from_exit_status(1), None);
    }
}
