//! A guest's driver for the tests: it offers buffers, sends packets, and waits for what comes.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::packet::{HEADER_BYTES, Header};
use super::{HOST_CID, TYPE_STREAM, Vsock, op};
use crate::memory::GuestRam;
use crate::reactor::Reactor;
use crate::virtio::VirtioDevice;
use crate::virtio::testing::{self, BUFFERS, DriverQueue};

pub const CID: u32 = 42;
/// The guest's buffer of each connection, as it says itself.
pub const GUEST_WINDOW: u32 = 64 << 10;
const SIZE: u16 = 256;
const RX_BYTES: u32 = 4096;
/// Where packets to the device are put, 64 KiB and more.
const TX: u64 = 0x30_0000;

/// A device and its driver.
#[derive(Debug)]
pub struct Guest {
    pub device: Vsock,
    pub memory: GuestRam,
    pub rx: DriverQueue,
    pub tx: DriverQueue,
    pub event: DriverQueue,
    pub host: Host,
    reactor: Arc<Reactor>,
}

/// What a test has of the host.
#[derive(Debug)]
pub struct Host {
    folder: tempfile::TempDir,
    upstream: UnixDatagram,
}

impl Host {
    /// Connects to the device's listener.
    pub fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.folder.path().join("vsock")).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        client.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
        client
    }

    /// Asks for a port of the guest.
    pub fn connect(&self, port: u32) -> UnixStream {
        let mut client = self.client();
        writeln!(client, "CONNECT {port}").unwrap();
        client
    }

    /// The upstream socket once more, for another thread.
    pub fn clone_upstream(&self) -> UnixDatagram {
        self.upstream.try_clone().unwrap()
    }

    /// A connection of the guest: its port and the stream.
    pub fn accept(&self) -> (u32, UnixStream) {
        let mut port = [0; 4];
        let mut fds = [-1];
        let mut buffers = [libc::iovec { iov_base: port.as_mut_ptr().cast(), iov_len: port.len() }];
        // SAFETY: the buffer is `port`, which lives longer than the call.
        let (bytes, count) = unsafe { self.upstream.recv_with_fds(&mut buffers, &mut fds) }.unwrap();
        assert_eq!((bytes, count), (4, 1));
        // SAFETY: the kernel has just made the descriptor for us.
        let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fds[0]) });
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
        (u32::from_le_bytes(port), stream)
    }
}

/// Reads `OK <port>` and returns the port.
pub fn read_ok(client: &UnixStream) -> u32 {
    let mut line = String::new();
    // One byte at a time would not read ahead either, but the guest sends nothing before the line is read.
    BufReader::new(client).read_line(&mut line).unwrap();
    line.trim_end().strip_prefix("OK ").unwrap().parse().unwrap()
}

/// A packet of the guest to `host` port from `guest` port.
pub fn packet(op: u16, guest: u32, host: u32) -> Header {
    Header {
        src_cid: u64::from(CID),
        dst_cid: HOST_CID,
        src_port: guest,
        dst_port: host,
        kind: TYPE_STREAM,
        op,
        buf_alloc: GUEST_WINDOW,
        ..Header::default()
    }
}

impl Guest {
    /// A device at work, with `buffers` offered for packets to the guest.
    pub fn new(buffers: u16) -> Self {
        Self::named("vsock", buffers)
    }

