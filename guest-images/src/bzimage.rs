//! Unpacks the ELF kernel out of a bzImage.
//!
//! Source: Linux, Documentation/x86/boot.rst ("The Linux/x86 Boot Protocol"), fields `setup_sects`, `header`,
//! `version`, `payload_offset` and `payload_length`. The payload is the compressed ELF `vmlinux`, followed by its
//! unpacked length as 4 bytes (little endian); gzip ends in such a length by itself.

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use linux_loader::loader::bootparam::setup_header;

/// Offset of the setup header in the file.
const HEADER_AT: usize = 0x1f1;
/// The header's magic, "HdrS".
const MAGIC: u32 = 0x5372_6448;
/// First version of the protocol that says where the payload is.
const MIN_VERSION: u16 = 0x0208;
/// Length of a sector, the unit of `setup_sects`.
const SECTOR: usize = 512;
/// A kernel unpacks to no more than this many bytes.
const MAX_UNPACKED: u32 = 512 << 20;

/// How the kernel in a bzImage is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// gzip.
    Gzip,
    /// xz.
    Xz,
    /// Zstandard.
    Zstd,
    /// LZ4, the old frame format.
    Lz4,
}

impl Compression {
    /// The compression that the first bytes of a payload show.
    fn of(payload: &[u8]) -> Option<Self> {
        [
            (&b"\x1f\x8b\x08"[..], Self::Gzip),
            (&b"\xfd7zXZ\0"[..], Self::Xz),
            (&b"\x28\xb5\x2f\xfd"[..], Self::Zstd),
            (&b"\x02\x21\x4c\x18"[..], Self::Lz4),
        ]
        .into_iter()
        .find_map(|(magic, kind)| payload.starts_with(magic).then_some(kind))
    }

    /// The program that unpacks it from its standard input to its standard output.
    pub fn program(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
        }
    }
}

/// The compressed kernel inside a bzImage.
#[derive(Debug, PartialEq, Eq)]
pub struct Payload<'a> {
    /// How it is compressed.
    pub compression: Compression,
    /// The compressed bytes, without the length behind them.
    pub data: &'a [u8],
    /// Length of the ELF file in bytes.
    pub unpacked: u32,
}

