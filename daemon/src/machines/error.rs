//! Why something could not be done with a VM, one enum per kind of operation.

use std::{fmt, io};

use catalyst_api::{PowerOp, VmState};
use catalyst_images::ImageError;
use thiserror::Error;

use crate::engine::EngineError;
use crate::network::NetworkError;
use crate::ports::error::PortError;
use crate::saved::SavedError;
use crate::store::config::MICRO;
use crate::store::foreign::{RegisterError, RegisterFailed};
use crate::store::identity::IdentityError;
use crate::store::{ConfigError, IdError, StoreError, VmId};
use crate::user_data::UserDataError;
use crate::user_data::host::HostError;
use catalyst_agent_link::AgentError;

/// No such VM.
#[derive(Debug, Error)]
#[error("There is no VM '{0}'; see: catalyst vm list")]
pub struct UnknownVm(pub String);

/// What a VM is that has not all that a VM of a template has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// Its guest has no agent of ours.
    Foreign,
    /// It is a container, and as its engine made it.
    Container,
}

impl fmt::Display for Special {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Foreign => {
                "was registered in place, or is of an imported image: it has no agent of Catalyst's"
            }
            Self::Container => "is a container",
        })
    }
}

/// Why a VM could not be made.
#[derive(Debug, Error)]
pub enum CreateError {
    /// The id cannot be one.
    #[error(transparent)]
    Id(#[from] IdError),
    /// A value is out of its range.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The parent is not there.
    #[error(transparent)]
    Unknown(#[from] UnknownVm),
    /// The template cannot be used.
    #[error("The template '{name}' cannot be used")]
    Template {
        /// Its name.
        name: String,
        /// Why not.
        #[source]
        source: ImageError,
    },
    /// The parent does not lie still.
    #[error("The VM '{id}' is {state}; it can be cloned while it is on or off")]
    ParentState {
        /// The parent.
        id: VmId,
        /// Its state.
        state: VmState,
    },
    /// The parent runs and cannot be frozen.
    #[error("The running VM cannot be cloned")]
    Freeze(#[from] FreezeError),
    /// The clone does not go on from its parent's memory.
    #[error("The clone was made, and does not run")]
    Start(#[from] PowerError),
    /// A running VM's clone is as large as it.
    #[error("A clone of a running VM has its CPUs and memory; leave them out")]
    ParentSize,
    /// The template's disk is larger.
    #[error("A disk of {asked} GiB is not possible: that of the template '{name}' has {least} GiB")]
    DiskTooSmall {
        /// What was asked for.
        asked: u64,
        /// The template.
        name: String,
        /// The least that is possible.
        least: u64,
    },
    /// A clone keeps its parent's disk.
    #[error("A clone has the template and disk size of its parent; leave them out")]
    ParentDisk,
    /// A port of the host is not to be had.
    #[error(transparent)]
    Port(#[from] PortError),
    /// The VMX cannot be registered in place.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// A registered VM is as its VMX says.
    #[error(
        "A VM that is registered in place is as its VMX says; leave parent, template, CPUs, memory and disk out"
    )]
    SourceAlone,
    /// The user-data is none, or asks for what there is not.
    #[error(transparent)]
    UserData(#[from] UserDataError),
    /// A setting of the host's cannot be passed on.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A registered VM has no agent.
    #[error(
        "A VM that is registered in place, or of an imported image, has no agent of Catalyst's that could set it up: leave user-data, proxy and certificates out"
    )]
    UserDataNoAgent,
    /// Its disks are not ours.
    #[error("The VM '{0}' {1}, and cannot be cloned")]
    Special(VmId, Special),
    /// Containers are the engine's.
    #[error(
        "A VM that is a container is made by catalyst-oci, as root and by the daemon's Unix socket, of the template '{MICRO}'"
    )]
    Container,
    /// Its engine's process is not there.
    #[error("There is no process {0} that could be a container")]
    NoRuntime(u32),
    /// No address is left.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// It could not be written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The daemon is stopping.
    #[error("The daemon is stopping")]
    Stopping,
}

