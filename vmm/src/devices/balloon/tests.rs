use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::tests::resident;
use crate::memory::{Backing, GuestRam, map};
use crate::reactor::Reactor;
use crate::virtio::testing::{DriverQueue, activation};
use crate::virtio::{Interrupt, VirtioDevice};

const LIST: u64 = 0x30_0000;
/// Where the pages that are given up begin: above the rings.
const FIRST: u32 = 0x100;

struct Guest {
    device: Balloon,
    memory: GuestRam,
    queues: Vec<DriverQueue>,
    interrupt: Interrupt,
}

impl Guest {
    /// A guest that has touched the second of its 4 MiB.
    fn new() -> Self {
        let memory = map(4, Backing::Anonymous, false).unwrap();
        memory.write_slice(&vec![7; 1 << 20], GuestAddress(1 << 20)).unwrap();
        let mut device = Balloon::new(Arc::new(Reactor::spawn("test", || ()).unwrap()));
        let queues: Vec<_> = (0..3).map(|index| DriverQueue::new(&memory, index, 16)).collect();
        let all: Vec<_> = queues.iter().collect();
        let active = activation(&memory, &all, device.features(), device.counters());
        let interrupt = active.interrupt.clone();
        device.activate(active).unwrap();
        Self { device, memory, queues, interrupt }
    }

    fn give(&mut self, queue: usize, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.memory.write_slice(&bytes, GuestAddress(LIST)).unwrap();
        self.queues[queue].offer(&[(LIST, u32::try_from(bytes.len()).unwrap(), false)]);
        self.queues[queue].kick();
        assert_eq!(self.queues[queue].wait_used().1, 0);
    }

    /// Resident pages of the second MiB.
    fn resident(&self) -> usize {
        resident(&self.memory, 256..512)
    }

    fn first(&self, page: u32) -> u8 {
        self.memory.read_obj(GuestAddress(u64::from(page) << 12)).unwrap()
    }
}

#[test]
fn inflated_pages_go_back_to_the_host_and_can_be_used_again() {
    let mut guest = Guest::new();
    assert_eq!(guest.resident(), 256);
    let falling: Vec<u32> = (FIRST..FIRST + 64).rev().collect();
    guest.give(INFLATE, &falling);
    assert_eq!(guest.resident(), 192);
    // One at a time, twice, and out of order.
    guest.give(INFLATE, &[FIRST + 100, FIRST + 98, FIRST + 100]);
    assert_eq!(guest.resident(), 190);
    assert_eq!([98, 99, 100].map(|page| guest.first(FIRST + page)), [0, 7, 0]);
    guest.give(DEFLATE, &falling);
    guest.memory.write_obj(9_u8, GuestAddress(u64::from(FIRST) << 12)).unwrap();
    assert_eq!(guest.first(FIRST), 9);
}

#[test]
fn reported_pages_go_back_to_the_host() {
    let mut guest = Guest::new();
    guest.queues[REPORTING].offer(&[(1 << 20, 0x2_0000, true), ((1 << 20) + 0x8_0000, 0x1000, true)]);
    guest.queues[REPORTING].kick();
    assert_eq!(guest.queues[REPORTING].wait_used().1, 0);
    assert_eq!(guest.resident(), 256 - 33);
}

#[test]
fn pages_that_are_no_ram_and_buffers_the_wrong_way_do_no_harm() {
    let mut guest = Guest::new();
    guest.give(INFLATE, &[u32::MAX, 0x400, FIRST]);
    assert_eq!(guest.resident(), 255);
    guest.queues[REPORTING].offer(&[(1 << 20, 0x2000, false)]);
    guest.queues[REPORTING].offer(&[((4 << 20) - 0x1000, 0x2000, true)]);
    guest.queues[REPORTING].offer(&[(0xffff_ffff_ffff_f000, u32::MAX, true)]);
    guest.queues[REPORTING].kick();
    for _ in 0..3 {
        guest.queues[REPORTING].wait_used();
    }
    assert_eq!((guest.resident(), guest.device.counters().counted().errors), (255, 4));
    // A list that is outside of memory, and one that is no whole number of pages.
    guest.queues[INFLATE].offer(&[(0xffff_0000_0000, 4, false)]);
    guest.queues[INFLATE].offer(&[(LIST, 3, false)]);
    guest.queues[INFLATE].kick();
    for _ in 0..2 {
        guest.queues[INFLATE].wait_used();
    }
    assert_eq!(guest.resident(), 255);
}

#[test]
fn a_ring_that_makes_no_sense_is_told_once() {
    let guest = Guest::new();
    guest.memory.write_obj(0x7000_u16, GuestAddress(guest.queues[INFLATE].avail + 2)).unwrap();
    for _ in 0..10 {
        guest.queues[INFLATE].kick();
    }
    let begun = Instant::now();
    while !guest.interrupt.is_reset_needed() {
        assert!(begun.elapsed() < Duration::from_secs(10));
        std::thread::yield_now();
    }
    assert_eq!(guest.device.counters().counted().errors, 1);
}

#[test]
fn the_guest_is_told_the_target_and_tells_what_it_gave() {
    let mut guest = Guest::new();
    guest.device.set_target(512);
    assert_eq!(guest.interrupt.status(), crate::virtio::interrupt::CONFIG_CHANGE);
    let mut config = [0; 8];
    guest.device.read_config(0, &mut config);
    assert_eq!(config, [0, 2, 0, 0, 0, 0, 0, 0]);
    guest.device.write_config(4, &100_u32.to_le_bytes());
    guest.device.write_config(0, &100_u32.to_le_bytes());
    let state = guest.device.save();
    assert_eq!((state, guest.device.actual()), (BalloonState { target: 512, actual: 100 }, 100));
    guest.device.reset();
    assert_eq!(guest.device.save(), BalloonState { target: 512, actual: 0 });
    guest.device.restore(&state).unwrap();
    assert_eq!(guest.device.save(), state);
}
