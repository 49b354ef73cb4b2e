//! A tap in a namespace, somebody at its other end, and a guest.

// Numbers of the C interface and of short frames, all small.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::super::{HEADER, Net};
use crate::memory::GuestRam;
use crate::reactor::Reactor;
use crate::virtio::testing::{self, BUFFERS, DriverQueue};
use crate::virtio::{Interrupt, VirtioDevice};

pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const MRG_RXBUF: u64 = 1 << 15;
/// All offloads of the receiving side.
pub const GUEST_OFFLOADS: u64 = 1 << 1 | 1 << 7 | 1 << 8 | 1 << 9;
/// An Ethernet type that the kernel has no use for.
const EXPERIMENT: [u8; 2] = [0x88, 0xb5];
/// Guest memory for frames that the guest sends; below it are its receive buffers.
pub const SEND_AREA: u64 = BUFFERS + (2 << 20);

/// Runs a test in a network namespace of its own, which ends with its thread.
pub fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let run = move || {
        // SAFETY: only this thread moves to the new namespace.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return println!("SKIPPED: no network namespace: {}", io::Error::last_os_error());
        }
        if let Err(error) = open_tun() {
            return println!("SKIPPED: /dev/net/tun: {error}");
        }
        test();
    };
    if let Err(panic) = std::thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

fn open_tun() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/net/tun")
}

fn ok(result: libc::c_int) -> libc::c_int {
    assert!(result >= 0, "{}", io::Error::last_os_error());
    result
}

fn request() -> libc::ifreq {
    // SAFETY: zero bytes are an ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
        *to = from.cast_signed();
    }
    request
}

/// Makes `tap0`, not up.
pub fn make_tap(flags: libc::c_int) -> File {
    let file = open_tun().unwrap();
    let mut request = request();
    request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap();
    // SAFETY: the kernel reads and writes an ifreq.
    ok(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) });
    file
}

pub fn good_tap() -> File {
    make_tap(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)
}

fn socket(domain: i32, kind: i32, protocol: i32) -> OwnedFd {
    // SAFETY: the descriptor is new and nobody else's.
    unsafe { OwnedFd::from_raw_fd(ok(libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol))) }
}

pub fn set_up(up: bool) {
    // What the host's IPv6 says by itself would come between.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/tap0/disable_ipv6", "1");
    let control = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
    let mut request = request();
    request.ifr_ifru.ifru_flags = if up { i16::try_from(libc::IFF_UP).unwrap() } else { 0 };
    // SAFETY: the kernel reads an ifreq.
    ok(unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) });
}

/// Deletes `tap0`, by rtnetlink(7).
pub fn delete_interface() {
    let netlink = socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE);
    let mut message = [0_u32; 8];
    message[0] = 32;
    message[1] = u32::from(libc::RTM_DELLINK) | u32::from(libc::NLM_F_REQUEST as u16) << 16;
    message[5] = interface_index().cast_unsigned();
    // SAFETY: the kernel reads the message.
    let sent = unsafe { libc::send(netlink.as_raw_fd(), message.as_ptr().cast(), 32, 0) };
    assert_eq!(sent, 32, "{}", io::Error::last_os_error());
}

fn interface_index() -> i32 {
    // SAFETY: the name is a C string.
    let index = unsafe { libc::if_nametoindex(c"tap0".as_ptr()) };
    assert!(index > 0, "{}", io::Error::last_os_error());
    index.cast_signed()
}

/// Two ends of a socket that keeps messages apart and does not block.
pub fn seqpacket() -> (File, File) {
    let mut ends = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: the kernel writes two descriptors.
    ok(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) });
    // SAFETY: both are new and nobody else's.
    unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) }
}

/// A packet socket on `tap0` whose frames stand behind a `virtio_net_hdr` of 10 bytes.
#[derive(Debug)]
pub struct Peer(OwnedFd);

