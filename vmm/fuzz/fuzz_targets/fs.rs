//! File sharing: FUSE messages about a small folder that is made anew for each input.

#![no_main]
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::{Arc, Once};

use catalyst_vmm::devices::fs::{Fs, ShareRoot};
use catalyst_vmm_fuzz::{Guest, Message, Number, Op, threads};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

const NAMES: [&str; 8] = ["file", "folder", "link", "new", "other", ".", "..", "a/b"];

/// A FUSE message: its header, then numbers as fields, then names.
#[derive(Arbitrary, Debug)]
struct Fuse {
    urgent: bool,
    opcode: u8,
    node: Number,
    /// Fields of 8 bytes; handles come first.
    fields: Vec<Number>,
    names: Vec<u8>,
    data: Vec<u8>,
    /// Makes the header's length wrong.
    length: Option<u32>,
    user: u8,
}

impl Message for Fuse {
    fn queue(&self) -> u8 {
        u8::from(!self.urgent)
    }
    fn bytes(&self, known: &[u64]) -> Vec<u8> {
        let mut body: Vec<u8> =
            self.fields.iter().take(16).flat_map(|field| field.of(known).to_le_bytes()).collect();
        for name in self.names.iter().take(2) {
            body.extend(NAMES[usize::from(name % 8)].as_bytes());
            body.push(0);
        }
        body.extend(&self.data);
        let length = self.length.unwrap_or(u32::try_from(40 + body.len()).unwrap());
        let node = self.node.of(known);
        [
            &length.to_le_bytes()[..],
            &u32::from(self.opcode % 56).to_le_bytes(),
            &7_u64.to_le_bytes(),
            &node.to_le_bytes(),
            &u32::from(self.user).to_le_bytes(),
            &u32::from(self.user).to_le_bytes(),
            &1_u32.to_le_bytes(),
            &[0; 4],
            &body,
        ]
        .concat()
    }
}

/// An INIT as Linux sends it, without which nothing is answered.
struct Init;

impl Message for Init {
    fn queue(&self) -> u8 {
        1
    }
    fn bytes(&self, _: &[u64]) -> Vec<u8> {
        let words = [56_u32, 26, 1, 0, 0, 0, 0, 0, 1, 0, 7, 38, 1 << 17, !(1 << 30)];
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
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

fuzz_target!(|ops: Vec<Op<Fuse>>| {
    static ONCE: Once = Once::new();
    ONCE.call_once(confine);
    let outside = tempfile::tempdir().unwrap();
    let folder = outside.path().join("share");
    fs::create_dir(&folder).unwrap();
    fill(&folder);
    let root = ShareRoot::folder(&File::open(&folder).unwrap()).unwrap();
    let device = Fs::new("share", root, Arc::clone(&threads().reactor)).unwrap();
    let mut guest = Guest::new(device);
    guest.run(&[Op::Message { message: Init, cut: 40, room: 0x1000, wait: true }], |_, _, _| ());
    guest.run(&ops, |_, _, _| {
        let _ = fs::remove_dir_all(folder.join("folder"));
    });
    drop(guest);
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1, "the guest left its share");
});
