//! What `catalyst doctor` says.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::EngineName;

/// How a checked thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CheckStatus {
    /// As it should be.
    Ok,
    /// Works, but worse than it could.
    Degraded,
    /// Not there, or useless.
    Missing,
}

/// One line of the doctor's report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// How it is.
    pub status: CheckStatus,
    /// What was found, with its figure.
    pub found: String,
    /// What to do about it, as a command where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// The whole report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Doctor {
    /// The engine that VMs are started with.
    pub engine: EngineName,
    /// Why that one.
    pub engine_reason: String,
    /// The checks, in a fixed order.
    pub checks: Vec<Check>,
}
