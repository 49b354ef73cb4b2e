//! Boot: a kernel, an initial RAM disk, a command line and tables, put into guest memory without any firmware.
//!
//! An ELF kernel is entered by PVH (Xen's HVM direct boot, `Documentation/x86/…/pvh` and xen/include/public/arch-x86/hvm/start_info.h)
//! or by Linux's 64-bit boot protocol (kernel, Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"), a bzImage by
//! the latter. Both get the same map of memory and the same ACPI tables.

pub mod acpi;
mod dsdt;
mod image;
mod linux64;
mod map;
mod pvh;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use linux_loader::bootparam::setup_header;
use linux_loader::loader::{self, BzImage, Elf, KernelLoader, PvhBootCapability};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use crate::description::Protocol;
use crate::layout;

/// What is started.
#[derive(Debug)]
pub struct Kernel {
    /// Kernel image: ELF or bzImage.
    pub image: File,
    /// Initial RAM disk.
    pub initrd: Option<File>,
    /// Command line.
    pub command_line: String,
    /// How it is entered.
    pub protocol: Protocol,
}

/// How the boot processor begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode without paging at this address, `struct hvm_start_info` in EBX.
    Pvh(u64),
    /// 64-bit mode with the first 4 GiB mapped one to one, the zero page in RSI.
    Long(u64),
}

/// Why a kernel cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The image is neither ELF nor bzImage.
    #[error("The kernel is neither an ELF image (vmlinux) nor a bzImage")]
    Unknown,
    /// The image is cut off, or asks for memory that the machine does not have.
    #[error(
        "The kernel cannot be loaded into {ram} MiB of memory: the image is cut off or damaged, or needs more memory"
    )]
    Load {
        /// RAM in MiB.
        ram: u64,
        /// The library's word.
        #[source]
        source: loader::Error,
    },
    /// It was loaded, but what it says of itself cannot be.
    #[error("The kernel cannot be started: {0}")]
    Image(&'static str),
    /// The initial RAM disk does not fit.
    #[error("The initial RAM disk of {size} bytes does not fit into {ram} MiB of memory beside the kernel")]
    InitrdTooBig {
        /// Its length.
        size: u64,
        /// RAM in MiB.
        ram: u64,
    },
    /// A file could not be read.
    #[error("Cannot read the {0}")]
    Read(&'static str, #[source] io::Error),
    /// Guest memory was not there where a table belongs.
    #[error("Cannot put the {0} into guest memory, which is too small")]
    Table(&'static str),
}

/// What stands in place of firmware: `mov al, 0xfe; out 0x64, al; hlt; jmp` to the halt, which asks the keyboard controller for
/// a reset. Linux without EFI jumps there where ACPI is hardware-reduced, unless it is told `reboot=acpi`.
const RESET: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];

/// What a kernel image turned out to be.
struct Loaded {
    entry: Entry,
    /// First address after it.
    end: u64,
    /// The header of a bzImage.
    header: Option<setup_header>,
}

/// Where the initial RAM disk lies.
#[derive(Clone, Copy, Debug, Default)]
struct Initrd {
    address: u64,
    size: u64,
}

/// Loads the kernel and everything it is told. `acpi` is what lies at [`layout::ACPI`]; the RSDP is its beginning.
pub fn load(memory: &GuestMemoryMmap<()>, kernel: Kernel, acpi: &[u8]) -> Result<Entry, BootError> {
    let Kernel { image, initrd, command_line, protocol } = kernel;
    let mut image = image::Image::new(image).map_err(|error| BootError::Read("kernel", error))?;
    let loaded = load_image(memory, &mut image, protocol)?;
    let initrd = initrd.map(|file| load_initrd(memory, file, &loaded)).transpose()?;
    write(memory, "ACPI tables", layout::ACPI, acpi)?;
    write(memory, "reset vector", layout::RESET_VECTOR, &RESET)?;
    let mut line = command_line.into_bytes();
    line.push(0);
    write(memory, "command line", layout::COMMAND_LINE, &line)?;
    match loaded.entry {
        Entry::Pvh(_) => pvh::write_start_info(memory, initrd)?,
        Entry::Long(_) => linux64::write_zero_page(memory, loaded.header, initrd, line.len())?,
    }
    Ok(loaded.entry)
}

fn load_image(
    memory: &GuestMemoryMmap<()>,
    image: &mut image::Image,
    protocol: Protocol,
) -> Result<Loaded, BootError> {
    let ram = crate::memory::size(memory) >> 20;
    let mut magic = [0; 4];
    image.rewind().and_then(|()| image.read_exact(&mut magic)).map_err(|_| BootError::Unknown)?;
    let high = Some(GuestAddress(layout::HIGH_RAM));
    if &magic == b"\x7fELF" {
        check_segments(memory, image)?;
        let result =
            Elf::load(memory, None, image, high).map_err(|source| BootError::Load { ram, source })?;
        return elf_entry(memory, &result, protocol);
    }
    if protocol == Protocol::Pvh {
        return Err(BootError::Image("PVH was asked for, which takes an ELF image"));
    }
    let result = match BzImage::load(memory, None, image, high) {
        Ok(result) => result,
        Err(loader::Error::Bzimage(loader::bzimage::Error::InvalidBzImage)) => {
            return Err(BootError::Unknown);
        }
        Err(source) => return Err(BootError::Load { ram, source }),
    };
    bzimage_entry(memory, &result)
}

/// The loader copies what is in the file and does not look at how much memory a segment wants beyond that.
fn check_segments(memory: &GuestMemoryMmap<()>, image: &mut image::Image) -> Result<(), BootError> {
    const LOAD: u32 = 1;
    let read = |error| BootError::Read("kernel", error);
    let mut header = [0; 64];
    image.rewind().and_then(|()| image.read_exact(&mut header)).map_err(read)?;
    let word = |bytes: &[u8], at: usize| {
        bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
    };
    let count = u16::from_le_bytes([header[56], header[57]]);
    image.seek(SeekFrom::Start(word(&header, 32))).map_err(read)?;
    for _ in 0..count {
        let mut segment = [0; 56];
        image.read_exact(&mut segment).map_err(read)?;
        let kind = u32::from_le_bytes([segment[0], segment[1], segment[2], segment[3]]);
        let (address, in_file, in_memory) = (word(&segment, 24), word(&segment, 32), word(&segment, 40));
        if kind != LOAD {
            continue;
        }
        if in_file > in_memory {
            return Err(BootError::Image("a segment is longer in the file than in memory"));
        }
        let end = address.checked_add(in_memory);
        let fits = end.is_some_and(|end| in_memory == 0 || is_ram(memory, address, end));
        if !fits || (in_memory > 0 && address < layout::HIGH_RAM) {
            return Err(BootError::Image(
                "a segment lies outside the machine's memory; give the machine more memory",
            ));
        }
    }
    Ok(())
}

fn is_ram(memory: &GuestMemoryMmap<()>, start: u64, end: u64) -> bool {
    usize::try_from(end - start).is_ok_and(|length| memory.check_range(GuestAddress(start), length))
}

fn elf_entry(
    memory: &GuestMemoryMmap<()>,
    result: &loader::KernelLoaderResult,
    protocol: Protocol,
) -> Result<Loaded, BootError> {
    let pvh = match result.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(address) => Some(address.0),
        _ => None,
    };
    let entry = match (protocol, pvh) {
        (Protocol::Pvh, None) => {
            return Err(BootError::Image("it has no PVH entry (CONFIG_PVH), which was asked for"));
        }
        (Protocol::Auto | Protocol::Pvh, Some(address)) => Entry::Pvh(address),
        (Protocol::Auto | Protocol::Linux64, _) => Entry::Long(result.kernel_load.0),
    };
    let (Entry::Pvh(address) | Entry::Long(address)) = entry;
    if !memory.address_in_range(GuestAddress(address)) {
        return Err(BootError::Image("its entry lies outside the machine's memory"));
    }
    Ok(Loaded { entry, end: result.kernel_end, header: None })
}

