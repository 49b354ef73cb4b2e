//! What a device has done, for the statistics of the control socket.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// Counters that device threads add to and the control socket reads. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct Counters(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    kicks: AtomicU64,
    requests: AtomicU64,
    interrupts: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    errors: AtomicU64,
}

/// The values at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    /// Times that the driver notified the device.
    pub kicks: u64,
    /// Descriptor chains that were used.
    pub requests: u64,
    /// Interrupts that the driver got.
    pub interrupts: u64,
    /// Bytes that went from the outside (disk, network, host) to the guest.
    pub read_bytes: u64,
    /// Bytes that went from the guest to the outside.
    pub written_bytes: u64,
    /// Requests that failed, and chains that were not as they must be.
    pub errors: u64,
}

impl Counters {
    /// The driver notified the device.
    pub fn kicked(&self) {
        add(&self.0.kicks, 1);
    }

    /// A descriptor chain was used.
    pub fn used(&self) {
        add(&self.0.requests, 1);
    }

    /// The driver got an interrupt.
    pub fn interrupted(&self) {
        add(&self.0.interrupts, 1);
    }

    /// Bytes went to the guest.
    pub fn read(&self, bytes: usize) {
        add(&self.0.read_bytes, bytes as u64);
    }

    /// Bytes came from the guest.
    pub fn written(&self, bytes: usize) {
        add(&self.0.written_bytes, bytes as u64);
    }

    /// A request failed.
    pub fn failed(&self) {
        add(&self.0.errors, 1);
    }

    /// The values now.
    pub fn counted(&self) -> Counted {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counted {
            kicks: get(&self.0.kicks),
            requests: get(&self.0.requests),
            interrupts: get(&self.0.interrupts),
            read_bytes: get(&self.0.read_bytes),
            written_bytes: get(&self.0.written_bytes),
            errors: get(&self.0.errors),
        }
    }
}

fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Ordering::Relaxed);
}