/// Why a VM's folders are as they were.
#[derive(Debug, Error)]
pub enum FolderError {
    /// No such VM.
    #[error(transparent)]
    Vm(#[from] UnknownVm),
    /// No such folder.
    #[error("The VM '{id}' has no folder '{name}'; see: catalyst folder list {id}")]
    Unknown {
        /// The VM.
        id: VmId,
        /// The folder.
        name: String,
    },
    /// Another one has the name.
    #[error("The VM '{id}' has another folder '{name}'; remove that first, or take another name")]
    Exists {
        /// The VM.
        id: VmId,
        /// The folder.
        name: String,
    },
    /// Too many.
    #[error("The VM '{id}' has {most} folders, which is the most; remove one first")]
    TooMany {
        /// The VM.
        id: VmId,
        /// The limit.
        most: usize,
    },
    /// Its guest has no agent.
    #[error("The VM '{0}' {1}, and has no folders of the host")]
    Special(VmId, Special),
    /// Not a name.
    #[error("A folder's name is 1 to 80 bytes without '/' and control characters")]
    Name,
    /// Not a path of the host.
    #[error("A folder of the host is named by its absolute path")]
    HostPath,
    /// Not a path of the guest.
    #[error("A folder's place in the guest is an absolute path, and not its root")]
    GuestPath,
    /// It is not there, or closed to the owner.
    #[error("The folder {path} of the host cannot be shared")]
    Host {
        /// The folder.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Programs use it.
    #[error("The guest of VM '{id}' does not let go: {why}")]
    Busy {
        /// The VM.
        id: VmId,
        /// The guest's words, with the programs' names.
        why: String,
    },
    /// The guest did not.
    #[error("The guest of VM '{id}' did not mount or unmount the folder '{name}': {why}")]
    Guest {
        /// The VM.
        id: VmId,
        /// The folder.
        name: String,
        /// Why not.
        why: String,
    },
    /// The VM's file of folders.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The daemon is stopping.
    #[error("The daemon is stopping")]
    Stopping,
}

impl From<RegisterFailed> for CreateError {
    fn from(failed: RegisterFailed) -> Self {
        match failed {
            RegisterFailed::Register(error) => Self::Register(error),
            RegisterFailed::Store(error) => Self::Store(error),
        }
    }
}

/// Why a running VM could not be frozen for others to go on from.
#[derive(Debug, Error)]
pub enum FreezeError {
    /// It does not run.
    #[error("The VM '{id}' is {state}; switch it on, or off, before it is cloned")]
    State {
        /// The VM.
        id: VmId,
        /// Its state.
        state: VmState,
    },
    /// Its machine is none of ours.
    #[error("The VM '{0}' {1}, and cannot be cloned")]
    Special(VmId, Special),
    /// What its disk lies on.
    #[error("The layers of its disk cannot be opened")]
    Below(#[source] Box<PowerError>),
    /// It was being frozen when its daemon was killed.
    #[error(
        "The disk of '{0}' was being laid over when the daemon ended; power it off and on before it is cloned"
    )]
    Unsettled(VmId),
    /// Its disk lies on too many others.
    #[error("The disk of '{id}' lies on {most} others; power it off and on before it is cloned again")]
    Layers {
        /// The VM.
        id: VmId,
        /// The most that is possible.
        most: usize,
    },
    /// It had to be suspended before, and to go on.
    #[error(transparent)]
    Power(#[from] PowerError),
    /// Its process.
    #[error("The VM cannot be frozen")]
    Engine(#[from] EngineError),
    /// It could not be saved.
    #[error(transparent)]
    Saved(#[from] SavedError),
    /// A file.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The daemon is stopping.
    #[error("The daemon is stopping")]
    Stopping,
}

/// Why a snapshot could not be made, gone back to, or deleted.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// No such VM.
    #[error(transparent)]
    Vm(#[from] UnknownVm),
    /// No such snapshot.
    #[error("The VM '{id}' has no snapshot '{name}'; see: catalyst vm snapshot list {id}")]
    Unknown {
        /// The VM.
        id: VmId,
        /// The name.
        name: String,
    },
    /// There is one already.
    #[error("The VM '{id}' has a snapshot '{name}' already; choose another name, or delete it")]
    Exists {
        /// The VM.
        id: VmId,
        /// The name.
        name: String,
    },
    /// Its disks are not ours.
    #[error("The VM '{0}' {1}, and has no snapshots")]
    Special(VmId, Special),
    /// No name.
    #[error(
        "A snapshot's name has 1 to {most} characters, none of them '/' or a control character, and is not '.' or '..'"
    )]
    Name {
        /// The longest.
        most: usize,
    },
    /// No description.
    #[error("A snapshot's description is one line of at most {most} characters")]
    Description {
        /// The longest.
        most: usize,
    },
    /// Enough.
    #[error("The VM '{id}' has {most} snapshots, which is the most; delete some")]
    TooMany {
        /// The VM.
        id: VmId,
        /// The most.
        most: usize,
    },
    /// The VM is on its way from one state to another, or cannot be used.
    #[error("The VM '{id}' is {state}; wait until that is over, or power it off")]
    State {
        /// The VM.
        id: VmId,
        /// Its state.
        state: VmState,
    },
    /// The template cannot be used.
    #[error("The template of '{id}' cannot be used")]
    Template {
        /// The VM.
        id: VmId,
        /// Why not.
        #[source]
        source: ImageError,
    },
    /// The VM could not be frozen.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// Its machine could not be saved.
    #[error(transparent)]
    Saved(#[from] SavedError),
    /// Its process did not end, or no new one began.
    #[error(transparent)]
    Power(#[from] PowerError),
    /// A file.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The daemon is stopping.
    #[error("The daemon is stopping")]
    Stopping,
}

/// Why a VM could not be changed or deleted.
#[derive(Debug, Error)]
pub enum ChangeError {
    /// No such VM.
    #[error(transparent)]
    Unknown(#[from] UnknownVm),
    /// A value is out of its range.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// It runs.
    #[error("The VM '{id}' is {state}; power it off first, or delete it with --force")]
    State {
        /// The VM.
        id: VmId,
        /// Its state.
        state: VmState,
    },
    /// The process would not end.
    #[error("The VM could not be powered off")]
    Engine(#[from] EngineError),
    /// It could not be written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The daemon is stopping.
    #[error("The daemon is stopping")]
    Stopping,
}

/// Why a VM's power could not be changed.
#[derive(Debug, Error)]
pub enum PowerError {
    /// No such VM.
    #[error(transparent)]
    Unknown(#[from] UnknownVm),
    /// The state does not allow it.
    #[error("The VM '{id}' is {state}; '{op}' is not possible now")]
    State {
        /// The VM.
        id: VmId,
        /// Its state.
        state: VmState,
        /// What was asked.
        op: PowerOp,
    },
    /// It has no machine that could be saved.
    #[error("The VM '{0}' {1}, and cannot be suspended; pause it: catalyst vmpower pause {0}")]
    Special(VmId, Special),
    /// What the container's engine had made ready for it is not there any more.
    #[error("The VM '{id}' is a container that has ended")]
    ContainerEnded {
        /// The VM.
        id: VmId,
        /// What was looked for.
        #[source]
        source: io::Error,
    },
    /// There is no UEFI.
    #[error("The VM '{id}' wants UEFI, and {path} is not there; install it: sudo apt-get install ovmf")]
    Firmware {
        /// The VM.
        id: VmId,
        /// The file that was looked for.
        path: &'static str,
    },
    /// A saved machine cannot be gone on from.
    #[error("The VM '{id}' cannot go on from its saved machine")]
    Saved {
        /// The VM.
        id: VmId,
        /// Why not.
        #[source]
        source: SavedError,
    },
    /// There is no process.
    #[error("The VM '{0}' is off; start it with: catalyst vmpower on {0}")]
    Off(VmId),
    /// The process cannot be looked into.
    #[error("Cannot look into '{id}'")]
    Look {
        /// The VM.
        id: VmId,
        /// Why not.
        #[source]
        source: EngineError,
    },
    /// It was saved by something else.
    #[error(
        "The VM '{id}' cannot go on from its saved machine: {why}; give its memory up and boot: catalyst vmpower on --cold {id}"
    )]
    Misfit {
        /// The VM.
        id: VmId,
        /// What is another one.
        why: String,
    },
    /// The guest did not shut down in time.
    #[error(
        "The guest of '{id}' did not shut down within {seconds} s; try again, or pull the plug: catalyst vmpower off {id}"
    )]
    GuestTimeout {
        /// The VM.
        id: VmId,
        /// The limit.
        seconds: u64,
    },
    /// Someone pulled the plug while it was shutting down.
    #[error("The shutdown of '{0}' was overtaken by another request")]
    Overtaken(VmId),
    /// The template cannot be used.
    #[error("The template of '{id}' cannot be used")]
    Template {
        /// The VM.
        id: VmId,
        /// Why not.
        #[source]
        source: ImageError,
    },
    /// A file could not be opened.
    #[error("Cannot open {path}")]
    Open {
        /// The file.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The VM's files are unusable.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The VM's identity is unusable.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The network is not up.
    #[error("The VM network cannot be used")]
    Network(#[from] NetworkError),
    /// The process could not be started or spoken to.
    #[error("The VM '{id}' could not be powered {op}")]
    Engine {
        /// The VM.
        id: VmId,
        /// What was asked.
        op: PowerOp,
        /// Why not.
        #[source]
        source: EngineError,
    },
    /// The daemon is stopping.
    #[error("The daemon is stopping")]
    Stopping,
}

/// Why the guest could not be used.
#[derive(Debug, Error)]
pub enum GuestError {
    /// No such VM.
    #[error(transparent)]
    Unknown(#[from] UnknownVm),
    /// It does not run.
    #[error("The VM '{id}' is {state}; start it: catalyst vmpower on {id}")]
    State {
        /// The VM.
        id: VmId,
        /// Its state.
        state: VmState,
    },
    /// It runs, and is not so far.
    #[error("The guest of '{id}' is still starting: {missing}")]
    NotReady {
        /// The VM.
        id: VmId,
        /// What is missing.
        missing: &'static str,
    },
    /// The agent said no, or is gone.
    #[error("The agent in '{id}' could not do it")]
    Agent {
        /// The VM.
        id: VmId,
        /// Why not.
        #[source]
        source: AgentError,
    },
    /// It is not our guest.
    #[error(
        "The VM '{0}' was registered in place, or is of an imported image: its guest has no agent of Catalyst's, and logins of its own; get its address by: catalyst guest getip {0}"
    )]
    NoAgent(VmId),
    /// Too much at once.
    #[error("The console of '{0}' is attached elsewhere; leave it there first")]
    ConsoleBusy(VmId),
    /// A socket or file failed.
    #[error("Cannot {what} of '{id}'")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The VM.
        id: VmId,
        /// Why not.
        #[source]
        source: io::Error,
    },
}
