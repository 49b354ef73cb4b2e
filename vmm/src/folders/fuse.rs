//! FUSE messages as bytes: where numbers of files, open files and owners stand in them (the kernel's linux/fuse.h), and how one
//! is answered.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader, Writer};

use crate::devices::fs::Files;

/// `struct fuse_in_header` and `struct fuse_out_header`.
pub(super) const IN_HEADER: usize = 40;
pub(super) const OUT_HEADER: usize = 16;
/// `struct fuse_entry_out`.
const ENTRY: usize = 128;
/// Data that a message carries at most, so that it fits into a frame: pages, and what else is in `struct fuse_write_in`.
const MOST_PAGES: u16 = 15;
/// Room for an answer.
const ANSWER: usize = 64 * 1024;
const PIPE_SIZE: libc::c_int = 256 * 1024;

/// What is asked, as far as numbers go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The first message.
    Init,
    /// Nothing in its body or its answer is a number.
    Plain,
    /// Answered by attributes.
    Attributes,
    /// Sets attributes, and is answered by them.
    SetAttributes,
    /// Answered by an entry.
    Entry,
    /// Gives a file another name: begins with its number.
    Link,
    /// Begins with the number of the other folder.
    Rename,
    /// Answered by an open file.
    Open,
    /// Answered by an open folder.
    OpenFolder,
    /// Answered by an entry and an open file.
    Create,
    /// Begins with the number of an open file.
    Handle,
    /// The same, which is closed.
    Close,
    /// The guest forgets a file; not answered.
    Forget,
    /// Or many.
    ForgetMany,
    /// Not answered, and of no use here: each message is answered before the next is read.
    Interrupt,
    /// The end.
    Destroy,
    /// What is not served.
    Unknown,
}

impl Kind {
    pub(super) fn of(opcode: u32) -> Self {
        match opcode {
            26 => Self::Init,
            38 => Self::Destroy,
            // READLINK, UNLINK, RMDIR, STATFS, SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR, ACCESS.
            5 | 10 | 11 | 17 | 21..=24 | 34 => Self::Plain,
            3 => Self::Attributes,
            4 => Self::SetAttributes,
            // LOOKUP, SYMLINK, MKNOD, MKDIR.
            1 | 6 | 8 | 9 => Self::Entry,
            13 => Self::Link,
            // RENAME, RENAME2.
            12 | 45 => Self::Rename,
            14 => Self::Open,
            27 => Self::OpenFolder,
            35 => Self::Create,
            // READ, WRITE, FSYNC, FLUSH, READDIR, FSYNCDIR, FALLOCATE, LSEEK.
            15 | 16 | 20 | 25 | 28 | 30 | 43 | 46 => Self::Handle,
            // RELEASE, RELEASEDIR.
            18 | 29 => Self::Close,
            2 => Self::Forget,
            42 => Self::ForgetMany,
            36 => Self::Interrupt,
            _ => Self::Unknown,
        }
    }
}

/// A message or an answer, whose fields are reached by where they stand. What is too short for a field has none.
#[derive(Debug)]
pub(super) struct Message(pub(super) Vec<u8>);

impl Message {
    pub(super) fn u32(&self, at: usize) -> Option<u32> {
        self.0.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&self, at: usize) -> Option<u64> {
        self.0.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes)
    }

    pub(super) fn put_u32(&mut self, at: usize, value: u32) {
        if let Some(field) = self.0.get_mut(at..at + 4) {
            field.copy_from_slice(&value.to_le_bytes());
        }
    }

    pub(super) fn put_u64(&mut self, at: usize, value: u64) {
        if let Some(field) = self.0.get_mut(at..at + 8) {
            field.copy_from_slice(&value.to_le_bytes());
        }
    }

    pub(super) fn put_valid(&mut self, at: Valid, time: Duration) {
        self.put_u64(at.seconds, time.as_secs());
        self.put_u32(at.nanoseconds, time.subsec_nanos());
    }

    /// A request's header: which, its number, the file.
    pub(super) fn header(&self) -> Option<(u32, u64, u64)> {
        let whole = self.0.len() >= IN_HEADER && self.u32(0)? as usize == self.0.len();
        whole.then_some((self.u32(4)?, self.u64(8)?, self.u64(16)?))
    }

    /// An answer that says why not.
    pub(super) fn refusal(unique: u64, errno: i32) -> Self {
        let mut bytes = vec![0; OUT_HEADER];
        bytes[4..8].copy_from_slice(&(-errno).to_le_bytes());
        bytes[8..].copy_from_slice(&unique.to_le_bytes());
        let mut message = Self(bytes);
        message.put_u32(0, 16);
        message
    }

    /// An answer without a body.
    pub(super) fn done(unique: u64) -> Self {
        Self::refusal(unique, 0)
    }

    pub(super) fn is_good(&self) -> bool {
        self.u32(4) == Some(0)
    }
}