/// Why no kernel could be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum BzImageError {
    /// No bzImage at all.
    #[error("it is no bzImage: {0}")]
    NotABzImage(&'static str),
    /// Too old to say where its payload is.
    #[error("its boot protocol {major}.{minor:02} does not say where the kernel is (2.08 is the first that does)", major = .0 >> 8, minor = .0 & 0xff)]
    TooOld(u16),
    /// What the header says cannot be.
    #[error("its header is garbled: {0}")]
    Garbled(&'static str),
    /// Compressed in a way that this program does not know.
    #[error("its kernel is compressed in an unknown way (it begins with {0})")]
    UnknownCompression(String),
    /// The program that unpacks could not be run.
    #[error("cannot run {program} to unpack the kernel: install it")]
    Run {
        /// The program.
        program: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The program that unpacks failed.
    #[error("{program} cannot unpack the kernel: {message}")]
    Unpack {
        /// The program.
        program: &'static str,
        /// Its last words.
        message: String,
    },
    /// What came out is no ELF file of the length that was promised.
    #[error("the kernel unpacks to {found} bytes that are not an ELF file of {expected} bytes")]
    WrongResult {
        /// Length that came out.
        found: u64,
        /// Length that the bzImage promises.
        expected: u32,
    },
    /// A file cannot be read or written.
    #[error("cannot {action} {path}", path = .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Finds the compressed kernel in the bytes of a bzImage.
pub fn payload(image: &[u8]) -> Result<Payload<'_>, BzImageError> {
    let magic = u32_at(image, HEADER_AT + offset_of!(setup_header, header))
        .ok_or(BzImageError::NotABzImage("it ends within its header"))?;
    if magic != MAGIC {
        return Err(BzImageError::NotABzImage("it lacks the mark HdrS"));
    }
    let ends = BzImageError::Garbled("it ends within its header");
    let Some(version) = bytes_at(image, HEADER_AT + offset_of!(setup_header, version)) else {
        return Err(ends);
    };
    let version = u16::from_le_bytes(version);
    if version < MIN_VERSION {
        return Err(BzImageError::TooOld(version));
    }
    let (Some(offset), Some(length)) = (
        u32_at(image, HEADER_AT + offset_of!(setup_header, payload_offset)),
        u32_at(image, HEADER_AT + offset_of!(setup_header, payload_length)),
    ) else {
        return Err(ends);
    };
    // 0 stands for 4 sectors (boot.rst, setup_sects); the boot sector comes on top.
    let setup = match image[HEADER_AT] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let data = usize::try_from(offset)
        .ok()
        .and_then(|offset| offset.checked_add((setup + 1) * SECTOR))
        .and_then(|start| Some(start..start.checked_add(usize::try_from(length).ok()?)?))
        .and_then(|range| image.get(range))
        .ok_or(BzImageError::Garbled("the kernel that it points to lies beyond its end"))?;
    let compression = Compression::of(data)
        .ok_or_else(|| BzImageError::UnknownCompression(crate::digest::hex(&data[..data.len().min(6)])))?;
    let unpacked = data
        .len()
        .checked_sub(4)
        .and_then(|at| u32_at(data, at))
        .ok_or(BzImageError::Garbled("its kernel has no length"))?;
    if unpacked > MAX_UNPACKED {
        return Err(BzImageError::Garbled("its kernel is said to be larger than any kernel"));
    }
    let data = if compression == Compression::Gzip { data } else { &data[..data.len() - 4] };
    Ok(Payload { compression, data, unpacked })
}

/// Unpacks the kernel of the bzImage at `from` into the ELF file `to`, by the tool for its compression.
pub fn unpack(from: &Path, to: &Path) -> Result<(), BzImageError> {
    let io_error = |action, path: &Path, source| BzImageError::Io { action, path: path.to_owned(), source };
    let image = std::fs::read(from).map_err(|source| io_error("read", from, source))?;
    let payload = payload(&image)?;
    let program = payload.compression.program();
    let output = File::create(to).map_err(|source| io_error("write", to, source))?;
    let run_error = |source| BzImageError::Run { program, source };
    let mut child = Command::new(program)
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(output)
        .stderr(Stdio::piped())
        .spawn()
        .map_err(run_error)?;
    // A tool that gives up early closes its input; why it did is on its standard error.
    let fed = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(payload.data));
    let done = child.wait_with_output().map_err(run_error)?;
    if !done.status.success() || fed.is_err() {
        let message = String::from_utf8_lossy(&done.stderr).trim().to_owned();
        return Err(BzImageError::Unpack { program, message });
    }
    let found = std::fs::metadata(to).map_err(|source| io_error("read", to, source))?.len();
    let mut start = [0; 4];
    let elf = File::open(to).and_then(|mut file| file.read_exact(&mut start)).is_ok() && start == *b"\x7fELF";
    if found != u64::from(payload.unpacked) || !elf {
        return Err(BzImageError::WrongResult { found, expected: payload.unpacked });
    }
    Ok(())
}

fn bytes_at<const N: usize>(image: &[u8], at: usize) -> Option<[u8; N]> {
    image.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u32_at(image: &[u8], at: usize) -> Option<u32> {
    bytes_at(image, at).map(u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage of one setup sector that carries `payload`.
    fn image(version: u16, offset: u32, length: u32, payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 2 * SECTOR];
        image[HEADER_AT] = 1;
        image[0x202..0x206].copy_from_slice(&MAGIC.to_le_bytes());
        image[0x206..0x208].copy_from_slice(&version.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&offset.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    fn packed(kernel: &[u8]) -> Vec<u8> {
        let mut child =
            Command::new("xz").arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(kernel).unwrap();
        let mut packed = child.wait_with_output().unwrap().stdout;
        packed.extend_from_slice(&u32::try_from(kernel.len()).unwrap().to_le_bytes());
        packed
    }

    fn unpack_bytes(image: &[u8]) -> Result<Vec<u8>, BzImageError> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("vmlinuz"), image).unwrap();
        unpack(&folder.path().join("vmlinuz"), &folder.path().join("vmlinux"))?;
        Ok(std::fs::read(folder.path().join("vmlinux")).unwrap())
    }

    #[test]
    fn the_kernel_inside_comes_out_whole() {
        let kernel = [&b"\x7fELF"[..], &[7; 5000]].concat();
        let packed = packed(&kernel);
        let length = u32::try_from(packed.len()).unwrap();
        assert_eq!(unpack_bytes(&image(0x020f, 0, length, &packed)).unwrap(), kernel);
    }

    #[test]
    fn what_unpacks_to_something_else_is_refused() {
        let packed = packed(b"#!/bin/sh");
        let length = u32::try_from(packed.len()).unwrap();
        let error = unpack_bytes(&image(0x020f, 0, length, &packed)).unwrap_err();
        assert!(matches!(error, BzImageError::WrongResult { found: 9, expected: 9 }), "{error:?}");
    }

    #[test]
    fn damaged_data_names_the_tool_that_refused_it() {
        let error = unpack_bytes(&image(0x020f, 0, 18, b"\xfd7zXZ\0garbage!\x01\0\0\0")).unwrap_err();
        assert!(matches!(error, BzImageError::Unpack { program: "xz", .. }), "{error:?}");
    }

    #[test]
    fn garbled_headers_are_refused_by_name() {
        let cases: [(Vec<u8>, &str); 8] = [
            (vec![], "ends within its header"),
            (vec![0; 0x203], "ends within its header"),
            (vec![0; 4096], "lacks the mark"),
            (image(0x0207, 0, 8, &[0; 8]), "2.07"),
            (image(0x020f, 0, 9, &[0; 8]), "beyond its end"),
            (image(0x020f, u32::MAX, u32::MAX, &[0; 8]), "beyond its end"),
            (image(0x020f, 0, 8, &[0; 8]), "unknown way"),
            (image(0x020f, 0, 10, b"\xfd7zXZ\0\xff\xff\xff\xff"), "larger than any kernel"),
        ];
        for (image, part) in cases {
            let message = payload(&image).unwrap_err().to_string();
            assert!(message.contains(part), "{message} should contain '{part}'");
        }
        let whole = image(0x020f, 0, 8, &[0; 8]);
        for end in 0..whole.len() {
            assert!(payload(&whole[..end]).is_err());
        }
    }
}
