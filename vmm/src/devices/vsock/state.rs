//! What is saved of a vsock.

use serde::{Deserialize, Serialize};

/// A vsock, as it is saved. Its connections are not: their other ends are elsewhere, so a guest that is restored
/// is told that they are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's context ID. A guest may come back with another one; it reads it anew at the transport reset.
    pub cid: u32,
}
