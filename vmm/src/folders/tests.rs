//! A guest and the process that serves it, without the process: messages over the port's line.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use catalyst_agent_protocol::{Channel, Decoder, Line, LineControl, encode};

use super::serve::Server;
use super::{Answer, FolderOwner, FoldersError, Request, Saved, fuse};
use crate::devices::fs::{Files, ShareRoot};

pub(super) const ROOT: u64 = 1;
pub(super) const LOOKUP: u32 = 1;
pub(super) const GETATTR: u32 = 3;
pub(super) const SETATTR: u32 = 4;
const UNLINK: u32 = 10;
pub(super) const OPEN: u32 = 14;
const READ: u32 = 15;
pub(super) const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const INIT: u32 = 26;
pub(super) const CREATE: u32 = 35;
const FORGET: u32 = 2;

/// A served folder, and the control socket.
struct Host {
    control: UnixStream,
    serving: JoinHandle<Result<(), FoldersError>>,
}

impl Host {
    fn ask(&mut self, request: &Request) -> Answer {
        let mut line = serde_json::to_vec(request).unwrap();
        line.push(b'\n');
        self.control.write_all(&line).unwrap();
        let mut answer = Vec::new();
        let mut byte = [0];
        while self.control.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
            answer.push(byte[0]);
        }
        serde_json::from_slice(&answer).unwrap()
    }

    fn save(&mut self) -> Saved {
        match self.ask(&Request::Save) {
            Answer::Saved(saved) => *saved,
            other => panic!("{other:?}"),
        }
    }
}

/// What the agent and its kernel do.
pub(super) struct Guest {
    port: UnixStream,
    decoder: Decoder,
    epoch: u32,
    session: u64,
    line: Line,
    unique: u64,
    /// User and group whose program asks.
    pub(super) user: (u32, u32),
}

/// Serves what is in `root`: folders, whose files belong to 4000 in the guest.
fn serve(root: &Path, state: Option<Saved>) -> (Host, UnixStream) {
    let (port, guest) = UnixStream::pair().unwrap();
    guest.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let path = root.parent().unwrap().join(format!("control-{}", rand(root)));
    let listener = UnixListener::bind(&path).unwrap();
    let files = Files::serving(ShareRoot::folder(&File::open(root).unwrap()).unwrap()).unwrap();
    let server = Server::new(files, fuse::Pipe::new().unwrap(), port, Some(listener), state).unwrap();
    let serving = thread::spawn(move || server.run());
    let mut host = Host { control: UnixStream::connect(path).unwrap(), serving };
    let owner = FolderOwner { name: "work".into(), uid: 4000, gid: 4000 };
    assert_eq!(host.ask(&Request::Ready), Answer::Done);
    assert_eq!(host.ask(&Request::Owners { folders: vec![owner] }), Answer::Done);
    (host, guest)
}

fn rand(root: &Path) -> usize {
    fs::read_dir(root.parent().unwrap()).unwrap().count()
}

impl Guest {
    pub(super) fn new(port: UnixStream) -> Self {
        let (decoder, line) = (Decoder::new(), Line::default());
        let mut guest = Self { port, decoder, epoch: 0, session: 77, line, unique: 0, user: (0, 0) };
        guest.greet();
        guest.ask(INIT, 0, &init());
        guest
    }

    /// The next frame.
    fn frame(&mut self) -> catalyst_agent_protocol::Frame {
        let mut buffer = vec![0; 65536];
        loop {
            if let Some(frame) = self.decoder.next_frame() {
                return frame;
            }
            let count = self.port.read(&mut buffer).unwrap();
            assert_ne!(count, 0, "the other side has ended");
            self.decoder.push(&buffer[..count]);
        }
    }

    /// Answers the greeting; what the other side has not received goes again.
    fn greet(&mut self) {
        let frame = self.frame();
        let LineControl::Hello { session, received } = serde_json::from_slice(&frame.payload).unwrap() else {
            panic!("no greeting")
        };
        self.epoch = frame.epoch;
        if session == self.session {
            assert!(self.line.confirmed(received));
        }
        let hello = LineControl::Hello { session: self.session, received: self.line.received() };
        let hello = encode(self.epoch, 0, Channel::Control, &hello.to_bytes()).unwrap();
        self.port.write_all(&hello).unwrap();
        let again = self.line.again(self.epoch, Channel::Output);
        self.port.write_all(&again).unwrap();
    }

    pub(super) fn send(&mut self, opcode: u32, node: u64, body: &[u8]) {
        self.unique += 2;
        let mut message = Vec::new();
        message.extend(u32::try_from(40 + body.len()).unwrap().to_le_bytes());
        message.extend(opcode.to_le_bytes());
        message.extend(self.unique.to_le_bytes());
        message.extend(node.to_le_bytes());
        message.extend([self.user.0, self.user.1, 0, 0].map(u32::to_le_bytes).concat());
        message.extend(body);
        let frame = self.line.send(self.epoch, Channel::Output, message).unwrap();
        self.port.write_all(&frame).unwrap();
    }

