//! What a kernel is told that is entered by PVH.

use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::{BootError, Initrd, map, write};
use crate::layout;

/// "xEn3", its first byte with the highest bit set.
const MAGIC: u32 = 0x336e_c578;

/// Writes `struct hvm_start_info`, the list of modules and the map of memory.
pub fn write_start_info(memory: &GuestMemoryMmap<()>, initrd: Option<Initrd>) -> Result<(), BootError> {
    let what = "PVH start information";
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: layout::ACPI,
        ..Default::default()
    };
    let mut at = layout::PVH_TABLES;
    if let Some(Initrd { address, size }) = initrd {
        let module = hvm_modlist_entry { paddr: address, size, ..Default::default() };
        info.nr_modules = 1;
        info.modlist_paddr = at;
        write(memory, what, at, module.as_slice())?;
        at += size_of_val(&module) as u64;
    }
    info.memmap_paddr = at;
    for range in map::ranges(memory) {
        let entry =
            hvm_memmap_table_entry { addr: range.start, size: range.length, type_: range.kind, reserved: 0 };
        write(memory, what, at, entry.as_slice())?;
        at += size_of_val(&entry) as u64;
        info.memmap_entries += 1;
    }
    write(memory, what, layout::PVH_START_INFO, info.as_slice())
}
