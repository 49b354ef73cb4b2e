//! What is saved of the registers.

use serde::{Deserialize, Serialize};

/// Everything that outlives an access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerState {
    /// Events that the guest has not taken yet.
    pub events: u32,
}
