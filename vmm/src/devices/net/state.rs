//! What is saved of a NIC.

use serde::{Deserialize, Serialize};

/// A NIC, besides its queues. A frame that is half received when it is saved is lost, as on any wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// MAC address.
    pub mac: [u8; 6],
    /// Whether the link is up.
    pub link_up: bool,
}