    pub(super) fn answer(&mut self) -> Result<Vec<u8>, i32> {
        loop {
            let frame = self.frame();
            if frame.channel == Channel::Control {
                if let Ok(LineControl::Confirm { received }) = serde_json::from_slice(&frame.payload) {
                    assert!(self.line.confirmed(received));
                }
                continue;
            }
            let Some(answer) = self.line.receive(frame) else { continue };
            assert_eq!(answer[8..16], self.unique.to_le_bytes());
            let errno = i32::from_le_bytes(answer[4..8].try_into().unwrap());
            return if errno == 0 { Ok(answer[16..].to_vec()) } else { Err(-errno) };
        }
    }

    pub(super) fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        self.send(opcode, node, body);
        self.answer().unwrap_or_else(|errno| panic!("message {opcode}: errno {errno}"))
    }

    pub(super) fn lookup(&mut self, node: u64, name: &str) -> Result<Vec<u8>, i32> {
        self.send(LOOKUP, node, &[name.as_bytes(), b"\0"].concat());
        self.answer()
    }

    pub(super) fn node(&mut self, path: &str) -> u64 {
        path.split('/').fold(ROOT, |node, name| number(&self.lookup(node, name).unwrap(), 0))
    }

    /// A new file, open for reading and writing: its number and that of the handle.
    pub(super) fn create(&mut self, folder: u64, name: &str) -> (u64, u64) {
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
        let fields = [flags.cast_unsigned(), 0o644, 0o022, 0].map(u32::to_le_bytes).concat();
        let answer = self.ask(CREATE, folder, &[&fields, name.as_bytes(), b"\0"].concat());
        (number(&answer, 0), number(&answer, 128))
    }

    pub(super) fn write(&mut self, node: u64, handle: u64, at: u64, text: &str) {
        let mut fields = [handle, at].map(u64::to_le_bytes).concat();
        fields.extend(u32::try_from(text.len()).unwrap().to_le_bytes());
        fields.extend([0; 20]);
        self.ask(WRITE, node, &[&fields, text.as_bytes()].concat());
    }

    pub(super) fn read(&mut self, node: u64, handle: u64) -> Result<String, i32> {
        let mut fields = [handle, 0].map(u64::to_le_bytes).concat();
        fields.extend(1000_u32.to_le_bytes());
        fields.extend([0; 20]);
        self.send(READ, node, &fields);
        self.answer().map(|bytes| String::from_utf8(bytes).unwrap())
    }
}

fn init() -> Vec<u8> {
    [7_u32, 38, 1 << 17, !(1 << 30)].map(u32::to_le_bytes).concat()
}

pub(super) fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn world() -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    fs::create_dir_all(root.join("work/sub")).unwrap();
    fs::write(root.join("work/a"), "of the host").unwrap();
    (folder, root)
}

#[test]
fn files_are_read_and_written_and_belong_to_the_guests_user() {
    let (_folder, root) = world();
    let (_host, port) = serve(&root, None);
    let mut guest = Guest::new(port);
    let work = guest.node("work");
    let (node, handle) = guest.create(work, "b");
    guest.write(node, handle, 0, "of the guest");
    assert_eq!(fs::read_to_string(root.join("work/b")).unwrap(), "of the guest");
    let attributes = guest.ask(GETATTR, node, &[0; 16]);
    let uid = u32::from_le_bytes(attributes[16 + 68..16 + 72].try_into().unwrap());
    assert_eq!(uid, 4000);
    // Whom it belongs to on the host is not the guest's business, and what unpacks an archive does not fail for it.
    let mut chown = vec![0; 88];
    chown[0] = 6;
    chown[76..84].copy_from_slice(&[4000_u32, 4000].map(u32::to_le_bytes).concat());
    guest.ask(SETATTR, node, &chown);
    let own = fs::metadata(root.join("work")).unwrap().uid();
    assert_eq!(fs::metadata(root.join("work/b")).unwrap().uid(), own);
    assert_eq!(guest.lookup(work, "..").unwrap_err(), libc::EINVAL);
    assert_eq!(guest.lookup(999, "a").unwrap_err(), libc::ESTALE, "no number of ours");
}

