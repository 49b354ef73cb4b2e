//! Errors as clients get them.

use std::error::Error;
use std::io;

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use catalyst_api::legacy::CodeMessage;
use catalyst_api::{ApiError, ErrorCode};
use catalyst_images::ImageError;

use crate::docker::DockerError;
use crate::engine::EngineError;
use crate::machines::error::{
    ChangeError, CreateError, FolderError, FreezeError, GuestError, PowerError, SnapshotError, UnknownVm,
};
use crate::ports::error::PortError;
use crate::saved::SavedError;
use crate::store::disk::DiskError;
use crate::store::foreign::RegisterError;
use crate::store::{ConfigError, StoreError};

/// The messages of an error and its causes, nearest first; a cause that only repeats is left out.
pub fn chain(error: &dyn Error) -> Vec<String> {
    let mut messages: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let message = plain(&error.to_string());
        if messages.last().is_none_or(|last| !last.ends_with(&message)) {
            messages.push(message);
        }
        next = error.source();
    }
    messages
}

/// The words of the system's error without its number, which tells a user nothing.
pub fn plain(message: &str) -> String {
    let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    match message.rsplit_once(" (os error ") {
        Some((words, end)) if end.strip_suffix(')').is_some_and(number) => words.to_owned(),
        _ => message.to_owned(),
    }
}

/// An error of the daemon that knows which word clients get for it.
pub trait Failure: Error {
    /// The stable word.
    fn code(&self) -> ErrorCode;
}

/// What a handler of `/v1` answers when it fails.
#[derive(Debug)]
pub struct Refusal(pub ApiError);

impl<E: Failure> From<E> for Refusal {
    fn from(error: E) -> Self {
        let mut causes = chain(&error);
        let message = causes.remove(0);
        Self(ApiError { code: error.code(), message, causes })
    }
}

impl Refusal {
    /// An error that has no cause below it.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self(ApiError { code, message: message.into(), causes: Vec::new() })
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (status(self.0.code), Json(self.0)).into_response()
    }
}

/// The HTTP status of each word.
pub fn status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::InvalidRequest => StatusCode::BAD_REQUEST,
        ErrorCode::Forbidden => StatusCode::FORBIDDEN,
        ErrorCode::VmNotFound
        | ErrorCode::SnapshotNotFound
        | ErrorCode::FolderNotFound
        | ErrorCode::PortNotFound
        | ErrorCode::ImageNotFound
        | ErrorCode::TaskNotFound
        | ErrorCode::PathNotFound => StatusCode::NOT_FOUND,
        ErrorCode::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
        ErrorCode::VmExists
        | ErrorCode::SnapshotExists
        | ErrorCode::FolderExists
        | ErrorCode::TemplateExists
        | ErrorCode::FileExists
        | ErrorCode::Busy
        | ErrorCode::PortTaken
        | ErrorCode::WrongState
        | ErrorCode::InUse
        | ErrorCode::ImageUnusable
        | ErrorCode::GuestNotReady => StatusCode::CONFLICT,
        ErrorCode::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorCode::GuestTimeout => StatusCode::GATEWAY_TIMEOUT,
        ErrorCode::GuestFailed => StatusCode::BAD_GATEWAY,
        ErrorCode::HostUnfit => StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::DiskFull => StatusCode::INSUFFICIENT_STORAGE,
        ErrorCode::NotYet => StatusCode::NOT_IMPLEMENTED,
        ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// What a handler of `/api` answers when it fails. The clients of old understand only some
/// statuses (AppCatalyst reference section 1.2); the original used 500 for almost everything.
#[derive(Debug)]
pub struct LegacyRefusal {
    status: StatusCode,
    message: String,
}

impl LegacyRefusal {
    /// An error with `status`, or the nearest that the clients understand.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let status = match status.as_u16() {
            413 | 422 => StatusCode::BAD_REQUEST,
            400 | 401 | 403..=406 | 408 | 409 | 415 | 500 | 503 | 504 => status,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self { status, message: message.into() }
    }
}

impl<E: Failure> From<E> for LegacyRefusal {
    fn from(error: E) -> Self {
        Self::new(status(error.code()), chain(&error).join(": "))
    }
}

impl IntoResponse for LegacyRefusal {
    fn into_response(self) -> Response {
        let body = CodeMessage { code: self.status.as_u16(), message: self.message };
        (self.status, Json(body)).into_response()
    }
}

fn io_code(error: &io::Error) -> ErrorCode {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorCode::DiskFull,
        _ => ErrorCode::Internal,
    }
}

fn disk_code(error: &DiskError) -> ErrorCode {
    match error {
        DiskError::Tool(_) => ErrorCode::HostUnfit,
        DiskError::Full(_) => ErrorCode::DiskFull,
        DiskError::Io { source, .. } => io_code(source),
        DiskError::Create { .. } | DiskError::Missing(_) | DiskError::Unusable { .. } => ErrorCode::Internal,
    }
}

