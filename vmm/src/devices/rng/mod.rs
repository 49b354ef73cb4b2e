//! The entropy device (virtio 1.2, section 5.4): random bytes of the host's kernel, by getrandom(2).
//!
//! It gives at most [`MOST_IN_PERIOD`] in each [`PERIOD`]. A guest that asks without end then costs the host a few
//! percent of a core, and the other devices of the same thread keep their turn; one that seeds its own generator
//! asks for less than a hundred bytes now and then and never meets the limit.

mod device;
#[cfg(test)]
mod tests;
mod worker;

use std::time::Duration;

pub use device::Rng;

/// The time that [`MOST_IN_PERIOD`] is for.
pub const PERIOD: Duration = Duration::from_millis(100);
/// Bytes given in one period.
pub const MOST_IN_PERIOD: usize = 1 << 20;
/// Bytes given for one chain; the driver asks again for more.
pub const MOST_OF_CHAIN: usize = 64 << 10;
/// What a chain costs of a period's bytes at least, since a chain of one byte is work too.
const LEAST_COST: usize = 1024;
const QUEUE_SIZE: u16 = 64;
