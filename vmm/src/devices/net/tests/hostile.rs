use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use vm_memory::{Bytes, GuestAddress};

use super::super::MAX_FRAME;
use super::super::frame::{BadChain, Direction, MAX_PIECES, Pieces};
use super::world::*;
use crate::virtio::testing::{self, BUFFERS, DriverQueue, INDIRECT, NEXT, Part, WRITE};
use crate::virtio::{Counters, Interrupt, VirtioDevice};

const PLAIN: [u8; 10] = [0; 10];
const OUTSIDE: u64 = 1 << 40;

#[test]
fn frames_that_are_none_are_dropped_and_the_next_one_goes() {
    in_namespace(|| {
        let (mut guest, peer) = Guest::new(0);
        let most = u32::try_from(MAX_FRAME).unwrap();
        let bad: [&[Part]; 9] = [
            &[(SEND_AREA, 0, false)],
            &[(SEND_AREA, 11, false)],
            &[(SEND_AREA, 12, false)],
            // A header and half an Ethernet header, which the kernel refuses.
            &[(SEND_AREA, 20, false)],
            &[(SEND_AREA, most + 1, false)],
            &[(SEND_AREA, u32::MAX, false)],
            &[(SEND_AREA, 12, false), (OUTSIDE, 100, false)],
            &[(u64::MAX - 5, 100, false)],
            &[(SEND_AREA, 12, false), (SEND_AREA, 100, true)],
        ];
        for (number, parts) in bad.iter().enumerate() {
            guest.send.offer(parts);
            guest.send.kick();
            guest.send.wait_used();
            assert_eq!(guest.errors(), number as u64 + 1, "{parts:?}");
        }
        let refused = [[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0], [0, 0x77, 0, 0, 0, 0, 0, 0, 0, 0]];
        for header in refused {
            guest.send_frame(header, &frame(1, 100));
        }
        assert_eq!(guest.errors(), 11);
        assert!(peer.has_nothing());
        guest.send_frame(PLAIN, &frame(2, 100));
        assert!(peer.receive().1 == frame(2, 100));
    });
}

#[test]
fn chains_that_loop_are_dropped() {
    in_namespace(|| {
        let (mut guest, peer) = Guest::new(MRG_RXBUF);
        guest.send.describe(200, (SEND_AREA, 20, NEXT, 201));
        guest.send.describe(201, (SEND_AREA, 20, NEXT, 200));
        guest.send.offer_head(200);
        guest.send.kick();
        assert_eq!(guest.send.wait_used(), (200, 0));
        guest.receive.describe(200, (BUFFERS, 20, NEXT | WRITE, 200));
        guest.receive.offer_head(200);
        guest.receive.kick();
        peer.send(PLAIN, &frame(1, 100));
        assert_eq!(guest.receive.wait_used(), (200, 0));
        assert_eq!(guest.errors(), 2);
        guest.offer_buffers(0..1, 2048);
        assert_eq!(guest.receive.wait_used(), (0, 126));
    });
}

#[test]
fn buffers_that_are_none_are_given_back_empty() {
    in_namespace(|| {
        let (mut guest, peer) = Guest::new(MRG_RXBUF);
        peer.send(PLAIN, &frame(1, 100));
        let bad: [&[Part]; 4] = [
            &[(BUFFERS, 11, true)],
            &[(OUTSIDE, 2048, true)],
            &[(BUFFERS, 2048, false)],
            &[(BUFFERS, 12, true), (BUFFERS, 2048, false)],
        ];
        for parts in bad {
            guest.receive.offer(parts);
            guest.receive.kick();
            assert_eq!(guest.receive.wait_used().1, 0, "{parts:?}");
        }
        guest.receive.offer(&[(BUFFERS, 12, true), (BUFFERS + 0x1000, 50, true), (BUFFERS, 0, true)]);
        guest.receive.offer(&[(BUFFERS + 0x2000, 70, true)]);
        guest.receive.kick();
        assert_eq!(guest.receive.wait_used().1, 62);
        assert_eq!(guest.receive.wait_used().1, 64);
        assert_eq!(guest.bytes(BUFFERS + 10, 2), [2, 0]);
        let got = [guest.bytes(BUFFERS + 0x1000, 50), guest.bytes(BUFFERS + 0x2000, 64)].concat();
        assert!(got == frame(1, 100));
    });
}

#[test]
fn rings_that_make_no_sense_end_the_nic_and_a_reset_brings_it_back() {
    in_namespace(|| {
        let (mut guest, peer) = Guest::new(MRG_RXBUF);
        // The available index runs further ahead than the ring is long.
        guest.memory.write_obj(5000_u16, GuestAddress(guest.send.avail + 2)).unwrap();
        guest.send.kick();
        eventually(|| guest.interrupt.is_reset_needed());
        peer.send(PLAIN, &frame(1, 100));
        guest.send.kick();
        guest.must_rest();
        assert_eq!(guest.net.queue_states().len(), 2);
        guest.reset(MRG_RXBUF);
        guest.send.offer_head(999);
        guest.send.kick();
        eventually(|| guest.interrupt.is_reset_needed());
        guest.reset(MRG_RXBUF);
        guest.send_frame(PLAIN, &frame(2, 100));
        assert!(peer.receive().1 == frame(2, 100));
    });
}

