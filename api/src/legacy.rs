//! The AppCatalyst contract, `/api/…` (AppCatalyst reference sections 1.1 to 1.5).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::words::{AbsolutePath, PathPart, VmId};

/// Every error, and every answer that carries one word: `code` repeats the HTTP status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CodeMessage {
    /// HTTP status.
    pub code: u16,
    /// A state word, an address, or what went wrong.
    pub message: String,
}

/// Body of `POST /api/vms`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreateBody {
    /// Id of the new VM.
    #[serde(default)]
    #[schema(value_type = VmId, required = true)]
    pub id: String,
    /// VM to clone; some clients write it all in lower case.
    #[serde(default, rename = "parentId", alias = "parentid", skip_serializing_if = "Option::is_none")]
    pub parent_id: Option<String>,
    /// Display name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// Path of an existing VMX to register in place.
    #[serde(
        default,
        rename = "sourceReference",
        alias = "sourcereference",
        skip_serializing_if = "Option::is_none"
    )]
    pub source_reference: Option<String>,
}

/// Reply of `POST /api/vms`: all five keys, blanks as empty strings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreatedVm {
    /// Id.
    pub id: String,
    /// The VM it was cloned from, or empty.
    #[serde(rename = "parentId")]
    pub parent_id: String,
    /// Display name.
    pub name: String,
    /// Tag, or empty.
    pub tag: String,
    /// Registered VMX, or empty.
    #[serde(rename = "sourceReference")]
    pub source_reference: String,
}

/// Reply of `GET /api/vms/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmObject {
    /// Id.
    pub id: String,
    /// Display name.
    pub name: String,
    /// Tag, or empty.
    pub tag: String,
}

/// A shared folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct FolderObject {
    /// Its name (not a path).
    #[schema(value_type = PathPart)]
    pub guest_path: String,
    /// Folder on the host.
    #[schema(value_type = AbsolutePath)]
    pub host_path: String,
    /// 4: the guest may write.
    pub flags: i64,
}
