//! A copy of a VM's memory, taken from outside the process that has it.
//!
//! What a VM process maps says all that is needed (proc_pid_maps(5), proc_pid_pagemap(5)): pages that are its own, and the
//! file that stands behind those that it never wrote. So one way serves memory of a cold start, of a clone and of both
//! engines. The part that never changes is copied while the VM runs; then it stands still for its own pages alone.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use super::process::stat_fields;
use crate::privilege::as_root;
use crate::store::sparse;

/// Bytes of a page.
const PAGE: u64 = 4096;
/// Bytes that are read at once.
const CHUNK: usize = 1 << 20;
/// Of an entry of a page map (Documentation/admin-guide/mm/pagemap.rst): the page is in memory, or in swap.
const THERE: u64 = 3 << 62;
/// The page is a file's or shared, not the process's own.
const OF_FILE: u64 = 1 << 61;

/// A range of a VM's RAM in the address space of its process. Ranges are in the order of guest addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its first address.
    pub start: u64,
    /// Bytes; whole pages.
    pub length: u64,
}

/// Where a VM's memory is, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owned {
    /// The process's own pages.
    pub private: u64,
    /// Pages that it sees of a file that others may see too.
    pub shared: u64,
}

/// A mapping of the process, cut to an extent.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    /// Where the part begins in its file; none if the mapping has no file.
    file_offset: Option<u64>,
    /// The name of the whole mapping in `/proc/PID/map_files`.
    name: String,
    shared: bool,
}

/// The memory of one process.
#[derive(Debug)]
pub struct Memory {
    pid: u32,
    ram: Vec<Extent>,
}

impl Memory {
    /// The memory `ram` of process `pid`, which must not be reaped meanwhile.
    pub fn new(pid: u32, ram: Vec<Extent>) -> Self {
        Self { pid, ram }
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.ram.iter().map(|extent| extent.length).sum()
    }

    /// Whether part of it is a file that the process writes.
    pub fn is_shared(&self) -> io::Result<bool> {
        let mut shared = false;
        self.each(|mapping, _| {
            shared |= mapping.shared;
            Ok(())
        })?;
        Ok(shared)
    }

    /// Copies into `out`, which is empty, what the process sees of files. It may run meanwhile, since nobody writes those,
    /// unless memory is shared ([`Memory::is_shared`]): then it must stand still.
    pub fn copy_files(&self, out: &File) -> io::Result<()> {
        out.set_len(self.size())?;
        self.each(|mapping, at| {
            let Some(offset) = mapping.file_offset else { return Ok(()) };
            let file = self.open(&format!("map_files/{}", mapping.name))?;
            sparse::copy_range(&file, offset, out, at, mapping.end - mapping.start)
        })
    }

    /// Copies into `out`, over what [`Memory::copy_files`] put there, the process's own pages. It must stand still.
    pub fn copy_own(&self, out: &File) -> io::Result<()> {
        let memory = self.open("mem")?;
        let map = self.open("pagemap")?;
        let mut buffer = vec![0; CHUNK];
        self.each(|mapping, at| {
            if mapping.shared {
                return Ok(());
            }
            if mapping.file_offset.is_none() {
                // It may have been given back since, and then reads as zeros.
                sparse::punch(out, at, mapping.end - mapping.start)?;
            }
            own_pages(&map, mapping, |start, length| {
                copy_pages(&memory, start, length, out, at + (start - mapping.start), &mut buffer)
            })
        })
    }

    /// How much is the process's own, and how much it sees of files.
    pub fn owned(&self) -> io::Result<Owned> {
        let map = self.open("pagemap")?;
        let mut owned = Owned::default();
        self.each(|mapping, _| {
            let mut own = 0;
            if !mapping.shared {
                own_pages(&map, mapping, |_, length| {
                    own += length;
                    Ok(())
                })?;
            }
            owned.private += own;
            if let Some(offset) = mapping.file_offset {
                let file = self.open(&format!("map_files/{}", mapping.name))?;
                let seen = sparse::allocated(&file, offset, mapping.end - mapping.start)?;
                owned.shared += seen.saturating_sub(own);
            }
            Ok(())
        })?;
        Ok(owned)
    }