/// Where fields stand in requests.
pub(super) mod request {
    use super::IN_HEADER;

    pub const NODE: usize = 16;
    pub const BODY: usize = IN_HEADER;
    pub const GETATTR_FLAGS: usize = IN_HEADER;
    /// Of GETATTR and SETATTR alike.
    pub const ATTR_HANDLE: usize = IN_HEADER + 8;
    pub const SETATTR_VALID: usize = IN_HEADER;
    pub const SETATTR_UID: usize = IN_HEADER + 76;
    pub const SETATTR_GID: usize = IN_HEADER + 80;
    /// `FUSE_GETATTR_FH`, `FATTR_FH`, `FATTR_UID`, `FATTR_GID`.
    pub const GETATTR_FH: u32 = 1;
    pub const VALID_FH: u32 = 1 << 6;
    pub const VALID_UID: u32 = 1 << 1;
    pub const VALID_GID: u32 = 1 << 2;
}

/// Where it stands how long something holds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Valid {
    seconds: usize,
    nanoseconds: usize,
}

/// Where fields stand in answers.
pub(super) mod answer {
    use super::{ENTRY, OUT_HEADER, Valid};

    pub const NODE: usize = OUT_HEADER;
    pub const ENTRY_VALID: Valid = Valid { seconds: OUT_HEADER + 16, nanoseconds: OUT_HEADER + 32 };
    pub const ENTRY_ATTR_VALID: Valid = Valid { seconds: OUT_HEADER + 24, nanoseconds: OUT_HEADER + 36 };
    pub const ENTRY_ATTR: usize = OUT_HEADER + 40;
    pub const ATTR_VALID: Valid = Valid { seconds: OUT_HEADER, nanoseconds: OUT_HEADER + 8 };
    pub const ATTR: usize = OUT_HEADER + 16;
    pub const HANDLE: usize = OUT_HEADER;
    pub const OPEN_FLAGS: usize = OUT_HEADER + 8;
    /// `FOPEN_KEEP_CACHE`.
    pub const KEEP_CACHE: u32 = 1 << 1;
    pub const CREATED_HANDLE: usize = OUT_HEADER + ENTRY;
    pub const MODE: usize = 60;
    pub const UID: usize = 68;
    pub const GID: usize = 72;
    pub const MAX_WRITE: usize = OUT_HEADER + 20;
    pub const MAX_PAGES: usize = OUT_HEADER + 28;
}

/// Bounds what the guest may send at once by what fits into a frame.
pub(super) fn bound(init: &mut Message) {
    init.put_u32(answer::MAX_WRITE, u32::from(MOST_PAGES) * 4096);
    if let Some(field) = init.0.get_mut(answer::MAX_PAGES..answer::MAX_PAGES + 2) {
        field.copy_from_slice(&MOST_PAGES.to_le_bytes());
    }
}

/// Where the crate writes its answers to.
#[derive(Debug)]
pub(super) struct Pipe {
    from: File,
    to: File,
    scratch: Vec<u8>,
}

impl Pipe {
    pub(super) fn new() -> io::Result<Self> {
        let mut ends = [0; 2];
        // SAFETY: the kernel fills the array.
        if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) } == -1 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: both were just opened and are nobody else's.
        let (from, to) = unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) };
        // SAFETY: numbers; where there is no room for more, the usual 64 KiB must do.
        unsafe { libc::fcntl(to.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE_SIZE) };
        Ok(Self { from, to, scratch: vec![0; ANSWER] })
    }

    /// Has a message answered that has an answer. The crate leaves some malformed ones without; the guest's program would wait
    /// for ever.
    pub(super) fn answer(&mut self, server: &Server<Arc<Files>>, message: &mut Message) -> Message {
        let refusal = Message::refusal(message.u64(8).unwrap_or_default(), libc::EINVAL);
        let Ok(reader) = Reader::<'_, ()>::from_fuse_buffer(FuseBuf::new(&mut message.0)) else {
            return refusal;
        };
        let Ok(writer) = FuseDevWriter::new(self.to.as_raw_fd(), &mut self.scratch) else { return refusal };
        // Whatever it says of it, what it wrote is the answer.
        let _ = server.handle_message(reader, Writer::FuseDev(writer), None, None);
        let mut bytes = vec![0; ANSWER];
        match self.from.read(&mut bytes) {
            Ok(count) if count >= OUT_HEADER => {
                bytes.truncate(count);
                Message(bytes)
            }
            _ => refusal,
        }
    }
}
