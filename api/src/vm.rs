//! Virtual machines: what is asked for, what is told.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::port::{Port, PublishPort};
use crate::words::{AbsolutePath, DisplayName, ImageName, Tag, VmId};

/// The state of a VM. The words are the ones AppCatalyst's clients understand
/// (reference section 1.4), so that both APIs speak of a VM alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum VmState {
    /// No process.
    #[default]
    #[serde(rename = "powered off")]
    PoweredOff,
    /// The process is being started.
    #[serde(rename = "powering on")]
    PoweringOn,
    /// The virtual CPUs run.
    #[serde(rename = "powered on")]
    PoweredOn,
    /// The guest was asked to shut down and has not finished.
    #[serde(rename = "powering off")]
    PoweringOff,
    /// Memory and devices are being written to disk.
    #[serde(rename = "suspending")]
    Suspending,
    /// Memory and devices lie on disk; no process.
    #[serde(rename = "suspended")]
    Suspended,
    /// The process lives, its virtual CPUs do not run.
    #[serde(rename = "paused")]
    Paused,
    /// The VM cannot be used until a person has done something; `reason` says what.
    #[serde(rename = "blocked")]
    Blocked,
}

impl VmState {
    /// The word on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PoweredOff => "powered off",
            Self::PoweringOn => "powering on",
            Self::PoweredOn => "powered on",
            Self::PoweringOff => "powering off",
            Self::Suspending => "suspending",
            Self::Suspended => "suspended",
            Self::Paused => "paused",
            Self::Blocked => "blocked",
        }
    }

    /// Whether a VM process exists in this state.
    pub const fn has_process(self) -> bool {
        !matches!(self, Self::PoweredOff | Self::Suspended | Self::Blocked)
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What can be asked of a VM's power (AppCatalyst reference section 1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PowerOp {
    /// Start, or resume where suspended.
    On,
    /// Pull the plug.
    Off,
    /// Ask the guest to shut down, and wait for it.
    Shutdown,
    /// Write memory and devices to disk and stop.
    Suspend,
    /// Stop the virtual CPUs, keep the process.
    Pause,
    /// Let the virtual CPUs go on.
    Unpause,
}

impl PowerOp {
    /// All words, in the order the help text lists them.
    pub const ALL: [Self; 6] =
        [Self::On, Self::Off, Self::Shutdown, Self::Suspend, Self::Pause, Self::Unpause];

    /// The word on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Off => "off",
            Self::Shutdown => "shutdown",
            Self::Suspend => "suspend",
            Self::Pause => "pause",
            Self::Unpause => "unpause",
        }
    }
}

impl fmt::Display for PowerOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for PowerOp {
    type Err = ();

    fn from_str(word: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|op| op.as_str() == word).ok_or(())
    }
}

/// The program a VM runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum EngineName {
    /// `catalyst-vmm` on `/dev/kvm`.
    Kvm,
    /// QEMU's software CPU (TCG).
    Qemu,
}

impl fmt::Display for EngineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Qemu => "qemu",
        })
    }
}

/// How a VM's process began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum StartMode {
    /// The guest booted.
    Cold,
    /// It went on from the warm state of its template.
    Warm,
    /// It went on from another VM's memory, of which it is a clone.
    Clone,
    /// It went on from where it was suspended.
    Resume,
    /// It went back to a snapshot.
    Snapshot,
}

impl StartMode {
    /// The word on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Warm => "warm",
            Self::Clone => "clone",
            Self::Resume => "resume",
            Self::Snapshot => "snapshot",
        }
    }
}

impl fmt::Display for StartMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What is known of the guest from its agent. Untrusted: the guest says it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestStatus {
    /// The agent has said hello on its port.
    pub agent: bool,
    /// Hostname, address and keys are applied; the address answers.
    pub identity: bool,
    /// sshd accepts connections.
    pub ssh: bool,
    /// dockerd answers.
    pub docker: bool,
    /// The agent's version, at most 64 characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_version: Option<String>,
}

/// How far the setting up of a guest by user-data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum SetUpStage {
    /// It begins when the VM is on for the first time.
    Pending,
    /// Users and files are there; the commands run.
    Running,
    /// All is done.
    Done,
    /// It is over, and something failed.
    Failed,
}

impl SetUpStage {
    /// The word on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }
}

/// How far the setting up of a guest is, and what failed. Untrusted: the guest says it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SetUpInfo {
    /// How far it is.
    pub state: SetUpStage,
    /// What failed, with the end of the commands' output, in one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// A virtual machine as `vm show` tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// The id: also the name of the VM's folder and its DNS name.
    pub id: String,
    /// The display name (`displayname` of the VMX), by default the id.
    pub name: String,
    /// Power state.
    pub state: VmState,
    /// Why the VM is in this state, where there is something to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Tags, as given at creation.
    pub tags: Vec<String>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Virtual size of the disk in GiB.
    pub disk_gib: u64,
    /// The template (image) it was made from; empty for one that was registered in place.
    pub template: String,
    /// The engine of the running process, or the one the next power-on takes.
    pub engine: EngineName,
    /// MAC address of its NIC, fixed for life.
    pub mac: String,
    /// Address on the VM network, fixed for life.
    pub address: String,
    /// What the agent says of the guest.
    pub guest: GuestStatus,
    /// Process id of the VM process while there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// When the process was started, in seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started: Option<u64>,
    /// How it began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_mode: Option<StartMode>,
    /// How far the guest is set up by user-data, where the VM was made with any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set_up: Option<SetUpInfo>,
    /// Ports of the guest that are published on the host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
    /// Whether it is powered on when the host has started.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub autostart: bool,
    /// The VM's configuration file.
    pub vmx: String,
    /// Its guest starts by its own loader and has no agent: it was registered in place, or is of an imported image.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub foreign: bool,
    /// The VMX that was registered in place, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The container that the VM is, if it is one. It goes when the container goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<ContainerInfo>,
}