    /// All pages of the process's own, RAM or not, in bytes (proc_pid_smaps(5)).
    pub fn anonymous(&self) -> io::Result<u64> {
        let text = as_root(|| fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid)))?;
        let kib = text.lines().find_map(|line| {
            line.strip_prefix("Anonymous:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
        });
        kib.map(|kib| kib * 1024).ok_or_else(|| io::Error::other("smaps_rollup without Anonymous"))
    }

    /// Processor time of the process since it began, in milliseconds (fields 14 and 15 of proc_pid_stat(5)).
    pub fn processor_ms(&self) -> io::Result<u64> {
        let stat = as_root(|| fs::read_to_string(format!("/proc/{}/stat", self.pid)))?;
        let ticks = || {
            let mut times = stat_fields(&stat)?.skip(11).map(str::parse::<u64>);
            Some(times.next()?.ok()? + times.next()?.ok()?)
        };
        let ticks = ticks().ok_or_else(|| io::Error::other("stat without processor times"))?;
        Ok(ticks * 1000 / rustix::param::clock_ticks_per_second())
    }

    /// Calls `act` for each mapping that RAM consists of, with its offset in RAM.
    fn each(&self, mut act: impl FnMut(&Mapping, u64) -> io::Result<()>) -> io::Result<()> {
        let text = as_root(|| fs::read_to_string(format!("/proc/{}/maps", self.pid)))?;
        let mut at = 0;
        for extent in &self.ram {
            let mut covered = extent.start;
            for mapping in mappings(&text, *extent) {
                if mapping.start != covered {
                    break;
                }
                covered = mapping.end;
                act(&mapping, at + (mapping.start - extent.start))?;
            }
            if covered != extent.start + extent.length {
                return Err(io::Error::other(format!("its RAM is not mapped at {covered:#x}")));
            }
            at += extent.length;
        }
        Ok(())
    }

    fn open(&self, name: &str) -> io::Result<File> {
        as_root(|| File::open(format!("/proc/{}/{name}", self.pid)))
    }
}

/// The mappings in `text` (proc_pid_maps(5)) that lie in the extent, cut to it.
fn mappings(text: &str, extent: Extent) -> Vec<Mapping> {
    let (first, last) = (extent.start, extent.start + extent.length);
    let parse = |line: &str| {
        let mut words = line.split_whitespace();
        let name = words.next()?;
        let (start, end) = name.split_once('-')?;
        let hex = |word: &str| u64::from_str_radix(word, 16).ok();
        let (whole, end) = (hex(start)?, hex(end)?);
        let shared = words.next()?.as_bytes().get(3) == Some(&b's');
        let offset = hex(words.next()?)?;
        let inode = words.nth(1)?;
        let (start, end) = (whole.max(first), end.min(last));
        (start < end).then(|| Mapping {
            start,
            end,
            file_offset: (inode != "0").then_some(offset + (start - whole)),
            name: name.to_owned(),
            shared,
        })
    };
    text.lines().filter_map(parse).collect()
}

/// Calls `act` with the first address and the bytes of each run of the process's own pages, none longer than a chunk.
fn own_pages(
    map: &File,
    mapping: &Mapping,
    mut act: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    const ENTRY: u64 = 8;
    let mut entries = vec![0; CHUNK];
    let mut start = mapping.start;
    while start < mapping.end {
        let pages = ((mapping.end - start) / PAGE).min(CHUNK as u64 / ENTRY);
        #[expect(clippy::cast_possible_truncation, reason = "at most a chunk")]
        let entries = &mut entries[..(pages * ENTRY) as usize];
        map.read_exact_at(entries, start / PAGE * ENTRY)?;
        let mut run = 0;
        for (page, entry) in (0..).zip(entries.chunks_exact(8)) {
            let entry = u64::from_ne_bytes(<[u8; 8]>::try_from(entry).unwrap_or_default());
            let own = entry & THERE != 0 && entry & OF_FILE == 0;
            run += u64::from(own);
            let end = start + (page + u64::from(own)) * PAGE;
            let last = page + 1 == pages;
            if run > 0 && (!own || last || run * PAGE == CHUNK as u64) {
                act(end - run * PAGE, run * PAGE)?;
                run = 0;
            }
        }
        start += pages * PAGE;
    }
    Ok(())
}

