//! A guest's side of virtio-fs, for tests: FUSE messages over the queues.

use std::fs::File;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{
    AttrOut, CreateIn, EntryOut, InHeader, InitIn, InitOut, OpenIn, OpenOut, OutHeader, ReadIn, WriteIn,
};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{Fs, ShareRoot};
use crate::memory::GuestRam;
use crate::reactor::Reactor;
use crate::virtio::testing::{BUFFERS, DriverQueue, activation, memory};
use crate::virtio::{Counters, VirtioDevice};

pub(super) use fuse_backend_rs::abi::fuse_abi::{Opcode, ROOT_ID};

/// Where answers go; messages are at [`BUFFERS`].
pub(super) const ANSWERS: u64 = BUFFERS + 0x18_0000;
const HEADER: usize = size_of::<OutHeader>();

/// A guest that has the device to itself.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) fs: Fs,
    pub(super) memory: GuestRam,
    pub(super) urgent: DriverQueue,
    pub(super) requests: DriverQueue,
    unique: u64,
}

impl Guest {
    pub(super) fn new(root: ShareRoot) -> Self {
        Self::with(Fs::new("shares", root, Arc::new(Reactor::spawn("fs", || ()).unwrap())).unwrap())
    }

    /// Sets the device up, but does not mount.
    pub(super) fn with(fs: Fs) -> Self {
        let memory = memory();
        let urgent = DriverQueue::new(&memory, 0, 64);
        let requests = DriverQueue::new(&memory, 1, 512);
        let mut guest = Self { fs, memory, urgent, requests, unique: 0 };
        guest.activate();
        guest
    }

    /// With fresh queues.
    pub(super) fn activate(&mut self) {
        self.urgent = DriverQueue::new(&self.memory, 0, 64);
        self.requests = DriverQueue::new(&self.memory, 1, 512);
        for queue in [&self.urgent, &self.requests] {
            self.memory.write_obj(0_u32, GuestAddress(queue.avail)).unwrap();
            self.memory.write_obj(0_u32, GuestAddress(queue.used)).unwrap();
        }
        let queues = [&self.urgent, &self.requests];
        let activation = activation(&self.memory, &queues, 0, &Counters::default());
        self.fs.activate(activation).unwrap();
    }

    pub(super) fn folder(path: &std::path::Path) -> Self {
        let mut guest = Self::new(ShareRoot::folder(&File::open(path).unwrap()).unwrap());
        guest.mount();
        guest
    }

    pub(super) fn mount(&mut self) -> InitOut {
        let all = InitIn { major: 7, minor: 38, max_readahead: 1 << 17, flags: !(1 << 30) };
        object(&self.ask(Opcode::Init, 0, all.as_slice()).unwrap())
    }

    /// Bytes of a whole message.
    pub(super) fn message(&mut self, opcode: u32, inode: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 2;
        let len = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
        // As somebody in the guest whom the host does not know.
        let header = InHeader {
            len,
            opcode,
            unique: self.unique,
            nodeid: inode,
            uid: 1000,
            gid: 1000,
            pid: 7,
            padding: 0,
        };
        [header.as_slice(), body].concat()
    }

    /// Sends a message and waits for its answer: what follows its header, or the error's number.
    pub(super) fn ask(&mut self, opcode: Opcode, inode: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let message = self.message(opcode as u32, inode, body);
        self.memory.write_slice(&message, GuestAddress(BUFFERS)).unwrap();
        let length = u32::try_from(message.len()).unwrap();
        let head = self.requests.offer(&[(BUFFERS, length, false), (ANSWERS, 0x2_0000, true)]);
        self.requests.kick();
        let (used, written) = self.requests.wait_used();
        assert_eq!(used, head);
        let mut answer = vec![0; written as usize];
        self.memory.read_slice(&mut answer, GuestAddress(ANSWERS)).unwrap();
        let header: OutHeader = object(&answer);
        assert_eq!((header.unique, header.len), (self.unique, written), "the answer to another message");
        if header.error == 0 { Ok(answer.split_off(HEADER)) } else { Err(-header.error) }
    }

