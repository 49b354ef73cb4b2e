//! Guest memory: one private or shared mapping a range, none of it touched before the guest touches it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use crate::layout;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Bytes of a large page.
const LARGE: usize = 2 << 20;
/// How often a range may come to lie where no large pages are possible; after that the guest merely runs on small ones.
const PLACES: usize = 8;

/// Guest memory, shared by everything that reads or writes it.
pub type GuestRam = Arc<GuestMemoryMmap<()>>;

/// What stands behind guest memory.
#[derive(Clone, Copy, Debug)]
pub enum Backing<'a> {
    /// Pages of this process alone.
    Anonymous,
    /// A file, most often a memfd, that other processes may map as well. What it held is lost: memory begins as zeros.
    Shared(&'a File),
    /// What a file holds, exactly as long as the memory, as it was when it was saved. What is written is this process's
    /// alone: the file stays as it is, and must, since what was not written is read from it at any time.
    Private(&'a File),
}

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A size that cannot be.
    #[error(
        "Guest memory of {mib} MiB is not possible: at least 1 MiB and at most {max} MiB (the host's memory)"
    )]
    Size {
        /// What was asked for.
        mib: u64,
        /// What the host has.
        max: u64,
    },
    /// The mapping failed.
    #[error("Cannot map {mib} MiB of guest memory")]
    Map {
        /// What was asked for.
        mib: u64,
        /// Why not.
        #[source]
        source: MmapRegionError,
    },
    /// The file could not be made long enough.
    #[error("Cannot make the file of guest memory {mib} MiB long")]
    Resize {
        /// What was asked for.
        mib: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file of saved memory that is not as long as the memory.
    #[error(
        "The file of guest memory has {length} bytes, and {mib} MiB of it were to be restored, {wanted} bytes"
    )]
    Length {
        /// What the file has.
        length: u64,
        /// What was asked for.
        mib: u64,
        /// The same in bytes.
        wanted: u64,
    },
    /// A file whose length is not known.
    #[error("Cannot tell how long the file of guest memory is")]
    Look(#[source] io::Error),
    /// The ranges cannot be put together.
    #[error("Cannot put guest memory of {mib} MiB together: {why}")]
    Assemble {
        /// What was asked for.
        mib: u64,
        /// The library's word.
        why: String,
    },
}

/// The ranges of RAM, as (first address, length in bytes): below the hole, and above 4 GiB.
pub fn ranges(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(layout::HOLE_START);
    let mut ranges = vec![(0, low)];
    if bytes > low {
        ranges.push((layout::HOLE_END, bytes - low));
    }
    ranges
}

/// Maps `mib` MiB of guest memory. Nothing is reserved and nothing touched: what the guest does not write costs
/// nothing. With `huge_pages` the kernel may use large pages (madvise(2), MADV_HUGEPAGE).
pub fn map(mib: u64, backing: Backing<'_>, huge_pages: bool) -> Result<GuestRam, MemoryError> {
    let max = host_mib();
    if mib == 0 || mib > max {
        return Err(MemoryError::Size { mib, max });
    }
    let bytes = mib << 20;
    match backing {
        Backing::Anonymous => {}
        Backing::Shared(file) => file
            .set_len(0)
            .and_then(|()| file.set_len(bytes))
            .map_err(|source| MemoryError::Resize { mib, source })?,
        // Pages beyond its end would be there, and whoever touches one would die of it (SIGBUS).
        Backing::Private(file) => match file.metadata().map_err(MemoryError::Look)?.len() {
            length if length == bytes => {}
            length => return Err(MemoryError::Length { length, mib, wanted: bytes }),
        },
    }
    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, length) in ranges(bytes) {
        let region = map_range(length, offset, backing, mib)?;
        if huge_pages {
            advise_huge_pages(&region);
        }
        let region = GuestRegionMmap::new(region, GuestAddress(start))
            .ok_or_else(|| MemoryError::Assemble { mib, why: "an address is too high".into() })?;
        regions.push(region);
        offset += length;
    }
    GuestMemoryMmap::from_regions(regions)
        .map(Arc::new)
        .map_err(|error| MemoryError::Assemble { mib, why: error.to_string() })
}

