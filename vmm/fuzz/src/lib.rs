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
use libfuzzer_sys::arbitrary::{self, Arbitrary, Unstructured};
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

/// The device threads of this process: one, which stands but for [`Threads::settle`], with a handler that tells when
/// all before it were called.
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
        reactor.pause();
        Threads { reactor, fence, passed: Mutex::new(passed), _registration: registration }
    });
    &THREADS
}

impl Threads {
    /// Lets the thread run until it has taken all that is ready. Else it stands, so that an input does the same each
    /// time. epoll(7) gives what is ready in turn; the second time is for what a handler left to its next turn.
    pub fn settle(&self) {
        self.reactor.resume();
        for _ in 0..2 {
            self.fence.write(1).unwrap();
            self.passed.lock().unwrap().recv_timeout(PATIENCE).expect("the device's thread hangs");
        }
        self.reactor.pause();
    }
}

/// As many of them as an input gives. The crate's own `Vec` ends after each element with a chance of one in two.
#[derive(Debug)]
pub struct All<T>(pub Vec<T>);

impl<'a, T: Arbitrary<'a>> Arbitrary<'a> for All<T> {
    fn arbitrary(input: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let mut all = Vec::new();
        while !input.is_empty() && all.len() < MOST_OPS {
            all.push(T::arbitrary(input)?);
        }
        Ok(Self(all))
    }
}

/// A few of them.
#[derive(Debug)]
pub struct Few<T>(pub Vec<T>);

impl<'a, T: Arbitrary<'a>> Arbitrary<'a> for Few<T> {
    fn arbitrary(input: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let count = u8::arbitrary(input)? % 24;
        (0..count).map(|_| T::arbitrary(input)).collect::<arbitrary::Result<_>>().map(Self)
    }
}

/// Bytes, often few and at most 4 KiB.
#[derive(Debug)]
pub struct Data(pub Vec<u8>);

impl<'a> Arbitrary<'a> for Data {
    fn arbitrary(input: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let length = match usize::from(u8::arbitrary(input)?) {
            length @ 0..0xf0 => length,
            high => (high - 0xef) << 8,
        };
        let length = length.min(input.len());
        Ok(Self(input.bytes(length)?.to_vec()))
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
    bytes: Data,
}

impl Message for Plain {
    fn queue(&self) -> u8 {
        self.queue
    }
    fn bytes(&self, _: &[u64]) -> Vec<u8> {
        self.bytes.0.clone()
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
    /// A message in a chain as drivers make it, with room for an answer.
    Message {
        /// What it says.
        message: M,
        /// It is in two pieces if this is within it.
        cut: u16,
        /// Bytes for the answer; a page of them most often.
        room: u16,
        /// The device sees it later if this is high.
        hold: u8,
    },
    /// A buffer for the device to fill.
    Room { queue: u8, length: u16, hold: u8 },
    /// Something at the host's end.
    Host { which: u8, act: Act },
    /// What drivers do rarely, or never.
    Odd(Odd),
}

/// What drivers do rarely, or never.
#[derive(Arbitrary, Debug)]
pub enum Odd {
    /// A chain of these parts: address, length, whether the device writes.
    Chain { queue: u8, parts: Few<(Place, u32, bool)>, hold: u8 },
    /// One descriptor.
    Describe { queue: u8, index: u16, place: Place, length: u32, flags: u8, next: u16 },
    /// The chain that begins at this descriptor.
    Head { queue: u8, head: u16 },
    /// The available ring's index.
    AvailIndex { queue: u8, index: u16 },
    /// Bytes of guest memory.
    Write { place: Place, bytes: Data },
    /// A notification.
    Kick { queue: u8, hold: u8 },
    /// Configuration is read.
    ReadConfig { offset: u16, length: u8 },
    /// Configuration is written.
    WriteConfig { offset: u16, bytes: [u8; 8], length: u8 },
    /// A reset, after which the driver takes these features and leaves this queue out.
    Reset { features: u64, left_out: Option<u8> },
}

/// From here on a notification is held back: the device sees it with the next one.
const HOLD: u8 = 192;
/// Where the device's answers hold numbers that a driver uses again, 8 bytes each: FUSE's nodes and handles, also those
/// of a file that was made, and vsock's ports.
const NUMBERS: [u64; 2] = [16, 144];

/// What somebody at the host's end of a device does.
#[derive(Arbitrary, Debug)]
pub enum Act {
    /// Comes.
    Connect,
    /// Says something.
    Send(Data),
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
        for op in ops {
            match op {
                Op::Message { message, cut, room, hold } => {
                    self.send(message, *cut, *room);
                    self.kick(message.queue(), *hold);
                }
                Op::Room { queue, length, hold } => {
                    let at = self.slot();
                    self.clear(at);
                    self.queue(*queue).offer(&[(at, room(*length), true)]);
                    self.rooms.push(at);
                    self.kick(*queue, *hold);
                }
                Op::Host { which, act } => host(self.transport.device_mut(), *which, act),
                Op::Odd(odd) => self.step(odd),
            }
        }
        self.settle();
        let _ = self.transport.save();
    }

