//! What is saved of a balloon.

use serde::{Deserialize, Serialize};

/// How large it is to be, and is, in pages of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// What the host asked for.
    pub target: u32,
    /// What the guest says it gave.
    pub actual: u32,
}
