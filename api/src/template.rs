//! Templates and their warm states.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::EngineName;

/// A template: an image, and the warm states that VMs made from it can go on from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TemplateInfo {
    /// Name, e.g. `lumen`.
    pub name: String,
    /// The image's version that new VMs are made from.
    pub version: String,
    /// Its warm states, the newest first.
    pub warm: Vec<WarmInfo>,
}

/// A warm state: a template that was booted once, brought to rest and saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WarmInfo {
    /// Name.
    pub name: String,
    /// The engine that it goes on with.
    pub engine: EngineName,
    /// Virtual CPUs of the VMs that it is for.
    pub cpus: u32,
    /// Memory in MiB of the VMs that it is for.
    pub memory_mib: u64,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// Bytes of memory that it holds.
    pub memory_bytes: u64,
    /// Bytes on disk, memory included.
    pub allocated_bytes: u64,
    /// Whether a VM can go on from it here and now.
    pub fits: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// VMs of this daemon whose disk stands on its disk.
    pub used_by: usize,
}

/// Body of `POST /v1/templates/{name}/warm`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct WarmRequest {
    /// Virtual CPUs, 1 to 32; by default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 32)]
    pub cpus: Option<u32>,
    /// Memory in MiB; by default 1024.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 128)]
    pub memory_mib: Option<u64>,
}
