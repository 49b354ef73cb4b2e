use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::console::Console;
use crate::console::tests::{connect, listener};
use crate::memory::GuestRam;
use crate::reactor::Reactor;
use crate::virtio::testing::{BUFFERS, DriverQueue, activation, memory};
use crate::virtio::{Interrupt, VirtioDevice};

/// One for all tests.
fn reactor() -> &'static Reactor {
    static REACTOR: LazyLock<Reactor> = LazyLock::new(|| Reactor::spawn("test", || ()).unwrap());
    &REACTOR
}

const PORT_SPACE: u64 = 0x4_0000;
const CONTROL: u64 = 0x30_0000;

/// A guest with the console (port 0) and the port "agent" (port 1).
struct Guest {
    device: Serial,
    memory: GuestRam,
    queues: Vec<DriverQueue>,
    interrupt: Interrupt,
    folder: TempDir,
    log: tempfile::NamedTempFile,
    /// Control buffers, by head.
    next_control: u64,
}

impl Guest {
    fn new() -> Self {
        let (folder, listener) = listener();
        let log = tempfile::NamedTempFile::new().unwrap();
        let console = Console::new(None, Some(File::options().append(true).open(log.path()).unwrap()));
        let device = Serial::new(Some(console), vec![("agent".into(), listener)], reactor()).unwrap();
        let memory = memory();
        let queues: Vec<_> = (0..6).map(|index| DriverQueue::new(&memory, index, 32)).collect();
        let interrupt = Interrupt::new().unwrap();
        Self { device, memory, queues, interrupt, folder, log, next_control: 0 }
    }

    /// Activated, with eight buffers for control messages.
    fn up() -> Self {
        let mut guest = Self::new();
        guest.activate();
        for _ in 0..8 {
            guest.offer_control();
        }
        guest
    }

    fn activate(&mut self) {
        let queues: Vec<_> = self.queues.iter().collect();
        let active = activation(&self.memory, &queues, VIRTIO_CONSOLE_F_MULTIPORT, self.device.counters());
        self.interrupt = active.interrupt.clone();
        self.device.activate(active).unwrap();
    }

    fn offer_control(&mut self) {
        let at = CONTROL + 0x100 * (self.next_control % 32);
        self.next_control += 1;
        self.queues[2].offer(&[(at, 0x100, true)]);
        self.queues[2].kick();
    }

    fn say(&mut self, port: u32, event: u16, value: u16) {
        let at = GuestAddress(CONTROL + 0x8000);
        self.memory.write_obj(port, at).unwrap();
        self.memory.write_obj(event, GuestAddress(at.0 + 4)).unwrap();
        self.memory.write_obj(value, GuestAddress(at.0 + 6)).unwrap();
        self.queues[3].offer(&[(at.0, 8, false)]);
        self.queues[3].kick();
        self.queues[3].wait_used();
    }