    fn step(&mut self, odd: &Odd) {
        match *odd {
            Odd::Chain { queue, ref parts, hold } => {
                let parts: Vec<_> =
                    parts.0.iter().map(|&(at, length, write)| (at.address(), length, write)).collect();
                if !parts.is_empty() {
                    self.queue(queue).offer(&parts);
                    self.kick(queue, hold);
                }
            }
            Odd::Describe { queue, index, place, length, flags, next } => {
                let index = index % 1024;
                self.queue(queue).describe(index, (place.address(), length, flags.into(), next));
            }
            Odd::Head { queue, head } => self.queue(queue).offer_head(head),
            Odd::AvailIndex { queue, index } => {
                let at = self.queue(queue).avail + 2;
                self.memory.write_obj(index, GuestAddress(at)).unwrap();
            }
            Odd::Write { place, ref bytes } => {
                // What does not fit is not written.
                let _ = self.memory.write_slice(&bytes.0, GuestAddress(place.address()));
            }
            Odd::Kick { queue, hold } => self.kick(queue, hold),
            Odd::ReadConfig { offset, length } => {
                let mut data = vec![0xff; usize::from(length % 8) + 1];
                self.transport.read(0x100 + u64::from(offset), &mut data);
            }
            Odd::WriteConfig { offset, bytes, length } => {
                self.transport.write(0x100 + u64::from(offset), &bytes[..=usize::from(length % 8)]);
            }
            Odd::Reset { features, left_out } => self.set_up(features, left_out),
        }
    }

    /// Makes sure that no number stands where an answer is going to be.
    fn clear(&self, at: u64) {
        for offset in NUMBERS {
            self.memory.write_obj(0_u64, GuestAddress(at + offset)).unwrap();
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
        let answer = at + 0x1000;
        self.clear(answer);
        let pieces = [
            (at, first, false),
            (at + u64::from(first), length - first, false),
            (answer, self::room(room), true),
        ];
        let pieces: Vec<_> = pieces.into_iter().filter(|(_, length, _)| *length > 0).collect();
        if !pieces.is_empty() {
            self.queue(message.queue()).offer(&pieces);
            self.rooms.push(answer);
        }
    }

    fn kick(&mut self, queue: u8, hold: u8) {
        let kicks = self.transport.kicks();
        kicks[usize::from(queue) % kicks.len()].write(1).unwrap();
        if hold < HOLD {
            self.settle();
        }
    }

    /// Lets the device work, and learns the numbers that it gave.
    fn settle(&mut self) {
        threads().settle();
        let memory = &self.memory;
        let known = &mut self.known;
        self.rooms.retain(|room| {
            let numbers = NUMBERS.map(|offset| memory.read_obj::<u64>(GuestAddress(room + offset)).unwrap());
            known.extend(numbers.iter().filter(|number| **number != 0));
            numbers[0] == 0
        });
    }
}

/// Length of a buffer: a page in half of all cases.
fn room(length: u16) -> u32 {
    if length < 0x8000 { 0x1000 } else { u32::from(length) % 0x1000 }
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
        Act::Send(bytes) => drop(stream.write(&bytes.0)),
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
