use super::world::*;
use crate::virtio::VirtioDevice;
use crate::virtio::testing::BUFFERS;

const PLAIN: [u8; 10] = [0; 10];

#[test]
fn frames_come_in_unchanged_and_the_driver_is_told() {
    in_namespace(|| {
        let (mut guest, peer) = Guest::new(MRG_RXBUF);
        guest.offer_buffers(0..8, 2048);
        for number in 0..8_u8 {
            let sent = frame(number, 46 + 180 * usize::from(number));
            peer.send(PLAIN, &sent);
            let (head, length) = guest.receive.wait_used();
            assert_eq!((u64::from(head), length as usize), (u64::from(number), sent.len() + 12));
            let got = guest.bytes(BUFFERS + u64::from(head) * 2048, length as usize);
            assert_eq!(got[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
            assert_eq!(got[12..], sent);
        }
        eventually(|| guest.interrupt.status() == 1);
        let counted = guest.net.counters().counted();
        assert!(counted.read_bytes > 8 * 46 && counted.errors == 0 && counted.interrupts >= 1);
    });
}

/// Takes one frame out of buffers of `length` bytes each.
fn take_spread(guest: &mut Guest, length: usize) -> Vec<u8> {
    let (first, used) = guest.receive.wait_used();
    let mut bytes = guest.bytes(BUFFERS + u64::from(first) * length as u64, used as usize);
    for _ in 1..u16::from_le_bytes([bytes[10], bytes[11]]) {
        // All of a frame's buffers come at once.
        let (head, used) = guest.receive.take_used().unwrap();
        bytes.extend(guest.bytes(BUFFERS + u64::from(head) * length as u64, used as usize));
    }
    bytes
}

#[test]
fn a_long_segment_is_spread_over_mergeable_buffers_with_its_header() {
    in_namespace(|| {
        let (mut guest, peer) = Guest::new(MRG_RXBUF | GUEST_OFFLOADS);
        guest.offer_buffers(0..128, 1536);
        let (header, sent) = packet(6, 60_000);
        peer.send(header, &sent);
        let got = take_spread(&mut guest, 1536);
        assert_eq!(got[10], 40, "buffers");
        // NEEDS_CSUM, TCPv4, segments of 1000 bytes, where the checksum belongs.
        assert_eq!((got[0], got[1], &got[4..10]), (1, 1, &header[4..10]));
        assert!(got[12..] == sent);
    });
}

#[test]
fn a_driver_that_takes_no_offloads_gets_short_frames_with_checksums() {
    in_namespace(|| {
        let (mut guest, peer) = Guest::new(MRG_RXBUF);
        guest.offer_buffers(0..128, 1536);
        let (header, sent) = packet(6, 60_000);
        peer.send(header, &sent);
        let mut payload: Vec<u8> = Vec::new();
        for _ in 0..60 {
            let got = take_spread(&mut guest, 1536);
            assert_eq!((got.len(), &got[..10]), (12 + 54 + 1000, &PLAIN[..]));
            payload.extend(&got[12 + 54..]);
        }
        assert!(payload == sent[54..]);
    });
}

#[test]
fn a_datagram_comes_in_with_its_checksum_left_out_if_the_driver_takes_it_so() {
    in_namespace(|| {
        let (mut guest, peer) = Guest::new(MRG_RXBUF | GUEST_OFFLOADS);
        guest.offer_buffers(0..2, 2048);
        let (header, sent) = packet(17, 500);
        peer.send(header, &sent);
        let got = take_spread(&mut guest, 2048);
        assert_eq!((&got[..10], &got[12..]), (&header[..], &sent[..]));
        guest.reset(MRG_RXBUF);
        guest.offer_buffers(0..2, 2048);
        peer.send(header, &sent);
        let got = take_spread(&mut guest, 2048);
        assert_eq!(got[..10], PLAIN);
        assert_ne!(got[12 + 40..12 + 42], sent[40..42], "the checksum");
    });
}

#[test]
fn a_guest_without_buffers_loses_only_time_and_burns_none() {
    in_namespace(|| {
        let (mut guest, peer) = Guest::new(MRG_RXBUF);
        guest.offer_buffers(0..1, 2048);
        peer.send(PLAIN, &frame(0, 100));
        guest.receive.wait_used();
        for number in 1..=20 {
            peer.send(PLAIN, &frame(number, 100));
        }
        guest.must_rest();
        guest.offer_buffers(1..21, 2048);
        for number in 1..=20 {
            let got = take_spread(&mut guest, 2048);
            assert!(got[12..] == frame(number, 100), "{number}");
        }
        assert_eq!(guest.errors(), 0);
    });
}

#[test]
fn a_frame_for_which_there_are_too_few_buffers_waits_for_more() {
    in_namespace(|| {
        let (mut guest, peer) = Guest::new(MRG_RXBUF | GUEST_OFFLOADS);
        guest.offer_buffers(0..10, 1536);
        let (header, sent) = packet(6, 60_000);
        peer.send(header, &sent);
        peer.send(PLAIN, &frame(9, 60));
        guest.must_rest();
        assert!(guest.receive.take_used().is_none());
        guest.offer_buffers(10..30, 1536);
        guest.offer_buffers(30..60, 1536);
        assert!(take_spread(&mut guest, 1536)[12..] == sent);
        assert!(take_spread(&mut guest, 1536)[12..] == frame(9, 60));
        assert_eq!(guest.errors(), 0);
    });
}

#[test]
fn a_frame_that_can_never_fit_is_dropped_and_the_next_one_comes() {
    in_namespace(|| {
        // Without mergeable buffers.
        let (mut guest, peer) = Guest::new(0);
        guest.offer_buffers(0..2, 512);
        peer.send(PLAIN, &frame(1, 1000));
        peer.send(PLAIN, &frame(2, 400));
        assert!(take_spread(&mut guest, 512)[12..] == frame(2, 400));
        assert_eq!(guest.errors(), 1);
        // With them, but all of them together are too small.
        guest.reset(MRG_RXBUF | GUEST_OFFLOADS);
        guest.offer_buffers(0..256, 128);
        let (header, sent) = packet(6, 60_000);
        peer.send(header, &sent);
        peer.send(PLAIN, &frame(3, 400));
        assert!(take_spread(&mut guest, 128)[12..] == frame(3, 400));
        assert_eq!(guest.errors(), 2);
    });
}

#[test]
fn buffers_that_are_held_are_saved_as_not_taken() {
    in_namespace(|| {
        let (mut guest, peer) = Guest::new(MRG_RXBUF);
        guest.offer_buffers(0..100, 2048);
        for number in 0..3 {
            peer.send(PLAIN, &frame(number, 100));
            assert!(take_spread(&mut guest, 2048)[12..] == frame(number, 100));
        }
        guest.reactor.pause();
        peer.send(PLAIN, &frame(9, 100));
        let states = guest.net.queue_states();
        let indices: Vec<_> = states.iter().map(|state| (state.next_avail, state.next_used)).collect();
        assert_eq!(indices, [(3, 3), (0, 0)]);
        guest.reactor.resume();
        assert!(take_spread(&mut guest, 2048)[12..] == frame(9, 100));
        guest.net.reset();
        assert!(guest.net.queue_states().is_empty());
    });
}

#[test]
fn while_the_link_is_down_nothing_passes_and_nothing_is_kept() {
    in_namespace(|| {
        let (mut guest, peer) = Guest::new(MRG_RXBUF);
        let status = |guest: &Guest| {
            let mut config = [0xff; 10];
            guest.net.read_config(0, &mut config);
            assert_eq!((&config[..6], &config[8..]), (&MAC[..], &[0xff; 2][..]));
            config[6..8].to_vec()
        };
        assert_eq!(status(&guest), [1, 0]);
        guest.offer_buffers(0..8, 2048);
        guest.net.set_link(false);
        assert_eq!((status(&guest), guest.interrupt.status() & 2), (vec![0, 0], 2));
        assert!(!guest.net.save().link_up);
        guest.send_frame(PLAIN, &frame(1, 100));
        peer.send(PLAIN, &frame(2, 100));
        guest.must_rest();
        assert!(peer.has_nothing() && guest.receive.take_used().is_none());
        guest.net.set_link(true);
        assert_eq!(status(&guest), [1, 0]);
        guest.send_frame(PLAIN, &frame(3, 100));
        assert!(peer.receive().1 == frame(3, 100));
        peer.send(PLAIN, &frame(4, 100));
        assert!(take_spread(&mut guest, 2048)[12..] == frame(4, 100));
        assert_eq!(guest.errors(), 0);
    });
}

#[test]
fn a_nic_that_is_restored_with_its_link_down_begins_so() {
    in_namespace(|| {
        let (mut guest, peer) = Guest::new(MRG_RXBUF);
        guest.net.reset();
        let state = super::super::NetState { mac: MAC, link_up: false };
        guest.net.restore(&state).unwrap();
        assert_eq!(guest.net.save(), state);
        guest.reset(MRG_RXBUF);
        guest.send_frame(PLAIN, &frame(1, 100));
        assert!(peer.has_nothing());
    });
}
