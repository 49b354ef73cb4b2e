use std::io::Read;
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress};

use super::super::tap::Tap;
use super::super::worker::Worker;
use super::super::{Net, NetError};
use super::world::*;
use crate::virtio::testing::{self, DriverQueue};
use crate::virtio::{ActivateError, Counters, VirtioDevice};

const PLAIN: [u8; 10] = [0; 10];

#[test]
fn frames_go_out_unchanged_wherever_their_descriptors_part_them() {
    in_namespace(|| {
        let (mut guest, peer) = Guest::new(0);
        let sent = frame(1, 1000);
        guest.send_frame(PLAIN, &sent);
        assert!(peer.receive().1 == sent);
        let cuts: [&[u32]; 4] = [&[], &[5], &[12, 13, 14], &[1, 40, 400, 401, 900]];
        for cuts in cuts {
            let end = u32::try_from(12 + sent.len()).unwrap();
            let edges = [&[0], cuts, &[end]].concat();
            let parts: Vec<_> = edges
                .windows(2)
                .map(|edge| (SEND_AREA + u64::from(edge[0]), edge[1] - edge[0], false))
                .collect();
            guest.send.offer(&parts);
            guest.send.kick();
            assert!(peer.receive().1 == sent, "{cuts:?}");
        }
        eventually(|| guest.net.counters().counted().written_bytes == 5 * sent.len() as u64);
    });
}

#[test]
fn checksums_and_segments_are_left_to_the_other_side() {
    in_namespace(|| {
        let (mut guest, peer) = Guest::new(0);
        for (protocol, length) in [(17, 500), (6, 60_000)] {
            let (header, sent) = packet(protocol, length);
            guest.send_frame(header, &sent);
            let (got, bytes) = peer.receive();
            assert_eq!((got[0], got[1], &got[4..]), (1, header[1], &header[4..]), "{protocol}");
            assert!(bytes == sent, "{protocol}");
        }
    });
}

#[test]
fn many_frames_go_in_order_in_few_turns() {
    in_namespace(|| {
        let (mut guest, peer) = Guest::new(0);
        guest.reactor.pause();
        for _ in 0..250 {
            guest.offer_frame(PLAIN, &frame(7, 60));
        }
        guest.reactor.resume();
        for _ in 0..250 {
            assert!(peer.receive().1 == frame(7, 60));
            guest.send.wait_used();
        }
        let counted = guest.net.counters().counted();
        assert!(counted.kicks <= 2, "{counted:?}");
        // Four turns of 64 frames.
        eventually(|| guest.net.counters().counted().interrupts == 4);
    });
}

#[test]
fn a_tap_that_goes_down_costs_frames_only() {
    in_namespace(|| {
        let (mut guest, peer) = Guest::new(MRG_RXBUF);
        guest.offer_buffers(0..8, 2048);
        set_up(false);
        for number in 0..5 {
            guest.send_frame(PLAIN, &frame(number, 100));
        }
        assert_eq!(guest.errors(), 5);
        guest.must_rest();
        set_up(true);
        drop(peer);
        let peer = Peer::new();
        guest.send_frame(PLAIN, &frame(9, 100));
        assert!(peer.receive().1 == frame(9, 100));
        peer.send(PLAIN, &frame(8, 100));
        guest.receive.wait_used();
    });
}

#[test]
fn a_tap_whose_interface_is_deleted_costs_frames_only() {
    in_namespace(|| {
        let (mut guest, _peer) = Guest::new(MRG_RXBUF);
        guest.offer_buffers(0..8, 2048);
        delete_interface();
        guest.send_frame(PLAIN, &frame(1, 100));
        // The frame, and a look for one to receive at each event that the deletion makes.
        assert!((1..=8).contains(&guest.errors()), "{}", guest.errors());
        guest.must_rest();
        guest.net.reset();
    });
}

