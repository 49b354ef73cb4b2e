//! Images and long tasks.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Whether an image can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ImageState {
    /// Whole.
    Ok,
    /// A file is missing or is not what the manifest says.
    Damaged,
    /// A build was begun and has not ended.
    Incomplete,
}

/// One version of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageInfo {
    /// Name, e.g. `lumen`.
    pub name: String,
    /// Content key of the version.
    pub version: String,
    /// Whether new VMs are made from this version.
    pub current: bool,
    /// Whether it can be used.
    pub state: ImageState,
    /// What is wrong with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Kernel version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Number of packages.
    pub packages: usize,
    /// Bytes on disk.
    pub allocated_bytes: u64,
    /// Virtual size of the disk in bytes.
    pub virtual_bytes: u64,
    /// Seconds since 1970.
    pub created: u64,
    /// VMs of this daemon that stand on it.
    pub used_by: usize,
}

/// Where a task stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum TaskState {
    /// Under way.
    Running,
    /// Ended well.
    Done,
    /// Ended badly; `message` says why.
    Failed,
}

/// Something that takes long, such as an image build.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Task {
    /// Number of the task in this daemon.
    pub id: u64,
    /// What it does, e.g. `image build lumen`.
    pub title: String,
    /// Where it stands.
    pub state: TaskState,
    /// 0 to 100.
    pub percent: u8,
    /// The step it is at, or why it failed.
    pub message: String,
}
