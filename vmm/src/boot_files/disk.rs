//! A disk's partitions, and what is in them: MBR with its extended partitions, and GPT (UEFI specification, section 5).

use std::io;

use crate::devices::block::{Image, SECTOR};

/// The same, of memory.
const SECTOR_LENGTH: usize = 512;
/// Most partitions that are looked at.
const MAX_PARTITIONS: usize = 128;
/// Longest entry of a GPT, in bytes.
const MAX_ENTRY: usize = 4096;
/// Type of an MBR's entry that says that there is a GPT.
const PROTECTIVE: u8 = 0xee;
/// Types of extended partitions.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// What can be read anywhere.
pub trait Source {
    /// Its length in bytes.
    fn size(&self) -> u64;
    /// Reads until `bytes` is full.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;
}

impl Source for Image {
    fn size(&self) -> u64 {
        self.size()
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        check_range(self.size(), bytes.len(), offset)?;
        self.read(bytes.into(), offset)
    }
}

impl Source for Vec<u8> {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        check_range(self.size(), bytes.len(), offset)?;
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        bytes.copy_from_slice(&self[at..at + bytes.len()]);
        Ok(())
    }
}

fn check_range(size: u64, length: usize, offset: u64) -> io::Result<()> {
    let end = offset.checked_add(length as u64).filter(|end| *end <= size);
    end.map(drop).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// A part of a disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Where it begins.
    pub start: u64,
    /// How long it is.
    pub length: u64,
}

/// The partitions of a disk; the disk itself if it has none.
pub fn partitions(disk: &dyn Source) -> Vec<Partition> {
    let whole = Partition { start: 0, length: disk.size() };
    let mut sector = [0; SECTOR_LENGTH];
    if disk.read_at(&mut sector, 0).is_err() || sector[510..] != [0x55, 0xaa] {
        return vec![whole];
    }
    let entries = mbr_entries(&sector);
    let mut found = Vec::new();
    if entries.iter().any(|entry| entry.kind == PROTECTIVE) {
        found.extend(gpt(disk));
    } else {
        for entry in entries {
            if EXTENDED.contains(&entry.kind) {
                logical(disk, entry.first, &mut found);
            } else if entry.kind != 0 {
                found.push(entry.partition(0));
            }
        }
    }
    found.retain(|part| part.length > 0 && check_range(disk.size(), 0, part.start).is_ok());
    found.truncate(MAX_PARTITIONS);
    if found.is_empty() { vec![whole] } else { found }
}

/// An entry of an MBR, in sectors.
#[derive(Clone, Copy)]
struct Entry {
    kind: u8,
    first: u64,
    count: u64,
}

impl Entry {
    fn partition(self, base: u64) -> Partition {
        Partition { start: (base + self.first) * SECTOR, length: self.count * SECTOR }
    }
}

fn mbr_entries(sector: &[u8; SECTOR_LENGTH]) -> [Entry; 4] {
    [0, 1, 2, 3].map(|at| {
        let entry = &sector[446 + 16 * at..462 + 16 * at];
        Entry { kind: entry[4], first: u32_at(entry, 8).into(), count: u32_at(entry, 12).into() }
    })
}

/// Logical partitions: each has a table of its own, which names it and the next table.
fn logical(disk: &dyn Source, base: u64, found: &mut Vec<Partition>) {
    let mut table = base;
    for _ in 0..MAX_PARTITIONS {
        let mut sector = [0; SECTOR_LENGTH];
        if disk.read_at(&mut sector, table * SECTOR).is_err() || sector[510..] != [0x55, 0xaa] {
            return;
        }
        let [own, next, ..] = mbr_entries(&sector);
        if own.kind != 0 {
            found.push(own.partition(table));
        }
        if !EXTENDED.contains(&next.kind) || next.first == 0 {
            return;
        }
        table = base + next.first;
    }
}