#[test]
fn frames_for_which_there_is_no_room_wait_for_it() {
    let (ours, theirs) = seqpacket();
    let (reactor, _) = reactor();
    let memory = testing::memory();
    let receive = DriverQueue::new(&memory, 0, 256);
    let mut send = DriverQueue::new(&memory, 1, 256);
    let counters = Counters::default();
    let mut queues = testing::activation(&memory, &[&receive, &send], 0, &counters).queues.into_iter();
    let tap = Arc::new(Tap::stand_in(ours));
    let (first, second) = (queues.next().unwrap(), queues.next().unwrap());
    let worker = Worker::new(tap, first, second, counters.clone(), 0, true);
    let worker = Arc::new(Mutex::new(worker));
    let registration = reactor.register(Arc::clone(&worker) as _);
    worker.lock().unwrap().start(registration).unwrap();
    for number in 0..200 {
        let at = SEND_AREA + 4000 * number;
        memory.write_obj(number, GuestAddress(at)).unwrap();
        send.offer(&[(at, 4000, false)]);
    }
    send.kick();
    let mut taken = 0;
    // It gets stuck before it is through: nobody reads.
    eventually(|| {
        taken += std::iter::from_fn(|| send.take_used()).count();
        taken > 0 && worker.lock().unwrap().waits_for_tap()
    });
    assert!(taken < 200, "{taken}");
    for number in 0..200_u64 {
        let mut bytes = [0; 5000];
        eventually(|| (&theirs).read(&mut bytes).is_ok_and(|length| length == 4000));
        assert_eq!(bytes[..8], number.to_le_bytes());
    }
    for _ in taken..200 {
        send.wait_used();
    }
    assert_eq!(counters.counted().errors, 0);
    let registration = worker.lock().unwrap().stop();
    drop(registration);
}

#[test]
fn a_reset_device_does_nothing_and_can_be_activated_again() {
    in_namespace(|| {
        let (mut guest, peer) = Guest::new(MRG_RXBUF);
        for _ in 0..3 {
            guest.net.reset();
            guest.offer_frame(PLAIN, &frame(1, 100));
            guest.offer_buffers(0..1, 2048);
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(guest.send.take_used().is_none() && peer.has_nothing());
            guest.reset(MRG_RXBUF);
            guest.send_frame(PLAIN, &frame(2, 100));
            assert!(peer.receive().1 == frame(2, 100));
        }
    });
}

#[test]
fn what_waits_when_the_device_is_activated_is_sent_without_a_kick() {
    in_namespace(|| {
        let (mut guest, peer) = Guest::new(0);
        guest.reactor.pause();
        guest.reset(0);
        guest.reactor.resume();
        guest.net.reset();
        guest.offer_frame(PLAIN, &frame(1, 100));
        // The transport empties the eventfd at a reset; the ring tells all the same.
        let counters = guest.net.counters().clone();
        let activation = testing::activation(&guest.memory, &[&guest.receive, &guest.send], 0, &counters);
        while activation.queues[1].take_kick() {}
        guest.net.activate(activation).unwrap();
        assert!(peer.receive().1 == frame(1, 100));
    });
}

#[test]
fn no_capability_is_needed() {
    in_namespace(|| {
        let tap = good_tap();
        set_up(true);
        let peer = Peer::new();
        // Version 3, this thread; no capability in any set.
        let mut header = [0x2008_0522_u32, 0];
        let mut data = [0_u32; 6];
        // SAFETY: the kernel reads a header and six words.
        assert_eq!(unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), data.as_mut_ptr()) }, 0);
        let mut guest = Guest::on(tap, MRG_RXBUF | GUEST_OFFLOADS);
        guest.offer_buffers(0..64, 1536);
        let (header, sent) = packet(6, 30_000);
        peer.send(header, &sent);
        assert_eq!(guest.receive.wait_used(), (0, 1536));
    });
}

#[test]
fn what_is_no_tap_is_refused() {
    in_namespace(|| {
        let (reactor, _) = reactor();
        let refuse = |file| Net::new(file, MAC, std::sync::Arc::clone(&reactor)).unwrap_err();
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(refuse(null), NetError::NoTap { .. }));
        let without = refuse(make_tap(libc::IFF_TAP | libc::IFF_NO_PI));
        assert!(without.to_string().contains("IFF_VNET_HDR"), "{without}");
        let tun = make_tap(libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
        assert!(matches!(refuse(tun), NetError::Flags { .. }));
    });
}

#[test]
fn a_driver_without_a_queue_is_refused() {
    in_namespace(|| {
        let (mut guest, _peer) = Guest::new(0);
        guest.net.reset();
        let counters = guest.net.counters().clone();
        let queue = DriverQueue::new(&guest.memory, 0, 16);
        let activation = testing::activation(&guest.memory, &[&queue], 0, &counters);
        assert!(matches!(guest.net.activate(activation), Err(ActivateError::NoQueue(1))));
    });
}
