//! What a queue's thread does: it takes requests until there are none and serves each to its end.

use std::fmt::{self, Debug, Display, Formatter};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use imago::io_buffers::{IoVector, IoVectorMut};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vmm_sys_util::epoll::EventSet;

use super::image::Image;
use super::request::{self, Kind, Parts};
use super::{MAX_DISCARD_RANGES, MAX_RANGE_SECTORS, MAX_ZERO_RANGES, NoRoom, SECTOR, SERIAL_LENGTH};
use crate::memory::GuestRam;
use crate::reactor::EventHandler;
use crate::virtio::{Counters, QueueError, Virtqueue};

/// Requests served before other handlers, and whoever pauses the reactor, get their turn.
const BUDGET: usize = 1024;

/// One queue at work.
#[derive(Debug)]
pub(super) struct Worker {
    /// None once the device was reset.
    pub queue: Option<Virtqueue>,
    pub disk: Disk,
}

impl EventHandler for Worker {
    fn ready(&mut self, _: u32, _: EventSet) {
        let Some(queue) = &mut self.queue else { return };
        queue.take_kick();
        match self.disk.serve(queue) {
            Ok(true) => {}
            Ok(false) => queue.kick_again(),
            Err(error) => queue.give_up(&error),
        }
    }
}

/// Why a request is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    /// The driver is told so.
    Status(u32),
    /// The file system of the image has no room. The request stays where it is.
    NoRoom,
}

const IO_ERROR: Failure = Failure::Status(VIRTIO_BLK_S_IOERR);
const UNSUPPORTED: Failure = Failure::Status(VIRTIO_BLK_S_UNSUPP);

/// What serves a queue's requests.
#[derive(Clone)]
pub(super) struct Disk {
    pub image: Image,
    pub serial: [u8; SERIAL_LENGTH],
    pub features: u64,
    pub counters: Counters,
    pub complaints: Arc<Complaints>,
    pub no_room: NoRoom,
}

impl Debug for Disk {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").field("image", &self.image).finish_non_exhaustive()
    }
}

impl Disk {
    /// Serves what there is; false if more may be left. What finds no room is left for the next turn.
    pub fn serve(&self, queue: &mut Virtqueue) -> Result<bool, QueueError> {
        let memory = GuestRam::clone(queue.memory());
        let mut parts = Parts::default();
        let mut left = BUDGET;
        loop {
            queue.disable_kicks()?;
            while left > 0 {
                let Some(mut chain) = queue.pop()? else { break };
                left -= 1;
                let written = if parts.gather(&mut chain, &memory).is_ok() {
                    self.answer(&mut parts)
                } else {
                    self.counters.failed();
                    Some(0)
                };
                let Some(written) = written else {
                    queue.undo_pop();
                    queue.notify()?;
                    (self.no_room)();
                    return Ok(false);
                };
                queue.push(chain.head_index(), written)?;
            }
            // All that was served so far takes one interrupt.
            queue.notify()?;
            if left == 0 {
                return Ok(false);
            }
            if !queue.enable_kicks()? {
                return Ok(true);
            }
        }
    }

