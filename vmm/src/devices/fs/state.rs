//! What is saved of the device.

use serde::{Deserialize, Serialize};

/// A virtio-fs device's state, besides its queues.
///
/// What a guest has open on the host cannot be saved: the files may be others, or none, where it is restored. So a
/// snapshot is of use only while the guest has nothing mounted; who takes one looks here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    /// The guest has the file system mounted.
    pub mounted: bool,
}
