use std::io::Read;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::guest::{CID, Guest, packet, wait_until};
use super::packet::{HEADER_BYTES, Header};
use super::*;
use crate::virtio::VirtioDevice;

#[test]
fn packets_that_belong_to_nothing_are_answered_with_a_reset_but_no_reset_is() {
    let mut guest = Guest::new(8);
    let good = packet(op::RW, 5, 6);
    guest.send(good, &[]);
    let (reset, _) = guest.expect(op::RST);
    assert_eq!((reset.src_cid, reset.src_port, reset.dst_port), (HOST_CID, 6, 5));
    guest.send(Header { dst_cid: 77, op: op::REQUEST, ..good }, &[]);
    assert_eq!(guest.expect(op::RST).0.src_cid, 77);
    guest.send(Header { src_cid: 78, op: op::REQUEST, ..good }, &[]);
    guest.expect(op::RST);
    guest.send(Header { kind: 2, op: op::REQUEST, ..good }, &[]);
    assert_eq!(guest.expect(op::RST).0.kind, 2);
    guest.send(Header { op: op::RST, ..good }, &[]);
    guest.send(Header { dst_port: 9, ..good }, &[]);
    assert_eq!(guest.expect(op::RST).0.src_port, 9, "the reset got no answer");
}

#[test]
fn operations_that_are_unknown_or_out_of_place_end_the_connection() {
    for op in [0, 8, u16::MAX, op::REQUEST, op::RESPONSE] {
        let mut guest = Guest::new(8);
        let mut stream = guest.connect(1000, 80);
        guest.send(packet(op, 1000, 80), &[]);
        guest.expect(op::RST);
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        assert_eq!(guest.connections(), 0);
    }
}

#[test]
fn a_guest_that_ignores_its_credit_loses_the_connection() {
    let mut guest = Guest::new(8);
    let _stream = guest.connect(1000, 80);
    let chunk = vec![1; 64 << 10];
    for _ in 0..64 {
        guest.send_data(packet(op::RW, 1000, 80), &chunk);
    }
    while guest.receive().0.op != op::RST {}
    assert_eq!(guest.connections(), 0);
}

#[test]
fn lengths_that_are_wrong_are_no_packets() {
    let mut guest = Guest::new(8);
    let mut stream = guest.connect(1000, 80);
    let at = 0x30_0000;
    let header = Header { len: 100, ..packet(op::RW, 1000, 80) };
    guest.memory.write_slice(&header.to_bytes(), GuestAddress(at)).unwrap();
    let errors = guest.device.counters().counted().errors;
    let bad: [&[(u64, u32, bool)]; 7] = [
        &[(at, 43, false)],
        &[(at, 44, false)],
        &[(at, 143, false)],
        &[(at, 44, false), (at, 99, false)],
        &[(at, 44, false), (at, 100, true)],
        &[(at, 44, false), (u64::MAX - 10, 100, false)],
        &[(4 << 20, 144, false)],
    ];
    for parts in bad {
        guest.send_parts(parts);
    }
    assert_eq!(guest.device.counters().counted().errors, errors + 7);
    guest.send_data(packet(op::RW, 1000, 80), b"good");
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"good");
}

#[test]
fn a_packet_may_lie_in_many_pieces() {
    let mut guest = Guest::new(8);
    let mut stream = guest.connect(1000, 80);
    let at = 0x30_0000;
    let header = Header { len: 9, ..packet(op::RW, 1000, 80) };
    guest.memory.write_slice(&header.to_bytes(), GuestAddress(at)).unwrap();
    guest.memory.write_slice(b"piecemeal", GuestAddress(at + HEADER_BYTES as u64)).unwrap();
    guest.send_parts(&[(at, 10, false), (at + 10, 36, false), (at + 46, 3, false), (at + 49, 4, false)]);
    let mut bytes = [0; 9];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"piecemeal");
}

#[test]
fn buffers_that_cannot_be_used_are_given_back_empty() {
    let mut guest = Guest::new(0);
    let small = guest.rx.offer(&[(0x20_0000, 44, true)]);
    let read_only = guest.rx.offer(&[(0x20_0000, 4096, false)]);
    let outside = guest.rx.offer(&[(1 << 40, 4096, true)]);
    let split = guest.rx.offer(&[(0x20_0000, 20, true), (0x20_0014, 200, true)]);
    guest.send(packet(op::RW, 5, 6), &[]);
    let used = [0; 4].map(|_| guest.rx.wait_used());
    assert_eq!(used, [(small, 0), (read_only, 0), (outside, 0), (split, 44)]);
    let mut bytes = [0; HEADER_BYTES];
    guest.memory.read_slice(&mut bytes, GuestAddress(0x20_0000)).unwrap();
    assert_eq!(Header::from_bytes(&bytes).op, op::RST);
}

