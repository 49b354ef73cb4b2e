use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{InitOut, LinkIn, MkdirIn, MknodIn, Rename2In, SetattrIn};
use proptest::prelude::*;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::guest::{ANSWERS, Guest, Opcode, ROOT_ID, named};
use super::*;
use crate::reactor::Reactor;
use crate::virtio::VirtioDevice;
use crate::virtio::testing::{BUFFERS, INDIRECT, NEXT, WRITE};

/// Where a test puts an indirect table.
const TABLE: u64 = BUFFERS + 0x1_0000;

/// Descriptors of this process on what is below `folder`.
fn descriptors_below(folder: &Path) -> usize {
    let all = fs::read_dir("/proc/self/fd").unwrap();
    all.filter(|entry| fs::read_link(entry.as_ref().unwrap().path()).is_ok_and(|to| to.starts_with(folder)))
        .count()
}

fn mkdir(guest: &mut Guest, parent: u64, name: &str, mode: u32) -> Result<Vec<u8>, i32> {
    let fields = MkdirIn { mode, umask: 0 };
    guest.ask(Opcode::Mkdir, parent, &named(fields.as_slice(), &[name]))
}

fn chmod(guest: &mut Guest, inode: u64, mode: u32) -> Result<Vec<u8>, i32> {
    let fields = SetattrIn { valid: 1, mode, ..SetattrIn::default() };
    guest.ask(Opcode::Setattr, inode, fields.as_slice())
}

#[test]
fn configuration_is_the_tag_and_one_request_queue() {
    let folder = tempfile::tempdir().unwrap();
    let root = || ShareRoot::folder(&fs::File::open(folder.path()).unwrap()).unwrap();
    let reactor = Arc::new(Reactor::spawn("fs", || ()).unwrap());
    let device = Fs::new("shares", root(), Arc::clone(&reactor)).unwrap();
    let mut config = [0xff; 44];
    device.read_config(0, &mut config);
    assert_eq!(&config[..8], b"shares\0\0");
    assert_eq!(&config[36..], [1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    for tag in ["", "a\0b", &"x".repeat(37)] {
        assert!(matches!(Fs::new(tag, root(), Arc::clone(&reactor)), Err(FsError::Tag(_))));
    }
}

#[test]
fn files_are_made_read_renamed_linked_and_listed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let mut guest = Guest::folder(path);
    let (inode, handle) = guest.create(ROOT_ID, "a", libc::O_RDWR, 0o666).unwrap();
    guest.write(inode, handle, b"from the guest").unwrap();
    assert_eq!(fs::read(path.join("a")).unwrap(), b"from the guest");
    assert_eq!(fs::metadata(path.join("a")).unwrap().mode() & 0o7777, 0o644);
    assert_eq!(guest.read(inode, handle).unwrap(), b"from the guest");

    mkdir(&mut guest, ROOT_ID, "sub", 0o755).unwrap();
    let sub = guest.walk(&["sub"]).unwrap();
    let rename = Rename2In { newdir: sub, flags: 0, padding: 0 };
    guest.ask(Opcode::Rename2, ROOT_ID, &named(rename.as_slice(), &["a", "b"])).unwrap();
    let link = LinkIn { oldnodeid: inode };
    guest.ask(Opcode::Link, ROOT_ID, &named(link.as_slice(), &["c"])).unwrap();
    guest.ask(Opcode::Symlink, ROOT_ID, &named(&[], &["l", "sub/b"])).unwrap();
    let l = guest.walk(&["l"]).unwrap();
    assert_eq!(guest.ask(Opcode::Readlink, l, &[]).unwrap(), b"sub/b");
    assert_eq!(guest.read_file(&["sub", "b"]).unwrap(), b"from the guest");
    assert_eq!(fs::metadata(path.join("c")).unwrap().nlink(), 2);

    let listed = guest.list(ROOT_ID).unwrap();
    assert_eq!(listed.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["c", "l", "sub"]);
    assert_eq!(listed[0].1, guest.attributes(inode).unwrap().attr.ino, "the number that stat gives");

    guest.ask(Opcode::Unlink, sub, &named(&[], &["b"])).unwrap();
    guest.ask(Opcode::Rmdir, ROOT_ID, &named(&[], &["sub"])).unwrap();
    assert!(!path.join("sub").exists());
}

#[test]
fn an_existing_file_is_opened_by_create_unless_exclusive() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a"), "old").unwrap();
    let mut guest = Guest::folder(folder.path());
    let exclusive = libc::O_RDWR | libc::O_EXCL;
    assert_eq!(guest.create(ROOT_ID, "a", exclusive, 0o644), Err(libc::EEXIST));
    let (inode, handle) = guest.create(ROOT_ID, "a", libc::O_RDWR, 0o644).unwrap();
    assert_eq!(guest.read(inode, handle).unwrap(), b"old");
    guest.create(ROOT_ID, "a", libc::O_RDWR | libc::O_TRUNC, 0o644).unwrap();
    assert_eq!(fs::read(folder.path().join("a")).unwrap(), b"");
}

