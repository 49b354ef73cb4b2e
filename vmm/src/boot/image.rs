//! A kernel image as the loader reads it: mapped, and without its zeros.
//!
//! Nearly half of a Linux `vmlinux` is pages of zeros, most of them `.bss` that the linker wrote out. Guest memory is zeros
//! already, so they are not copied; and what the page cache holds is copied once, from the mapping.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    Bytes, FileOffset, MmapRegion, ReadVolatile, VolatileMemory, VolatileMemoryError, VolatileSlice,
};

/// What is looked at, and copied or not, at once: half a page stays in the processor's first cache.
const PIECE: usize = 2048;

/// A longer file is read as far as the loader asks for it only: nothing says that it is a kernel.
const READ_AHEAD: usize = 256 << 20;

/// A mapped file with a position. A file that another process cuts short meanwhile ends this one (SIGBUS), which is not
/// running a guest yet.
pub struct Image {
    map: Option<MmapRegion<()>>,
    length: usize,
    at: usize,
}

impl Image {
    /// Maps all of `file`.
    pub fn new(file: File) -> io::Result<Self> {
        let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        if length == 0 {
            return Ok(Self { map: None, length, at: 0 });
        }
        let ahead = if length <= READ_AHEAD { libc::MAP_POPULATE } else { 0 };
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | ahead;
        let map = MmapRegion::build(Some(FileOffset::new(file, 0)), length, libc::PROT_READ, flags)
            .map_err(io::Error::other)?;
        Ok(Self { map: Some(map), length, at: 0 })
    }

    /// What is left, at most `most` bytes of it.
    fn rest(&mut self, most: usize) -> Result<Option<VolatileSlice<'_>>, VolatileMemoryError> {
        let count = most.min(self.length.saturating_sub(self.at));
        let Some(map) = self.map.as_ref().filter(|_| count > 0) else { return Ok(None) };
        let slice = map.get_slice(self.at, count)?;
        self.at += count;
        Ok(Some(slice))
    }
}

impl Read for Image {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = self.rest(buffer.len()).map_err(io::Error::other)?;
        Ok(rest.map_or(0, |rest| rest.copy_to(buffer)))
    }
}

impl Seek for Image {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let (base, offset) = match to {
            SeekFrom::Start(at) => (0, i64::try_from(at).ok()),
            SeekFrom::End(offset) => (self.length, Some(offset)),
            SeekFrom::Current(offset) => (self.at, Some(offset)),
        };
        let at = offset
            .and_then(|offset| i64::try_from(base).ok()?.checked_add(offset))
            .and_then(|at| usize::try_from(at).ok())
            .ok_or(io::ErrorKind::InvalidInput)?;
        self.at = at;
        Ok(at as u64)
    }
}

impl ReadVolatile for Image {
    /// Copies to memory that holds zeros.
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let Some(rest) = self.rest(buffer.len())? else { return Ok(0) };
        let mut piece = [0; PIECE];
        let mut done = 0;
        while done < rest.len() {
            let count = rest.offset(done)?.copy_to(&mut piece);
            let bytes = &piece[..count];
            if bytes != &[0; PIECE][..count] {
                buffer.write_slice(bytes, done)?;
            }
            done += count;
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::memory::{Backing, map, tests::resident};

    const PAGE: usize = 4096;

    fn image(bytes: &[u8]) -> Image {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Image::new(file).unwrap()
    }

    fn copy(image: &mut Image, memory: &GuestMemoryMmap<()>, length: usize) -> usize {
        memory.read_volatile_from(GuestAddress(0), image, length).unwrap()
    }

    #[test]
    fn bytes_arrive_and_pages_of_zeros_are_not_touched() {
        let mut bytes = vec![0; 16 * PAGE + 7];
        bytes[..3].copy_from_slice(b"abc");
        bytes[9 * PAGE - 1] = 1;
        bytes[16 * PAGE + 6] = 2;
        let memory = map(1, Backing::Anonymous, false).unwrap();
        assert_eq!(copy(&mut image(&bytes), &memory, bytes.len()), bytes.len());
        assert_eq!(resident(&memory, 0..17), 3);
        let mut found = vec![9; bytes.len()];
        memory.read_slice(&mut found, GuestAddress(0)).unwrap();
        assert_eq!(found, bytes);
    }

    #[test]
    fn it_is_read_from_where_it_was_put_and_ends_where_the_file_ends() {
        let mut image = image(b"0123456789");
        assert_eq!(image.seek(SeekFrom::End(-4)).unwrap(), 6);
        assert_eq!(image.seek(SeekFrom::Current(1)).unwrap(), 7);
        assert!(image.seek(SeekFrom::Current(-8)).is_err());
        let mut text = String::new();
        image.read_to_string(&mut text).unwrap();
        assert_eq!(text, "789");
        let memory = map(1, Backing::Anonymous, false).unwrap();
        assert_eq!(copy(&mut image, &memory, 8), 0);
        image.seek(SeekFrom::Start(u64::MAX >> 1)).unwrap();
        assert_eq!(copy(&mut image, &memory, 8), 0);
        image.rewind().unwrap();
        assert_eq!(copy(&mut image, &memory, 20), 10);
    }

    #[test]
    fn an_empty_file_is_an_image_without_bytes() {
        assert_eq!(image(b"").read(&mut [0; 4]).unwrap(), 0);
    }
}