    pub(super) fn lookup(&mut self, parent: u64, name: &str) -> Result<EntryOut, i32> {
        self.ask(Opcode::Lookup, parent, &named(&[], &[name])).map(|answer| object(&answer))
    }

    /// Follows names from the root.
    pub(super) fn walk(&mut self, path: &[&str]) -> Result<u64, i32> {
        path.iter().try_fold(ROOT_ID, |inode, name| Ok(self.lookup(inode, name)?.nodeid))
    }

    pub(super) fn open(&mut self, inode: u64, flags: i32) -> Result<u64, i32> {
        let open = OpenIn { flags: flags.cast_unsigned(), fuse_flags: 0 };
        self.ask(Opcode::Open, inode, open.as_slice()).map(|answer| object::<OpenOut>(&answer).fh)
    }

    /// The inode and the handle of a file that is created.
    pub(super) fn create(
        &mut self,
        parent: u64,
        name: &str,
        flags: i32,
        mode: u32,
    ) -> Result<(u64, u64), i32> {
        let create = CreateIn { flags: flags.cast_unsigned(), mode, umask: 0o022, fuse_flags: 0 };
        let answer = self.ask(Opcode::Create, parent, &named(create.as_slice(), &[name]))?;
        let entry: EntryOut = object(&answer);
        Ok((entry.nodeid, object::<OpenOut>(&answer[size_of::<EntryOut>()..]).fh))
    }

    pub(super) fn read(&mut self, inode: u64, handle: u64) -> Result<Vec<u8>, i32> {
        let read = ReadIn { fh: handle, size: 4096, ..ReadIn::default() };
        self.ask(Opcode::Read, inode, read.as_slice())
    }

    pub(super) fn write(&mut self, inode: u64, handle: u64, data: &[u8]) -> Result<Vec<u8>, i32> {
        let size = u32::try_from(data.len()).unwrap();
        let write = WriteIn { fh: handle, size, flags: libc::O_RDWR.cast_unsigned(), ..WriteIn::default() };
        self.ask(Opcode::Write, inode, &[write.as_slice(), data].concat())
    }

    pub(super) fn read_file(&mut self, path: &[&str]) -> Result<Vec<u8>, i32> {
        let inode = self.walk(path)?;
        let handle = self.open(inode, libc::O_RDONLY)?;
        self.read(inode, handle)
    }

    pub(super) fn attributes(&mut self, inode: u64) -> Result<AttrOut, i32> {
        self.ask(Opcode::Getattr, inode, &[0; 16]).map(|answer| object(&answer))
    }

    /// Names in a folder with their inode numbers, by one READDIR.
    pub(super) fn list(&mut self, inode: u64) -> Result<Vec<(String, u64)>, i32> {
        let open = OpenIn::default();
        let handle = object::<OpenOut>(&self.ask(Opcode::Opendir, inode, open.as_slice())?).fh;
        let read = ReadIn { fh: handle, size: 0x1_0000, ..ReadIn::default() };
        let answer = self.ask(Opcode::Readdir, inode, read.as_slice())?;
        let mut rest = &answer[..];
        let mut names = Vec::new();
        while rest.len() >= 24 {
            let number = u64::from_le_bytes(rest[..8].try_into().unwrap());
            let length = u32::from_le_bytes(rest[16..20].try_into().unwrap()) as usize;
            names.push((String::from_utf8(rest[24..24 + length].to_vec()).unwrap(), number));
            rest = &rest[(24 + length).next_multiple_of(8)..];
        }
        names.sort();
        Ok(names)
    }
}

/// A body: fixed fields, then names that end with zeros.
pub(super) fn named(fields: &[u8], names: &[&str]) -> Vec<u8> {
    let mut body = fields.to_vec();
    for name in names {
        body.extend(name.as_bytes());
        body.push(0);
    }
    body
}

/// The object at the beginning of `bytes`.
pub(super) fn object<T: ByteValued + Default>(bytes: &[u8]) -> T {
    let mut object = T::default();
    object.as_mut_slice().copy_from_slice(&bytes[..size_of::<T>()]);
    object
}