fn map_range(
    length: u64,
    offset: u64,
    backing: Backing<'_>,
    mib: u64,
) -> Result<MmapRegion<()>, MemoryError> {
    let error = |source| MemoryError::Map { mib, source };
    let size = usize::try_from(length)
        .map_err(|_| MemoryError::Assemble { mib, why: "it is longer than an address".into() })?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let attempt = || match backing {
        Backing::Anonymous => {
            let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
            MmapRegion::build(None, size, protection, flags).map_err(error)
        }
        Backing::Shared(file) | Backing::Private(file) => {
            let file = file.try_clone().map_err(|source| error(MmapRegionError::Mmap(source)))?;
            let shared = matches!(backing, Backing::Shared(_));
            let flags = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE } | libc::MAP_NORESERVE;
            MmapRegion::build(Some(FileOffset::new(file, offset)), size, protection, flags).map_err(error)
        }
    };
    // What came to lie elsewhere is kept until the end, so that its place is taken for the next attempt.
    let mut elsewhere = Vec::new();
    while size >= LARGE && elsewhere.len() < PLACES {
        let _around = aligned_gap(size);
        let region = attempt()?;
        if region.as_ptr().align_offset(LARGE) == 0 {
            return Ok(region);
        }
        elsewhere.push(region);
    }
    attempt()
}

/// Address space that is held for a moment. Dropping it gives it back.
struct Reserved {
    start: *mut u8,
    length: usize,
}

impl Reserved {
    fn new(length: usize) -> Option<Self> {
        let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        // SAFETY: a new mapping where the kernel likes it, that nobody reads or writes.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_NONE, flags, -1, 0) };
        (start != libc::MAP_FAILED).then_some(Self { start: start.cast(), length })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: the range is a mapping of this value's own, which nothing points into.
            unsafe { libc::munmap(self.start.cast(), self.length) };
        }
    }
}

/// Leaves one gap of exactly `size` bytes in the address space, at a multiple of a large page, and holds what lies around
/// it: the kernel puts the next mapping of that size there, unless it fits into a higher gap as well. KVM maps by large
/// pages only what lies at the same offset in such a page for the guest and for the host, and kernels before 6.7 do not see
/// to that.
fn aligned_gap(size: usize) -> Option<[Reserved; 2]> {
    let mut before = Reserved::new(size.checked_add(LARGE)?)?;
    let skip = before.start.align_offset(LARGE);
    let gap = before.start.wrapping_add(skip);
    let after = Reserved { start: gap.wrapping_add(size), length: before.length - skip - size };
    before.length = skip;
    drop(Reserved { start: gap, length: size });
    Some([before, after])
}

/// Only advice: a kernel without large pages goes on with small ones.
fn advise_huge_pages(region: &MmapRegion<()>) {
    // SAFETY: the range is exactly a mapping that this process owns; the advice changes no content.
    unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_HUGEPAGE) };
}