impl Peer {
    pub fn new() -> Self {
        let all = i32::from(u16::to_be(libc::ETH_P_ALL as u16));
        let socket = socket(libc::AF_PACKET, libc::SOCK_RAW, all);
        let set = |option, value: libc::c_int| {
            // SAFETY: the kernel reads an int.
            ok(unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::SOL_PACKET,
                    option,
                    (&raw const value).cast(),
                    size_of::<libc::c_int>() as u32,
                )
            });
        };
        set(libc::PACKET_VNET_HDR, 1);
        set(23, 1); // PACKET_IGNORE_OUTGOING
        // SAFETY: zero bytes are an address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = all as u16;
        address.sll_ifindex = interface_index();
        // SAFETY: the kernel reads an address of this length.
        ok(unsafe {
            libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32)
        });
        let timeout = libc::timeval { tv_sec: 10, tv_usec: 0 };
        // SAFETY: the kernel reads a timeval.
        ok(unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const timeout).cast(),
                size_of::<libc::timeval>() as u32,
            )
        });
        Self(socket)
    }

    pub fn send(&self, header: [u8; 10], frame: &[u8]) {
        let bytes = [&header, frame].concat();
        // SAFETY: the kernel reads the buffer.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        assert_eq!(usize::try_from(sent).ok(), Some(bytes.len()), "{}", io::Error::last_os_error());
    }

    fn read(&self, flags: libc::c_int) -> io::Result<([u8; 10], Vec<u8>)> {
        let mut bytes = vec![0; 70_000];
        // SAFETY: the kernel writes at most the buffer's length.
        let got = unsafe { libc::recv(self.0.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), flags) };
        let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        Ok((bytes[..10].try_into().unwrap(), bytes[10..got].to_vec()))
    }

    pub fn receive(&self) -> ([u8; 10], Vec<u8>) {
        self.read(0).unwrap()
    }

    pub fn has_nothing(&self) -> bool {
        self.read(libc::MSG_DONTWAIT).is_err()
    }
}

/// A frame with `length` bytes of payload that tell where they belong.
pub fn frame(number: u8, length: usize) -> Vec<u8> {
    let mut frame = [&MAC[..], &[2, 0, 0, 0, 0, 2], &EXPERIMENT].concat();
    frame.push(number);
    frame.extend((1..length).map(|at| (at / 3 + at % 251) as u8));
    frame
}