fn store_code(error: &StoreError) -> ErrorCode {
    match error {
        StoreError::Io { source, .. } => io_code(source),
        StoreError::Vmx { .. } | StoreError::Elsewhere { .. } => ErrorCode::WrongState,
        StoreError::Exists(_) => ErrorCode::VmExists,
        StoreError::Disk(disk) => disk_code(disk),
    }
}

fn register_code(error: &RegisterError) -> ErrorCode {
    match error {
        RegisterError::Path(_) | RegisterError::Open { .. } => ErrorCode::InvalidRequest,
        RegisterError::Disk { source, .. } => match disk_code(source) {
            ErrorCode::Internal => ErrorCode::InvalidRequest,
            code => code,
        },
        RegisterError::Ours(_) | RegisterError::Taken { .. } => ErrorCode::InUse,
    }
}

fn engine_code(error: &EngineError) -> ErrorCode {
    match error {
        EngineError::Program { .. } | EngineError::Device { .. } | EngineError::Kernel(_) => {
            ErrorCode::HostUnfit
        }
        EngineError::Io { source, .. } => io_code(source),
        EngineError::Died(_) | EngineError::Refused { .. } | EngineError::Description(_) => {
            ErrorCode::Internal
        }
        EngineError::Running(_) => ErrorCode::WrongState,
    }
}

/// The word for an image's error.
pub fn image_code(error: &ImageError) -> ErrorCode {
    match error {
        ImageError::Missing { .. } | ImageError::MissingVersion { .. } => ErrorCode::ImageNotFound,
        ImageError::BadName(_) => ErrorCode::InvalidRequest,
        ImageError::Exists(_) => ErrorCode::TemplateExists,
        ImageError::Io { .. } => ErrorCode::Internal,
        _ => ErrorCode::ImageUnusable,
    }
}

impl Failure for UnknownVm {
    fn code(&self) -> ErrorCode {
        ErrorCode::VmNotFound
    }
}

impl Failure for StoreError {
    fn code(&self) -> ErrorCode {
        store_code(self)
    }
}

impl Failure for ConfigError {
    fn code(&self) -> ErrorCode {
        ErrorCode::InvalidRequest
    }
}

impl Failure for ImageError {
    fn code(&self) -> ErrorCode {
        image_code(self)
    }
}

impl Failure for CreateError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Id(_)
            | Self::Config(_)
            | Self::ParentDisk
            | Self::ParentSize
            | Self::SourceAlone
            | Self::DiskTooSmall { .. }
            | Self::UserData(_)
            | Self::Host(_)
            | Self::UserDataNoAgent
            | Self::Container
            | Self::NoRuntime(_) => ErrorCode::InvalidRequest,
            Self::Unknown(_) => ErrorCode::VmNotFound,
            Self::Template { source, .. } => image_code(source),
            Self::ParentState { .. } => ErrorCode::WrongState,
            Self::Register(error) => register_code(error),
            Self::Special(..) => ErrorCode::NotYet,
            Self::Freeze(freeze) => freeze.code(),
            Self::Start(power) => power.code(),
            Self::Port(port) => port.code(),
            Self::Network(_) => ErrorCode::HostUnfit,
            Self::Store(store) => store_code(store),
            Self::Stopping => ErrorCode::Internal,
        }
    }
}

impl Failure for FreezeError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Special(..) => ErrorCode::NotYet,
            Self::State { .. } | Self::Unsettled(_) | Self::Layers { .. } => ErrorCode::WrongState,
            Self::Power(power) => power.code(),
            Self::Below(error) => error.code(),
            Self::Engine(engine) => engine_code(engine),
            Self::Saved(saved) => saved_code(saved),
            Self::Store(store) => store_code(store),
            Self::Stopping => ErrorCode::Internal,
        }
    }
}

impl Failure for FolderError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Vm(_) => ErrorCode::VmNotFound,
            Self::Special(..) => ErrorCode::NotYet,
            Self::Unknown { .. } => ErrorCode::FolderNotFound,
            Self::Exists { .. } => ErrorCode::FolderExists,
            Self::Name | Self::HostPath | Self::GuestPath | Self::Host { .. } => ErrorCode::InvalidRequest,
            Self::TooMany { .. } => ErrorCode::WrongState,
            Self::Busy { .. } => ErrorCode::Busy,
            Self::Guest { .. } => ErrorCode::GuestFailed,
            Self::Store(store) => store_code(store),
            Self::Stopping => ErrorCode::Internal,
        }
    }
}

