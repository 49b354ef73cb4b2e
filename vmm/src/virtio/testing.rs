//! The guest's side of a queue, for tests and fuzz targets: what a driver does, and what a hostile one might.

// A test says what went wrong by panicking.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, Counters, Interrupt, VIRTIO_F_VERSION_1, Virtqueue};
use crate::memory::GuestRam;

/// Descriptor flag: another one follows.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = 2;
/// Descriptor flag: the descriptor is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Where the first queue's rings lie; each queue takes [`QUEUE_SPACE`].
pub const RINGS: u64 = 0x1_0000;
/// What the rings of one queue take.
pub const QUEUE_SPACE: u64 = 0x1_0000;
/// Free for buffers.
pub const BUFFERS: u64 = 0x10_0000;

/// 4 MiB of guest memory.
pub fn memory() -> GuestRam {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap())
}

/// A part of a chain: address, length, and whether the device writes it.
pub type Part = (u64, u32, bool);

/// The driver's side of one queue.
#[derive(Debug)]
pub struct DriverQueue {
    memory: GuestRam,
    /// Guest physical address of the descriptor table.
    pub desc: u64,
    /// Guest physical address of the available ring.
    pub avail: u64,
    /// Guest physical address of the used ring.
    pub used: u64,
    size: u16,
    next_desc: u16,
    offered: u16,
    seen: u16,
    kick: EventFd,
}

impl DriverQueue {
    /// The rings of queue `index`, all empty.
    pub fn new(memory: &GuestRam, index: u16, size: u16) -> Self {
        let desc = RINGS + u64::from(index) * QUEUE_SPACE;
        Self {
            memory: Arc::clone(memory),
            desc,
            avail: desc + 0x8000,
            used: desc + 0xa000,
            size,
            next_desc: 0,
            offered: 0,
            seen: 0,
            kick: crate::virtio::event().unwrap(),
        }
    }

    /// The device's side of it.
    pub fn device_side(&self, index: usize, interrupt: &Interrupt, counters: &Counters) -> Virtqueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.desc)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.avail)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.used)).unwrap();
        queue.set_ready(true);
        let kick = self.kick.try_clone().unwrap();
        Virtqueue::new(index, queue, Arc::clone(&self.memory), kick, interrupt.clone(), counters.clone())
    }

    /// Writes one descriptor, whatever it says.
    pub fn describe(&self, index: u16, (address, length, flags, next): (u64, u32, u16, u16)) {
        let at = GuestAddress(self.desc + 16 * u64::from(index));
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, at).unwrap();
    }

    /// Offers the chain that begins at descriptor `head`.
    pub fn offer_head(&mut self, head: u16) {
        let slot = GuestAddress(self.avail + 4 + 2 * u64::from(self.offered % self.size));
        self.memory.write_obj(head, slot).unwrap();
        self.offered = self.offered.wrapping_add(1);
        self.memory.write_obj(self.offered, GuestAddress(self.avail + 2)).unwrap();
    }

    /// Offers a chain of these parts (at least one) and returns its head. Descriptors are taken in turn: do not
    /// have more of them under way than the queue is long.
    pub fn offer(&mut self, parts: &[Part]) -> u16 {
        let head = self.next_desc;
        for (at, &(address, length, write)) in parts.iter().enumerate() {
            let last = at + 1 == parts.len();
            let index = self.next_desc;
            self.next_desc = (index + 1) % self.size;
            let flags = if write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.describe(index, (address, length, flags, self.next_desc));
        }
        self.offer_head(head);
        head
    }

    /// Notifies the device.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// The next chain that came back: its head, and how many bytes were written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.memory.read_obj(GuestAddress(self.used + 2)).unwrap();
        if index == self.seen {
            return None;
        }
        let slot = self.used + 4 + 8 * u64::from(self.seen % self.size);
        let id: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let length = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        self.seen = self.seen.wrapping_add(1);
        Some((u16::try_from(id).unwrap(), length))
    }

    /// Waits for it, ten seconds at most, as a driver would by its interrupt.
    pub fn wait_used(&mut self) -> (u16, u32) {
        let begun = Instant::now();
        loop {
            if let Some(used) = self.take_used() {
                return used;
            }
            assert!(begun.elapsed() < Duration::from_secs(10), "no chain came back");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// What a device gets that is activated with these queues.
pub fn activation(
    memory: &GuestRam,
    queues: &[&DriverQueue],
    features: u64,
    counters: &Counters,
) -> Activation {
    let interrupt = Interrupt::new().unwrap();
    let queues = queues
        .iter()
        .enumerate()
        .map(|(index, queue)| queue.device_side(index, &interrupt, counters))
        .collect();
    Activation { memory: Arc::clone(memory), queues, interrupt, features: features | VIRTIO_F_VERSION_1 }
}
