//! How a build tells how far it is: for people on standard error, for programs as JSON lines.

use serde::{Deserialize, Serialize};

/// One line of progress. With `--json` the builder prints these on its standard output, one a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Number of the step, from 1.
    pub step: u32,
    /// Number of steps.
    pub of: u32,
    /// Name of the step (`packages`, …; `done` at the end).
    pub name: String,
    /// How much of the step is done, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<u8>,
    /// What goes on.
    pub message: String,
}