#[test]
fn what_changes_on_the_host_is_seen_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a");
    fs::write(&file, "one").unwrap();
    let mut guest = Guest::new(ShareRoot::folder(&fs::File::open(folder.path()).unwrap()).unwrap());
    let InitOut { flags, max_write, .. } = guest.mount();
    assert_ne!(flags & 1 << 12, 0, "the guest compares times and sizes before it uses cached pages");
    assert_eq!(flags & (1 << 16 | 1 << 13 | 1 << 17), 0, "no write-back, READDIRPLUS, or unseen opens");
    assert_eq!(max_write, 1 << 20);
    let entry = guest.lookup(ROOT_ID, "a").unwrap();
    assert_eq!(
        (entry.entry_valid, entry.entry_valid_nsec, entry.attr_valid, entry.attr_valid_nsec),
        (0, 0, 0, 0)
    );
    let handle = guest.open(entry.nodeid, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(entry.nodeid, handle).unwrap(), b"one");
    fs::write(&file, "three").unwrap();
    let attributes = guest.attributes(entry.nodeid).unwrap();
    assert_eq!((attributes.attr.size, attributes.attr_valid, attributes.attr_valid_nsec), (5, 0, 0));
    assert_eq!(guest.read(entry.nodeid, handle).unwrap(), b"three");
    fs::remove_file(&file).unwrap();
    assert_eq!(guest.lookup(ROOT_ID, "a").err(), Some(libc::ENOENT));
}

#[test]
fn no_name_and_no_link_leads_out_of_the_folder() {
    let outside = tempfile::tempdir().unwrap();
    let outside_path = outside.path().canonicalize().unwrap();
    let secret = outside.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o640)).unwrap();
    let folder = outside_path.join("shared");
    fs::create_dir_all(folder.join("sub")).unwrap();
    symlink(&secret, folder.join("file")).unwrap();
    symlink(outside.path(), folder.join("folder")).unwrap();
    symlink(outside.path().join("new"), folder.join("dangling")).unwrap();
    let mut guest = Guest::folder(&folder);
    let sub = guest.walk(&["sub"]).unwrap();
    for parent in [ROOT_ID, sub] {
        for name in ["..", ".", "", "../secret", "sub/..", "/etc/passwd"] {
            assert_eq!(guest.lookup(parent, name).err(), Some(libc::EINVAL), "{name:?}");
            assert_eq!(guest.create(parent, name, libc::O_RDWR, 0o644), Err(libc::EINVAL), "{name:?}");
            assert_eq!(guest.ask(Opcode::Unlink, parent, &named(&[], &[name])), Err(libc::EINVAL));
        }
    }
    let file = guest.walk(&["file"]).unwrap();
    let to_folder = guest.walk(&["folder"]).unwrap();
    let kept = descriptors_below(&folder);
    for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_PATH, libc::O_PATH | libc::O_DIRECTORY] {
        guest.open(file, flags).unwrap_err();
        guest.create(ROOT_ID, "file", flags, 0o644).unwrap_err();
        guest.create(ROOT_ID, "dangling", flags, 0o644).unwrap_err();
        guest.open(to_folder, flags).unwrap_err();
    }
    assert_eq!(descriptors_below(&folder), kept, "what failed left nothing open");
    guest.lookup(to_folder, "secret").unwrap_err();
    guest.list(to_folder).unwrap_err();
    chmod(&mut guest, file, 0o777).unwrap_err();
    assert!(!outside.path().join("new").exists());
    assert_eq!(fs::metadata(&secret).unwrap().mode() & 0o777, 0o640);
    assert_eq!(fs::read(&secret).unwrap(), b"secret");
}

