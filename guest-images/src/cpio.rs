//! Writes initial RAM disks.
//!
//! Format: "newc" of cpio (Linux, Documentation/driver-api/early-userspace/buffer-format.rst): per file a header
//! of ASCII hexadecimal numbers, the name and the content, each padded to 4 bytes; at the end `TRAILER!!!`.
//! Uncompressed: unpacking costs the virtual CPU more than reading costs the host.

use std::io::{self, Write};

/// Type bits of a folder's mode (inode(7)).
const FOLDER: u32 = 0o040_000;
/// Type bits of a plain file's mode.
const FILE: u32 = 0o100_000;

/// Length of an entry's header in bytes.
const HEADER: usize = 6 + 13 * 8;

/// Writes an archive, file by file. All belongs to root and has no time, so that the same content gives the
/// same bytes.
#[derive(Debug)]
pub struct CpioWriter<W: Write> {
    output: W,
    inode: u32,
}

impl<W: Write> CpioWriter<W> {
    /// An empty archive.
    pub fn new(output: W) -> Self {
        Self { output, inode: 0 }
    }

    /// Adds a folder with the permissions `mode`.
    pub fn folder(&mut self, name: &str, mode: u32) -> io::Result<()> {
        self.entry(name, FOLDER | mode, &[])
    }

    /// Adds a file with the permissions `mode`.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(name, FILE | mode, content)
    }

    /// Ends the archive.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.output)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let size = u32::try_from(content.len()).map_err(io::Error::other)?;
        let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        write!(self.output, "070701")?;
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        for field in [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            write!(self.output, "{field:08x}")?;
        }
        self.output.write_all(name.as_bytes())?;
        self.output.write_all(&[0])?;
        self.pad(HEADER + name.len() + 1)?;
        self.output.write_all(content)?;
        self.pad(content.len())
    }

    fn pad(&mut self, length: usize) -> io::Result<()> {
        self.output.write_all(&[0; 3][..length.wrapping_neg() % 4])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_the_archive_ends_in_its_trailer() {
        let mut archive = CpioWriter::new(Vec::new());
        archive.folder("bin", 0o755).unwrap();
        archive.file("bin/a", 0o700, b"abcde").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[14..22], b"000041ed");
        let second = bytes[4..].windows(6).position(|at| at == b"070701").unwrap() + 4;
        assert_eq!(second % 4, 0);
        assert_eq!(&bytes[second + 54..second + 62], b"00000005");
        assert!(bytes.windows(10).any(|at| at == b"TRAILER!!!"));
    }
}
