//! The error body of `/v1`.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A stable word for each kind of failure; scripts may match on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request is malformed or a value is out of its range.
    InvalidRequest,
    /// The sender may not use this daemon.
    Forbidden,
    /// No such VM.
    VmNotFound,
    /// No such snapshot.
    SnapshotNotFound,
    /// The VM publishes no such port.
    PortNotFound,
    /// No such image.
    ImageNotFound,
    /// No such task.
    TaskNotFound,
    /// No such path.
    PathNotFound,
    /// The path does not know this method.
    MethodNotAllowed,
    /// A VM of this id exists.
    VmExists,
    /// The VM has a snapshot of this name.
    SnapshotExists,
    /// No such folder.
    FolderNotFound,
    /// The VM has another folder of this name.
    FolderExists,
    /// There is a template of this name.
    TemplateExists,
    /// There is a file of this name.
    FileExists,
    /// Programs in the guest use it.
    Busy,
    /// The port of the host is taken; the message says by whom.
    PortTaken,
    /// The VM's state does not allow it.
    WrongState,
    /// Something else uses it.
    InUse,
    /// The image is damaged or half built.
    ImageUnusable,
    /// The body is too large.
    BodyTooLarge,
    /// The guest did not do it in time.
    GuestTimeout,
    /// The guest is not ready for it yet.
    GuestNotReady,
    /// The guest answered with an error.
    GuestFailed,
    /// The host lacks something that is needed; the message says what and the remedy.
    HostUnfit,
    /// The disk of the host is full.
    DiskFull,
    /// A later version brings it.
    NotYet,
    /// It went wrong on the daemon's side.
    Internal,
}

/// The body of every `/v1` reply that is not a success, but for the refusals of those who may not
/// use the daemon at all: these come before the path is known, and have the form of `/api`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ApiError {
    /// Stable word.
    pub code: ErrorCode,
    /// One line: what was tried, on what, and what to do.
    pub message: String,
    /// The causes below it, nearest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<String>,
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        self.causes.iter().try_for_each(|cause| write!(f, ": {cause}"))
    }
}

impl std::error::Error for ApiError {}