#[test]
fn no_file_gets_to_run_as_its_owner_and_no_device_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::folder(folder.path());
    assert_eq!(guest.create(ROOT_ID, "s", libc::O_RDWR, 0o4755), Err(libc::EPERM));
    let (inode, _) = guest.create(ROOT_ID, "a", libc::O_RDWR, 0o755).unwrap();
    for mode in [0o4755, 0o2755] {
        assert_eq!(chmod(&mut guest, inode, libc::S_IFREG | mode), Err(libc::EPERM));
        assert_eq!(chmod(&mut guest, inode, libc::S_IFDIR | mode), Err(libc::EPERM));
    }
    chmod(&mut guest, inode, 0o700).unwrap();
    assert_eq!(fs::metadata(folder.path().join("a")).unwrap().permissions().mode() & 0o7777, 0o700);
    mkdir(&mut guest, ROOT_ID, "d", 0o2775).unwrap();
    for kind in [libc::S_IFCHR, libc::S_IFBLK, libc::S_IFREG | 0o4000] {
        let fields = MknodIn { mode: kind | 0o600, rdev: 0x103, umask: 0, padding: 0 };
        let made = guest.ask(Opcode::Mknod, ROOT_ID, &named(fields.as_slice(), &["null"]));
        assert_eq!(made, Err(libc::EPERM));
    }
    // A pipe may be there, but is never opened on the host, where that would wait.
    let fields = MknodIn { mode: libc::S_IFIFO | 0o600, rdev: 0, umask: 0, padding: 0 };
    guest.ask(Opcode::Mknod, ROOT_ID, &named(fields.as_slice(), &["pipe"])).unwrap();
    let pipe = guest.walk(&["pipe"]).unwrap();
    guest.open(pipe, libc::O_RDONLY).unwrap_err();
}

#[test]
fn files_of_the_monitors_user_are_shown_as_a_user_of_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let own = fs::metadata(folder.path()).unwrap();
    let root = ShareRoot::folder(&fs::File::open(folder.path()).unwrap()).unwrap().shown_as(1000, 1001);
    let mut guest = Guest::new(root);
    guest.mount();
    let (inode, _) = guest.create(ROOT_ID, "a", libc::O_RDWR, 0o644).unwrap();
    let entry = guest.lookup(ROOT_ID, "a").unwrap();
    assert_eq!((entry.attr.uid, entry.attr.gid), (1000, 1001));
    // Whoever gives it to that user again changes nothing.
    let fields = SetattrIn { valid: 6, uid: 1000, gid: 1001, ..SetattrIn::default() };
    guest.ask(Opcode::Setattr, inode, fields.as_slice()).unwrap();
    let attributes = guest.attributes(inode).unwrap();
    assert_eq!((attributes.attr.uid, attributes.attr.gid), (1000, 1001));
    let made = fs::metadata(folder.path().join("a")).unwrap();
    assert_eq!((made.uid(), made.gid()), (own.uid(), own.gid()));
}

#[test]
fn unmounting_and_reset_close_everything() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().canonicalize().unwrap();
    let mut guest = Guest::folder(&path);
    let before = descriptors_below(&path);
    let use_some = |guest: &mut Guest| {
        guest.create(ROOT_ID, "a", libc::O_RDWR, 0o644).unwrap();
        guest.list(ROOT_ID).unwrap();
        assert!(descriptors_below(&path) > before);
    };
    use_some(&mut guest);
    assert!(guest.fs.save().mounted);
    let message = guest.message(Opcode::Destroy as u32, 0, &[]);
    guest.memory.write_slice(&message, GuestAddress(BUFFERS)).unwrap();
    guest.requests.offer(&[(BUFFERS, 40, false), (ANSWERS, 64, true)]);
    guest.requests.kick();
    guest.requests.wait_used();
    assert_eq!(descriptors_below(&path), before);
    assert!(!guest.fs.save().mounted);

    guest.mount();
    use_some(&mut guest);
    guest.fs.reset();
    assert_eq!(descriptors_below(&path), before);
    assert!(guest.fs.queue_states().is_empty());
    guest.activate();
    guest.mount();
    use_some(&mut guest);
}

