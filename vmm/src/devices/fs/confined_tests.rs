//! A share that is added under full confinement, as the daemon and the monitor do it: two processes.
//!
//! The monitor's part is a test of its own ([`monitor`]), which the other tests start as a process without root's
//! rights; the two speak in lines. A failed assertion there ends it, and the test with it.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, chown, symlink};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use fuse_backend_rs::abi::fuse_abi::LinkIn;
use vm_memory::ByteValued;

use super::guest::{Guest, Opcode, ROOT_ID, named};
use super::mounting::{attach, clone_mount, detach};
use super::{ShareRoot, Unrooted};
use crate::confine::{self, Landlock};

/// The user that the monitor runs as; nobody has it.
const MONITOR: u32 = 61_234;
/// The user that owns what is shared with mapped IDs.
const OWNER: u32 = 61_235;
const SYS_ADMIN: u32 = 21;
/// Says what the process is to do; without it [`monitor`] does nothing.
const PART: &str = "CATALYST_TEST_PART";
/// The folder that is shared where there is no namespace.
const FOLDER: &str = "CATALYST_TEST_FOLDER";
/// The name of an abstract socket of the other process.
const SOCKET: &str = "CATALYST_TEST_SOCKET";

/// Becomes [`MONITOR`], with `CAP_SYS_ADMIN` as ambient capability if `admin`, as the daemon starts monitors.
fn become_monitor(admin: bool) -> io::Result<()> {
    let succeeded = |returned: i64| if returned == -1 { Err(io::Error::last_os_error()) } else { Ok(()) };
    let header = [0x2008_0522_u32, 0];
    let admin = u32::from(admin) << SYS_ADMIN;
    let sets = [admin, admin, admin, 0, 0, 0];
    // SAFETY: the header and both halves of the sets are there; the rest are numbers.
    unsafe {
        succeeded(libc::prctl(libc::PR_SET_KEEPCAPS, 1).into())?;
        succeeded(libc::setgroups(0, std::ptr::null()).into())?;
        succeeded(libc::setresgid(MONITOR, MONITOR, MONITOR).into())?;
        succeeded(libc::setresuid(MONITOR, MONITOR, MONITOR).into())?;
        succeeded(libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()))?;
        if admin != 0 {
            succeeded(libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, SYS_ADMIN, 0, 0).into())?;
        }
        succeeded(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())
    }
}

/// The other process, seen from the test.
struct Monitor {
    process: Child,
    said: BufReader<std::process::ChildStdout>,
}

impl Monitor {
    fn start(part: &str, admin: bool, variables: &[(&str, &str)]) -> Self {
        let name = format!("{}::monitor", module_path!().split_once("::").unwrap().1);
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", &name, "--ignored", "--nocapture", "--test-threads=1"])
            .env(PART, part)
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        // SAFETY: system calls only.
        unsafe { command.pre_exec(move || become_monitor(admin)) };
        let mut process = command.spawn().unwrap();
        let said = BufReader::new(process.stdout.take().unwrap());
        Self { process, said }
    }

    /// Waits until it says `what`, and returns what follows on the line.
    fn wait_for(&mut self, what: &str) -> String {
        let mut seen = String::new();
        loop {
            let begin = seen.len();
            assert_ne!(self.said.read_line(&mut seen).unwrap(), 0, "the monitor ended; it said:\n{seen}");
            if let Some((_, rest)) = seen[begin..].split_once(what) {
                return rest.trim().to_owned();
            }
        }
    }

    fn tell(&mut self, what: &str) {
        writeln!(self.process.stdin.as_mut().unwrap(), "{what}").unwrap();
    }

