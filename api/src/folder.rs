//! Folders of the host in guests (`/v1/vms/{id}/folders`).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::words::{AbsolutePath, PathPart};

/// A folder of the host that a VM's guest sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Folder {
    /// Its name, one of a kind among the VM's folders.
    pub name: String,
    /// The folder on the host.
    pub host_path: String,
    /// Where it is mounted in the guest, besides `/mnt/hgfs/NAME`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_path: Option<String>,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// The guest's user to whom the files belong there; on the host they are the owner's.
    pub uid: u32,
    /// The guest's group.
    pub gid: u32,
    /// Whether the guest has it mounted.
    pub mounted: bool,
    /// Why not, if something is wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Body of `POST /v1/vms/{id}/folders`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateFolder {
    /// Its name: 1 to 80 bytes, one part of a path.
    #[schema(value_type = PathPart)]
    pub name: String,
    /// Absolute path of a folder on the host that the owner may enter.
    #[schema(value_type = AbsolutePath)]
    pub host_path: String,
    /// Absolute path in the guest; made if it is not there.
    #[serde(default)]
    #[schema(value_type = Option<AbsolutePath>)]
    pub guest_path: Option<String>,
    /// Whether the guest may only read.
    #[serde(default)]
    pub read_only: bool,
    /// The guest's user to whom the files belong there: 1000 if left out, lumen's `catalyst`.
    #[serde(default)]
    pub uid: Option<u32>,
    /// The guest's group: 1000 if left out.
    #[serde(default)]
    pub gid: Option<u32>,
}
