//! The pieces of guest memory that a driver's descriptor chains name, as readv and writev take them.

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::RawFd;

use vm_memory::{GuestMemory, VolatileSlice};

use super::{HEADER, MAX_FRAME};
use crate::memory::GuestRam;
use crate::virtio::queue::Chain;

/// Most pieces at once: what the kernel takes (IOV_MAX, 1024), less one for a buffer of the device's own.
pub const MAX_PIECES: usize = 1023;

/// A chain that is not as it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadChain {
    /// It has a descriptor that the device writes where it reads, or the other way round.
    #[error("a descriptor goes the wrong way")]
    Direction,
    /// It leads outside of guest memory.
    #[error("a descriptor lies outside memory")]
    Outside,
    /// It loops, or its next descriptor cannot be read.
    #[error("the chain has no end")]
    Endless,
    /// It has more than [`MAX_PIECES`] descriptors.
    #[error("the chain has too many descriptors")]
    TooManyPieces,
    /// It is longer than a frame can be, or shorter than a header.
    #[error("the chain has {0} bytes")]
    Length(usize),
}

/// Which way the bytes of a chain go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device reads the chain.
    FromGuest,
    /// The device writes the chain.
    ToGuest,
}

impl Direction {
    /// Bytes that a chain may have.
    fn lengths(self) -> RangeInclusive<usize> {
        match self {
            Self::FromGuest => HEADER + 1..=MAX_FRAME,
            // A buffer may be longer than any frame; what it has besides is not used.
            Self::ToGuest => HEADER..=u32::MAX as usize,
        }
    }
}

/// What a chain added to [`Pieces`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Added {
    /// Bytes of the chain.
    pub bytes: usize,
    /// Pieces that they are in.
    pub pieces: usize,
}

/// Pieces of guest memory, in order. All of them lie within memory that it holds.
pub struct Pieces {
    memory: GuestRam,
    list: Vec<libc::iovec>,
}

// SAFETY: the pointers lead into guest memory, which `memory` keeps mapped and any thread may access.
unsafe impl Send for Pieces {}

impl std::fmt::Debug for Pieces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pieces").field("count", &self.list.len()).finish_non_exhaustive()
    }
}

impl Pieces {
    /// None yet.
    pub fn new(memory: GuestRam) -> Self {
        Self { memory, list: Vec::new() }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.list.len()
    }

    /// Forgets all of them.
    pub fn clear(&mut self) {
        self.list.clear();
    }

    /// Forgets the first `count`.
    pub fn remove_first(&mut self, count: usize) {
        self.list.drain(..count.min(self.list.len()));
    }

    /// Adds a chain's pieces, or nothing if it is bad. There may be more than [`MAX_PIECES`] afterwards: who adds
    /// several chains looks at [`Pieces::count`], and takes the last one back by [`Pieces::remove_last`].
    pub fn add(&mut self, chain: Chain, direction: Direction) -> Result<Added, BadChain> {
        let before = self.list.len();
        let added = self.try_add(chain, direction);
        if added.is_err() {
            self.list.truncate(before);
        }
        added
    }

    fn try_add(&mut self, chain: Chain, direction: Direction) -> Result<Added, BadChain> {
        let before = self.list.len();
        let (mut bytes, mut descriptors, mut unfinished) = (0, 0, true);
        for descriptor in chain {
            if descriptor.is_write_only() != (direction == Direction::ToGuest) {
                return Err(BadChain::Direction);
            }
            descriptors += 1;
            let length = descriptor.len() as usize;
            for slice in self.memory.get_slices(descriptor.addr(), length) {
                let slice = slice.map_err(|_| BadChain::Outside)?;
                let iov_base = slice.ptr_guard_mut().as_ptr().cast();
                self.list.push(libc::iovec { iov_base, iov_len: slice.len() });
            }
            // Descriptors of no length count too, or a chain could keep the device busy for long.
            if descriptors > MAX_PIECES || self.list.len() - before > MAX_PIECES {
                return Err(BadChain::TooManyPieces);
            }
            bytes += length;
            unfinished = descriptor.has_next();
        }
        if unfinished {
            return Err(BadChain::Endless);
        }
        if !direction.lengths().contains(&bytes) {
            return Err(BadChain::Length(bytes));
        }
        Ok(Added { bytes, pieces: self.list.len() - before })
    }

    /// Forgets the last `count`.
    pub fn remove_last(&mut self, count: usize) {
        self.list.truncate(self.list.len().saturating_sub(count));
    }

    /// Copies `bytes` to where the first piece begins and `offset` bytes further; what is beyond the last is left
    /// out.
    pub fn write_at(&self, mut offset: usize, mut bytes: &[u8]) {
        for piece in &self.list {
            if bytes.is_empty() {
                return;
            }
            if offset >= piece.iov_len {
                offset -= piece.iov_len;
                continue;
            }
            // SAFETY: a piece lies within memory that `self.memory` keeps mapped, and the guest's memory is accessed
            // by volatile accesses only.
            let slice = unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len) };
            let length = bytes.len().min(piece.iov_len - offset);
            if let Ok(target) = slice.subslice(offset, length) {
                target.copy_from(&bytes[..length]);
            }
            bytes = &bytes[length..];
            offset = 0;
        }
    }

    /// Reads into the pieces, and what is more than they hold into `overflow` (readv(2)). Returns how much was read
    /// in all.
    pub fn read_from(&mut self, fd: RawFd, overflow: &mut [u8]) -> io::Result<usize> {
        let pieces = self.list.len();
        if !overflow.is_empty() {
            self.list.push(libc::iovec { iov_base: overflow.as_mut_ptr().cast(), iov_len: overflow.len() });
        }
        let result = call(|| {
            // SAFETY: the pieces are memory that stays mapped and on whose content nobody relies; the last one may
            // be a buffer that is borrowed for as long as this takes.
            unsafe { libc::readv(fd, self.list.as_ptr(), int(self.list.len())) }
        });
        self.list.truncate(pieces);
        result
    }

    /// Writes all pieces at once (writev(2)).
    pub fn write_to(&self, fd: RawFd) -> io::Result<usize> {
        call(|| {
            // SAFETY: the pieces are memory that stays mapped.
            unsafe { libc::writev(fd, self.list.as_ptr(), int(self.list.len())) }
        })
    }
}

fn int(count: usize) -> libc::c_int {
    libc::c_int::try_from(count).unwrap_or(libc::c_int::MAX)
}

/// Calls until no signal comes between.
fn call(mut what: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        let result = what();
        if let Ok(length) = usize::try_from(result) {
            return Ok(length);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