/// A TCP segment over IPv4 (`protocol` 6), or a datagram (17), whose checksum is left to others. The header for it
/// asks for segments of 1000 bytes if it is TCP.
pub fn packet(protocol: u8, payload: usize) -> ([u8; 10], Vec<u8>) {
    let transport = if protocol == 6 { 20 } else { 8 };
    let mut frame = [&MAC[..], &[2, 0, 0, 0, 0, 2], &[8, 0]].concat();
    let total = u16::try_from(20 + transport + payload).unwrap();
    let mut ip = [0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    ip[2..4].copy_from_slice(&total.to_be_bytes());
    let sum: u32 = ip.chunks(2).map(|two| u32::from(two[0]) << 8 | u32::from(two[1])).sum();
    let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(ip);
    let mut layer = vec![0; transport];
    layer[..4].copy_from_slice(&[0x12, 0x34, 0x56, 0x78]);
    let mut header = [1, 0, 0, 0, 0, 0, 34, 0, 6, 0];
    if protocol == 6 {
        layer[12] = 0x50;
        layer[13] = 0x10;
        header = [1, 1, 54, 0, 0xe8, 3, 34, 0, 16, 0];
    } else {
        layer[4..6].copy_from_slice(&(total - 20).to_be_bytes());
    }
    frame.extend(layer);
    frame.extend((0..payload).map(|at| (at / 7 + at % 253) as u8));
    (header, frame)
}

/// A guest with an active NIC.
pub struct Guest {
    pub memory: GuestRam,
    pub receive: DriverQueue,
    pub send: DriverQueue,
    pub net: Net,
    pub interrupt: Interrupt,
    pub reactor: Arc<Reactor>,
    pub clock: libc::clockid_t,
}

impl Guest {
    /// One on a tap that is up.
    pub fn new(features: u64) -> (Self, Peer) {
        let tap = good_tap();
        set_up(true);
        (Self::on(tap, features), Peer::new())
    }

    pub fn on(tap: File, features: u64) -> Self {
        let (reactor, clock) = reactor();
        let net = Net::new(tap, MAC, Arc::clone(&reactor)).unwrap();
        let memory = testing::memory();
        let receive = DriverQueue::new(&memory, 0, 256);
        let send = DriverQueue::new(&memory, 1, 256);
        let interrupt = Interrupt::new().unwrap();
        let mut guest = Self { memory, receive, send, net, interrupt, reactor, clock };
        guest.activate(features);
        guest
    }

    pub fn activate(&mut self, features: u64) {
        let counters = self.net.counters().clone();
        let activation = testing::activation(&self.memory, &[&self.receive, &self.send], features, &counters);
        self.interrupt = activation.interrupt.clone();
        self.net.activate(activation).unwrap();
    }

    /// Resets the device and begins with empty rings, as a driver does that is loaded again.
    pub fn reset(&mut self, features: u64) {
        self.net.reset();
        for queue in [&self.receive, &self.send] {
            self.memory.write_slice(&vec![0; 0x8000], GuestAddress(queue.avail)).unwrap();
        }
        self.receive = DriverQueue::new(&self.memory, 0, 256);
        self.send = DriverQueue::new(&self.memory, 1, 256);
        self.activate(features);
    }

    /// Offers `count` buffers of `length` bytes each, one descriptor each, and notifies. Buffer `n` lies at
    /// `BUFFERS + n * length`, as many as the guest has descriptors.
    pub fn offer_buffers(&mut self, range: std::ops::Range<u64>, length: u32) {
        for number in range {
            self.receive.offer(&[(BUFFERS + number * u64::from(length), length, true)]);
        }
        self.receive.kick();
    }

    pub fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Puts a frame where the guest sends from, and offers it: header and frame in descriptors of their own.
    pub fn offer_frame(&mut self, header: [u8; 10], frame: &[u8]) {
        let bytes = [&header, &[0, 0][..], frame].concat();
        self.memory.write_slice(&bytes, GuestAddress(SEND_AREA)).unwrap();
        let length = u32::try_from(frame.len()).unwrap();
        self.send.offer(&[(SEND_AREA, 12, false), (SEND_AREA + HEADER as u64, length, false)]);
        self.send.kick();
    }

    /// Sends a frame, and waits until the device has taken it.
    pub fn send_frame(&mut self, header: [u8; 10], frame: &[u8]) {
        self.offer_frame(header, frame);
        self.send.wait_used();
    }

    pub fn errors(&self) -> u64 {
        self.net.counters().counted().errors
    }

    /// CPU time of the reactor's thread so far.
    fn cpu_time(&self) -> Duration {
        cpu_time(self.clock)
    }

    /// Waits for a tenth of a second, in which the reactor's thread must use next to no CPU time.
    pub fn must_rest(&self) {
        let before = self.cpu_time();
        std::thread::sleep(Duration::from_millis(100));
        let burnt = self.cpu_time().saturating_sub(before);
        assert!(burnt < Duration::from_millis(5), "{burnt:?}");
    }
}

fn cpu_time(clock: libc::clockid_t) -> Duration {
    // SAFETY: zero bytes are a timespec.
    let mut time: libc::timespec = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes a timespec.
    ok(unsafe { libc::clock_gettime(clock, &raw mut time) });
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap())
}

/// A reactor, and the clock of its thread's CPU time.
pub fn reactor() -> (Arc<Reactor>, libc::clockid_t) {
    let (tell, told) = mpsc::channel();
    let reactor = Reactor::spawn("test-net", move || {
        let mut clock = 0;
        // SAFETY: the thread is this one; its clock is written.
        assert_eq!(unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &raw mut clock) }, 0);
        tell.send(clock).unwrap();
    })
    .unwrap();
    let clock = told.recv().unwrap();
    (Arc::new(reactor), clock)
}

/// Waits ten seconds at most.
pub fn eventually(mut what: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !what() {
        assert!(begun.elapsed() < Duration::from_secs(10), "it did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}