#[test]
fn forgotten_files_are_closed_by_messages_that_have_no_answer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().canonicalize().unwrap();
    fs::write(path.join("a"), "").unwrap();
    let mut guest = Guest::folder(&path);
    let before = descriptors_below(&path);
    let inode = guest.walk(&["a"]).unwrap();
    guest.walk(&["a"]).unwrap();
    assert_eq!(descriptors_below(&path), before + 1);
    let message = guest.message(Opcode::Forget as u32, inode, &2_u64.to_le_bytes());
    guest.memory.write_slice(&message, GuestAddress(BUFFERS)).unwrap();
    guest.urgent.offer(&[(BUFFERS, 48, false)]);
    guest.urgent.kick();
    assert_eq!(guest.urgent.wait_used().1, 0);
    assert_eq!(descriptors_below(&path), before);
    assert_eq!(guest.open(inode, libc::O_RDONLY), Err(libc::EBADF));
}

#[test]
fn a_guest_cannot_use_up_the_monitors_descriptors() {
    let folder = tempfile::tempdir().unwrap();
    for name in 0..9 {
        fs::write(folder.path().join(name.to_string()), "").unwrap();
    }
    let root = ShareRoot::folder(&fs::File::open(folder.path()).unwrap()).unwrap();
    let reactor = Arc::new(Reactor::spawn("fs", || ()).unwrap());
    let mut guest = Guest::with(Fs::with_limit("shares", root, reactor, 8).unwrap());
    guest.mount();
    let found = (0..9).map(|name| guest.lookup(ROOT_ID, &name.to_string()).map(|_| ()));
    let found: Vec<_> = found.collect();
    assert_eq!(found.iter().filter(|found| found.is_ok()).count(), 8);
    assert_eq!(found[8], Err(libc::ENFILE));
    assert_eq!(guest.list(ROOT_ID), Err(libc::ENFILE));
}

#[test]
fn malformed_messages_are_answered_and_the_next_one_works() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a"), "still here").unwrap();
    let mut guest = Guest::folder(folder.path());
    let good = guest.message(Opcode::Lookup as u32, ROOT_ID, b"a\0");
    let length = u32::try_from(good.len()).unwrap();
    let send = |guest: &mut Guest, message: &[u8], parts: &[(u64, u32, bool)]| {
        guest.memory.write_slice(message, GuestAddress(BUFFERS)).unwrap();
        guest.requests.offer(parts);
        guest.requests.kick();
        guest.requests.wait_used().1
    };
    let room = (ANSWERS, 4096, true);
    // No room for an answer, or not enough of it.
    assert_eq!(send(&mut guest, &good, &[(BUFFERS, length, false)]), 0);
    assert_eq!(send(&mut guest, &good, &[(BUFFERS, length, false), (ANSWERS, 8, true)]), 0);
    // No message, half a header, no end of a name, a length that is not there.
    assert_eq!(send(&mut guest, &good, &[room]), 0);
    assert_eq!(send(&mut guest, &good, &[(BUFFERS, 20, false), room]), 0);
    assert_eq!(send(&mut guest, &good, &[(BUFFERS, length - 1, false), room]), 16);
    let mut long = good.clone();
    long[..4].copy_from_slice(&0xffff_ffff_u32.to_le_bytes());
    assert_eq!(send(&mut guest, &long, &[(BUFFERS, length, false), room]), 16);
    long[..4].copy_from_slice(&3_u32.to_le_bytes());
    assert_eq!(send(&mut guest, &long, &[(BUFFERS, length, false), room]), 16);
    let mut code = [0; 4];
    guest.memory.read_slice(&mut code, GuestAddress(ANSWERS + 4)).unwrap();
    assert_eq!(i32::from_le_bytes(code), -libc::EINVAL);
    // Outside memory, and far more than a message.
    assert_eq!(send(&mut guest, &good, &[(1 << 40, length, false), room]), 0);
    assert_eq!(send(&mut guest, &good, &[(BUFFERS, length, false), (ANSWERS, u32::MAX, true)]), 0);
    let large = (ANSWERS, 1 << 20, true);
    assert_eq!(send(&mut guest, &good, &[(BUFFERS, length, false), large, large]), 0);
    // The message in more parts than any has, by an indirect table.
    for part in 0..600_u64 {
        let (address, length) = if part == 0 { (BUFFERS, length) } else { (ANSWERS + part, 1) };
        let flags = if part == 0 { NEXT } else { WRITE | if part < 599 { NEXT } else { 0 } };
        let words = [address, u64::from(length) | u64::from(flags) << 32 | (part + 1) << 48];
        guest
            .memory
            .write_slice(&words.map(u64::to_le_bytes).concat(), GuestAddress(TABLE + 16 * part))
            .unwrap();
    }
    guest.memory.write_slice(&good, GuestAddress(BUFFERS)).unwrap();
    guest.requests.describe(0, (TABLE, 600 * 16, INDIRECT, 0));
    guest.requests.offer_head(0);
    guest.requests.kick();
    assert_eq!(guest.requests.wait_used().1, 0);
    assert_eq!(guest.read_file(&["a"]).unwrap(), b"still here");
    assert!(guest.fs.counters().counted().errors >= 10);
}