/// A bzImage is entered 512 bytes after its load address in 64-bit mode (boot.rst).
fn bzimage_entry(
    memory: &GuestMemoryMmap<()>,
    result: &loader::KernelLoaderResult,
) -> Result<Loaded, BootError> {
    const XLF_KERNEL_64: u16 = 1;
    let header = result.setup_header.ok_or(BootError::Unknown)?;
    if header.version < 0x20c || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::Image("the bzImage has no 64-bit entry"));
    }
    let start = result.kernel_load.0;
    // It unpacks itself where it prefers to lie, if it may, and says how much it needs there.
    let preferred = header.pref_address.max(start);
    let end = preferred.saturating_add(u64::from(header.init_size)).max(result.kernel_end);
    if !is_ram(memory, start, end) {
        return Err(BootError::Image("the bzImage needs more memory to unpack; give the machine more"));
    }
    Ok(Loaded { entry: Entry::Long(start + 0x200), end, header: Some(header) })
}

/// As high as it may lie below the hole, so that the kernel need not move it.
fn load_initrd(memory: &GuestMemoryMmap<()>, mut file: File, loaded: &Loaded) -> Result<Initrd, BootError> {
    const PAGE: u64 = 0x1000;
    let read = |error| BootError::Read("initial RAM disk", error);
    let size = file.metadata().map_err(read)?.len();
    file.rewind().map_err(read)?;
    let ram = crate::memory::size(memory);
    let low = ram.min(layout::HOLE_START);
    let most = loaded.header.map_or(low, |header| (u64::from(header.initrd_addr_max) + 1).min(low));
    let error = BootError::InitrdTooBig { size, ram: ram >> 20 };
    let Some(address) = most.checked_sub(size).map(|address| address & !(PAGE - 1)) else {
        return Err(error);
    };
    if address < loaded.end {
        return Err(error);
    }
    let length = usize::try_from(size).map_err(|_| BootError::InitrdTooBig { size, ram: ram >> 20 })?;
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut file, length)
        .map_err(|error| read(io::Error::other(error.to_string())))?;
    Ok(Initrd { address, size })
}

fn write(
    memory: &GuestMemoryMmap<()>,
    what: &'static str,
    address: u64,
    bytes: &[u8],
) -> Result<(), BootError> {
    memory.write_slice(bytes, GuestAddress(address)).map_err(|_| BootError::Table(what))
}

#[cfg(test)]
mod tests;
