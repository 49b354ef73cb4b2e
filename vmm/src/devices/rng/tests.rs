use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::reactor::Reactor;
use crate::virtio::VirtioDevice;
use crate::virtio::testing::{BUFFERS, DriverQueue, activation, memory};

fn device() -> Rng {
    Rng::new(Arc::new(Reactor::spawn("test", || ()).unwrap()))
}

#[test]
fn a_guest_gets_random_bytes_of_a_bounded_number() {
    let (mut device, memory) = (device(), memory());
    let mut queue = DriverQueue::new(&memory, 0, 16);
    // Offered before the device works, and not notified of.
    queue.offer(&[(BUFFERS, 32, true), (BUFFERS + 64, 32, true)]);
    device.activate(activation(&memory, &[&queue], 0, device.counters())).unwrap();
    assert_eq!(queue.wait_used(), (0, 64));
    let bytes: [[u8; 32]; 2] = [0, 64].map(|at| memory.read_obj(GuestAddress(BUFFERS + at)).unwrap());
    assert!(bytes[0] != [0; 32] && bytes[0] != bytes[1]);
    assert_eq!(memory.read_obj::<[u8; 32]>(GuestAddress(BUFFERS + 32)).unwrap(), [0; 32]);
    queue.offer(&[(BUFFERS, 1 << 20, true)]);
    queue.kick();
    assert_eq!(queue.wait_used().1 as usize, MOST_OF_CHAIN);
}

#[test]
fn a_guest_that_asks_without_end_gets_what_a_period_has() {
    let (mut device, memory) = (device(), memory());
    let mut queue = DriverQueue::new(&memory, 0, 16);
    let begun = Instant::now();
    device.activate(activation(&memory, &[&queue], 0, device.counters())).unwrap();
    let chains = 3 * MOST_IN_PERIOD / MOST_OF_CHAIN;
    for _ in 0..chains {
        queue.offer(&[(BUFFERS, 64 << 10, true)]);
        queue.kick();
        queue.wait_used();
    }
    assert!(begun.elapsed() >= 2 * PERIOD, "{:?}", begun.elapsed());
}

#[test]
fn bad_chains_come_back_empty_and_after_a_reset_nothing_is_written() {
    let (mut device, memory) = (device(), memory());
    let mut queue = DriverQueue::new(&memory, 0, 16);
    device.activate(activation(&memory, &[&queue], 0, device.counters())).unwrap();
    for part in [(BUFFERS, 8, false), (0xffff_ffff_0000, 8, true)] {
        queue.offer(&[part]);
        queue.kick();
        assert_eq!(queue.wait_used().1, 0);
    }
    assert_eq!(device.counters().counted().errors, 2);
    assert_eq!(device.queue_states().len(), 1);
    device.reset();
    queue.offer(&[(BUFFERS, 8, true)]);
    queue.kick();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(queue.take_used(), None);
    assert!(device.queue_states().is_empty());
}