    /// The same, on a thread of this name.
    pub fn named(thread: &str, buffers: u16) -> Self {
        raise_descriptor_limit();
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("vsock")).unwrap();
        let (upstream, other) = seqpacket_pair();
        let reactor = Arc::new(Reactor::spawn(thread, || ()).unwrap());
        let device = Vsock::new(CID, Some(listener), Some(other), Arc::clone(&reactor));
        let memory = testing::memory();
        let queue = |index| DriverQueue::new(&memory, index, SIZE);
        let (rx, tx, event) = (queue(0), queue(1), queue(2));
        let host = Host { folder, upstream };
        let mut guest = Self { device, memory, rx, tx, event, host, reactor };
        guest.activate(buffers);
        guest
    }

    /// The driver starts from the beginning, with empty queues.
    pub fn activate(&mut self, buffers: u16) {
        self.memory.write_slice(&vec![0; 0x3_0000], GuestAddress(testing::RINGS)).unwrap();
        let queue = |index| DriverQueue::new(&self.memory, index, SIZE);
        (self.rx, self.tx, self.event) = (queue(0), queue(1), queue(2));
        for _ in 0..buffers {
            self.offer_room();
        }
        let queues = [&self.rx, &self.tx, &self.event];
        let activation = testing::activation(&self.memory, &queues, 0, self.device.counters());
        self.device.activate(activation).unwrap();
    }

    /// Offers one buffer for a packet. Buffers are used in turn, as their descriptors are.
    pub fn offer_room(&mut self) {
        let head = self.rx.offer(&[(0, RX_BYTES, true)]);
        let address = BUFFERS + u64::from(head) * u64::from(RX_BYTES);
        self.rx.describe(head, (address, RX_BYTES, testing::WRITE, 0));
    }

    /// Offers one buffer and notifies the device.
    pub fn give_room(&mut self) {
        self.offer_room();
        self.rx.kick();
    }

    /// Sends a packet and waits until the device has taken it.
    pub fn send(&mut self, header: Header, data: &[u8]) {
        self.memory.write_slice(&header.to_bytes(), GuestAddress(TX)).unwrap();
        self.memory.write_slice(data, GuestAddress(TX + HEADER_BYTES as u64)).unwrap();
        let length = u32::try_from(HEADER_BYTES + data.len()).unwrap();
        self.send_parts(&[(TX, length, false)]);
    }

    /// Sends a chain, whatever it is.
    pub fn send_parts(&mut self, parts: &[testing::Part]) {
        let head = self.tx.offer(parts);
        self.tx.kick();
        assert_eq!(self.tx.wait_used(), (head, 0));
    }

    /// Sends data with its length in the header.
    pub fn send_data(&mut self, header: Header, data: &[u8]) {
        self.send(Header { op: op::RW, len: u32::try_from(data.len()).unwrap(), ..header }, data);
    }

    /// The next packet that has come, and its buffer offered again.
    pub fn poll(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, written) = self.rx.take_used()?;
        let at = BUFFERS + u64::from(head) * u64::from(RX_BYTES);
        let mut bytes = vec![0; written as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        self.give_room();
        let data = bytes.split_off(HEADER_BYTES);
        let header = Header::from_bytes(&bytes.try_into().unwrap());
        assert_eq!(header.len as usize, data.len());
        assert_eq!(header.dst_cid, u64::from(CID));
        Some((header, data))
    }

    /// Returns when the device has given what it had to give for the packets that it took.
    pub fn settle(&self) {
        self.reactor.pause();
        self.reactor.resume();
    }

    /// Waits for the next packet.
    pub fn receive(&mut self) -> (Header, Vec<u8>) {
        let mut got = None;
        wait_until("a packet came", || {
            got = self.poll();
            got.is_some()
        });
        got.unwrap()
    }

    /// Waits for the next packet, which must be for this.
    pub fn expect(&mut self, op: u16) -> (Header, Vec<u8>) {
        let (header, data) = self.receive();
        assert_eq!(header.op, op, "{header:?}");
        (header, data)
    }

    /// Connects to a port of the host, and returns the host's end.
    pub fn connect(&mut self, port: u32, host: u32) -> UnixStream {
        self.send(packet(op::REQUEST, port, host), &[]);
        let (asked, stream) = self.host.accept();
        assert_eq!(asked, host);
        let (response, _) = self.expect(op::RESPONSE);
        assert_eq!((response.src_port, response.dst_port), (host, port));
        stream
    }

    /// Accepts a connection of the host to `port`: the client, and the host's port.
    pub fn accept(&mut self, port: u32) -> (UnixStream, u32) {
        let client = self.host.connect(port);
        let (request, _) = self.expect(op::REQUEST);
        assert_eq!((request.src_cid, request.dst_port), (HOST_CID, port));
        self.send(packet(op::RESPONSE, port, request.src_port), &[]);
        assert_eq!(read_ok(&client), request.src_port);
        (client, request.src_port)
    }

    /// Connections that the device has.
    pub fn connections(&self) -> usize {
        self.device.worker().connections()
    }
}

/// Waits for something that has no event, ten seconds at most.
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(10), "not so after ten seconds: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Takes the guest's connections and keeps them, until the device has gone.
pub fn keep_all(upstream: &UnixDatagram) {
    let mut kept = Vec::new();
    loop {
        let mut port = [0; 4];
        match upstream.recv_with_fd(&mut port) {
            Ok((4, Some(stream))) => kept.push(stream),
            _ => return,
        }
    }
}

/// Some tests have thousands of descriptors, and others run beside them.
fn raise_descriptor_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is there for the kernel to write and to read.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
        limit.rlim_cur = limit.rlim_max;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
    }
}

fn seqpacket_pair() -> (UnixDatagram, OwnedFd) {
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for the two descriptors.
    let result = unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0, fds.as_mut_ptr()) };
    assert_eq!(result, 0);
    // SAFETY: the kernel has just made them for us.
    let [ours, theirs] = fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    let ours = UnixDatagram::from(ours);
    ours.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    (ours, theirs)
}
