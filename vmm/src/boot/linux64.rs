//! What a kernel is told that is entered by Linux's 64-bit boot protocol, and the tables it is entered with
//! (kernel, Documentation/arch/x86/{boot,zero-page}.rst; Intel SDM volume 3A, section 4.5).

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::{BootError, Initrd, map, write};
use crate::layout;

/// Nobody in particular.
const LOADER_UNDEFINED: u8 = 0xff;
/// Loadflags: the kernel lies at 1 MiB or above.
const LOADED_HIGH: u8 = 1;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// Present, writable.
const ENTRY: u64 = 3;
/// Present, writable, a 2 MiB page.
const LARGE_PAGE: u64 = 0x83;
/// GiB that are mapped one to one.
const MAPPED: u64 = 4;

/// Writes the zero page and the page tables. `header` is that of a bzImage; an ELF kernel has none.
pub fn write_zero_page(
    memory: &GuestMemoryMmap<()>,
    header: Option<setup_header>,
    initrd: Option<Initrd>,
    command_line_size: usize,
) -> Result<(), BootError> {
    let what = "zero page";
    let low = |address: u64| u32::try_from(address).map_err(|_| BootError::Table(what));
    let mut params = boot_params {
        hdr: header.unwrap_or(setup_header {
            header: HEADER_MAGIC,
            boot_flag: BOOT_FLAG,
            kernel_alignment: 0x100_0000,
            ..Default::default()
        }),
        acpi_rsdp_addr: layout::ACPI,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.loadflags |= LOADED_HIGH;
    params.hdr.cmd_line_ptr = low(layout::COMMAND_LINE)?;
    params.hdr.cmdline_size = low(command_line_size as u64)?;
    if let Some(Initrd { address, size }) = initrd {
        params.hdr.ramdisk_image = low(address)?;
        params.hdr.ramdisk_size = low(size)?;
    }
    for (entry, range) in params.e820_table.iter_mut().zip(map::ranges(memory)) {
        *entry = boot_e820_entry { addr: range.start, size: range.length, type_: range.kind };
        params.e820_entries += 1;
    }
    write(memory, what, layout::ZERO_PAGE, params.as_slice())?;
    write_page_tables(memory)
}

fn write_page_tables(memory: &GuestMemoryMmap<()>) -> Result<(), BootError> {
    const PAGE: u64 = 0x1000;
    let pointers = layout::PAGE_TABLES + PAGE;
    let directories = pointers + PAGE;
    let entry = |address: u64, value: u64| write(memory, "page tables", address, &value.to_le_bytes());
    entry(layout::PAGE_TABLES, pointers | ENTRY)?;
    for gib in 0..MAPPED {
        entry(pointers + 8 * gib, (directories + PAGE * gib) | ENTRY)?;
        for large in 0..512 {
            entry(directories + PAGE * gib + 8 * large, (gib << 30) | (large << 21) | LARGE_PAGE)?;
        }
    }
    Ok(())
}
