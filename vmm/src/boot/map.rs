//! The map of memory that the kernel is told, in the types of E820 (ACPI 6.5, section 15).

use vm_memory::GuestMemoryMmap;

use crate::{layout, memory};

/// A range and its type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
    /// One of the constants below.
    pub kind: u32,
}

/// RAM.
pub const RAM: u32 = 1;
/// Not to be used.
pub const RESERVED: u32 = 2;
/// ACPI tables, which may be reused once they were read.
pub const ACPI: u32 = 3;

/// The map of a machine with this memory.
pub fn ranges(memory: &GuestMemoryMmap<()>) -> Vec<Range> {
    let range = |start, end, kind| Range { start, length: end - start, kind };
    let mut ranges = vec![
        range(0, layout::LOW_RAM_END, RAM),
        range(layout::LOW_RAM_END, layout::ACPI, RESERVED),
        range(layout::ACPI, layout::GENERATION_ID, ACPI),
        range(layout::GENERATION_ID, layout::ACPI_END, RESERVED),
    ];
    for (start, length) in memory::ranges(memory::size(memory)) {
        let first = start.max(layout::HIGH_RAM);
        ranges.push(range(first, start + length, RAM));
    }
    ranges
}
