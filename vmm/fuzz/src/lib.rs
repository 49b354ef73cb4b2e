//! What the fuzz targets share: a guest that drives a device through its registers and queues, in any order and with
//! any values, and a host that speaks to it over sockets.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, mpsc};
use std::time::Duration;

use catalyst_vmm::bus::BusDevice;
use catalyst_vmm::memory::GuestRam;
use catalyst_vmm::reactor::{EventHandler, Reactor, Registration};
use catalyst_vmm::virtio::VirtioDevice;
use catalyst_vmm::virtio::mmio::Transport;
use catalyst_vmm::virtio::testing::{self, BUFFERS, DriverQueue, RINGS};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Longest that anything may take which must happen.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Most operations of one input.
pub const MOST_OPS: usize = 64;

/// Where messages of the guest lie, each in a slot of its own, with room for the answer.
const SLOT: u64 = 0x2000;
const SLOTS: u64 = 64;

/// The device threads of this process: one, with a handler that tells when all before it were called.
#[derive(Debug)]
pub struct Threads {
    /// Devices work on it.
    pub reactor: Arc<Reactor>,
    fence: EventFd,
    passed: Mutex<mpsc::Receiver<()>>,
    _registration: Registration,
}

#[derive(Debug)]
struct Fence {
    event: EventFd,
    passed: mpsc::Sender<()>,
}

impl EventHandler for Fence {
    fn ready(&mut self, _: u32, _: EventSet) {
        if self.event.read().is_ok() {
            self.passed.send(()).unwrap();
        }
    }
}

/// The one of this process. A target that changes what threads inherit does so before its first use.
pub fn threads() -> &'static Threads {
    static THREADS: LazyLock<Threads> = LazyLock::new(|| {
        let reactor = Arc::new(Reactor::spawn("device", || ()).unwrap());
        let fence = EventFd::new(EFD_NONBLOCK).unwrap();
        let (tell, passed) = mpsc::channel();
        let handler = Fence { event: fence.try_clone().unwrap(), passed: tell };
        let registration = reactor.register(Arc::new(Mutex::new(handler)));
        registration.watch(fence.as_raw_fd(), 0, EventSet::IN).unwrap();
        Threads { reactor, fence, passed: Mutex::new(passed), _registration: registration }
    });
    &THREADS
}

impl Threads {
    /// Returns when the thread has taken all that was ready before. epoll(7) gives what is ready in turn; the second
    /// time is for what a handler left to its next turn.
    pub fn settle(&self) {
        for _ in 0..2 {
            self.fence.write(1).unwrap();
            self.passed.lock().unwrap().recv_timeout(PATIENCE).expect("the device's thread hangs");
        }
        self.reactor.pause();
        self.reactor.resume();
    }
}

/// What a driver would send on a queue.
pub trait Message {
    /// The queue.
    fn queue(&self) -> u8;
    /// Its bytes; `known` are numbers that the device gave before, newest last.
    fn bytes(&self, known: &[u64]) -> Vec<u8>;
}

/// Any bytes on any queue.
#[derive(Arbitrary, Debug)]
pub struct Plain {
    queue: u8,
    bytes: Vec<u8>,
}

impl Message for Plain {
    fn queue(&self) -> u8 {
        self.queue
    }
    fn bytes(&self, _: &[u64]) -> Vec<u8> {
        self.bytes.clone()
    }
}

/// An address, most often one that is of use.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Place {
    /// Among the buffers.
    Buffer(u16),
    /// Among the rings.
    Ring(u16),
    /// So far before the end of memory.
    End(u16),
    /// Anywhere.
    Any(u64),
}

impl Place {
    /// The address itself.
    pub fn address(self) -> u64 {
        match self {
            Self::Buffer(at) => BUFFERS + 16 * u64::from(at),
            Self::Ring(at) => RINGS + 16 * u64::from(at),
            Self::End(before) => (4 << 20) - u64::from(before),
            Self::Any(address) => address,
        }
    }
}

/// A number that the device gave, or any other.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Number {
    /// The one that came so many before the last.
    Known(u8),
    /// A small one.
    Small(u8),
    /// Any.
    Any(u64),
}

impl Number {
    /// The number itself.
    pub fn of(self, known: &[u64]) -> u64 {
        match self {
            Self::Known(back) => known.iter().rev().cycle().nth(back.into()).copied().unwrap_or(1),
            Self::Small(number) => number.into(),
            Self::Any(number) => number,
        }
    }
}