    fn end(mut self) {
        self.wait_for("test result: ok. 1 passed");
        assert!(self.process.wait().unwrap().success());
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// In the monitor: waits for the test to say `what`.
fn wait_for(what: &str) {
    let mut line = String::new();
    io::stdin().read_line(&mut line).unwrap();
    assert_eq!(line.trim(), what);
}

fn is_root() -> bool {
    // SAFETY: no memory is involved.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        println!("SKIPPED: it takes root to start a process as another user and to mount into its namespace");
    }
    root
}

/// Listens where only the host may connect; the socket closes when the result is dropped.
fn abstract_socket() -> (UnixListener, String) {
    let name = format!("catalyst-test-{}-{:?}", std::process::id(), std::thread::current().id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    (UnixListener::bind_addr(&address).unwrap(), name)
}

#[test]
#[ignore = "the monitor's part of the other tests, which start it"]
fn monitor() {
    match std::env::var(PART).as_deref() {
        Ok("namespace") => share_of_a_namespace(),
        Ok("folder") => share_of_a_folder(),
        _ => println!("SKIPPED: this is a part of other tests"),
    }
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

/// What no confined process can do, whether it has a namespace of its own or not.
fn assert_confined(landlock: Landlock) {
    let (header, mut sets) = ([0x2008_0522_u32, 0], [u32::MAX; 6]);
    // SAFETY: the kernel reads the header and fills both halves of the sets.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()), 0);
        assert_eq!(sets, [0; 6], "no capability is left");
        let ambient = libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_IS_SET, SYS_ADMIN, 0, 0);
        assert_eq!(ambient, 0);
        assert_eq!(libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0), 1);
        assert_eq!(libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0), 0);
        assert_eq!(libc::unshare(libc::CLONE_NEWNS), -1);
        // vCPU threads are kicked by signals.
        assert_eq!(libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), 0), 0);
    }
    if landlock != Landlock::Full {
        println!("SKIPPED: what only Landlock 6 and later forbids; this kernel has {landlock:?}");
        return;
    }
    assert_eq!(errno(TcpStream::connect("127.0.0.1:9")), libc::EACCES);
    let address = SocketAddr::from_abstract_name(std::env::var(SOCKET).unwrap()).unwrap();
    assert_eq!(errno(UnixStream::connect_addr(&address)), libc::EPERM);
}

fn share_of_a_namespace() {
    let unrooted = Unrooted::open().unwrap();
    let root = confine::enter_namespace().unwrap().expect("a namespace");
    let confinement = confine::drop_privileges(&[&root]).unwrap();
    assert_confined(confinement.landlock);
    assert_eq!(fs::read_dir("/").unwrap().count(), 0, "the root is empty");
    assert_eq!(errno(fs::read("/etc/passwd")), libc::ENOENT);
    assert_eq!(errno(fs::create_dir("/own")), libc::EACCES);
    assert_eq!(errno(fs::write("/../own", "")), libc::EACCES);

    let mut guest = Guest::new(unrooted.at(&root).unwrap());
    guest.mount();
    assert_eq!(guest.list(ROOT_ID).unwrap(), []);
    assert_eq!(guest.create(ROOT_ID, "own", libc::O_RDWR, 0o644), Err(libc::EACCES));
    // SAFETY: no memory is involved.
    println!("READY {}", unsafe { libc::gettid() });
    wait_for("added");

    assert_eq!(guest.list(ROOT_ID).unwrap().len(), 1);
    let project = guest.walk(&["project"]).unwrap();
    // SAFETY: no memory is involved.
    assert_eq!(guest.attributes(project).unwrap().attr.uid, unsafe { libc::geteuid() });
    use_share(&mut guest, project);
    println!("USED");
    wait_for("removed");

    assert_eq!(guest.lookup(ROOT_ID, "project").err(), Some(libc::ENOENT));
    if confinement.landlock != Landlock::None {
        let hello = guest.open(project, libc::O_RDONLY | libc::O_DIRECTORY);
        assert_eq!(hello, Err(libc::EACCES), "no file of a share that was taken away can be opened");
    }
}

/// Reads and writes files of a share at `folder`, and nothing else.
fn use_share(guest: &mut Guest, folder: u64) {
    let hello = guest.lookup(folder, "hello").unwrap().nodeid;
    let handle = guest.open(hello, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(hello, handle).unwrap(), b"from the host");
    let (made, handle) = guest.create(folder, "made", libc::O_RDWR, 0o644).unwrap();
    guest.write(made, handle, b"from the guest").unwrap();
    assert_eq!(guest.read(made, handle).unwrap(), b"from the guest");
    // By another descriptor, through /proc/self/fd.
    let handle = guest.open(made, libc::O_RDWR).unwrap();
    guest.write(made, handle, b"FROM").unwrap();
    assert_eq!(guest.read(made, handle).unwrap(), b"FROM the guest");
    let link = LinkIn { oldnodeid: made };
    guest.ask(Opcode::Link, folder, &named(link.as_slice(), &["linked"])).unwrap();
    let rename = folder.to_le_bytes();
    guest.ask(Opcode::Rename, folder, &named(&rename, &["linked", "renamed"])).unwrap();
    let names: Vec<_> = guest.list(folder).unwrap().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["hello", "made", "out", "renamed", "root-only"]);

    let out = guest.lookup(folder, "out").unwrap().nodeid;
    guest.open(out, libc::O_RDONLY).unwrap_err();
    guest.create(folder, "out", libc::O_RDWR | libc::O_PATH, 0o644).unwrap_err();
    assert_eq!(guest.lookup(folder, "..").err(), Some(libc::EINVAL));
    // The host's permissions count, whoever asks in the guest.
    let root_only = guest.lookup(folder, "root-only").unwrap().nodeid;
    assert_eq!(guest.open(root_only, libc::O_RDONLY), Err(libc::EACCES));
}

