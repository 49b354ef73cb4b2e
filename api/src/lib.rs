//! Catalyst's types on the wire, shared by daemon and CLI.
//!
//! Two APIs live side by side: [`legacy`] is the AppCatalyst contract to the letter
//! (`/api/…`), everything else here is Catalyst's own typed API (`/v1/…`), from which the
//! daemon generates its OpenAPI 3.1 description. There is no behaviour in this crate, but that it reads what a user has set
//! in files ([`config`]), which both daemon and CLI must read alike.

pub mod config;
pub mod docker;
pub mod doctor;
pub mod error;
pub mod event;
pub mod exec;
pub mod folder;
pub mod image;
pub mod legacy;
pub mod port;
pub mod snapshot;
pub mod system;
pub mod template;
pub mod vm;
pub mod words;

pub use docker::DockerInfo;
pub use doctor::{Check, CheckStatus, Doctor};
pub use error::{ApiError, ErrorCode};
pub use event::{Event, EventKind};
pub use exec::{ExecFrame, ExecOutput, ExecRequest, TerminalSize};
pub use folder::{CreateFolder, Folder};
pub use image::{ImageInfo, ImageState, Task, TaskState};
pub use port::{HostAddress, Port, PortName, PortState, Protocol, PublishPort};
pub use snapshot::{CreateSnapshot, RestoreSnapshot, Snapshot};
pub use system::{NetworkInfo, Version};
pub use template::{CreateTemplate, ExportVm, ImportImage, TemplateInfo, WarmInfo, WarmRequest};
pub use vm::{
    Address, CloneVm, ContainerInfo, CreateVm, EngineName, GuestStatus, MemoryInfo, PowerOp, PowerRequest,
    Proxy, SetUpInfo, SetUpStage, SshInfo, StartMode, UpdateVm, Vm, VmState,
};

/// The port the daemon listens on where nothing else is said, as AppCatalyst did.
pub const DEFAULT_PORT: u16 = 8080;