/// What guest and host do.
#[derive(Arbitrary, Debug)]
pub enum Op<M> {
    /// A message in a chain as drivers make it, in two pieces if `cut` is within it, with `room` for an answer.
    Message { message: M, cut: u16, room: u16, wait: bool },
    /// A buffer for the device to fill.
    Room { queue: u8, length: u16, wait: bool },
    /// A chain of these parts: address, length, whether the device writes.
    Chain { queue: u8, parts: Vec<(Place, u32, bool)>, wait: bool },
    /// One descriptor.
    Describe { queue: u8, index: u16, place: Place, length: u32, flags: u8, next: u16 },
    /// The chain that begins at this descriptor.
    Head { queue: u8, head: u16 },
    /// The available ring's index.
    AvailIndex { queue: u8, index: u16 },
    /// Bytes of guest memory.
    Write { place: Place, bytes: Vec<u8> },
    /// A notification; `wait` until the device has taken it.
    Kick { queue: u8, wait: bool },
    /// Configuration is read.
    ReadConfig { offset: u16, length: u8 },
    /// Configuration is written.
    WriteConfig { offset: u16, bytes: [u8; 8], length: u8 },
    /// A reset, after which the driver takes these features and leaves these queues out.
    Reset { features: u64, left_out: Option<u8> },
    /// Something at the host's end.
    Host { which: u8, act: Act },
}

/// What somebody at the host's end of a device does.
#[derive(Arbitrary, Debug)]
pub enum Act {
    /// Comes.
    Connect,
    /// Says something.
    Send(Vec<u8>),
    /// Listens.
    Receive,
    /// Says nothing more.
    Shutdown,
    /// Goes.
    Close,
    /// What only some devices have.
    Other(u8),
}

/// A guest with one device.
#[derive(Debug)]
pub struct Guest<D> {
    transport: Transport<D>,
    memory: GuestRam,
    queues: Vec<DriverQueue>,
    known: Vec<u64>,
    rooms: Vec<u64>,
    next_slot: u64,
}

impl<D: VirtioDevice> Guest<D> {
    /// A guest whose driver has taken all features and set up all queues.
    pub fn new(device: D) -> Self {
        let memory = testing::memory();
        let transport = Transport::new(device, Arc::clone(&memory)).unwrap();
        let mut guest = Self {
            transport,
            memory,
            queues: Vec::new(),
            known: Vec::new(),
            rooms: Vec::new(),
            next_slot: 0,
        };
        guest.set_up(u64::MAX, None);
        guest
    }