impl Failure for SnapshotError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Vm(_) => ErrorCode::VmNotFound,
            Self::Unknown { .. } => ErrorCode::SnapshotNotFound,
            Self::Exists { .. } => ErrorCode::SnapshotExists,
            Self::Name { .. } | Self::Description { .. } => ErrorCode::InvalidRequest,
            Self::TooMany { .. } | Self::State { .. } => ErrorCode::WrongState,
            Self::Special(..) => ErrorCode::NotYet,
            Self::Template { source, .. } => image_code(source),
            Self::Freeze(freeze) => freeze.code(),
            Self::Saved(saved) => saved_code(saved),
            Self::Power(power) => power.code(),
            Self::Store(store) => store_code(store),
            Self::Stopping => ErrorCode::Internal,
        }
    }
}

impl Failure for PortError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Unknown(_) => ErrorCode::VmNotFound,
            Self::NotPublished { .. } => ErrorCode::PortNotFound,
            Self::GuestPort
            | Self::Form(_)
            | Self::TooMany(_)
            | Self::Privileged { .. }
            | Self::NoAddress(_)
            | Self::Ambiguous { .. } => ErrorCode::InvalidRequest,
            Self::Published { .. } | Self::Own { .. } | Self::Taken { .. } => ErrorCode::PortTaken,
            Self::Bind { .. } => ErrorCode::HostUnfit,
            Self::Store(store) => store_code(store),
            Self::Stopping => ErrorCode::Internal,
        }
    }
}

impl Failure for DockerError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::NotAllowed { .. } => ErrorCode::Forbidden,
            Self::Settings { .. } => ErrorCode::InvalidRequest,
            Self::Network(_)
            | Self::Socket(_)
            | Self::Run { .. }
            | Self::Ended { .. }
            | Self::Slow { .. } => ErrorCode::HostUnfit,
            Self::File { source, .. } => io_code(source),
            Self::Process(engine) => engine_code(engine),
            Self::Peer(_) | Self::Stopping => ErrorCode::Internal,
        }
    }
}

impl Failure for ChangeError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Unknown(_) => ErrorCode::VmNotFound,
            Self::Config(_) => ErrorCode::InvalidRequest,
            Self::State { .. } => ErrorCode::WrongState,
            Self::Engine(engine) => engine_code(engine),
            Self::Store(store) => store_code(store),
            Self::Stopping => ErrorCode::Internal,
        }
    }
}

impl Failure for PowerError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Unknown(_) => ErrorCode::VmNotFound,
            Self::State { .. } | Self::Overtaken(_) | Self::Off(_) | Self::ContainerEnded { .. } => {
                ErrorCode::WrongState
            }
            Self::GuestTimeout { .. } => ErrorCode::GuestTimeout,
            Self::Template { source, .. } => image_code(source),
            Self::Open { source, .. } => io_code(source),
            Self::Store(store) => store_code(store),
            Self::Identity(_) | Self::Stopping => ErrorCode::Internal,
            Self::Misfit { .. } | Self::Network(_) | Self::Firmware { .. } => ErrorCode::HostUnfit,
            Self::Special(..) => ErrorCode::NotYet,
            Self::Engine { source, .. } | Self::Look { source, .. } => engine_code(source),
            Self::Saved { source, .. } => saved_code(source),
        }
    }
}

fn saved_code(error: &SavedError) -> ErrorCode {
    match error {
        SavedError::Io { source, .. } => io_code(source),
        SavedError::Engine(engine) => engine_code(engine),
        SavedError::Damaged { .. } => ErrorCode::Internal,
    }
}

impl Failure for GuestError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Unknown(_) => ErrorCode::VmNotFound,
            Self::State { .. } => ErrorCode::WrongState,
            Self::NotReady { .. } => ErrorCode::GuestNotReady,
            Self::Agent { .. } => ErrorCode::GuestFailed,
            Self::NoAgent(_) => ErrorCode::NotYet,
            Self::ConsoleBusy(_) => ErrorCode::InUse,
            Self::Io { source, .. } => io_code(source),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_names_each_cause_once() {
        let error = StoreError::Io {
            what: "write",
            path: "/x".into(),
            source: io::Error::from(io::ErrorKind::StorageFull),
        };
        let outer = CreateError::Store(error);
        assert_eq!(chain(&outer), ["Cannot write /x", "no storage space"]);
        assert_eq!(outer.code(), ErrorCode::DiskFull);
    }

    #[test]
    fn the_systems_numbers_are_left_out() {
        let error = io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(chain(&error), ["No such file or directory"]);
        assert_eq!(plain("odd (os error x)"), "odd (os error x)");
    }

    #[test]
    fn the_old_clients_get_only_statuses_they_understand() {
        for status in 400..600 {
            let refusal = LegacyRefusal::new(StatusCode::from_u16(status).unwrap(), "");
            let known = [400, 401, 403, 404, 405, 406, 408, 409, 415, 500, 503, 504];
            assert!(known.contains(&refusal.status.as_u16()), "{status}");
        }
    }
}