#[test]
fn what_holds_for_a_moment_is_neither_a_files_name_nor_what_is_shared() {
    let (_folder, root) = world();
    std::os::unix::fs::symlink("a", root.join("work/link")).unwrap();
    let (_host, port) = serve(&root, None);
    let mut guest = Guest::new(port);
    // Seconds and nanoseconds for which an answer's name and attributes hold (`struct fuse_entry_out`).
    let holds = |entry: &[u8]| {
        let part = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap());
        [(number(entry, 16), part(32)), (number(entry, 24), part(36))]
    };
    let moment = (0, 100_000_000);
    assert_eq!(holds(&guest.lookup(ROOT, "work").unwrap()), [(0, 0); 2], "the daemon takes it away");
    let work = guest.node("work");
    assert_eq!(holds(&guest.lookup(work, "sub").unwrap()), [moment; 2]);
    assert_eq!(holds(&guest.lookup(work, "link").unwrap()), [moment; 2]);
    assert_eq!(holds(&guest.lookup(work, "a").unwrap()), [(0, 0), moment], "who opens it sees it as it is");
    let flags = (libc::O_RDWR | libc::O_CREAT).cast_unsigned();
    let fields = [flags, 0o644, 0o022, 0].map(u32::to_le_bytes).concat();
    let created = guest.ask(CREATE, work, &[&fields[..], b"new\0"].concat());
    assert_eq!(holds(&created), [(0, 0), moment]);
    let attributes = |guest: &mut Guest, node| {
        let answer = guest.ask(GETATTR, node, &[0; 16]);
        (number(&answer, 0), u32::from_le_bytes(answer[8..12].try_into().unwrap()))
    };
    assert_eq!(attributes(&mut guest, ROOT), (0, 0));
    assert_eq!(attributes(&mut guest, work), moment);
    assert_eq!(attributes(&mut guest, number(&created, 0)), moment);
}

#[test]
fn a_connection_that_is_cut_loses_and_repeats_nothing() {
    let (_folder, root) = world();
    let (mut host, port) = serve(&root, None);
    let mut guest = Guest::new(port);
    let work = guest.node("work");
    let (node, handle) = guest.create(work, "b");
    guest.write(node, handle, 0, "one ");
    let saved = host.save();
    // The port is left alone meanwhile: what is asked now waits, and is asked again of the next process.
    guest.send(UNLINK, work, b"a\0");
    drop((guest.port, host));
    let (host, port) = serve(&root, Some(saved));
    guest.port = port;
    guest.decoder = Decoder::new();
    guest.greet();
    assert_eq!(guest.answer(), Ok(Vec::new()), "it is done once");
    assert!(!root.join("work/a").exists());
    guest.write(node, handle, 4, "two");
    assert_eq!(guest.read(node, handle).unwrap(), "one two", "what was open still is");
    assert_eq!(guest.node("work"), work, "numbers stay");
    drop(guest);
    assert!(host.serving.join().unwrap().is_ok(), "it ends with the port");
}

#[test]
fn a_file_that_is_another_when_a_guest_goes_on_is_stale() {
    let (_folder, root) = world();
    let (mut host, port) = serve(&root, None);
    let mut guest = Guest::new(port);
    let work = guest.node("work");
    let (node, handle) = guest.create(work, "b");
    let saved = host.save();
    drop((guest.port, host));
    // By renaming: the new one has another inode.
    fs::write(root.join("work/new"), "another").unwrap();
    fs::rename(root.join("work/new"), root.join("work/b")).unwrap();
    let (_host, port) = serve(&root, Some(saved));
    guest.port = port;
    guest.decoder = Decoder::new();
    guest.greet();
    assert_eq!(guest.read(node, handle).unwrap_err(), libc::ESTALE);
    guest.ask(RELEASE, node, &[handle, 0, 0].map(u64::to_le_bytes).concat());
    let again = number(&guest.lookup(work, "b").unwrap(), 0);
    assert_ne!(again, node);
    let opened = guest.ask(OPEN, again, &[0; 8]);
    assert_eq!(guest.read(again, number(&opened, 0)).unwrap(), "another");
}

#[test]
fn what_breaks_the_rules_ends_the_process_or_is_refused() {
    let (_folder, root) = world();
    let (host, port) = serve(&root, None);
    let mut guest = Guest::new(port);
    guest.send(9999, ROOT, b"");
    assert_eq!(guest.answer().unwrap_err(), libc::ENOSYS);
    for opcode in [LOOKUP, SETATTR, OPEN, READ, WRITE, RELEASE, CREATE] {
        guest.send(opcode, ROOT, b"");
        assert!(guest.answer().is_err(), "message {opcode} without a body");
    }
    guest.send(FORGET, 5, b"");
    guest.send(FORGET, ROOT, &u64::MAX.to_le_bytes());
    guest.node("work/sub");
    let never = LineControl::Confirm { received: 4000 };
    guest.port.write_all(&encode(guest.epoch, 0, Channel::Control, &never.to_bytes()).unwrap()).unwrap();
    assert!(matches!(host.serving.join().unwrap(), Err(FoldersError::Guest(_))));
}
