//! Containers: what a runtime on the host asks of the agent of a VM that is one container, or has those of a pod (docs/CONTAINERS.md).
//!
//! Over a port of its own ([`crate::CONTAINER_PORT_NAME`]), with the frames, epochs and streams of the agent's port. The order is:
//! `create_container` brings the document and makes all ready; `start_container` opens the stream of its program;
//! `exec_container` opens those of others, meanwhile. A document that is too long for that is written to [`DOCUMENT`] by `put_file` before.

use serde::{Deserialize, Serialize};

use crate::message::Terminal;

/// Where a document is written to that is longer than [`MAX_INLINE`], a [`Container`] as JSON.
pub const DOCUMENT: &str = "/run/catalyst/container.json";
/// Longest document that comes with its request, in bytes: as a string in JSON it may have twice as many, and fits a frame.
pub const MAX_INLINE: usize = 24 * 1024;
/// The name of the tree that is the container's root, among the folders that are served.
pub const ROOT_TREE: &str = "root";
/// Among the folders that are served, the one of the trees of containers that have a name.
pub const JOINED_TREES: &str = "joined";
/// Longest name of a container.
pub const MAX_NAME: usize = 64;
/// Longest DNS message that is passed on, so that it fits a frame as base64. RFC 1035, section 4.2.2, would have twice as much by TCP.
pub const MAX_QUERY: usize = 32 * 1024;

/// A container. All of it is the runtime's, and what is left out is as an empty one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Container {
    /// What it is called among those of the VM: letters, digits and `-`. The one that the VM is has no name; the trees of others are
    /// in the folder of their name in [`JOINED_TREES`].
    pub name: String,
    /// The VM is another's, or others have been in it before: its time, name, network and resolver are there and stay.
    pub joins: bool,
    /// It has IPC and host names together with all others of the VM that have this.
    pub shares: bool,
    /// It has its processes together with all others of the VM that have this.
    pub shares_processes: bool,
    /// Most memory, in bytes; 0 is as much as the VM has.
    pub memory_limit: u64,
    /// Host name; none is left as it is.
    pub hostname: String,
    /// NIS domain name.
    pub domainname: String,
    /// The time now, in nanoseconds since 1970.
    pub unix_ns: u64,
    /// 32 random bytes for the kernel's generator, in hexadecimal digits.
    pub seed: String,
    /// Whether nothing is written to the root, [`ROOT_TREE`].
    pub read_only: bool,
    /// What is mounted in it, in this order.
    pub mounts: Vec<Mount>,
    /// Kernel settings, as `net.ipv4.ip_forward`.
    pub sysctls: Vec<(String, String)>,
    /// Paths that are hidden.
    pub masked_paths: Vec<String>,
    /// Paths that may only be read.
    pub readonly_paths: Vec<String>,
    /// Network interfaces, and where they lead.
    pub network: Network,
    /// The port of 127.0.0.11 is answered by the host ([`crate::Control::Resolve`]).
    pub resolver: bool,
    /// Most processes; 0 is as many as there can be.
    pub pids_limit: u64,
    /// Its program.
    pub process: Process,
}

/// A mount of a container, as the OCI runtime specification has it ("Mounts").
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mount {
    /// Where, absolute, in the container.
    pub destination: String,
    /// `tree` for a tree of the host's, else a file system of the guest's kernel: `proc`, `tmpfs`, `sysfs`, `devpts`, `mqueue`,
    /// `cgroup`.
    pub kind: String,
    /// The tree's name, if it is one; else what programs are told to be mounted there.
    pub source: String,
    /// Options, as fstab(5) has them: flags (`ro`, `nosuid`, …), the rest is the file system's.
    pub options: Vec<String>,
}

/// A container's network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Network {
    /// Interfaces; those of before that are not among them go down.
    pub interfaces: Vec<Interface>,
    /// Routes, besides those that addresses bring.
    pub routes: Vec<Route>,
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Interface {
    /// Which of the VM's NICs it is, from 0 on, in the order of the machine.
    pub nic: u8,
    /// What it is called in the container.
    pub name: String,
    /// MAC address, as `02:42:…`.
    pub mac: String,
    /// Longest packet, in bytes.
    pub mtu: u32,
    /// Addresses with their prefixes, `172.17.0.2/16` or IPv6.
    pub addresses: Vec<String>,
}

/// A route.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Route {
    /// The interface's name.
    pub interface: String,
    /// Where to, `10.0.0.0/8`, or `default` (of the gateway's family).
    pub destination: String,
    /// By which gateway, or nothing for what is on the link.
    pub gateway: String,
}

/// A program of a container, as the OCI runtime specification has it ("Process").
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Process {
    /// Program and arguments; the program is found in the PATH of `env`, in the container.
    pub args: Vec<String>,
    /// Environment, as `NAME=value`; all of it.
    pub env: Vec<String>,
    /// Working directory, absolute; it is made if it is not there.
    pub cwd: String,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Further groups.
    pub additional_gids: Vec<u32>,
    /// umask, if it is not 0022.
    pub umask: Option<u32>,
    /// Capabilities.
    pub capabilities: Capabilities,
    /// Limits.
    pub rlimits: Vec<Rlimit>,
    /// It gains nothing by programs with set-uid.
    pub no_new_privileges: bool,
    /// The kernel's liking for it when memory is short (proc(5)).
    pub oom_score_adj: Option<i32>,
    /// It has a terminal.
    pub terminal: Option<Terminal>,
    /// Input will come; else its stdin is empty.
    pub stdin: bool,
}

/// Sets of capabilities (capabilities(7)), each a mask with bit n for capability n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// Bounding set.
    pub bounding: u64,
    /// Effective set.
    pub effective: u64,
    /// Inheritable set.
    pub inheritable: u64,
    /// Permitted set.
    pub permitted: u64,
    /// Ambient set.
    pub ambient: u64,
}

/// A limit (getrlimit(2)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rlimit {
    /// Its number, as `RLIMIT_NOFILE`.
    pub resource: u32,
    /// Soft limit; `u64::MAX` is none.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}