/// Without `CAP_SYS_ADMIN` there is no namespace: a folder is shared, and Landlock keeps the process in it.
fn share_of_a_folder() {
    let folder = File::open(std::env::var(FOLDER).unwrap()).unwrap();
    let root = ShareRoot::folder(&folder).unwrap();
    assert!(confine::enter_namespace().unwrap().is_none());
    let confinement = confine::drop_privileges(&[&folder]).unwrap();
    assert_confined(confinement.landlock);
    if confinement.landlock != Landlock::None {
        assert_eq!(errno(fs::read("/etc/passwd")), libc::EACCES);
        assert_eq!(errno(fs::read("/proc/self/maps")), libc::EACCES);
    }
    let mut guest = Guest::new(root);
    guest.mount();
    use_share(&mut guest, ROOT_ID);
}

/// A folder of `user` with a file, and things that must stay out of reach.
fn prepare(user: u32, outside: &Path) -> std::path::PathBuf {
    let folder = outside.join("project");
    fs::create_dir(&folder).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    fs::write(folder.join("hello"), "from the host").unwrap();
    symlink(outside.join("secret"), folder.join("out")).unwrap();
    fs::write(folder.join("root-only"), "root's").unwrap();
    let closed = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o600);
    fs::set_permissions(folder.join("root-only"), closed).unwrap();
    let open = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o755);
    fs::set_permissions(outside, open).unwrap();
    for path in [&folder, &folder.join("hello")] {
        chown(path, Some(user), Some(user)).unwrap();
    }
    folder
}

/// Shares a folder of `user` with a confined monitor, and looks at what it made.
fn add_a_share(user: u32) {
    let outside = tempfile::tempdir().unwrap();
    let folder = prepare(user, outside.path());
    let map = (user != MONITOR).then_some((user, MONITOR));
    let tree = match clone_mount(&folder, false, map) {
        Err(error) if map.is_some() && error.raw_os_error() == Some(libc::EINVAL) => {
            return println!("SKIPPED: the file system of {} cannot map IDs", outside.path().display());
        }
        tree => tree.unwrap(),
    };
    let (_socket, name) = abstract_socket();
    let mut monitor = Monitor::start("namespace", true, &[(SOCKET, &name)]);
    let thread = monitor.wait_for("READY");
    let namespace = File::open(format!("/proc/{thread}/ns/mnt")).unwrap();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count();
    attach(&tree, &namespace, c"/project").unwrap();
    assert_eq!(fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count(), mounts);
    monitor.tell("added");
    monitor.wait_for("USED");
    let made = fs::metadata(folder.join("made")).unwrap();
    assert_eq!((made.uid(), made.gid(), made.mode() & 0o777), (user, user, 0o644));
    assert_eq!(fs::read(folder.join("renamed")).unwrap(), b"FROM the guest");
    detach(&namespace, c"/project").unwrap();
    monitor.tell("removed");
    monitor.end();
}

#[test]
fn a_share_is_added_under_full_confinement() {
    if is_root() {
        add_a_share(MONITOR);
    }
}

#[test]
fn an_owners_files_are_the_monitors_by_a_mapped_mount() {
    if is_root() {
        add_a_share(OWNER);
    }
}

#[test]
fn a_folder_is_shared_where_there_is_no_namespace() {
    if !is_root() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    let folder = prepare(MONITOR, outside.path());
    let (_socket, name) = abstract_socket();
    let path = folder.to_str().unwrap();
    Monitor::start("folder", false, &[(FOLDER, path), (SOCKET, &name)]).end();
    assert_eq!(fs::read(folder.join("renamed")).unwrap(), b"FROM the guest");
    assert_eq!(fs::metadata(folder.join("made")).unwrap().uid(), MONITOR);
}

#[test]
fn the_hosts_root_is_not_shared_by_mistake() {
    let folder = tempfile::tempdir().unwrap();
    let meant = File::open(folder.path()).unwrap();
    assert!(matches!(Unrooted::open().unwrap().at(&meant), Err(super::FsError::NotRoot)));
}