    fn register(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn set_up(&mut self, features: u64, left_out: Option<u8>) {
        self.register(0x70, 0);
        self.register(0x70, 1 | 2);
        let offered = |transport: &mut Transport<D>, half: u32| {
            transport.write(0x14, &half.to_le_bytes());
            let mut word = [0; 4];
            transport.read(0x10, &mut word);
            u32::from_le_bytes(word)
        };
        for half in [0, 1] {
            let own = if half == 0 { features as u32 } else { (features >> 32) as u32 | 1 };
            let taken = offered(&mut self.transport, half) & own;
            self.register(0x24, half);
            self.register(0x20, taken);
        }
        self.register(0x70, 1 | 2 | 8);
        let sizes = self.transport.device().queue_sizes().to_vec();
        self.queues.clear();
        for (index, size) in (0..).zip(sizes) {
            let queue = DriverQueue::new(&self.memory, index, size);
            for ring in [queue.avail, queue.used] {
                self.memory.write_obj(0_u32, GuestAddress(ring)).unwrap();
            }
            self.register(0x30, u32::from(index));
            self.register(0x38, u32::from(size));
            for (offset, address) in [(0x80, queue.desc), (0x90, queue.avail), (0xa0, queue.used)] {
                self.register(offset, u32::try_from(address).unwrap());
                self.register(offset + 4, 0);
            }
            if left_out.is_none_or(|left| u16::from(left) != index) {
                self.register(0x44, 1);
            }
            self.queues.push(queue);
        }
        self.register(0x70, 1 | 2 | 8 | 4);
    }

    /// Does all of it, then waits until the device has, and looks at what would be saved.
    pub fn run<M: Message>(&mut self, ops: &[Op<M>], mut host: impl FnMut(&mut D, u8, &Act)) {
        for op in ops.iter().take(MOST_OPS) {
            self.step(op, &mut host);
        }
        self.settle();
        threads().reactor.pause();
        let _ = self.transport.save();
        threads().reactor.resume();
    }

    fn step<M: Message>(&mut self, op: &Op<M>, host: &mut impl FnMut(&mut D, u8, &Act)) {
        match *op {
            Op::Message { ref message, cut, room, wait } => {
                self.send(message, cut, room);
                self.kick(message.queue(), wait);
            }
            Op::Room { queue, length, wait } => {
                let at = self.slot();
                let length = u32::from(length) % 0x1001;
                self.queue(queue).offer(&[(at, length, true)]);
                self.rooms.push(at);
                self.kick(queue, wait);
            }
            Op::Chain { queue, ref parts, wait } => {
                let parts: Vec<_> =
                    parts.iter().take(32).map(|&(at, length, write)| (at.address(), length, write)).collect();
                if !parts.is_empty() {
                    self.queue(queue).offer(&parts);
                    self.kick(queue, wait);
                }
            }
            Op::Describe { queue, index, place, length, flags, next } => {
                let index = index % 1024;
                self.queue(queue).describe(index, (place.address(), length, flags.into(), next));
            }
            Op::Head { queue, head } => self.queue(queue).offer_head(head),
            Op::AvailIndex { queue, index } => {
                let at = self.queue(queue).avail + 2;
                self.memory.write_obj(index, GuestAddress(at)).unwrap();
            }
            Op::Write { place, ref bytes } => {
                // What does not fit is not written.
                let _ = self.memory.write_slice(bytes, GuestAddress(place.address()));
            }
            Op::Kick { queue, wait } => self.kick(queue, wait),
            Op::ReadConfig { offset, length } => {
                let mut data = vec![0xff; usize::from(length % 8) + 1];
                self.transport.read(0x100 + u64::from(offset), &mut data);
            }
            Op::WriteConfig { offset, bytes, length } => {
                self.transport.write(0x100 + u64::from(offset), &bytes[..=usize::from(length % 8)]);
            }
            Op::Reset { features, left_out } => self.set_up(features, left_out),
            Op::Host { which, ref act } => host(self.transport.device_mut(), which, act),
        }
    }

    fn slot(&mut self) -> u64 {
        self.next_slot += 1;
        BUFFERS + self.next_slot % SLOTS * SLOT
    }

    fn queue(&mut self, queue: u8) -> &mut DriverQueue {
        let count = self.queues.len();
        &mut self.queues[usize::from(queue) % count]
    }

    fn send(&mut self, message: &impl Message, cut: u16, room: u16) {
        let at = self.slot();
        let mut bytes = message.bytes(&self.known);
        bytes.truncate(0x1000);
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
        let length = u32::try_from(bytes.len()).unwrap();
        let first = u32::from(cut).min(length);
        let room = u32::from(room) % 0x1001;
        let answer = at + 0x1000;
        self.memory.write_obj(0_u64, GuestAddress(answer + 16)).unwrap();
        let pieces =
            [(at, first, false), (at + u64::from(first), length - first, false), (answer, room, true)];
        let pieces: Vec<_> = pieces.into_iter().filter(|(_, length, _)| *length > 0).collect();
        if !pieces.is_empty() {
            self.queue(message.queue()).offer(&pieces);
            self.rooms.push(answer);
        }
    }

    fn kick(&mut self, queue: u8, wait: bool) {
        let kicks = self.transport.kicks();
        kicks[usize::from(queue) % kicks.len()].write(1).unwrap();
        if wait {
            self.settle();
        }
    }

    /// Waits for the device, and learns the numbers that it gave: FUSE's nodes and handles, and vsock's ports, follow
    /// 16 bytes of header.
    fn settle(&mut self) {
        threads().settle();
        let memory = &self.memory;
        let known = &mut self.known;
        self.rooms.retain(|room| {
            let number: u64 = memory.read_obj(GuestAddress(room + 16)).unwrap();
            if number != 0 {
                known.push(number);
            }
            number == 0
        });
    }
}

/// A listener at a name of its own, and what connected to it.
#[derive(Debug)]
pub struct Door {
    address: SocketAddr,
    /// Those who came, oldest first.
    pub clients: Vec<UnixStream>,
}

impl Door {
    /// The listener is for the device.
    pub fn new() -> (UnixListener, Self) {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let number = LAST.fetch_add(1, Ordering::Relaxed);
        let name = format!("catalyst-fuzz-{}-{number}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        (listener, Self { address, clients: Vec::new() })
    }

    /// Does what `act` says with the client `which`.
    pub fn act(&mut self, which: u8, act: &Act) {
        if matches!(act, Act::Connect) {
            // A full backlog would make it wait.
            if self.clients.len() < 32 {
                let client = UnixStream::connect_addr(&self.address).unwrap();
                client.set_nonblocking(true).unwrap();
                self.clients.push(client);
            }
        } else if !self.clients.is_empty() {
            let at = usize::from(which) % self.clients.len();
            if !act_on(&self.clients[at], act) {
                self.clients.remove(at);
            }
        }
        threads().settle();
    }
}

/// False if the stream is to be closed. Errors are the other end's affair.
pub fn act_on(mut stream: &UnixStream, act: &Act) -> bool {
    match act {
        Act::Send(bytes) => drop(stream.write(bytes)),
        Act::Receive => drop(stream.read(&mut [0; 1 << 14])),
        Act::Shutdown => drop(stream.shutdown(Shutdown::Write)),
        Act::Close => return false,
        Act::Connect | Act::Other(_) => {}
    }
    true
}

/// Two ends of a socket that keeps messages apart and does not block.
pub fn seqpacket() -> (UnixDatagram, OwnedFd) {
    use std::os::fd::FromRawFd;
    let mut ends = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: the kernel writes two descriptors.
    assert_eq!(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) }, 0);
    // SAFETY: both are new and nobody else's.
    unsafe { (UnixDatagram::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) }
}

/// A file of these bytes, in memory.
pub fn memfd(bytes: &[u8]) -> File {
    let mut file = catalyst_vmm::memory::memfd(c"fuzz").unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// An empty qcow2 of 1 MiB with clusters of 512 bytes over some base.
pub const OVERLAY: &[u8] = include_bytes!("../seeds/overlay.qcow2");
/// Bytes of the disk that [`OVERLAY`] is.
pub const OVERLAY_SIZE: u64 = 1 << 20;