    /// The next control message: port, event, value, name.
    fn hear(&mut self) -> (u32, u16, u16, String) {
        let (head, length) = self.queues[2].wait_used();
        let at = CONTROL + 0x100 * u64::from(head);
        let mut bytes = vec![0; length as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let name = String::from_utf8(bytes[8..].to_vec()).unwrap();
        (u32::from(half(0)), half(4), half(6), name)
    }

    fn hears_nothing(&mut self) {
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(self.queues[2].take_used(), None);
    }

    /// Port 1 ready and open in the guest.
    fn opened() -> Self {
        let mut guest = Self::up();
        guest.say(1, 3, 1);
        assert_eq!(guest.hear(), (1, 7, 1, "agent".into()));
        guest.say(1, 6, 1);
        guest
    }

    fn offer_receive(&mut self, count: u64, length: u32) {
        for at in 0..count {
            self.queues[4].offer(&[(BUFFERS + at * 0x1000, length, true)]);
        }
        self.queues[4].kick();
    }

    fn send(&mut self, queue: usize, bytes: &[u8]) {
        let at = BUFFERS + PORT_SPACE;
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        self.queues[queue].offer(&[(at, u32::try_from(bytes.len()).unwrap(), false)]);
        self.queues[queue].kick();
    }

    fn received(&mut self) -> Vec<u8> {
        let (head, length) = self.queues[4].wait_used();
        let mut bytes = vec![0; length as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(BUFFERS + u64::from(head) * 0x1000)).unwrap();
        bytes
    }
}

#[test]
fn a_driver_learns_of_ports_their_names_and_who_is_there() {
    let mut guest = Guest::up();
    let mut config = [0; 12];
    guest.device.read_config(0, &mut config);
    assert_eq!((config[4], guest.device.queue_sizes().len()), (2, 6));
    guest.say(u32::MAX, 0, 1);
    assert_eq!([guest.hear(), guest.hear()].map(|message| (message.0, message.1)), [(0, 1), (1, 1)]);
    guest.say(0, 3, 1);
    assert_eq!([guest.hear(), guest.hear()].map(|message| (message.0, message.1)), [(0, 4), (0, 6)]);
    guest.say(1, 3, 1);
    assert_eq!(guest.hear(), (1, 7, 1, "agent".into()));
    guest.hears_nothing();
    let client = connect(guest.folder.path());
    assert_eq!(guest.hear(), (1, 6, 1, String::new()));
    drop(client);
    assert_eq!(guest.hear(), (1, 6, 0, String::new()));
}

#[test]
fn what_a_client_wrote_waits_until_the_guest_opens_the_port_and_is_there_before_its_end() {
    let mut guest = Guest::up();
    let mut client = connect(guest.folder.path());
    client.write_all(b"early").unwrap();
    guest.offer_receive(1, 3);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(guest.queues[4].take_used(), None);
    guest.say(1, 3, 1);
    assert_eq!([guest.hear(), guest.hear()].map(|message| message.1), [7, 6]);
    guest.say(1, 6, 1);
    assert_eq!(guest.received(), b"ear");
    drop(client);
    // No buffer: the rest waits, and with it the news that the client has gone.
    guest.hears_nothing();
    guest.offer_receive(2, 16);
    assert_eq!(guest.queues[4].wait_used().1, 2);
    assert_eq!(guest.hear(), (1, 6, 0, String::new()));
}

#[test]
fn a_client_that_went_unread_makes_room_for_the_next_and_the_guest_sees_both() {
    let mut guest = Guest::opened();
    let mut first = connect(guest.folder.path());
    first.write_all(b"lost").unwrap();
    assert_eq!(guest.hear().2, 1);
    drop(first);
    guest.hears_nothing();
    let mut second = connect(guest.folder.path());
    assert_eq!([guest.hear().2, guest.hear().2], [0, 1]);
    second.write_all(b"kept").unwrap();
    guest.offer_receive(1, 64);
    assert_eq!(guest.received(), b"kept");
}

#[test]
fn control_messages_are_joined_while_the_driver_has_no_buffers() {
    let mut guest = Guest::up();
    guest.say(1, 3, 1);
    guest.hear();
    for _ in 0..7 {
        drop(connect(guest.folder.path()));
        // The port is closed in the guest, so the client is let go at once.
        let mut last = connect(guest.folder.path());
        last.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        assert!(last.read(&mut [0]).is_err());
    }
    let mut heard = Vec::new();
    while let Some((_, length)) = guest.queues[2].take_used() {
        heard.push(length);
    }
    assert_eq!(heard.len(), 7);
    // The last one has gone: open or closed, the guest is told the end of it in two messages at most.
    for _ in 0..8 {
        guest.offer_control();
    }
    let last = std::iter::from_fn(|| {
        std::thread::sleep(Duration::from_millis(30));
        guest.queues[2].take_used().map(|(head, _)| head)
    });
    let count = last.count();
    assert!(count <= 2, "{count}");
}

#[test]
fn a_client_that_does_not_read_makes_the_guest_wait_and_loses_nothing() {
    let mut guest = Guest::opened();
    let mut client = connect(guest.folder.path());
    assert_eq!(guest.hear().2, 1);
    let pattern: Vec<u8> = (0..0x8000_u32).map(|at| (at % 251) as u8).collect();
    guest.memory.write_slice(&pattern, GuestAddress(BUFFERS)).unwrap();
    for _ in 0..32 {
        guest.queues[5].offer(&[(BUFFERS, 0x5000, false)]);
    }
    guest.queues[5].kick();
    let mut done = 0;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(100) {
        done += u32::from(guest.queues[5].take_used().is_some());
    }
    assert!((1..32).contains(&done), "{done}");
    let mut bytes = vec![0; 32 * 0x5000];
    client.read_exact(&mut bytes).unwrap();
    for piece in bytes.chunks(0x5000) {
        assert!(piece == &pattern[..0x5000]);
    }
    for _ in done..32 {
        guest.queues[5].wait_used();
    }
}

#[test]
fn without_a_client_what_the_guest_sends_is_discarded() {
    let mut guest = Guest::opened();
    guest.send(5, b"nobody");
    guest.queues[5].wait_used();
    let mut client = connect(guest.folder.path());
    assert_eq!(guest.hear().2, 1);
    guest.send(5, b"somebody");
    let mut bytes = [0; 8];
    client.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"somebody");
}