fn addresses() -> impl Strategy<Value = u64> {
    prop_oneof![3 => 0..4_u64 << 20, 1 => (4_u64 << 20) - 100..(4 << 20) + 100, 1 => any::<u64>()]
}

fn lengths() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0..3000_u32, 1 => 0..70_000_u32, 1 => any::<u32>()]
}

type Row = (u64, u32, u16, u16);

fn table(rows: usize) -> impl Strategy<Value = Vec<Row>> {
    let flags =
        prop_oneof![Just(0), Just(NEXT), Just(WRITE), Just(NEXT | WRITE), Just(INDIRECT), any::<u16>()];
    proptest::collection::vec((addresses(), lengths(), flags, 0..20_u16), rows)
}

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config { cases, failure_persistence: None, max_shrink_iters: 50, ..Config::default() })
}

#[test]
fn pieces_of_any_table_are_bounded_or_refused() {
    let strategy = (table(16), 0..16_u16, any::<bool>());
    runner(2000)
        .run(&strategy, |(rows, head, to_guest)| {
            let memory = testing::memory();
            let mut driver = DriverQueue::new(&memory, 0, 16);
            for (index, row) in (0..).zip(rows) {
                driver.describe(index, row);
            }
            driver.offer_head(head);
            let mut queue = driver.device_side(0, &Interrupt::new().unwrap(), &Counters::default());
            let chain = queue.pop().unwrap().unwrap();
            let mut pieces = Pieces::new(Arc::clone(&memory));
            let direction = if to_guest { Direction::ToGuest } else { Direction::FromGuest };
            if let Ok(added) = pieces.add(chain, direction) {
                prop_assert!(added.bytes >= 12 && added.pieces <= MAX_PIECES);
                prop_assert!(to_guest || added.bytes <= MAX_FRAME);
                prop_assert_eq!(added.pieces, pieces.count());
            } else {
                prop_assert_eq!(pieces.count(), 0);
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_chain_of_very_many_descriptors_is_refused() {
    let memory = testing::memory();
    for rows in [MAX_PIECES, MAX_PIECES + 1] {
        for row in 0..rows as u64 {
            let last = row + 1 == rows as u64;
            let descriptor = [
                SEND_AREA.to_le_bytes(),
                (0x14 | u64::from(NEXT * u16::from(!last)) << 32 | (row + 1) << 48).to_le_bytes(),
            ];
            memory.write_slice(&descriptor.concat(), GuestAddress(BUFFERS + 16 * row)).unwrap();
        }
        let mut driver = DriverQueue::new(&memory, 0, 16);
        driver.describe(0, (BUFFERS, 16 * u32::try_from(rows).unwrap(), INDIRECT, 0));
        driver.offer_head(0);
        let mut queue = driver.device_side(0, &Interrupt::new().unwrap(), &Counters::default());
        let added = Pieces::new(Arc::clone(&memory)).add(queue.pop().unwrap().unwrap(), Direction::FromGuest);
        if rows == MAX_PIECES {
            assert_eq!(added.map(|added| added.pieces), Ok(MAX_PIECES));
        } else {
            assert_eq!(added, Err(BadChain::TooManyPieces));
        }
    }
}

#[test]
fn no_table_harms_the_device() {
    in_namespace(|| {
        let (mut guest, peer) = Guest::new(MRG_RXBUF);
        let strategy = (table(16), table(16), proptest::collection::vec(0..20_u16, 1..40), any::<bool>());
        let guest = std::cell::RefCell::new(&mut guest);
        runner(150)
            .run(&strategy, |(receive, send, heads, mergeable)| {
                let guest = &mut **guest.borrow_mut();
                for (index, row) in (0..).zip(receive) {
                    guest.receive.describe(index, row);
                }
                for (index, row) in (0..).zip(send) {
                    guest.send.describe(index, row);
                }
                for head in heads {
                    guest.receive.offer_head(head);
                    guest.send.offer_head(head);
                    peer.send(PLAIN, &frame(3, 700));
                    guest.receive.kick();
                    guest.send.kick();
                }
                // Random writes may have gone over the rings themselves; what must hold is that it comes back.
                guest.memory.write_slice(&vec![0; 4 << 20], GuestAddress(0)).unwrap();
                guest.reset(if mergeable { MRG_RXBUF } else { 0 });
                // What went out meanwhile may have filled the other end up.
                while !peer.has_nothing() {}
                guest.send_frame(PLAIN, &frame(5, 100));
                prop_assert_eq!(peer.receive().1, frame(5, 100));
                Ok(())
            })
            .unwrap();
    });
}
