//! What `GET /v1/events` streams as server-sent events.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{GuestStatus, MemoryInfo, SetUpInfo, Task, VmState};

/// Something happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// What.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What happened; `type` on the wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum EventKind {
    /// A VM came to be.
    VmCreated {
        /// Its id.
        id: String,
    },
    /// A VM is gone.
    VmDeleted {
        /// Its id.
        id: String,
    },
    /// A VM's power state changed.
    VmState {
        /// Its id.
        id: String,
        /// The state it is in now.
        state: VmState,
        /// Why, where there is something to say.
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// Something else of a VM changed: name, tags, size, snapshots, folders, ports.
    VmChanged {
        /// Its id.
        id: String,
    },
    /// What a VM with a process takes, every two seconds or so; told to those alone who ask for it.
    VmUsage {
        /// The VM's id.
        id: String,
        /// Processor time of its process since that began, in milliseconds.
        cpu_ms: u64,
        /// Where its memory is.
        memory: MemoryInfo,
    },
    /// The agent said something new of its guest.
    VmGuest {
        /// The VM's id.
        id: String,
        /// What it says.
        guest: GuestStatus,
    },
    /// The setting up of a guest moved on.
    VmSetUp {
        /// The VM's id.
        id: String,
        /// How far it is.
        set_up: SetUpInfo,
    },
    /// A long task moved on.
    Task {
        /// The task as it is now.
        task: Task,
    },
    /// The listener was too slow and lost this many events; ask for the state anew.
    Lost {
        /// How many.
        count: u64,
    },
}
