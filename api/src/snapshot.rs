//! Snapshots of VMs (`/v1/vms/{id}/snapshots`).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::words::PathPart;

/// A VM as it was at one moment: its disk, and where it ran or was suspended its memory too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// Its name, one of a kind among the VM's snapshots.
    pub name: String,
    /// What the user says of it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// The name of the snapshot that the VM came from when this one was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Whether the VM as it is now comes from this one.
    pub current: bool,
    /// Whether it has the memory too.
    pub memory: bool,
    /// Bytes on disk that its memory takes.
    pub memory_bytes: u64,
    /// Bytes on disk that go when it is deleted, as far as the disk's layers are this one's alone.
    pub disk_bytes: u64,
}

/// Body of `POST /v1/vms/{id}/snapshots`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// Its name: 1 to 80 characters, none of them a control character or '/'.
    #[schema(value_type = PathPart)]
    pub name: String,
    /// Anything, in one line: at most 500 characters.
    #[serde(default)]
    #[schema(pattern = "^[^\\u0000-\\u001f\\u007f-\\u009f]*$", max_length = 500)]
    pub description: String,
}

/// Body of `POST /v1/vms/{id}/snapshots/{name}/restore`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreSnapshot {
    /// Whether a VM that had its memory saved goes on at once; else it is suspended there.
    #[serde(default = "yes")]
    pub start: bool,
}

const fn yes() -> bool {
    true
}
