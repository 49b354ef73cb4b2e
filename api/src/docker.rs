//! Docker's daemon whose containers are VMs.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Reply of `GET /v1/docker` and `POST /v1/docker`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DockerInfo {
    /// Whether it runs.
    pub up: bool,
    /// Its process id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// What clients use as `DOCKER_HOST`: `unix://` and the path of its socket, there while it is up.
    pub host: String,
    /// The file that it logs to.
    pub log: String,
    /// The folder of its images, containers and volumes, which stay when it is down.
    pub data: String,
    /// Why it is down, where nobody has taken it down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}
