//! The file of a saved machine.
//!
//! | bytes | |
//! |---:|---|
//! | 8 | `CATVMM`, carriage return, line feed |
//! | 4 | [`VERSION`], little-endian |
//! | 8 | bytes of content, little-endian |
//! | 32 | SHA-256 of all of this but itself |
//! | … | the content: a [`MachineState`] as JSON |
//!
//! The digest is against accidents. Whoever writes such a file can make it right, so what is inside is checked by those
//! who take it over.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use sha2::{Digest, Sha256};

use super::MachineState;

/// The version that this monitor writes and reads.
pub const VERSION: u32 = 1;
/// Most bytes of content; a machine with 32 virtual CPUs has less than two million.
pub const MAX_LENGTH: u64 = 16 << 20;

const MAGIC: [u8; 8] = *b"CATVMM\r\n";
const DIGEST: usize = 32;
/// What stands before the content.
const HEADER: usize = 8 + 4 + 8 + DIGEST;

/// Why a file is no saved machine, or none came about.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It cannot be read.
    #[error("Cannot read the saved machine")]
    Read(#[source] io::Error),
    /// It is something else.
    #[error("The file is no saved machine of this monitor")]
    NotOurs,
    /// It is of another monitor.
    #[error("The machine was saved in version {0}, and this monitor reads version {VERSION}; save it anew")]
    Version(u32),
    /// It says that it is longer than any.
    #[error("The saved machine has {0} bytes, and none has more than {MAX_LENGTH}")]
    TooLong(u64),
    /// A part is missing, or there is more behind it.
    #[error("The saved machine has {given} bytes where {wanted} should be")]
    Length {
        /// What there is.
        given: u64,
        /// What should be.
        wanted: u64,
    },
    /// A bit has changed.
    #[error("The saved machine is damaged: its digest is another")]
    Damaged,
    /// The content makes no sense.
    #[error("The saved machine cannot be understood")]
    Content(#[source] serde_json::Error),
    /// It cannot be written as JSON.
    #[error("The machine cannot be put into words")]
    Encode(#[source] serde_json::Error),
}

/// The file's bytes.
pub fn encode(state: &MachineState) -> Result<Vec<u8>, StateError> {
    seal(&serde_json::to_vec(state).map_err(StateError::Encode)?)
}

/// Puts a header before content.
pub fn seal(content: &[u8]) -> Result<Vec<u8>, StateError> {
    let length = content.len() as u64;
    if length > MAX_LENGTH {
        return Err(StateError::TooLong(length));
    }
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(length.to_le_bytes());
    let digest = digest(&bytes, content);
    bytes.extend(digest);
    bytes.extend(content);
    Ok(bytes)
}

/// The machine of a file.
pub fn decode(bytes: &[u8]) -> Result<MachineState, StateError> {
    serde_json::from_slice(content(bytes)?).map_err(StateError::Content)
}

fn content(bytes: &[u8]) -> Result<&[u8], StateError> {
    let given = bytes.len() as u64;
    let (magic, rest) = bytes.split_first_chunk::<8>().ok_or(StateError::NotOurs)?;
    if *magic != MAGIC {
        return Err(StateError::NotOurs);
    }
    let short = StateError::Length { given, wanted: HEADER as u64 };
    let Some((version, rest)) = rest.split_first_chunk::<4>() else { return Err(short) };
    let version = u32::from_le_bytes(*version);
    if version != VERSION {
        return Err(StateError::Version(version));
    }
    let Some((length, rest)) = rest.split_first_chunk::<8>() else { return Err(short) };
    let length = u64::from_le_bytes(*length);
    if length > MAX_LENGTH {
        return Err(StateError::TooLong(length));
    }
    let Some((told, content)) = rest.split_first_chunk::<DIGEST>() else { return Err(short) };
    if content.len() as u64 != length {
        return Err(StateError::Length { given, wanted: HEADER as u64 + length });
    }
    if digest(&bytes[..HEADER - DIGEST], content) != *told {
        return Err(StateError::Damaged);
    }
    Ok(content)
}

fn digest(head: &[u8], content: &[u8]) -> [u8; DIGEST] {
    Sha256::new().chain_update(head).chain_update(content).finalize().into()
}

/// Reads a file from its beginning, wherever its position is: several machines may be given one open file.
pub fn read(file: &File) -> Result<MachineState, StateError> {
    let length = file.metadata().map_err(StateError::Read)?.len();
    if length > HEADER as u64 + MAX_LENGTH {
        return Err(StateError::TooLong(length));
    }
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0).map_err(StateError::Read)?;
    decode(&bytes)
}