    /// Serves one request and returns how many bytes of the chain were written; `None` if there is no room.
    fn answer(&self, parts: &mut Parts<'_>) -> Option<u32> {
        let (status, written) = match self.handle(parts) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Failure::NoRoom) => return None,
            Err(Failure::Status(status)) => {
                self.counters.failed();
                (status, 0)
            }
        };
        parts.answer(status);
        Some(written.saturating_add(1))
    }

    fn handle(&self, parts: &mut Parts<'_>) -> Result<u32, Failure> {
        match parts.take_header().ok_or(IO_ERROR)? {
            Kind::Read(offset) => self.read(parts, offset),
            Kind::Write(offset) => self.write(parts, offset).map(|()| 0),
            Kind::Flush => self.done("flush", self.image.flush()).map(|()| 0),
            Kind::Identify => Ok(self.identify(parts)),
            Kind::Discard if self.has(VIRTIO_BLK_F_DISCARD) => self.discard(parts).map(|()| 0),
            Kind::WriteZeroes if self.has(VIRTIO_BLK_F_WRITE_ZEROES) => self.write_zeroes(parts).map(|()| 0),
            Kind::Discard | Kind::WriteZeroes if self.image.is_read_only() => Err(IO_ERROR),
            Kind::Discard | Kind::WriteZeroes | Kind::Unknown => Err(UNSUPPORTED),
        }
    }

    fn read(&self, parts: &mut Parts<'_>, offset: u64) -> Result<u32, Failure> {
        let length = request::length(&parts.writable);
        self.check(offset, length)?;
        if length == 0 {
            return Ok(0);
        }
        let (data, guard) = IoVectorMut::from_volatile_slice(&parts.writable);
        let read = self.image.read(data, offset);
        drop(guard);
        self.done("read", read)?;
        let length = u32::try_from(length).map_err(|_| IO_ERROR)?;
        self.counters.read(length as usize);
        Ok(length)
    }

    fn write(&self, parts: &mut Parts<'_>, offset: u64) -> Result<(), Failure> {
        let length = request::length(&parts.readable);
        self.check_writable()?;
        self.check(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        let (data, guard) = IoVector::from_volatile_slice(&parts.readable);
        let written = self.image.write(data, offset);
        drop(guard);
        self.done("write", written)?;
        self.counters.written(usize::try_from(length).unwrap_or(usize::MAX));
        if self.has(VIRTIO_BLK_F_FLUSH) {
            return Ok(());
        }
        // A driver that cannot flush must not lose what it wrote (section 5.2.6.2).
        self.done("flush", self.image.flush())
    }

    fn identify(&self, parts: &Parts<'_>) -> u32 {
        let mut done = 0;
        for slice in &parts.writable {
            let piece = slice.len().min(SERIAL_LENGTH - done);
            slice.copy_from(&self.serial[done..done + piece]);
            done += piece;
        }
        u32::try_from(done).unwrap_or(0)
    }

    fn discard(&self, parts: &mut Parts<'_>) -> Result<(), Failure> {
        for_ranges(parts, MAX_DISCARD_RANGES, |range| {
            if range.flags != 0 {
                return Err(UNSUPPORTED);
            }
            let (offset, length) = self.bounds(range)?;
            self.done("discard", self.image.discard(offset, length))
        })
    }

    fn write_zeroes(&self, parts: &mut Parts<'_>) -> Result<(), Failure> {
        for_ranges(parts, MAX_ZERO_RANGES, |range| {
            if range.flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                return Err(UNSUPPORTED);
            }
            let (offset, length) = self.bounds(range)?;
            let unmap = range.flags != 0;
            self.done("write zeroes", self.image.write_zeroes(offset, length, unmap))
        })?;
        if self.has(VIRTIO_BLK_F_FLUSH) { Ok(()) } else { self.done("flush", self.image.flush()) }
    }

    /// A range's offset and length in bytes.
    fn bounds(&self, range: request::Range) -> Result<(u64, u64), Failure> {
        let offset = range.sector.checked_mul(SECTOR).ok_or(IO_ERROR)?;
        let length = u64::from(range.sectors) * SECTOR;
        self.check_writable()?;
        self.check(offset, length)?;
        if range.sectors > MAX_RANGE_SECTORS { Err(IO_ERROR) } else { Ok((offset, length)) }
    }

    fn check(&self, offset: u64, length: u64) -> Result<(), Failure> {
        let end = offset.checked_add(length).ok_or(IO_ERROR)?;
        if !length.is_multiple_of(SECTOR) || end > self.image.size() { Err(IO_ERROR) } else { Ok(()) }
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.image.is_read_only() { Err(IO_ERROR) } else { Ok(()) }
    }

    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    fn done(&self, what: &str, result: io::Result<()>) -> Result<(), Failure> {
        result.map_err(|error| match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Failure::NoRoom,
            _ => {
                self.complaints.complain(what, &error);
                IO_ERROR
            }
        })
    }
}

/// Calls `each` for every range of a request; they must be whole, and not too many.
fn for_ranges(
    parts: &mut Parts<'_>,
    most: u32,
    mut each: impl FnMut(request::Range) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let length = request::length(&parts.readable);
    let size = request::RANGE as u64;
    if length == 0 || !length.is_multiple_of(size) || length / size > u64::from(most) {
        return Err(IO_ERROR);
    }
    while let Some(range) = parts.take_range() {
        each(range)?;
    }
    Ok(())
}

/// Tells on stderr that the disk fails, at most once a second: the guest may ask again as fast as it can.
#[derive(Debug, Default)]
pub(super) struct Complaints(Mutex<Option<Instant>>);

impl Complaints {
    const PAUSE: Duration = Duration::from_secs(1);

    /// Tells it; false if that was too soon.
    pub fn complain(&self, what: &str, error: &dyn Display) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| last.elapsed() < Self::PAUSE) {
            return false;
        }
        *last = Some(Instant::now());
        eprintln!(
            "catalyst-vmm: a disk failed under the guest, which sees an I/O error: cannot {what}: {error}"
        );
        true
    }
}
