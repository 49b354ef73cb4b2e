//! Sparse files: what was never written stays a hole when they are copied.

use std::fs::File;
use std::io::{self, Seek};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

/// Bytes of a page: zeros are looked for, and holes made, in these.
const PAGE: usize = 4096;

/// Copies `length` bytes at `from_offset` of `from` to `to_offset` of `to`, where there must be a hole. What is beyond
/// the end of `from` counts as a hole. The position of `from` changes.
pub fn copy_range(from: &File, from_offset: u64, to: &File, to_offset: u64, length: u64) -> io::Result<()> {
    each_piece(from, from_offset, length, |start, length| {
        let mut source = start;
        let mut left = length;
        let mut to = to;
        to.seek(io::SeekFrom::Start(to_offset + (start - from_offset)))?;
        while left > 0 {
            let count = usize::try_from(left).unwrap_or(usize::MAX).min(1 << 30);
            match rustix::fs::sendfile(to, from, Some(&mut source), count)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                sent => left -= sent as u64,
            }
        }
        Ok(())
    })
}

/// Copies a whole file, its length included.
pub fn copy(from: &File, to: &File) -> io::Result<()> {
    let length = from.metadata()?.len();
    to.set_len(length)?;
    copy_range(from, 0, to, 0, length)
}

/// Bytes of `length` at `offset` that are no hole. The position of `file` changes.
pub fn allocated(file: &File, offset: u64, length: u64) -> io::Result<u64> {
    let mut sum = 0;
    each_piece(file, offset, length, |_, length| {
        sum += length;
        Ok(())
    })?;
    Ok(sum)
}

/// Calls `act` with offset and length of each piece of data (lseek(2), SEEK_DATA).
fn each_piece(
    file: &File,
    offset: u64,
    length: u64,
    mut act: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let (mut at, end) = (offset, offset + length);
    while at < end {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) if start < end => start,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let stop = seek(file, SeekFrom::Hole(start))?.min(end);
        act(start, stop - start)?;
        at = stop;
    }
    Ok(())
}

/// Makes a hole.
pub fn punch(file: impl AsFd, offset: u64, length: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(fallocate(file, flags, offset, length)?)
}

/// Writes whole pages at `offset`; those of zeros become holes.
pub fn write(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let zeros = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let mut rest = bytes;
    let mut at = offset;
    while !rest.is_empty() {
        let hole = zeros(&rest[..PAGE.min(rest.len())]);
        let pages = rest.chunks(PAGE).take_while(|page| zeros(page) == hole).count();
        let (run, after) = rest.split_at((pages * PAGE).min(rest.len()));
        if hole {
            punch(file, at, run.len() as u64)?;
        } else {
            file.write_all_at(run, at)?;
        }
        (rest, at) = (after, at + run.len() as u64);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn holes_stay_holes_and_zeros_become_holes() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        from.set_len(1 << 30).unwrap();
        let mut bytes = vec![0; 8 * PAGE];
        bytes[2 * PAGE] = 7;
        bytes[7 * PAGE + 5] = 8;
        write(&from, 1 << 20, &bytes).unwrap();
        assert_eq!(allocated(&from, 0, 1 << 30).unwrap(), 2 * PAGE as u64);
        copy(&from, &to).unwrap();
        assert_eq!(to.metadata().unwrap().len(), 1 << 30);
        assert!(to.metadata().unwrap().blocks() * 512 <= 4 * PAGE as u64);
        let mut read = vec![1; 8 * PAGE];
        to.read_exact_at(&mut read, 1 << 20).unwrap();
        assert_eq!(read, bytes);
        write(&to, 1 << 20, &vec![0; 8 * PAGE]).unwrap();
        assert_eq!(allocated(&to, 0, 1 << 30).unwrap(), 0);
    }

    #[test]
    fn a_part_is_copied_to_where_it_is_wanted_and_past_the_end_there_is_nothing() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        from.write_all_at(&[1; 3 * PAGE], 0).unwrap();
        to.set_len(1 << 20).unwrap();
        copy_range(&from, PAGE as u64, &to, 8 * PAGE as u64, 64 * PAGE as u64).unwrap();
        let mut read = vec![9; 3 * PAGE];
        to.read_exact_at(&mut read, 8 * PAGE as u64).unwrap();
        assert_eq!((read[0], read[2 * PAGE - 1], read[2 * PAGE]), (1, 1, 0));
        assert_eq!(to.metadata().unwrap().len(), 1 << 20);
    }
}
