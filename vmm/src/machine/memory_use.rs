//! How much memory this process and its guest hold.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use crate::control::protocol::MemoryStats;

const PAGE: usize = 4096;
/// Pages that are asked for at once.
const BATCH: usize = 1 << 14;

/// Opened before this process loses sight of /proc.
#[derive(Debug)]
pub struct MemoryUse {
    statm: Option<File>,
}

impl MemoryUse {
    /// Opens what is needed later.
    pub fn open() -> Self {
        Self { statm: File::open("/proc/self/statm").ok() }
    }

    /// The figures now; those that cannot be told are 0.
    pub fn read(&self, memory: &GuestMemoryMmap<()>) -> MemoryStats {
        let ram_resident = memory.iter().map(resident).sum();
        let all = self.resident_pages().unwrap_or(0) * PAGE as u64;
        MemoryStats {
            ram: crate::memory::size(memory),
            ram_resident,
            overhead: all.saturating_sub(ram_resident),
        }
    }

    /// The second field of proc_pid_statm(5).
    fn resident_pages(&self) -> Option<u64> {
        let mut text = [0; 128];
        let length = self.statm.as_ref()?.read_at(&mut text, 0).ok()?;
        std::str::from_utf8(&text[..length]).ok()?.split_whitespace().nth(1)?.parse().ok()
    }
}

/// Bytes of a region that are in memory, by mincore(2).
fn resident(region: &impl GuestMemoryRegion) -> u64 {
    let Ok(start) = region.get_host_address(vm_memory::MemoryRegionAddress(0)) else { return 0 };
    let pages = usize::try_from(region.len()).unwrap_or(0) / PAGE;
    let mut there = vec![0_u8; BATCH.min(pages)];
    let mut sum = 0;
    for first in (0..pages).step_by(BATCH) {
        let count = BATCH.min(pages - first);
        // SAFETY: the range lies in a mapping of this process, and the vector has a byte for each of its pages.
        let result =
            unsafe { libc::mincore(start.add(first * PAGE).cast(), count * PAGE, there.as_mut_ptr()) };
        if result == 0 {
            sum += there[..count].iter().filter(|page| **page & 1 != 0).count() as u64 * PAGE as u64;
        }
    }
    sum
}
