//! The daemon itself.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::EngineName;

/// Reply of `GET /v1/version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// Always `catalyst`: tells this daemon from another program on the port.
    pub product: String,
    /// Version of the daemon.
    pub version: String,
    /// Process id of the daemon.
    pub pid: u32,
    /// Name of the owner.
    pub owner: String,
    /// State folder.
    pub state_dir: String,
    /// The folder in which VMs lie.
    pub vm_dir: String,
    /// Folder of the images.
    pub image_dir: String,
    /// The engine that VMs are started with.
    pub engine: EngineName,
}

/// Reply of `GET /v1/network`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkInfo {
    /// Name of the bridge.
    pub bridge: String,
    /// Subnet, e.g. `10.208.0.0/20`.
    pub subnet: String,
    /// The host's address in it.
    pub gateway: String,
    /// Whether bridge, NAT and DHCP are in place.
    pub up: bool,
    /// Process id of the DHCP and DNS server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dnsmasq_pid: Option<u32>,
    /// Number of fixed leases.
    pub leases: usize,
}
