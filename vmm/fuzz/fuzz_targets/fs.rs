//! File sharing: FUSE messages about a small folder that is made anew for each input.

#![no_main]
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::{Arc, Once};

use catalyst_vmm::devices::fs::{Fs, ShareRoot};
use catalyst_vmm_fuzz::{All, Data, Guest, Message, Number, Op, threads};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

const NAMES: [&str; 8] = ["file", "folder", "link", "new", "other", ".", "..", "a/b"];

/// What Linux sends with each operation: its number, the bytes of its fields, and how many names follow.
const OPERATIONS: [(u32, usize, usize); 40] = [
    (1, 0, 1),   // LOOKUP
    (2, 8, 0),   // FORGET
    (3, 16, 0),  // GETATTR
    (4, 88, 0),  // SETATTR
    (5, 0, 0),   // READLINK
    (6, 0, 2),   // SYMLINK
    (8, 16, 1),  // MKNOD
    (9, 8, 1),   // MKDIR
    (10, 0, 1),  // UNLINK
    (11, 0, 1),  // RMDIR
    (12, 8, 2),  // RENAME
    (13, 8, 1),  // LINK
    (14, 8, 0),  // OPEN
    (15, 40, 0), // READ
    (WRITE, 40, 0),
    (17, 0, 0),  // STATFS
    (18, 24, 0), // RELEASE
    (20, 16, 0), // FSYNC
    (21, 8, 2),  // SETXATTR
    (22, 8, 1),  // GETXATTR
    (23, 8, 0),  // LISTXATTR
    (24, 0, 1),  // REMOVEXATTR
    (25, 24, 0), // FLUSH
    (26, 16, 0), // INIT
    (27, 8, 0),  // OPENDIR
    (28, 40, 0), // READDIR
    (29, 24, 0), // RELEASEDIR
    (30, 16, 0), // FSYNCDIR
    (31, 48, 0), // GETLK
    (34, 8, 0),  // ACCESS
    (35, 16, 1), // CREATE
    (36, 8, 0),  // INTERRUPT
    (38, 0, 0),  // DESTROY
    (39, 32, 0), // IOCTL
    (42, 40, 0), // BATCH_FORGET
    (43, 32, 0), // FALLOCATE
    (44, 40, 0), // READDIRPLUS
    (45, 16, 2), // RENAME2
    (46, 24, 0), // LSEEK
    (47, 56, 0), // COPY_FILE_RANGE
];
const WRITE: u32 = 16;

/// A FUSE message.
#[derive(Arbitrary, Debug)]
enum Fuse {
    /// As Linux makes it. Handles come first among the fields.
    Good { operation: u8, node: Number, fields: [Number; 3], names: [u8; 2], data: Data },
    /// Any.
    Odd { urgent: bool, opcode: u8, node: Number, length: u32, body: Data },
}

impl Message for Fuse {
    fn queue(&self) -> u8 {
        u8::from(!matches!(self, Self::Odd { urgent: true, .. }))
    }
    fn bytes(&self, known: &[u64]) -> Vec<u8> {
        match self {
            Self::Good { operation, node, fields, names, data } => {
                let (opcode, length, count) = OPERATIONS[usize::from(*operation) % OPERATIONS.len()];
                let mut body: Vec<u8> =
                    fields.iter().flat_map(|field| field.of(known).to_le_bytes()).collect();
                body.resize(length, 0);
                if opcode == WRITE {
                    body[16..20].copy_from_slice(&u32::try_from(data.0.len()).unwrap().to_le_bytes());
                    body.extend(&data.0);
                }
                for name in &names[..count] {
                    body.extend(NAMES[usize::from(name % 8)].as_bytes());
                    body.push(0);
                }
                // The root is the node from which all others are found.
                let node = if let Number::Small(_) = node { 1 } else { node.of(known) };
                message(opcode, node, u32::try_from(40 + body.len()).unwrap(), &body)
            }
            Self::Odd { opcode, node, length, body, .. } => {
                message(u32::from(*opcode), node.of(known), *length, &body.0)
            }
        }
    }
}

fn message(opcode: u32, node: u64, length: u32, body: &[u8]) -> Vec<u8> {
    let words = |numbers: &[u32]| numbers.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    [words(&[length, opcode, 7, 0]), node.to_le_bytes().to_vec(), words(&[0, 0, 1, 0]), body.to_vec()]
        .concat()
}

/// An INIT as Linux sends it, without which nothing is answered.
struct Init;

impl Message for Init {
    fn queue(&self) -> u8 {
        1
    }
    fn bytes(&self, _: &[u64]) -> Vec<u8> {
        let words = [7_u32, 38, 1 << 17, !(1 << 30)];
        let body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        message(26, 0, 56, &body)
    }
}

/// What a guest should not be able to do, and what would cost the machine much if it could: devices, large files.
fn confine() {
    #[repr(C)]
    struct Header(u32, i32);
    let header = Header(0x2008_0522, 0);
    // SAFETY: the kernel reads a header and two sets of this version, all empty; and a limit.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_capset, &raw const header, [0_u32; 6].as_ptr()), 0);
        let limit = libc::rlimit { rlim_cur: 8 << 20, rlim_max: 8 << 20 };
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit), 0);
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

fn fill(folder: &Path) {
    fs::write(folder.join("file"), b"content").unwrap();
    fs::create_dir(folder.join("folder")).unwrap();
    fs::write(folder.join("folder/other"), b"").unwrap();
    symlink("../../../etc/passwd", folder.join("link")).unwrap();
}

/// A guest may have left folders that not even their owner may look into.
fn open_up(folder: &Path) {
    let _ = fs::set_permissions(folder, fs::Permissions::from_mode(0o700));
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            open_up(&entry.path());
        }
    }
}

fuzz_target!(|ops: All<Op<Fuse>>| {
    static ONCE: Once = Once::new();
    ONCE.call_once(confine);
    let outside = tempfile::tempdir().unwrap();
    let folder = outside.path().join("share");
    fs::create_dir(&folder).unwrap();
    fill(&folder);
    let root = ShareRoot::folder(&File::open(&folder).unwrap()).unwrap();
    let device = Fs::new("share", root, Arc::clone(&threads().reactor)).unwrap();
    let mut guest = Guest::new(device);
    guest.run(&[Op::Message { message: Init, cut: 40, room: 0, hold: 0 }], |_, _, _| ());
    guest.run(&ops.0, |_, _, _| {
        let _ = fs::remove_dir_all(folder.join("folder"));
    });
    drop(guest);
    open_up(&folder);
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1, "the guest left its share");
});