#[test]
fn more_messages_than_a_batch_are_all_answered() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::folder(folder.path());
    let message = guest.message(Opcode::Getattr as u32, ROOT_ID, &[0; 16]);
    guest.memory.write_slice(&message, GuestAddress(BUFFERS)).unwrap();
    for _ in 0..200 {
        guest.requests.offer(&[(BUFFERS, 56, false), (ANSWERS, 256, true)]);
    }
    guest.requests.kick();
    for _ in 0..200 {
        assert_eq!(guest.requests.wait_used().1, 16 + 104);
    }
}

/// Messages that allocate on the host's disk are left out; the host is that of the tests.
const FALLOCATE: u32 = Opcode::Fallocate as u32;

fn bodies() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200),
        // Small numbers meet inodes, handles and flags that there are.
        prop::collection::vec(0_u64..5, 0..12).prop_map(|words| {
            let mut bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
            bytes.extend(b"a\0b\0");
            bytes
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_a_guest_sends_the_device_lives_and_stays_in_its_folder(
        messages in prop::collection::vec(
            (0_u32..53, prop_oneof![Just(None), any::<u32>().prop_map(Some)], 0_u64..6, bodies(), 0_u32..0x3000),
            1..20,
        )
    ) {
        let outside = tempfile::tempdir().unwrap();
        let folder = outside.path().join("shared");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("a"), "a").unwrap();
        let mut guest = Guest::folder(&folder);
        let inode = guest.walk(&["a"]).unwrap();
        guest.open(inode, libc::O_RDWR).unwrap();
        for (opcode, length, inode, body, room) in messages {
            if opcode == FALLOCATE {
                continue;
            }
            let mut message = guest.message(opcode, inode, &body);
            if let Some(length) = length {
                message[..4].copy_from_slice(&length.to_le_bytes());
            }
            guest.memory.write_slice(&message, GuestAddress(BUFFERS)).unwrap();
            let length = u32::try_from(message.len()).unwrap();
            guest.requests.offer(&[(BUFFERS, length, false), (ANSWERS, room, true)]);
            guest.requests.kick();
            let (_, written) = guest.requests.wait_used();
            prop_assert!(written <= room);
        }
        let InitOut { major, .. } = guest.mount();
        prop_assert_eq!(major, 7);
        prop_assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    }

    #[test]
    fn whatever_the_chains_look_like_the_device_lives(
        descriptors in prop::collection::vec(
            (
                prop_oneof![Just(BUFFERS), Just(ANSWERS), any::<u64>()],
                prop_oneof![0_u32..100, any::<u32>()],
                0_u16..8,
                0_u16..16,
            ),
            16,
        ),
        heads in prop::collection::vec(0_u16..16, 1..8),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut guest = Guest::folder(folder.path());
        let message = guest.message(Opcode::Getattr as u32, ROOT_ID, &[0; 16]);
        guest.memory.write_slice(&message, GuestAddress(BUFFERS)).unwrap();
        for (index, &descriptor) in (0..).zip(&descriptors) {
            guest.requests.describe(index, descriptor);
        }
        for &head in &heads {
            guest.requests.offer_head(head);
        }
        guest.requests.kick();
        for _ in &heads {
            guest.requests.wait_used();
        }
        guest.fs.reset();
        guest.activate();
        guest.mount();
    }
}