#[test]
fn a_flood_of_requests_is_bounded_in_connections_and_in_resets() {
    let mut guest = Guest::new(0);
    let drain = guest.host.clone_upstream();
    let reader = std::thread::spawn(move || super::guest::keep_all(&drain));
    for port in 0..4000 {
        guest.send(packet(op::REQUEST, port, 80), &[]);
        assert!(guest.connections() <= MAX_CONNECTIONS);
    }
    for port in 0..4000 {
        guest.send(packet(op::RW, port, 81), &[]);
    }
    // Buffers at last: all that was kept comes, and the device works as before.
    let mut resets = 0;
    for _ in 0..64 {
        guest.give_room();
    }
    loop {
        let (header, _) = guest.receive();
        resets += usize::from(header.op == op::RST);
        if header.op == op::RESPONSE {
            break;
        }
    }
    assert_eq!(resets, MAX_REPLIES);
    guest.device.reset();
    drop(guest);
    reader.join().unwrap();
}

#[test]
fn what_waits_for_readers_that_do_not_read_is_bounded_over_all_connections() {
    let mut guest = Guest::new(64);
    let chunk = vec![1; 64 << 10];
    let mut streams = Vec::new();
    'full: loop {
        assert!(streams.len() * WINDOW as usize <= 2 * MAX_BUFFERED, "there is no bound");
        let port = 1000 + u32::try_from(streams.len()).unwrap();
        guest.send(packet(op::REQUEST, port, 80), &[]);
        streams.push(guest.host.accept().1);
        let (mut sent, mut forwarded) = (0, 0);
        while sent - forwarded + 65_536 <= WINDOW {
            guest.send_data(packet(op::RW, port, 80), &chunk);
            sent += 65_536;
            guest.send(packet(op::CREDIT_REQUEST, port, 80), &[]);
            guest.settle();
            while let Some((header, _)) = guest.poll() {
                match (header.op, header.dst_port == port) {
                    (op::RST, true) => break 'full,
                    (_, true) => forwarded = header.fwd_cnt,
                    other => panic!("{other:?}"),
                }
            }
        }
    }
    assert!(streams.len() > MAX_BUFFERED / WINDOW as usize / 2, "it is of use before");
}

#[test]
fn a_ring_that_makes_no_sense_ends_the_work_until_the_reset() {
    let mut guest = Guest::new(8);
    let mut stream = guest.connect(1000, 80);
    guest.memory.write_obj(0x7000_u16, GuestAddress(guest.tx.avail + 2)).unwrap();
    guest.tx.kick();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    guest.device.reset();
    guest.activate(8);
    guest.connect(1000, 80);
}

fn any_packet() -> impl Strategy<Value = (Header, usize)> {
    let numbers = (0_u32..3, 0_u32..3, 0_u16..9, any::<u32>(), any::<u32>());
    let odds = (prop::bool::weighted(0.05), prop::bool::weighted(0.05), 0_usize..3000, -2_i64..3);
    (numbers, odds).prop_map(|((guest, host, op, window, forwarded), (cid, kind, length, off))| {
        let length = if op == op::RW { length } else { 0 };
        let len = u32::try_from((i64::try_from(length).unwrap() + off).max(0)).unwrap();
        let len = if op == op::RW && off < 0 { u32::MAX } else { len };
        let good = packet(op, guest, host);
        let src_cid = if cid { 9 } else { u64::from(CID) };
        let kind = if kind { 2 } else { TYPE_STREAM };
        let flags = window % 5;
        (Header { src_cid, kind, len, flags, buf_alloc: window, fwd_cnt: forwarded, ..good }, length)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn whatever_packets_come_the_device_takes_them_and_works_on(
        packets in prop::collection::vec(any_packet(), 1..60),
    ) {
        let mut guest = Guest::new(32);
        let drain = guest.host.clone_upstream();
        let reader = std::thread::spawn(move || super::guest::keep_all(&drain));
        for (header, length) in packets {
            guest.send(header, &vec![7; length]);
            while guest.poll().is_some() {}
        }
        let _client = guest.host.connect(99);
        loop {
            let (header, _) = guest.receive();
            if header.op == op::REQUEST && header.dst_port == 99 {
                break;
            }
        }
        drop(guest);
        reader.join().unwrap();
    }

    #[test]
    fn whatever_the_descriptor_tables_say_the_device_lives(
        tables in prop::collection::vec(
            (0_u16..2, 0_u16..16, prop_oneof![0_u64..0x40_0000, any::<u64>()],
             prop_oneof![0_u32..5000, any::<u32>()], 0_u16..8, 0_u16..16),
            1..64,
        ),
        heads in prop::collection::vec((0_u16..2, any::<u16>()), 1..40),
    ) {
        let mut guest = Guest::new(0);
        for (queue, index, address, length, flags, next) in tables {
            // Not where the rings are: those have a test of their own.
            let address = if address < 0x10_0000 { address + 0x10_0000 } else { address };
            let queue = if queue == 0 { &guest.rx } else { &guest.tx };
            queue.describe(index, (address, length, flags, next));
        }
        for (queue, head) in heads {
            let queue = if queue == 0 { &mut guest.rx } else { &mut guest.tx };
            queue.offer_head(head % 24);
            queue.kick();
        }
        wait_until("all is taken", || {
            let queues = guest.device.queue_states();
            let offered: u16 = guest.memory.read_obj(GuestAddress(guest.tx.avail + 2)).unwrap();
            queues[queue::TX].next_avail == offered
        });
        guest.device.reset();
        guest.activate(8);
        guest.accept(22);
    }
}
