//! SHA-256 of files, of sparse ones without reading their holes.
//!
//! The digest of a sparse file is SHA-256 over: its length (8 bytes, little endian), then for each block of
//! 64 KiB that is not all zeros, in order, the block's number (8 bytes, little endian) and its bytes (the last
//! block may be short). So it does not matter which zeros the file system stores and which are holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

pub use catalyst_agent_protocol::hex;
use nix::unistd::Whence;
use sha2::{Digest, Sha256};

/// Bytes that one step reads; the unit in which zeros are left out.
const BLOCK: u64 = 64 << 10;

/// SHA-256 of the file at `path` in hexadecimal, `sparse` or plain. `read` is told the bytes of the file that
/// were covered since its last call, holes included.
pub fn sha256_file(path: &Path, sparse: bool, mut read: impl FnMut(u64)) -> io::Result<String> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut hash = Sha256::new();
    let mut buffer = vec![0; usize::try_from(BLOCK).unwrap_or(0)];
    if sparse {
        hash.update(size.to_le_bytes());
    }
    let mut at = 0;
    while at < size {
        if sparse {
            // Stepped down to the block's start: data may begin in its midst.
            let data = next_data(&file, at)?.unwrap_or(size) / BLOCK * BLOCK;
            let data = if data < at { at } else { data };
            if data > at {
                let to = if next_data(&file, at)?.is_none() { size } else { data };
                read(to - at);
                at = to;
                continue;
            }
        }
        let length = usize::try_from(BLOCK.min(size - at)).unwrap_or(0);
        let block = &mut buffer[..length];
        file.read_exact_at(block, at)?;
        if !sparse {
            hash.update(&*block);
        } else if block.iter().any(|byte| *byte != 0) {
            hash.update((at / BLOCK).to_le_bytes());
            hash.update(&*block);
        }
        at += length as u64;
        read(length as u64);
    }
    Ok(hex(&hash.finalize()))
}

/// Where the data at or after `offset` begins; `None` if only a hole follows (lseek(2), SEEK_DATA).
fn next_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    match nix::unistd::lseek(file, offset, Whence::SeekData) {
        Ok(data) => u64::try_from(data).map(Some).map_err(io::Error::other),
        Err(nix::errno::Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest_of(content: &[u8], holes: bool) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(content.len() as u64).unwrap();
        for (number, block) in content.chunks(4096).enumerate() {
            if !holes || block.iter().any(|byte| *byte != 0) {
                file.as_file().write_all_at(block, number as u64 * 4096).unwrap();
            }
        }
        let mut covered = 0;
        let digest = sha256_file(file.path(), true, |bytes| covered += bytes).unwrap();
        assert_eq!(covered, content.len() as u64);
        digest
    }

    #[test]
    fn stored_zeros_and_holes_have_one_digest() {
        let mut content = vec![0; 1_000_000];
        content[70_000] = 1;
        content[999_999] = 2;
        assert_eq!(digest_of(&content, true), digest_of(&content, false));
    }

    #[test]
    fn place_and_length_change_the_digest_of_a_sparse_file() {
        let mut content = vec![0; 400_000];
        content[0] = 1;
        let first = digest_of(&content, true);
        content.swap(0, 70_000);
        assert_ne!(digest_of(&content, true), first);
        content.swap(0, 70_000);
        content.push(0);
        assert_ne!(digest_of(&content, true), first);
    }

    #[test]
    fn a_plain_file_has_the_digest_that_sha256sum_prints() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"abc").unwrap();
        let digest = sha256_file(file.path(), false, |_| ()).unwrap();
        assert_eq!(digest, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
