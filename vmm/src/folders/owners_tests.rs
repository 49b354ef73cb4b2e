//! A container's trees, served by a process as it is in use: root's, confined, speaking with what the agent and its kernel are.
//!
//! That process is a test of its own ([`server`]), which the others start with the trees that it is to serve.

use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::tests::{CREATE, GETATTR, Guest, LOOKUP, OPEN, ROOT, SETATTR, WRITE, number};
use super::{Descriptors, Serving, Tree};
use crate::devices::fs::mounting::clone_mount;

/// Says what the process is to serve; without it [`server`] does nothing.
const SERVED: &str = "CATALYST_TEST_SERVED";
const READLINK: u32 = 5;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const LISTXATTR: u32 = 23;
/// `FATTR_MODE`, `FATTR_UID | FATTR_GID`.
const MODE: u32 = 1;
const OWNER: u32 = 6;
/// `FUSE_WRITE_KILL_SUIDGID`.
const KILL: u32 = 1 << 2;
/// Chown, DAC override, fowner, fsetid, setgid, setuid, setfcap.
const CAPABILITIES: &str = "00000000800000db";

#[test]
#[ignore = "a process that the other tests start"]
fn server() {
    let Ok(served) = std::env::var(SERVED) else { return };
    let mut words = served.split(' ');
    let port = words.next().unwrap().parse().unwrap();
    let trees = words.map(|tree| tree.parse::<Tree>().unwrap()).collect();
    let descriptors = Descriptors { port, control: None, state: None };
    let served = super::run(descriptors, Serving::KeepingOwners(trees));
    if let Err(error) = &served {
        eprintln!("{}", crate::chain(error));
    }
    // SAFETY: nothing is left to be done; what a test does at its end, its filter of system calls would not allow.
    unsafe { libc::_exit(i32::from(served.is_err())) };
}