/// Copies a run of at most a chunk; pages of zeros become holes where `out` has none already.
fn copy_pages(
    memory: &File,
    start: u64,
    length: u64,
    out: &File,
    at: u64,
    buffer: &mut [u8],
) -> io::Result<()> {
    #[expect(clippy::cast_possible_truncation, reason = "at most a chunk")]
    let buffer = &mut buffer[..length as usize];
    memory.read_exact_at(buffer, start)?;
    sparse::write(out, at, buffer)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
7f0000000000-7f0000100000 rw-p 00000000 00:00 0 
7f0000100000-7f0000300000 rw-p 00200000 00:01 77 /memfd:ram (deleted)
7f0000300000-7f0000400000 rw-s 00000000 00:01 78 /memfd:other (deleted)
7f0000500000-7f0000600000 rw-p 00000000 00:00 0
";

    #[test]
    fn mappings_are_cut_to_the_extent_with_their_place_in_the_file() {
        let found = mappings(MAPS, Extent { start: 0x7f00_0008_0000, length: 0x10_0000 });
        assert_eq!(found.len(), 2);
        assert_eq!(
            (found[0].start, found[0].end, found[0].file_offset),
            (0x7f00_0008_0000, 0x7f00_0010_0000, None)
        );
        assert_eq!((found[1].end, found[1].file_offset), (0x7f00_0018_0000, Some(0x20_0000)));
        let found = mappings(MAPS, Extent { start: 0x7f00_0018_0000, length: 0x8_0000 });
        assert_eq!(found[0].file_offset, Some(0x28_0000));
        assert!(mappings(MAPS, Extent { start: 0x7f00_0030_0000, length: PAGE })[0].shared);
    }

    #[test]
    fn the_processor_time_of_a_process_is_told_to_a_tick() {
        let now = || {
            let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID).unwrap();
            u64::try_from(time.tv_sec() * 1000 + time.tv_nsec() / 1_000_000).unwrap()
        };
        while now() < 50 {}
        let before = now();
        let told = Memory::new(std::process::id(), Vec::new()).processor_ms().unwrap();
        let after = now();
        // User and system time are rounded down each, to a tick of 10 ms.
        assert!((before.saturating_sub(20)..=after + 10).contains(&told), "{before} {told} {after}");
    }

    /// Anonymous and private memory of this process, and a file behind the latter.
    fn mapped(file: Option<&File>, pages: usize) -> Extent {
        use std::os::fd::AsRawFd;
        let flags = if file.is_some() { 0 } else { libc::MAP_ANONYMOUS };
        let fd = file.map_or(-1, AsRawFd::as_raw_fd);
        let (length, protection) = (pages * 4096, libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a new mapping where the kernel likes it.
        let start = unsafe {
            let start =
                libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_PRIVATE | flags, fd, 0);
            assert_ne!(start, libc::MAP_FAILED);
            libc::madvise(start, length, libc::MADV_NOHUGEPAGE);
            start
        };
        Extent { start: start as u64, length: length as u64 }
    }

    fn put(extent: Extent, page: u64, value: u8) {
        // SAFETY: the page lies in a mapping of the test's own, which nothing else refers to.
        unsafe { ((extent.start + page * PAGE) as *mut u8).write_volatile(value) };
    }

    fn page(file: &File, page: u64) -> u8 {
        let mut byte = [0];
        file.read_exact_at(&mut byte, page * PAGE).unwrap();
        byte[0]
    }

    #[test]
    fn own_pages_lie_over_those_of_the_file_and_zeros_are_zeros_again() {
        let base = tempfile::tempfile().unwrap();
        base.set_len(64 * PAGE).unwrap();
        for at in [1, 2, 3] {
            base.write_all_at(&[7; 4096], at * PAGE).unwrap();
        }
        let (anonymous, private) = (mapped(None, 600), mapped(Some(&base), 64));
        put(anonymous, 0, 1);
        put(anonymous, 599, 2);
        put(private, 2, 9);
        // SAFETY: as above.
        unsafe { std::ptr::write_bytes((private.start + 3 * PAGE) as *mut u8, 0, 4096) };
        let memory = Memory::new(std::process::id(), vec![anonymous, private]);
        let out = tempfile::tempfile().unwrap();
        if let Err(error) = memory.copy_files(&out).and_then(|()| memory.copy_own(&out)) {
            return println!("SKIPPED: needs root: {error}");
        }
        assert!(!memory.is_shared().unwrap());
        let at = |page_of_private: u64| page(&out, 600 + page_of_private);
        assert_eq!([page(&out, 0), page(&out, 1), page(&out, 599)], [1, 0, 2]);
        assert_eq!([at(0), at(1), at(2), at(3), at(4)], [0, 7, 9, 0, 0]);
        assert_eq!(memory.owned().unwrap(), Owned { private: 4 * PAGE, shared: PAGE });
        assert!(std::os::unix::fs::MetadataExt::blocks(&out.metadata().unwrap()) * 512 <= 8 * PAGE);
    }
}