fn gpt(disk: &dyn Source) -> Vec<Partition> {
    let mut header = [0; SECTOR_LENGTH];
    if disk.read_at(&mut header, SECTOR).is_err() || !header.starts_with(b"EFI PART") {
        return Vec::new();
    }
    let (table, count, size) = (u64_at(&header, 72), u32_at(&header, 80), u32_at(&header, 84) as usize);
    if !(128..=MAX_ENTRY).contains(&size) {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut entry = vec![0; size];
    for number in 0..u64::from(count).min(MAX_PARTITIONS as u64) {
        let at = table.checked_mul(SECTOR).and_then(|at| at.checked_add(number * size as u64));
        if at.is_none_or(|at| disk.read_at(&mut entry, at).is_err()) {
            break;
        }
        let (first, last) = (u64_at(&entry, 32), u64_at(&entry, 40));
        let (Some(start), true) = (first.checked_mul(SECTOR), entry[..16] != [0; 16]) else { continue };
        let count = last.checked_sub(first).and_then(|count| count.checked_add(1));
        if let Some(length) = count.and_then(|count| count.checked_mul(SECTOR)) {
            found.push(Partition { start, length });
        }
    }
    found
}

/// What is in a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// ext2, ext3 or ext4.
    Ext,
    /// Something else, by its name.
    Other(&'static str),
    /// Nothing that is known.
    Unknown,
}

/// Marks of what cannot be read here: where they stand, and whose they are.
const MARKS: [(u64, &[u8], &str); 10] = [
    (0, b"XFSB", "xfs"),
    (0, b"LUKS\xba\xbe", "LUKS, which is encrypted"),
    (512, b"LABELONE", "LVM"),
    (0, b"-FVE-FS-", "BitLocker"),
    (0x1_0040, b"_BHRfS_M", "btrfs"),
    (1024, b"\x10\x20\xf5\xf2", "f2fs"),
    (4086, b"SWAPSPACE2", "swap"),
    (3, b"NTFS    ", "NTFS"),
    (82, b"FAT32   ", "FAT"),
    (54, b"FAT1", "FAT"),
];
/// Where an ext file system has its mark.
const EXT_MARK: (u64, [u8; 2]) = (1024 + 56, [0x53, 0xef]);

/// Looks at what a partition has.
pub fn content(disk: &dyn Source, part: Partition) -> Content {
    let has = |offset: u64, mark: &[u8]| {
        let mut bytes = vec![0; mark.len()];
        let fits = offset + mark.len() as u64 <= part.length;
        let at = part.start.checked_add(offset);
        fits && at.is_some_and(|at| disk.read_at(&mut bytes, at).is_ok()) && bytes == mark
    };
    if has(EXT_MARK.0, &EXT_MARK.1) {
        return Content::Ext;
    }
    let mark = MARKS.into_iter().find(|(offset, mark, _)| has(*offset, mark));
    mark.map_or(Content::Unknown, |(_, _, name)| Content::Other(name))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(disk: &mut [u8], at: usize, bytes: &[u8]) {
        disk[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn table(disk: &mut [u8], sector: usize, entries: &[(u8, u32, u32)]) {
        for (number, (kind, first, count)) in entries.iter().enumerate() {
            let at = sector * 512 + 446 + 16 * number;
            disk[at + 4] = *kind;
            put(disk, at + 8, &first.to_le_bytes());
            put(disk, at + 12, &count.to_le_bytes());
        }
        put(disk, sector * 512 + 510, &[0x55, 0xaa]);
    }

    fn sectors(disk: &Vec<u8>) -> Vec<(u64, u64)> {
        partitions(disk).iter().map(|part| (part.start / 512, part.length / 512)).collect()
    }

    #[test]
    fn primary_and_logical_partitions_are_found() {
        let mut disk = vec![0; 512 * 200];
        table(&mut disk, 0, &[(0x83, 8, 10), (0x05, 40, 100), (0, 1, 1)]);
        table(&mut disk, 40, &[(0x82, 2, 10), (0x05, 20, 30)]);
        table(&mut disk, 60, &[(0x83, 1, 12)]);
        assert_eq!(sectors(&disk), [(8, 10), (42, 10), (61, 12)]);
    }

    #[test]
    fn a_gpt_is_read_and_a_disk_without_a_table_is_one_part() {
        let mut disk = vec![0; 512 * 200];
        assert_eq!(sectors(&disk), [(0, 200)]);
        table(&mut disk, 0, &[(0xee, 1, u32::MAX)]);
        put(&mut disk, 512, b"EFI PART");
        put(&mut disk, 512 + 72, &2_u64.to_le_bytes());
        put(&mut disk, 512 + 80, &128_u32.to_le_bytes());
        put(&mut disk, 512 + 84, &128_u32.to_le_bytes());
        put(&mut disk, 1024 + 128, &[1; 16]);
        put(&mut disk, 1024 + 160, &34_u64.to_le_bytes());
        put(&mut disk, 1024 + 168, &99_u64.to_le_bytes());
        assert_eq!(sectors(&disk), [(34, 66)]);
    }

    #[test]
    fn tables_that_lie_lead_nowhere() {
        let mut disk = vec![0; 512 * 64];
        // A chain that comes back to itself ends.
        table(&mut disk, 0, &[(0x05, 8, 8)]);
        table(&mut disk, 8, &[(0x83, 1, 1), (0x05, 4, 1)]);
        table(&mut disk, 12, &[(0x83, 1, 1), (0x05, 4, 1)]);
        assert_eq!(partitions(&disk).len(), MAX_PARTITIONS);
        // Beyond the end, and as long as can be.
        table(
            &mut disk,
            0,
            &[(0x83, u32::MAX, u32::MAX), (0x83, 1, u32::MAX), (0x05, u32::MAX, 1), (0, 0, 0)],
        );
        assert_eq!(sectors(&disk), [(1, u64::from(u32::MAX))]);
        table(&mut disk, 0, &[(0xee, 1, 1), (0, 0, 0), (0, 0, 0)]);
        put(&mut disk, 512, b"EFI PART");
        for (count, size, at) in
            [(u32::MAX, 128, u64::MAX), (u32::MAX, u32::MAX, 2), (u32::MAX, 0, 2), (9, 128, 2)]
        {
            put(&mut disk, 512 + 72, &at.to_le_bytes());
            put(&mut disk, 512 + 80, &count.to_le_bytes());
            put(&mut disk, 512 + 84, &size.to_le_bytes());
            disk[1024..1024 + 1152].fill(0xff);
            assert_eq!(sectors(&disk), [(0, 64)], "{count} {size}");
        }
    }

    #[test]
    fn what_cannot_be_read_has_its_name() {
        for (at, mark, name) in MARKS {
            let mut disk = vec![0; 1 << 17];
            put(&mut disk, 512 + usize::try_from(at).unwrap(), mark);
            let part = Partition { start: 512, length: (1 << 17) - 512 };
            assert_eq!(content(&disk, part), Content::Other(name));
            assert_eq!(content(&disk, Partition { start: 512, length: at }), Content::Unknown);
        }
        let mut disk = vec![0; 4096];
        put(&mut disk, 1024 + 56, &[0x53, 0xef]);
        assert_eq!(content(&disk, Partition { start: 0, length: 4096 }), Content::Ext);
    }
}
