//! Exits of virtual CPUs to this process, counted by kind.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Why a virtual CPU came out of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// Read from a port.
    PortIn,
    /// Write to a port.
    PortOut,
    /// Read from a register in memory.
    MmioRead,
    /// Write to a register in memory.
    MmioWrite,
    /// A signal, by which it is paused.
    Interrupted,
    /// Anything else.
    Other,
}

const NAMES: [&str; 6] = ["port-in", "port-out", "mmio-read", "mmio-write", "interrupted", "other"];

/// How many of each kind, of all virtual CPUs together.
#[derive(Debug, Default)]
pub struct ExitCounts([AtomicU64; NAMES.len()]);

impl ExitCounts {
    /// Counts one.
    pub fn count(&self, kind: ExitKind) {
        self.0[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// All counts, by name.
    pub fn by_name(&self) -> BTreeMap<String, u64> {
        let counts = NAMES.iter().zip(&self.0);
        counts.map(|(name, count)| ((*name).to_owned(), count.load(Ordering::Relaxed))).collect()
    }
}