/// The container that a VM is, as its engine knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ContainerInfo {
    /// The process that is the container to its engine; the VM is deleted when it ends.
    pub pid: u32,
    /// The engine's id of it.
    pub id: String,
    /// Its name, if the engine tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The image it was made from, if the engine tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Its program, with arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// Its labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Its address, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub address: Option<std::net::IpAddr>,
}

/// Body of `POST /v1/vms`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVm {
    /// Letters, digits, `-`, `_` and `.`, starting with a letter or digit; at most 63.
    #[schema(value_type = VmId)]
    pub id: String,
    /// Display name; by default the id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<DisplayName>)]
    pub name: Option<String>,
    /// An existing VM to clone: with its disk, and where it runs with its memory, so that the clone runs too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<VmId>)]
    pub parent: Option<String>,
    /// Absolute path of an existing `.vmx` to register where it is, instead of cloning: the VM is as that says, and deleting
    /// it deletes its files there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<AbsolutePath>)]
    pub source: Option<String>,
    /// The template to clone; by default `lumen`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<ImageName>)]
    pub template: Option<String>,
    /// Virtual CPUs, 1 to 32; by default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 32)]
    pub cpus: Option<u32>,
    /// Memory in MiB, 128 up to the host's; by default 1024.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 128)]
    pub memory_mib: Option<u64>,
    /// Virtual disk size in GiB, 64 to 16384; by default 64. It occupies what is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 64, maximum = 16384)]
    pub disk_gib: Option<u64>,
    /// Tags: at most 16 of at most 64 characters, without comma or control characters.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<Tag>, max_items = 16)]
    pub tags: Vec<String>,
    /// Ports of the guest to publish on the host; a parent's are not taken over.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 128)]
    pub publish: Vec<PublishPort>,
    /// What the new guest is set up with, once, when it is on for the first time: a `#cloud-config` with `users`,
    /// `ssh_authorized_keys`, `write_files`, `runcmd` and `hostname`, or a script that begins with `#!`. At most 256 KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data: Option<String>,
    /// Proxies that shells, services and dockerd in the new guest use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<Proxy>,
    /// Certificates of authorities that the new guest trusts, each text one or several in PEM.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ca_certificates: Vec<String>,
    /// The container that the VM is to be, of the template `micro`: for `catalyst-oci`, which asks as root by the Unix socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<ContainerInfo>,
}

/// Proxies of the host. One that it has on its loopback alone is refused; one that listens on its other addresses too is
/// reached there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Proxy {
    /// `HTTP_PROXY`, as `http://NAME:PORT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<String>,
    /// `HTTPS_PROXY`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub https: Option<String>,
    /// `NO_PROXY`: names and networks that are reached directly, with commas between.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_proxy: Option<String>,
}

/// Body of `POST /v1/vms/{id}/clones`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CloneVm {
    /// The ids of the clones, at least one and at most 256.
    #[schema(value_type = Vec<VmId>, min_items = 1, max_items = 256)]
    pub ids: Vec<String>,
}

/// Body of `PATCH /v1/vms/{id}`: what is absent stays. CPUs and memory take effect at the
/// next power-on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateVm {
    /// Display name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<DisplayName>)]
    pub name: Option<String>,
    /// Virtual CPUs, 1 to 32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 32)]
    pub cpus: Option<u32>,
    /// Memory in MiB, 128 up to the host's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 128)]
    pub memory_mib: Option<u64>,
    /// Replaces all tags.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Tag>>, max_items = 16)]
    pub tags: Option<Vec<String>>,
    /// Whether it is powered on when the host has started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autostart: Option<bool>,
}

/// Body of `POST /v1/vms/{id}/power`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PowerRequest {
    /// What to do.
    pub op: PowerOp,
    /// With `on`: boot, also where the VM could go on from a warm state of its template.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cold: bool,
}

/// Reply of `GET /v1/vms/{id}/memory`: where the VM's memory is, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryInfo {
    /// RAM of the guest.
    pub ram: u64,
    /// Of it, what the VM has for itself.
    pub private: u64,
    /// Of it, what it has in common with the template or VM that it went on from.
    pub shared: u64,
    /// Of it, what costs nothing.
    pub untouched: u64,
    /// What the VM's process has for itself besides.
    pub overhead: u64,
}

/// Reply of `GET /v1/vms/{id}/address`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Address {
    /// IPv4 address that the guest holds now.
    pub address: String,
}

/// Reply of `GET /v1/vms/{id}/ssh`: all a client needs for `ssh`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SshInfo {
    /// Address that the guest holds.
    pub address: String,
    /// TCP port.
    pub port: u16,
    /// Login name.
    pub user: String,
    /// Private key file on the daemon's machine, readable by the owner.
    pub key_file: String,
    /// The guest's host keys in `known_hosts` form, the address in front.
    pub known_hosts: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_is_one_word_on_the_wire_and_in_text() {
        for state in [
            VmState::PoweredOff,
            VmState::PoweringOn,
            VmState::PoweredOn,
            VmState::PoweringOff,
            VmState::Suspending,
            VmState::Suspended,
            VmState::Paused,
            VmState::Blocked,
        ] {
            assert_eq!(serde_json::to_value(state).unwrap(), serde_json::json!(state.to_string()));
        }
    }

    #[test]
    fn every_power_word_parses_back() {
        for op in PowerOp::ALL {
            assert_eq!(op.as_str().parse(), Ok(op));
        }
        assert_eq!("explode".parse::<PowerOp>(), Err(()));
    }
}