#[test]
fn the_console_never_waits_and_its_log_has_everything() {
    let mut guest = Guest::up();
    guest.send(1, b"hello\n");
    guest.queues[1].wait_used();
    assert_eq!(std::fs::read(guest.log.path()).unwrap(), b"hello\n");
}

#[test]
fn much_data_goes_both_ways_unharmed() {
    let mut guest = Guest::opened();
    let mut client = connect(guest.folder.path());
    guest.hear();
    let sent: Vec<u8> = (0..4_000_000_u32).map(|at| (at % 253) as u8).collect();
    let mut writer = client.try_clone().unwrap();
    let copy = sent.clone();
    let writing = std::thread::spawn(move || writer.write_all(&copy).unwrap());
    guest.offer_receive(32, 0x1000);
    let mut received = Vec::new();
    while received.len() < sent.len() {
        let (head, length) = guest.queues[4].wait_used();
        let at = BUFFERS + u64::from(head) * 0x1000;
        let mut bytes = vec![0; length as usize];
        guest.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        received.extend(bytes);
        guest.queues[4].describe(head, (at, 0x1000, 2, 0));
        guest.queues[4].offer_head(head);
        guest.queues[4].kick();
    }
    assert!(received == sent);
    writing.join().unwrap();
    let calls = guest.device.counters().counted();
    assert_eq!(calls.read_bytes, 4_000_000);
    guest.send(5, b"end");
    let mut bytes = [0; 3];
    client.read_exact(&mut bytes).unwrap();
}

#[test]
fn bad_chains_and_messages_do_no_harm_and_a_broken_ring_asks_for_a_reset() {
    let mut guest = Guest::opened();
    let mut client: UnixStream = connect(guest.folder.path());
    guest.hear();
    for (port, event) in [(77, 3), (1, 99), (0xffff_ffff, 6)] {
        guest.say(port, event, 1);
    }
    // Outside memory, the wrong way, and one that loops.
    guest.queues[5].offer(&[(0xffff_0000_0000, 8, false)]);
    guest.queues[5].offer(&[(BUFFERS, 8, true)]);
    guest.queues[5].describe(9, (BUFFERS, 1, 1, 9));
    guest.queues[5].offer_head(9);
    guest.queues[5].kick();
    for _ in 0..3 {
        guest.queues[5].wait_used();
    }
    let mut bytes = [0; 32];
    client.read_exact(&mut bytes).unwrap();
    guest.memory.write_obj(0x7000_u16, GuestAddress(guest.queues[5].avail + 2)).unwrap();
    guest.queues[5].kick();
    let begun = Instant::now();
    while !guest.interrupt.is_reset_needed() {
        assert!(begun.elapsed() < Duration::from_secs(10));
        std::thread::yield_now();
    }
    assert_eq!(guest.device.queue_states().len(), 6);
    guest.device.reset();
    assert!(guest.device.save().ports.iter().all(|port| port.state == PortState::default()));
}

#[test]
fn what_was_saved_goes_on_after_a_restore() {
    let guest = Guest::opened();
    let state = guest.device.save();
    let text = serde_json::to_string(&state).unwrap();
    let mut other = Guest::new();
    other.device.restore(&serde_json::from_str(&text).unwrap()).unwrap();
    assert_eq!(other.device.save(), state);
    other.activate();
    let mut client = connect(other.folder.path());
    client.write_all(b"hi").unwrap();
    other.offer_receive(1, 8);
    assert_eq!(other.received(), b"hi");
}

#[test]
fn a_guest_that_comes_back_is_told_that_the_client_it_knew_has_gone_before_it_is_told_of_the_next() {
    let mut guest = Guest::opened();
    let _client = connect(guest.folder.path());
    assert_eq!(guest.hear(), (1, 6, 1, String::new()));
    let state = guest.device.save();
    assert!(state.ports[1].state.told_open);
    for connects_first in [false, true] {
        let mut other = Guest::new();
        let _early = connects_first.then(|| connect(other.folder.path()));
        other.device.restore(&state).unwrap();
        other.activate();
        other.offer_control();
        assert_eq!(other.hear(), (1, 6, 0, String::new()));
        let _late = (!connects_first).then(|| connect(other.folder.path()));
        other.offer_control();
        assert_eq!(other.hear(), (1, 6, 1, String::new()));
    }
}

#[test]
fn other_ports_than_were_saved_are_refused_by_name() {
    let mut state = Guest::opened().device.save();
    state.ports[1].name = "other".into();
    let refused = Guest::new().device.restore(&state).unwrap_err().to_string();
    assert!(refused.contains("ports") && refused.contains("other") && refused.contains("agent"), "{refused}");
    state.ports.pop();
    assert!(Guest::new().device.restore(&state).is_err());
}
