//! The balloon (virtio 1.2, section 5.5): pages that the guest gives up, when it is asked to and when it reports them as
//! free, go back to the host.
//!
//! Queues that come with a feature have the numbers after those that are there, as Linux and QEMU count them: the
//! reporting queue is number 2, since there is no queue of statistics.

mod device;
mod state;
#[cfg(test)]
mod tests;
mod worker;

pub use device::Balloon;
pub use state::BalloonState;

/// Feature: the guest may take pages back when it runs out of memory.
pub const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// Feature: the guest reports free pages.
pub const VIRTIO_BALLOON_F_REPORTING: u64 = 1 << 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORTING: usize = 2;
const QUEUE_SIZE: u16 = 128;
/// Page numbers that are read of one chain; Linux sends 256. Further pages stay where they are.
const MOST_PAGES: usize = 16 << 10;
/// Chains of one queue before others get their turn.
const ROUNDS: u32 = 16;
