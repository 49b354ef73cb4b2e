//! What a driver asks for, read from a chain of descriptors (virtio 1.2, section 5.2.6).

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, VolatileSlice};

use super::{MAX_SEGMENTS, SECTOR};
use crate::virtio::queue::Chain;

/// Bytes before a request's data.
const HEADER: usize = 16;
/// Bytes of one range to discard or to zero.
pub(super) const RANGE: usize = 16;
/// Most bytes of one request's data: one request must not keep a queue's thread for long.
const MAX_BYTES: u64 = 1 << 30;
/// Header and status may lie in descriptors of their own.
const MAX_PARTS: usize = MAX_SEGMENTS as usize + 2;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Read from this offset in bytes.
    Read(u64),
    /// Write at this offset in bytes.
    Write(u64),
    Flush,
    Identify,
    Discard,
    WriteZeroes,
    Unknown,
}

/// A chain that cannot even be answered: broken, too long, outside memory, or without a place for the status.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Unanswerable;

/// The parts of one chain. It is used again for the next one, so that a request costs no allocation.
#[derive(Debug, Default)]
pub(super) struct Parts<'a> {
    /// What the device reads; after [`Parts::take_header`] the data only.
    pub readable: Vec<VolatileSlice<'a>>,
    /// What the device writes, but for the status.
    pub writable: Vec<VolatileSlice<'a>>,
    status: Option<VolatileSlice<'a>>,
}

impl<'a> Parts<'a> {
    /// Takes the next chain. A descriptor must lie in one range of guest memory.
    pub fn gather(&mut self, chain: &mut Chain, memory: &'a GuestMemoryMmap<()>) -> Result<(), Unanswerable> {
        self.readable.clear();
        self.writable.clear();
        self.status = None;
        let mut goes_on = true;
        let mut bytes = 0;
        for descriptor in chain.by_ref() {
            goes_on = descriptor.has_next();
            bytes += u64::from(descriptor.len());
            let full = self.readable.len() + self.writable.len() == MAX_PARTS;
            // What is read comes before what is written (section 2.7.4.2).
            let order = descriptor.is_write_only() || self.writable.is_empty();
            if full || !order || bytes > MAX_BYTES {
                return Err(Unanswerable);
            }
            if descriptor.len() == 0 {
                continue;
            }
            let slice = memory
                .get_slice(GuestAddress(descriptor.addr().0), descriptor.len() as usize)
                .map_err(|_| Unanswerable)?;
            if descriptor.is_write_only() { self.writable.push(slice) } else { self.readable.push(slice) }
        }
        // A chain that loops, or that leads out of memory, ends before its last descriptor.
        if goes_on {
            return Err(Unanswerable);
        }
        let last = self.writable.pop().ok_or(Unanswerable)?;
        let (data, status) = last.split_at(last.len() - 1).map_err(|_| Unanswerable)?;
        if !data.is_empty() {
            self.writable.push(data);
        }
        self.status = Some(status);
        Ok(())
    }

    /// Writes the status, the last byte that the device writes.
    pub fn answer(&self, status: u32) {
        if let Some(slice) = &self.status {
            // A slice of one byte takes one byte.
            #[expect(clippy::cast_possible_truncation, reason = "all statuses are below 256")]
            let _ = slice.write_obj(status as u8, 0);
        }
    }

    /// Reads the header off the front of what the device reads, however it is cut.
    pub fn take_header(&mut self) -> Option<Kind> {
        let mut header = [0; HEADER];
        take(&mut self.readable, &mut header)?;
        let (kind, rest) = header.split_first_chunk()?;
        let offset = u64::from_le_bytes(*rest.last_chunk()?).checked_mul(SECTOR);
        Some(match u32::from_le_bytes(*kind) {
            VIRTIO_BLK_T_IN => Kind::Read(offset?),
            VIRTIO_BLK_T_OUT => Kind::Write(offset?),
            VIRTIO_BLK_T_FLUSH => Kind::Flush,
            VIRTIO_BLK_T_GET_ID => Kind::Identify,
            VIRTIO_BLK_T_DISCARD => Kind::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Kind::WriteZeroes,
            _ => Kind::Unknown,
        })
    }

    /// Reads the next range off the front of what the device reads.
    pub fn take_range(&mut self) -> Option<Range> {
        let mut bytes = [0; RANGE];
        take(&mut self.readable, &mut bytes)?;
        let (sector, rest) = bytes.split_first_chunk()?;
        let (sectors, rest) = rest.split_first_chunk()?;
        let flags = u32::from_le_bytes(*rest.first_chunk()?);
        Some(Range { sector: u64::from_le_bytes(*sector), sectors: u32::from_le_bytes(*sectors), flags })
    }
}

/// A range to discard or to zero.
#[derive(Clone, Copy, Debug)]
pub(super) struct Range {
    pub sector: u64,
    pub sectors: u32,
    pub flags: u32,
}

/// Bytes of all slices.
pub(super) fn length(slices: &[VolatileSlice<'_>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}

/// Copies from the front of the slices and cuts that off; nothing if there is too little.
fn take(slices: &mut Vec<VolatileSlice<'_>>, bytes: &mut [u8]) -> Option<()> {
    let mut done = 0;
    let mut whole = 0;
    while done < bytes.len() {
        let slice = slices.get_mut(whole)?;
        let piece = slice.len().min(bytes.len() - done);
        slice.subslice(0, piece).ok()?.copy_to(&mut bytes[done..done + piece]);
        done += piece;
        if piece == slice.len() {
            whole += 1;
        } else {
            *slice = slice.offset(piece).ok()?;
        }
    }
    slices.drain(..whole);
    Some(())
}