/// The process, ended with the test.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(trees: &[(&str, &File)]) -> (Served, Guest) {
    let (port, giver) = UnixStream::pair().unwrap();
    let (given, guest) = UnixStream::pair().unwrap();
    giver.send_with_fd(&[0_u8][..], given.as_raw_fd()).unwrap();
    guest.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let list: Vec<String> = trees.iter().map(|(name, tree)| format!("{name}={}", tree.as_raw_fd())).collect();
    let fds: Vec<RawFd> = trees.iter().map(|(_, tree)| tree.as_raw_fd()).chain([port.as_raw_fd()]).collect();
    let name = format!("{}::server", module_path!().split_once("::").unwrap().1);
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", &name, "--ignored", "--nocapture", "--test-threads=1"])
        .env(SERVED, format!("{} {}", port.as_raw_fd(), list.join(" ")));
    // SAFETY: system calls only.
    unsafe {
        command.pre_exec(move || {
            for &fd in &fds {
                if libc::fcntl(fd, libc::F_SETFD, 0) == -1 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let served = Served(command.spawn().unwrap());
    drop(port);
    (served, Guest::new(guest))
}

fn is_root() -> bool {
    // SAFETY: no memory is involved.
    let is_root = unsafe { libc::geteuid() } == 0;
    if !is_root {
        println!("SKIPPED: needs root to act as other users, and to mount");
    }
    is_root
}

/// A folder that anybody may write to, and a detached mount of it.
fn world(read_only: bool) -> (tempfile::TempDir, File) {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o777)).unwrap();
    fs::write(folder.path().join("a"), "of the host").unwrap();
    let tree = clone_mount(folder.path(), read_only, None).unwrap();
    (folder, tree)
}

fn owner(path: &Path) -> (u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.uid(), metadata.gid())
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Who owns the file of an entry.
fn shown(entry: &[u8]) -> (u32, u32) {
    (word(entry, 40 + 68), word(entry, 40 + 72))
}

fn set(valid: u32, mode: u32, (uid, gid): (u32, u32)) -> Vec<u8> {
    let mut body = vec![0; 88];
    for (at, value) in [(0, valid), (68, mode), (76, uid), (80, gid)] {
        body[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    body
}

fn fields(numbers: &[u32], rest: &[u8]) -> Vec<u8> {
    [&numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>(), rest].concat()
}

#[test]
fn files_folders_and_links_belong_to_the_same_users_on_both_sides() {
    if !is_root() {
        return;
    }
    let (folder, tree) = world(false);
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("of a group")).unwrap();
    fs::set_permissions(at("of a group"), Permissions::from_mode(0o770)).unwrap();
    chown(at("of a group"), Some(0), Some(2000)).unwrap();
    let (_served, mut guest) = serve(&[("root", &tree)]);
    let root = guest.node("root");
    guest.user = (1000, 1001);
    let (node, handle) = guest.create(root, "file");
    guest.write(node, handle, 0, "of the guest");
    assert_eq!(guest.read(node, handle).unwrap(), "of the guest");
    guest.ask(MKDIR, root, &fields(&[0o755, 0], b"folder\0"));
    guest.ask(SYMLINK, root, b"link\0/etc/passwd\0");
    guest.ask(MKNOD, root, &fields(&[libc::S_IFIFO | 0o644, 0, 0, 0], b"pipe\0"));
    guest.ask(MKNOD, root, &fields(&[libc::S_IFSOCK | 0o644, 0, 0, 0], b"socket\0"));
    for name in ["file", "folder", "link", "pipe", "socket"] {
        assert_eq!(owner(&at(name)), (1000, 1001), "{name}");
        assert_eq!(shown(&guest.lookup(root, name).unwrap()), (1000, 1001), "{name}");
    }
    assert!(fs::metadata(at("pipe")).unwrap().file_type().is_fifo());
    // A group that only the guest's kernel knows its user to be in.
    let group = guest.node("root/of a group");
    guest.create(group, "b");
    assert_eq!(owner(&at("of a group/b")), (1000, 1001));

    guest.user = (0, 0);
    guest.create(root, "of root");
    assert_eq!(owner(&at("of root")), (0, 0), "it is root again");
    guest.ask(SETATTR, node, &set(OWNER, 0, (5, 6)));
    assert_eq!(owner(&at("file")), (5, 6));
    chown(at("a"), Some(4242), Some(4343)).unwrap();
    assert_eq!(shown(&guest.lookup(root, "a").unwrap()), (4242, 4343));
    let attributes = guest.ask(GETATTR, node, &[0; 16]);
    assert_eq!((word(&attributes, 16 + 68), word(&attributes, 16 + 72)), (5, 6));
}

#[test]
fn a_bit_to_run_as_the_owner_stays_until_somebody_else_writes() {
    if !is_root() {
        return;
    }
    let (folder, tree) = world(false);
    let path = folder.path().join("file");
    let (_served, mut guest) = serve(&[("root", &tree)]);
    let root = guest.node("root");
    let (node, handle) = guest.create(root, "file");
    guest.ask(SETATTR, node, &set(MODE, 0o4755, (0, 0)));
    assert_eq!(mode(&path), 0o4755);
    guest.write(node, handle, 0, "by root");
    assert_eq!(mode(&path), 0o4755);
    let mut write = [handle, 0].map(u64::to_le_bytes).concat();
    write.extend(fields(&[4, KILL, 0, 0, 0, 0], b"evil"));
    guest.user = (1000, 1000);
    guest.ask(WRITE, node, &write);
    assert_eq!(mode(&path), 0o755);
    guest.ask(SETATTR, node, &set(MODE, 0o2755, (0, 0)));
    guest.ask(SETATTR, node, &set(OWNER, 0, (7, 8)));
    assert_eq!(mode(&path), 0o755, "as chown(2) does");
}

#[test]
fn a_single_file_is_a_tree_and_one_for_reading_only_is_not_changed() {
    if !is_root() {
        return;
    }
    let (folder, tree) = world(false);
    let (other, protected) = world(true);
    // By its path alone, as no mount.
    let flags = libc::O_PATH | libc::O_NOFOLLOW;
    let conf = fs::OpenOptions::new().read(true).custom_flags(flags).open(folder.path().join("a")).unwrap();
    let single = clone_mount(&other.path().join("a"), false, None).unwrap();
    let trees = [("root", &tree), ("ro", &protected), ("conf", &conf), ("single", &single)];
    let (_served, mut guest) = serve(&trees);
    for (name, path) in [("conf", folder.path().join("a")), ("single", other.path().join("a"))] {
        let node = guest.node(name);
        let opened = guest.ask(OPEN, node, &fields(&[libc::O_RDWR.cast_unsigned(), 0], b""));
        guest.write(node, number(&opened, 0), 0, "of the guest");
        assert_eq!(fs::read_to_string(path).unwrap(), "of the guest");
    }
    let ro = guest.node("ro");
    let file = guest.node("ro/a");
    let create = fields(&[(libc::O_RDWR | libc::O_CREAT).cast_unsigned(), 0o644, 0, 0], b"new\0");
    for (opcode, node, body) in [
        (CREATE, ro, &create),
        (CREATE, ROOT, &create),
        (MKDIR, ROOT, &fields(&[0o755, 0], b"new\0")),
        (SETATTR, file, &set(OWNER, 0, (1, 1))),
        (SETATTR, file, &set(MODE, 0o777, (0, 0))),
        (OPEN, file, &fields(&[libc::O_RDWR.cast_unsigned(), 0], b"")),
    ] {
        guest.send(opcode, node, body);
        assert_eq!(guest.answer().unwrap_err(), libc::EROFS, "message {opcode}");
    }
}

#[test]
fn nothing_leads_out_of_a_tree_and_no_device_is_opened_or_made() {
    if !is_root() {
        return;
    }
    let (folder, tree) = world(false);
    symlink("/etc/passwd", folder.path().join("link")).unwrap();
    symlink("../../../../../..", folder.path().join("up")).unwrap();
    let null = CString::new(folder.path().join("null").as_os_str().as_bytes()).unwrap();
    // SAFETY: the path is a string.
    let made = unsafe { libc::mknod(null.as_ptr(), libc::S_IFCHR | 0o666, libc::makedev(1, 3)) };
    assert_eq!(made, 0);
    let (_served, mut guest) = serve(&[("root", &tree)]);
    let root = guest.node("root");
    for name in ["link", "up", "null"] {
        let node = number(&guest.lookup(root, name).unwrap(), 0);
        guest.send(OPEN, node, &[0; 8]);
        assert!(guest.answer().is_err(), "{name}");
        guest.send(LOOKUP, node, b"etc\0");
        assert_eq!(guest.answer().unwrap_err(), libc::ENOTDIR, "{name}");
    }
    let link = guest.node("root/link");
    assert_eq!(guest.ask(READLINK, link, b""), b"/etc/passwd");
    for name in ["..", ".", "", "a/b", "../a"] {
        assert_eq!(guest.lookup(root, name).unwrap_err(), libc::EINVAL, "{name}");
    }
    assert_eq!(guest.lookup(ROOT, "etc").unwrap_err(), libc::ENOENT);
    for kind in [libc::S_IFCHR, libc::S_IFBLK] {
        guest.send(MKNOD, root, &fields(&[kind | 0o666, 0, 0, 0], b"device\0"));
        assert_eq!(guest.answer().unwrap_err(), libc::EPERM);
    }
}

#[test]
fn names_do_not_go_from_one_tree_to_another() {
    if !is_root() {
        return;
    }
    let ((one, first), (_two, second)) = (world(false), world(false));
    let (_served, mut guest) = serve(&[("root", &first), ("volume", &second)]);
    let (root, volume, file) = (guest.node("root"), guest.node("volume"), guest.node("root/a"));
    guest.send(LINK, volume, &[&file.to_le_bytes()[..], b"b\0"].concat());
    assert_eq!(guest.answer().unwrap_err(), libc::EXDEV);
    guest.send(RENAME, root, &[&volume.to_le_bytes()[..], b"a\0b\0"].concat());
    assert_eq!(guest.answer().unwrap_err(), libc::EXDEV);
    guest.ask(LINK, root, &[&file.to_le_bytes()[..], b"b\0"].concat());
    assert_eq!(fs::metadata(one.path().join("b")).unwrap().nlink(), 2);
}

#[test]
fn what_never_changes_is_asked_for_once_and_names_in_volumes_each_time() {
    if !is_root() {
        return;
    }
    let ((_one, first), (_two, second)) = (world(false), world(false));
    let (_served, mut guest) = serve(&[("root", &first), ("volume", &second)]);
    let (ever, second, moment, not) = ((1 << 30, 0), (1, 0), (0, 100_000_000), (0, 0));
    let mut holds = |node, name: &str| {
        let entry = guest.lookup(node, name).unwrap();
        let [name, attributes] =
            [(16, 32), (24, 36)].map(|(whole, part)| (word(&entry, whole), word(&entry, part)));
        (name, attributes, number(&entry, 0))
    };
    let (name, attributes, root) = holds(ROOT, "root");
    assert_eq!((name, attributes), (ever, second));
    let (name, attributes, volume) = holds(ROOT, "volume");
    assert_eq!((name, attributes), (ever, moment));
    let (name, attributes, _) = holds(root, "a");
    assert_eq!((name, attributes), (moment, moment));
    let (name, attributes, _) = holds(volume, "a");
    assert_eq!((name, attributes), (not, moment));
    assert_eq!(word(&guest.ask(GETATTR, ROOT, &[0; 16]), 0), 1 << 30);
}

#[test]
fn pages_are_kept_while_a_file_of_the_root_is_what_it_was_when_they_were_read() {
    if !is_root() {
        return;
    }
    let ((one, first), (_two, second)) = (world(false), world(false));
    let (_served, mut guest) = serve(&[("root", &first), ("volume", &second)]);
    let mut keeps = |path: &str| {
        let node = guest.node(path);
        word(&guest.ask(OPEN, node, &[0; 8]), 8) & 2 != 0
    };
    assert!(
        !keeps("root/a") && !keeps("root/a"),
        "it was changed just now, and may be again with the same time"
    );
    let file = one.path().join("a");
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    while u64::try_from(fs::metadata(&file).unwrap().ctime()).unwrap() + 2 >= now() {
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(!keeps("root/a"), "what was read before may be older");
    assert!(keeps("root/a") && keeps("root/a"));
    assert!(!keeps("volume/a") && !keeps("volume/a"), "shared mappings of the host leave no time");
    let before = fs::metadata(&file).unwrap();
    let length = usize::try_from(before.len()).unwrap();
    fs::write(&file, "x".repeat(length)).unwrap();
    File::options().write(true).open(&file).unwrap().set_modified(before.modified().unwrap()).unwrap();
    assert!(!keeps("root/a") && !keeps("root/a"), "its size and its time are as before, and it is another");
}

#[test]
fn capabilities_and_what_users_note_of_a_file_are_kept_and_labels_are_not_shown() {
    if !is_root() {
        return;
    }
    let (folder, tree) = world(false);
    let (_served, mut guest) = serve(&[("root", &tree)]);
    let file = guest.node("root/a");
    let mut given = |name: &str, value: &[u8]| {
        let length = u32::try_from(value.len()).unwrap();
        guest.send(SETXATTR, file, &fields(&[length, 0], &[name.as_bytes(), b"\0", value].concat()));
        guest.answer().map(drop)
    };
    for name in ["trusted.overlay.opaque", "security.selinux", "system.posix_acl_access", "user."] {
        assert_eq!(given(name, b"y").unwrap_err(), libc::EOPNOTSUPP, "{name}");
    }
    // `VFS_CAP_REVISION_2`, effective, and CAP_NET_RAW.
    let capability = fields(&[0x0200_0001, 1 << 13, 0, 0, 0], b"");
    match given("security.capability", &capability) {
        Err(libc::EOPNOTSUPP) => {
            println!("SKIPPED: the file system of {} has no extended attributes", folder.path().display());
            return;
        }
        done => assert_eq!(done, Ok(())),
    }
    let get = fields(&[100, 0], b"security.capability\0");
    assert_eq!(guest.ask(GETXATTR, file, &get), capability);
    assert_eq!(guest.ask(LISTXATTR, file, &fields(&[100, 0], b"")), b"security.capability\0");
    assert_eq!(word(&guest.ask(LISTXATTR, file, &[0; 8]), 0), 20);
    guest.send(GETXATTR, file, &fields(&[100, 0], b"user.none\0"));
    assert_eq!(guest.answer().unwrap_err(), libc::ENODATA);
}

#[test]
fn the_process_has_no_more_than_it_needs() {
    if !is_root() {
        return;
    }
    let (_folder, tree) = world(false);
    let (served, mut guest) = serve(&[("root", &tree)]);
    guest.node("root");
    let tasks = fs::read_dir(format!("/proc/{}/task", served.0.id())).unwrap();
    let statuses = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let confined = |status: &String| {
        let has = |line: String| status.lines().any(|other| other == line);
        ["CapPrm", "CapEff", "CapBnd"].iter().all(|set| has(format!("{set}:\t{CAPABILITIES}")))
            && ["CapInh", "CapAmb"].iter().all(|set| has(format!("{set}:\t0000000000000000")))
            && has("NoNewPrivs:\t1".into())
            && has("Seccomp:\t2".into())
    };
    assert_eq!(statuses.filter(confined).count(), 1);
}