/// Why memory was not given back.
#[derive(Debug, thiserror::Error)]
pub enum DiscardError {
    /// Not all of the range is RAM.
    #[error("Cannot give {length:#x} bytes at guest address {address:#x} back: not all of them are RAM")]
    NotRam {
        /// The first address.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// The kernel does not do it.
    #[error("Cannot give {length:#x} bytes at guest address {address:#x} back to the host")]
    Io {
        /// The first address.
        address: u64,
        /// Bytes.
        length: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Gives the host back what stands behind the whole pages (4 KiB) of `length` bytes at guest address `address`, which
/// must lie in one range of RAM. The guest reads zeros there from now on, and what it writes costs memory again.
/// Memory in a file that others share is given up in the file, for all of them.
pub fn discard(memory: &GuestMemoryMmap<()>, address: u64, length: u64) -> Result<(), DiscardError> {
    let not_ram = DiscardError::NotRam { address, length };
    let Some((region, offset)) = memory.to_region_addr(GuestAddress(address)) else { return Err(not_ram) };
    if region.len() - offset.0 < length {
        return Err(not_ram);
    }
    // Regions begin at whole pages of the guest, so inside them pages are where the guest has them.
    let first = offset.0.next_multiple_of(PAGE);
    let end = (offset.0 + length) / PAGE * PAGE;
    let (Ok(first), Ok(size)) = (usize::try_from(first), usize::try_from(end.saturating_sub(first))) else {
        return Err(not_ram);
    };
    if size == 0 {
        return Ok(());
    }
    // What was saved in a file and is mapped by this process alone would come back from the file.
    let advice = match region.file_offset() {
        None => Some(libc::MADV_DONTNEED),
        Some(_) if region.flags() & libc::MAP_TYPE == libc::MAP_SHARED => Some(libc::MADV_REMOVE),
        Some(_) => None,
    };
    // SAFETY: `first` and `size` lie in the region's mapping, as was just checked. Guest memory is used by pointer
    // only, with content that may change at any time; this is such a change. A new mapping has the old one's place,
    // length and protection, and goes with it when the region is unmapped.
    let failed = unsafe {
        let start: *mut libc::c_void = region.as_ptr().add(first).cast();
        if let Some(advice) = advice {
            libc::madvise(start, size, advice) != 0
        } else {
            let flags = libc::MAP_FIXED | libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
            libc::mmap(start, size, region.prot(), flags, -1, 0) == libc::MAP_FAILED
        }
    };
    if failed {
        return Err(DiscardError::Io { address, length, source: io::Error::last_os_error() });
    }
    Ok(())
}

/// Bytes of RAM in `memory`.
pub fn size(memory: &GuestMemoryMmap<()>) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// A memfd for memory that is to be shared, sealed against nothing yet.
pub fn memfd(name: &std::ffi::CStr) -> io::Result<File> {
    // SAFETY: the name is a valid C string; the result is checked before it is owned.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that the kernel has just given and nobody else owns.
    let file = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(fd) };
    debug_assert!(file.as_raw_fd() >= 0);
    Ok(file)
}

fn host_mib() -> u64 {
    // SAFETY: sysconf only reads.
    let (pages, page) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    u64::try_from(pages).unwrap_or(0).saturating_mul(u64::try_from(page).unwrap_or(0)) >> 20
}

#[cfg(test)]
pub(crate) mod tests {
    use std::ops::Range;

    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn ram_leaves_the_hole_below_4_gib_free() {
        assert_eq!(ranges(256 << 20), [(0, 256 << 20)]);
        assert_eq!(ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ranges(5 << 30), [(0, 3 << 30), (4 << 30, 2 << 30)]);
    }

    #[test]
    fn ranges_lie_at_multiples_of_a_large_page() {
        let file = memfd(c"test").unwrap();
        for backing in [Backing::Anonymous, Backing::Shared(&file)] {
            let memory = map(3080, backing, true).unwrap();
            for region in memory.iter() {
                assert_eq!(region.as_ptr().align_offset(LARGE), 0, "{backing:?}");
            }
        }
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        for mib in [0, u64::MAX, host_mib() + 1] {
            assert!(matches!(map(mib, Backing::Anonymous, false), Err(MemoryError::Size { .. })), "{mib}");
        }
    }

    #[test]
    fn shared_memory_is_seen_through_its_file() {
        use std::os::unix::fs::FileExt;
        let file = memfd(c"test").unwrap();
        let memory = map(4, Backing::Shared(&file), false).unwrap();
        memory.write_slice(b"hello", GuestAddress(0x2000)).unwrap();
        let mut bytes = [0; 5];
        file.read_exact_at(&mut bytes, 0x2000).unwrap();
        assert_eq!(&bytes, b"hello");
        assert_eq!(size(&memory), 4 << 20);
    }

    /// How many of these pages are resident in this process.
    pub fn resident(memory: &GuestMemoryMmap<()>, pages: Range<u64>) -> usize {
        let mut there = vec![0_u8; pages.clone().count()];
        let start = memory.get_host_address(GuestAddress(pages.start << 12)).unwrap();
        // SAFETY: the vector has a byte for each page of the range, which is mapped.
        assert_eq!(unsafe { libc::mincore(start.cast(), there.len() << 12, there.as_mut_ptr()) }, 0);
        there.iter().filter(|page| **page & 1 == 1).count()
    }

    fn discards(memory: &GuestMemoryMmap<()>) {
        memory.write_slice(&vec![7; 16 << 12], GuestAddress(0)).unwrap();
        // Whole pages only: 3 to 9.
        discard(memory, 0x2001, 0x8000).unwrap();
        let first = |page: u64| memory.read_obj::<u8>(GuestAddress(page << 12)).unwrap();
        assert_eq!([first(2), first(10), first(15)], [7, 7, 7]);
        assert_eq!([first(3), first(9)], [0, 0]);
        memory.write_obj(9_u8, GuestAddress(0x5000)).unwrap();
        assert_eq!(first(5), 9);
    }

    #[test]
    fn discarded_memory_of_this_process_is_not_resident_and_reads_as_zeros() {
        let memory = map(4, Backing::Anonymous, false).unwrap();
        memory.write_slice(&vec![7; 16 << 12], GuestAddress(0)).unwrap();
        assert_eq!(resident(&memory, 0..16), 16);
        discard(&memory, 0, 16 << 12).unwrap();
        assert_eq!(resident(&memory, 0..16), 0);
        discards(&memory);
    }

    #[test]
    fn discarded_memory_of_a_shared_file_is_a_hole_in_it() {
        use std::os::unix::fs::MetadataExt;
        let file = memfd(c"test").unwrap();
        let memory = map(4, Backing::Shared(&file), false).unwrap();
        memory.write_slice(&vec![7; 16 << 12], GuestAddress(0)).unwrap();
        let before = file.metadata().unwrap().blocks();
        discard(&memory, 0, 16 << 12).unwrap();
        assert!(file.metadata().unwrap().blocks() + 16 * 8 <= before);
        discards(&memory);
    }

    #[test]
    fn memory_of_a_private_file_is_the_files_until_it_is_written_and_the_file_never_sees_that() {
        use std::os::unix::fs::FileExt;
        let file = memfd(c"test").unwrap();
        file.write_all_at(&vec![5; 4 << 20], 0).unwrap();
        let memory = map(4, Backing::Private(&file), true).unwrap();
        let other = map(4, Backing::Private(&file), false).unwrap();
        memory.write_obj(9_u8, GuestAddress(0x2000)).unwrap();
        let first = |memory: &GuestRam| memory.read_obj::<[u8; 2]>(GuestAddress(0x2000)).unwrap();
        assert_eq!([first(&memory), first(&other)], [[9, 5], [5, 5]]);
        let mut byte = [0];
        file.read_exact_at(&mut byte, 0x2000).unwrap();
        assert_eq!(byte, [5]);
    }

    #[test]
    fn a_private_file_of_another_length_is_refused() {
        let file = memfd(c"test").unwrap();
        for length in [0, (4 << 20) - 1, (4 << 20) + 4096] {
            file.set_len(length).unwrap();
            let refused = map(4, Backing::Private(&file), false).unwrap_err();
            assert!(refused.to_string().contains(&format!("has {length} bytes")), "{refused}");
            assert_eq!(file.metadata().unwrap().len(), length);
        }
    }

    #[test]
    fn discarded_memory_of_a_private_file_does_not_come_back_and_the_file_stays() {
        use std::os::unix::fs::FileExt;
        let file = memfd(c"test").unwrap();
        file.write_all_at(&vec![5; 1 << 20], 0).unwrap();
        let memory = map(1, Backing::Private(&file), false).unwrap();
        discards(&memory);
        let mut byte = [0];
        file.read_exact_at(&mut byte, 0x3000).unwrap();
        assert_eq!(byte, [5]);
    }

    #[test]
    fn what_is_not_ram_is_not_discarded() {
        let memory = map(4, Backing::Anonymous, false).unwrap();
        memory.write_slice(&vec![7; 16 << 12], GuestAddress(0)).unwrap();
        for (address, length) in [(4 << 20, 1), (0, (4 << 20) + 1), (u64::MAX, u64::MAX), (0x1000, u64::MAX)]
        {
            let refused = discard(&memory, address, length);
            assert!(matches!(refused, Err(DiscardError::NotRam { .. })), "{address:#x} {length:#x}");
        }
        discard(&memory, 0x1fff, 0x1000).unwrap();
        assert_eq!(resident(&memory, 0..16), 16);
    }
}
