//! Templates and their warm states.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::words::{AbsolutePath, ImageName, VmId};

use crate::EngineName;

/// A template: an image, and the warm states that VMs made from it can go on from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TemplateInfo {
    /// Name, e.g. `lumen`.
    pub name: String,
    /// The image's version that new VMs are made from.
    pub version: String,
    /// What its owner made it from: a VM, or a file that was imported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_from: Option<String>,
    /// Its VMs start by their own loader and have no agent: it was imported.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub foreign: bool,
    /// Size of its disk in GiB: no VM's is smaller.
    pub disk_gib: u64,
    /// VMs of this daemon that stand on it.
    pub used_by: usize,
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

/// Body of `POST /v1/templates`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateTemplate {
    /// The VM that it is made from: off, its disk; on, its memory too, so that new VMs go on from there.
    #[schema(value_type = VmId)]
    pub vm: String,
    /// Its name: a-z, 0-9, `-` and `.`, at most 64.
    #[schema(value_type = ImageName)]
    pub name: String,
}

/// Body of `POST /v1/images/import`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportImage {
    /// Absolute path of a disk on the daemon's machine that starts by its own loader: qcow2, VMDK, or raw by the ending
    /// `.raw` or `.img`.
    #[schema(value_type = AbsolutePath)]
    pub path: String,
    /// The name of the template that it becomes; by default the file's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<ImageName>)]
    pub name: Option<String>,
}

/// Body of `POST /v1/vms/{id}/export`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportVm {
    /// Absolute path of the qcow2 on the daemon's machine.
    #[schema(value_type = AbsolutePath)]
    pub path: String,
    /// Whether a file that is there may be overwritten.
    #[serde(default)]
    pub force: bool,
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
