//! What is saved of a disk besides its queues. Its content is not: that is the images'.

use serde::{Deserialize, Serialize};

/// A disk's own state: what must be the same where it comes back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Its size, in sectors of 512 bytes.
    pub sectors: u64,
    /// The guest cannot write.
    pub read_only: bool,
    /// Its number of queues.
    pub queues: u16,
    /// What the guest reads as its serial number.
    pub serial: String,
}
