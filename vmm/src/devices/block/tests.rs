//! The disk driven from the guest's side of its queues.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::image_tests::{Folder, assert_whole, open_rw};
use super::worker::Complaints;
use super::{Block, Image, MAX_RANGE_SECTORS, QUEUE_SIZE};
use crate::description::Format;
use crate::memory::GuestRam;
use crate::reactor::Reactor;
use crate::virtio::testing::{self, BUFFERS, DriverQueue, INDIRECT, NEXT, Part, WRITE};
use crate::virtio::{ActivateError, Counters, Interrupt, VIRTIO_F_EVENT_IDX, VirtioDevice};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What no device writes.
const UNTOUCHED: u8 = 0xcc;

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x800;
const DATA: u64 = BUFFERS + 0x1000;
/// Of the disk.
const SIZE: u64 = 1 << 20;

struct Guest {
    memory: GuestRam,
    queues: Vec<DriverQueue>,
    block: Block,
    interrupt: Option<Interrupt>,
    reactors: Vec<Arc<Reactor>>,
}

impl Guest {
    fn new(image: Image, queues: u16) -> Self {
        let reactors: Vec<_> =
            (0..queues).map(|_| Arc::new(Reactor::spawn("test-disk", || ()).unwrap())).collect();
        let block = Block::new(image, "the-serial", reactors.clone(), Arc::new(|| ()));
        let features = block.features();
        let mut guest =
            Self { memory: testing::memory(), queues: Vec::new(), block, interrupt: None, reactors };
        guest.activate(features);
        guest
    }

    fn activate(&mut self, features: u64) {
        let count = u16::try_from(self.block.queue_sizes().len()).unwrap();
        for ring in 0..u64::from(count) {
            let start = testing::RINGS + ring * testing::QUEUE_SPACE;
            self.memory.write_slice(&vec![0; 0xc000], GuestAddress(start)).unwrap();
        }
        self.queues = (0..count).map(|index| DriverQueue::new(&self.memory, index, QUEUE_SIZE)).collect();
        let sides: Vec<_> = self.queues.iter().collect();
        let activation = testing::activation(&self.memory, &sides, features, self.block.counters());
        self.interrupt = Some(activation.interrupt.clone());
        self.block.activate(activation).unwrap();
    }

    fn header(&self, kind: u32, sector: u64) {
        self.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        self.memory.write_obj(UNTOUCHED, GuestAddress(STATUS)).unwrap();
    }

    fn status(&self) -> u8 {
        self.memory.read_obj(GuestAddress(STATUS)).unwrap()
    }

    /// Sends a chain on the first queue and waits for it; how much the device says it wrote.
    fn send(&mut self, parts: &[Part]) -> u32 {
        let head = self.queues[0].offer(parts);
        self.queues[0].kick();
        let (used, written) = self.queues[0].wait_used();
        assert_eq!(used, head);
        written
    }

    fn request(&mut self, kind: u32, sector: u64, length: u32, device_writes: bool) -> u8 {
        self.header(kind, sector);
        let header = (HEADER, 16, false);
        let status = (STATUS, 1, true);
        if length == 0 {
            self.send(&[header, status]);
        } else {
            self.send(&[header, (DATA, length, device_writes), status]);
        }
        self.status()
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.memory.write_slice(data, GuestAddress(DATA)).unwrap();
        self.request(OUT, sector, u32::try_from(data.len()).unwrap(), false)
    }

    fn read(&mut self, sector: u64, length: u32) -> Vec<u8> {
        assert_eq!(self.request(IN, sector, length, true), OK);
        self.data(length as usize)
    }

    fn data(&self, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        data
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let bytes: Vec<u8> = ranges
            .iter()
            .flat_map(|&(sector, sectors, flags)| {
                [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
            })
            .collect();
        self.memory.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        self.request(kind, 0, u32::try_from(bytes.len()).unwrap(), false)
    }
}

fn raw_file() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE).unwrap();
    file
}

fn raw(read_only: bool) -> Image {
    Image::open(vec![(raw_file(), Format::Raw)], read_only).unwrap()
}

fn disk() -> Guest {
    Guest::new(raw(false), 1)
}

#[test]
fn what_is_written_is_read_and_counted() {
    let mut guest = disk();
    let data: Vec<u8> = (0..8192_u32).map(|at| (at % 253) as u8).collect();
    assert_eq!(guest.write(3, &data), OK);
    guest.memory.write_slice(&[0; 8192], GuestAddress(DATA)).unwrap();
    assert_eq!(guest.read(3, 8192), data);
    assert_eq!(guest.request(FLUSH, 0, 0, false), OK);
    let counted = guest.block.counters().counted();
    assert_eq!((counted.requests, counted.errors), (3, 0));
    assert_eq!((counted.written_bytes, counted.read_bytes), (8192, 8192));
    assert!(counted.kicks >= 3 && counted.interrupts >= 3);
}

#[test]
fn the_driver_reads_the_serial_number_and_the_size() {
    let mut guest = disk();
    assert_eq!(guest.request(GET_ID, 0, 20, true), OK);
    assert_eq!(guest.data(20), b"the-serial\0\0\0\0\0\0\0\0\0\0");
    let mut sectors = [0; 8];
    guest.block.read_config(0, &mut sectors);
    assert_eq!(u64::from_le_bytes(sectors), SIZE / 512);
    let mut beyond = [7; 4];
    guest.block.read_config(58, &mut beyond);
    assert_eq!(beyond, [0, 0, 7, 7]);
    assert_eq!(guest.block.save().serial, "the-serial");
}

#[test]
fn a_request_may_be_cut_in_any_way() {
    let mut guest = disk();
    guest.header(OUT, 1);
    guest.memory.write_slice(&[9; 1024], GuestAddress(HEADER + 16)).unwrap();
    // Header in three pieces, the last with the first data; an empty descriptor; the status alone.
    let header = [(HEADER, 1, false), (HEADER + 1, 8, false), (HEADER + 9, 7 + 100, false)];
    let rest = [(HEADER + 116, 0, false), (HEADER + 116, 924, false), (STATUS, 1, true)];
    assert_eq!(guest.send(&[header, rest].concat()), 1);
    assert_eq!(guest.status(), OK);
    guest.header(IN, 1);
    // Data and status in one descriptor.
    guest.send(&[(HEADER, 16, false), (DATA, 3, true), (DATA + 3, 1021 + 1, true)]);
    assert_eq!(guest.data(1025), [vec![9; 1024], vec![OK]].concat());
}

#[test]
fn discards_and_zeroes_do_what_they_say() {
    let mut guest = disk();
    assert_eq!(guest.write(0, &vec![5; 0x10000]), OK);
    assert_eq!(guest.ranges(WRITE_ZEROES, &[(1, 9, 0)]), OK);
    assert_eq!(guest.ranges(WRITE_ZEROES, &[(16, 16, 1)]), OK);
    assert_eq!(guest.ranges(DISCARD, &[(64, 8, 0), (80, 8, 0)]), OK);
    let read = guest.read(0, 0x10000);
    let sector = |at: usize| &read[at * 512..(at + 1) * 512];
    assert!([1, 9, 16, 31].into_iter().all(|at| sector(at) == [0; 512]));
    assert!([0, 10, 15, 32, 63, 72, 79, 88].into_iter().all(|at| sector(at) == [5; 512]));
}

#[test]
fn requests_that_cannot_be_are_refused_and_the_disk_goes_on() {
    let mut guest = disk();
    let end = SIZE / 512;
    assert_eq!(guest.request(IN, end, 512, true), IOERR);
    assert_eq!(guest.request(IN, end - 1, 1024, true), IOERR);
    assert_eq!(guest.request(IN, u64::MAX, 512, true), IOERR);
    assert_eq!(guest.request(IN, u64::MAX / 512, 512, true), IOERR);
    assert_eq!(guest.request(OUT, end, 512, false), IOERR);
    assert_eq!(guest.request(IN, 0, 511, true), IOERR);
    assert_eq!(guest.request(OUT, 0, 513, false), IOERR);
    assert_eq!(guest.request(99, 0, 0, false), UNSUPP);
    assert_eq!(guest.ranges(DISCARD, &[(0, 8, 1)]), UNSUPP);
    assert_eq!(guest.ranges(WRITE_ZEROES, &[(0, 8, 2)]), UNSUPP);
    assert_eq!(guest.ranges(WRITE_ZEROES, &[(0, 8, 0), (8, 8, 0)]), IOERR);
    assert_eq!(guest.ranges(DISCARD, &[(0, 8, 0); 17]), IOERR);
    assert_eq!(guest.ranges(DISCARD, &[(end, 1, 0)]), IOERR);
    assert_eq!(guest.ranges(DISCARD, &[(u64::MAX, u32::MAX, 0)]), IOERR);
    assert_eq!(guest.ranges(DISCARD, &[(0, MAX_RANGE_SECTORS + 1, 0)]), IOERR);
    assert_eq!(guest.request(DISCARD, 0, 15, false), IOERR);
    assert_eq!(guest.request(DISCARD, 0, 0, false), IOERR);
    // Too short for a header.
    guest.header(IN, 0);
    guest.send(&[(HEADER, 15, false), (STATUS, 1, true)]);
    assert_eq!(guest.status(), IOERR);
    assert_eq!(guest.block.counters().counted().errors, 18);
    assert_eq!(guest.write(0, &[1; 512]), OK);
}

#[test]
fn chains_that_cannot_be_answered_come_back_unwritten() {
    let mut guest = disk();
    guest.header(IN, 0);
    let header = (HEADER, 16, false);
    // No byte for the status; status outside memory; data outside memory; lengths that overflow; wrong order.
    assert_eq!(guest.send(&[header]), 0);
    assert_eq!(guest.send(&[header, (STATUS, 0, true)]), 0);
    assert_eq!(guest.send(&[header, (1 << 40, 1, true)]), 0);
    assert_eq!(guest.send(&[header, (DATA, u32::MAX, true), (STATUS, 1, true)]), 0);
    assert_eq!(guest.send(&[header, (u64::MAX, 512, true), (STATUS, 1, true)]), 0);
    assert_eq!(guest.send(&[header, (u64::MAX - 8, 512, true), (STATUS, 1, true)]), 0);
    assert_eq!(guest.send(&[(DATA, 512, true), header, (STATUS, 1, true)]), 0);
    assert_eq!(guest.status(), UNTOUCHED);
    // A loop; a chain that leads out of the table; a table of tables; a table without end.
    let loops = |guest: &mut Guest| {
        guest.queues[0].offer_head(200);
        guest.queues[0].kick();
        guest.queues[0].wait_used()
    };
    guest.queues[0].describe(200, (HEADER, 16, NEXT, 201));
    guest.queues[0].describe(201, (DATA, 512, NEXT | WRITE, 201));
    assert_eq!(loops(&mut guest), (200, 0));
    guest.queues[0].describe(201, (DATA, 512, NEXT | WRITE, 9999));
    assert_eq!(loops(&mut guest), (200, 0));
    guest.queues[0].describe(200, (DATA, 16, INDIRECT, 0));
    let table = [HEADER.to_le_bytes(), (u64::from(INDIRECT) << 32 | 16).to_le_bytes()].concat();
    guest.memory.write_slice(&table, GuestAddress(DATA)).unwrap();
    assert_eq!(loops(&mut guest), (200, 0));
    guest.queues[0].describe(200, (0, 16 * 65535, INDIRECT, 0));
    assert_eq!(loops(&mut guest), (200, 0));
    assert_eq!(guest.block.counters().counted().errors, 11);
    assert_eq!(guest.write(0, &[1; 512]), OK);
}

#[test]
fn a_ring_that_makes_no_sense_stops_the_device_until_it_is_reset() {
    let mut guest = disk();
    let avail = guest.queues[0].avail;
    guest.memory.write_obj(5000_u16, GuestAddress(avail + 2)).unwrap();
    guest.queues[0].kick();
    let interrupt = guest.interrupt.clone().unwrap();
    let begun = std::time::Instant::now();
    while !interrupt.is_reset_needed() {
        assert!(begun.elapsed().as_secs() < 10);
        std::thread::yield_now();
    }
    guest.block.reset();
    let features = guest.block.features();
    guest.activate(features);
    assert_eq!(guest.write(0, &[1; 512]), OK);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let file = raw_file();
    let image = Image::open(vec![(file.try_clone().unwrap(), Format::Raw)], true).unwrap();
    let mut guest = Guest::new(image, 1);
    assert_ne!(guest.block.features() & 1 << 5, 0);
    assert_eq!(guest.write(0, &[1; 512]), IOERR);
    assert_eq!(guest.ranges(WRITE_ZEROES, &[(0, 8, 0)]), IOERR);
    assert_eq!(guest.ranges(DISCARD, &[(0, 8, 0)]), IOERR);
    assert_eq!(guest.request(FLUSH, 0, 0, false), OK);
    assert_eq!(guest.read(0, 512), vec![0; 512]);
}

/// A file that reads, but whose writes the kernel refuses from now on when asked.
fn sealable() -> File {
    // SAFETY: the name is a string with its zero; the result is checked.
    let fd = unsafe { libc::memfd_create(c"disk".as_ptr(), libc::MFD_ALLOW_SEALING | libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: the descriptor is new, so nobody else has it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(SIZE).unwrap();
    file
}

#[test]
fn a_disk_that_fails_gives_io_errors_and_the_device_goes_on() {
    let file = sealable();
    let image = Image::open(vec![(file.try_clone().unwrap(), Format::Raw)], false).unwrap();
    let mut guest = Guest::new(image, 1);
    assert_eq!(guest.write(8, &[4; 512]), OK);
    // SAFETY: the descriptor is open, and the call takes a number.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) }, 0);
    for _ in 0..100 {
        assert_eq!(guest.write(8, &[5; 512]), IOERR);
    }
    assert_eq!(guest.ranges(WRITE_ZEROES, &[(8, 8, 1)]), IOERR);
    assert_eq!(guest.read(8, 512), vec![4; 512]);
    assert_eq!(guest.block.counters().counted().errors, 101);
    // It vanishes: what is beyond a file's end reads as zeroes.
    file.set_len(0).unwrap();
    assert_eq!(guest.read(8, 512), vec![0; 512]);
}

#[test]
fn a_write_that_finds_no_room_waits_until_there_is_some() {
    let folder = Folder::new();
    // Says SKIPPED where it cannot be.
    super::crash_tests::in_a_small_tmpfs(module_path!(), "no_room_child", &folder.path(""));
}

/// Runs in a process whose folder is a tmpfs of 2 MiB.
#[test]
#[ignore = "a part of the test above"]
fn no_room_child() {
    let Some(folder) = std::env::var_os("CATALYST_TEST_FOLDER") else { return };
    let folder = std::path::Path::new(&folder);
    let file = File::options().read(true).write(true).create_new(true).open(folder.join("image")).unwrap();
    file.set_len(SIZE).unwrap();
    std::fs::write(folder.join("ballast"), vec![1; 3 << 20]).unwrap_err();
    let (tell, told) = std::sync::mpsc::channel();
    let reactors = vec![Arc::new(Reactor::spawn("test-disk", || ()).unwrap())];
    let image = Image::open(vec![(file, Format::Raw)], false).unwrap();
    let no_room = Arc::new(move || {
        let _ = tell.send(());
    });
    let block = Block::new(image, "full", reactors.clone(), no_room);
    let features = block.features();
    let mut guest = Guest { memory: testing::memory(), queues: Vec::new(), block, interrupt: None, reactors };
    guest.activate(features);

    guest.memory.write_slice(&[7; 4096], GuestAddress(DATA)).unwrap();
    guest.header(OUT, 8);
    let head = guest.queues[0].offer(&[(HEADER, 16, false), (DATA, 4096, false), (STATUS, 1, true)]);
    guest.queues[0].kick();
    told.recv().unwrap();
    guest.reactors[0].pause();
    assert_eq!((guest.queues[0].take_used(), guest.status()), (None, UNTOUCHED));
    // It is saved as one that is still to be served.
    assert_eq!(guest.block.queue_states()[0].next_avail, 0);
    std::fs::remove_file(folder.join("ballast")).unwrap();
    guest.reactors[0].resume();
    assert_eq!(guest.queues[0].wait_used(), (head, 1));
    assert_eq!(guest.status(), OK);
    assert_eq!(guest.read(8, 4096), vec![7; 4096]);
    assert_eq!(guest.block.counters().counted().errors, 0);
}

#[test]
fn a_failing_disk_is_told_of_once_a_second() {
    let complaints = Complaints::default();
    assert!(complaints.complain("write", &"no space"));
    assert!(!complaints.complain("write", &"no space"));
}

fn drive_four_queues(image: Image) {
    let mut guest = Guest::new(image, 4);
    assert_ne!(guest.block.features() & 1 << 12, 0);
    for round in 0..200_u64 {
        for index in 0..4_u8 {
            let base = BUFFERS + 0x10000 * (u64::from(index) + 1);
            let sector = u64::from(index) * 64 + round % 8 * 8;
            // Every cluster is all queues' business; now and then what is there is given up first.
            let kind = if round % 40 >= 32 { DISCARD } else { OUT };
            guest.memory.write_obj(kind, GuestAddress(base)).unwrap();
            guest.memory.write_obj(sector, GuestAddress(base + 8)).unwrap();
            guest.memory.write_slice(&[index + 1; 4096], GuestAddress(base + 0x1000)).unwrap();
            let length = if kind == OUT { 4096 } else { 16 };
            if kind == DISCARD {
                let range = [sector.to_le_bytes(), 8_u64.to_le_bytes()].concat();
                guest.memory.write_slice(&range, GuestAddress(base + 0x1000)).unwrap();
            }
            let queue = &mut guest.queues[usize::from(index)];
            queue.offer(&[(base, 16, false), (base + 0x1000, length, false), (base + 0x800, 1, true)]);
            queue.kick();
        }
        for queue in &mut guest.queues {
            assert_eq!(queue.wait_used().1, 1);
        }
    }
    assert_eq!(guest.block.counters().counted().errors, 0);
    for index in 0..4_u8 {
        for place in 0..8 {
            assert_eq!(guest.write(u64::from(index) * 64 + place * 8, &[index + 1; 4096]), OK);
        }
    }
    for index in 0..4_u8 {
        assert_eq!(guest.read(u64::from(index) * 64, 32768), vec![index + 1; 32768]);
    }
}

#[test]
fn queues_work_side_by_side() {
    drive_four_queues(raw(false));
    let folder = Folder::new();
    let Some(path) = folder.qcow2("image", &["-o", "cluster_size=4K"], "1M") else { return };
    drive_four_queues(Image::open(vec![(open_rw(&path), Format::Qcow2)], false).unwrap());
    assert_whole(&path);
}

#[test]
fn a_batch_takes_one_interrupt() {
    let mut guest = disk();
    guest.block.reset();
    let features = guest.block.features() | VIRTIO_F_EVENT_IDX;
    guest.activate(features);
    guest.reactors[0].pause();
    guest.header(IN, 0);
    let before = guest.block.counters().counted();
    for _ in 0..32 {
        guest.queues[0].offer(&[(HEADER, 16, false), (DATA, 4096, true), (STATUS, 1, true)]);
        guest.queues[0].kick();
    }
    guest.reactors[0].resume();
    for _ in 0..32 {
        guest.queues[0].wait_used();
    }
    guest.reactors[0].pause();
    let after = guest.block.counters().counted();
    assert_eq!(after.requests - before.requests, 32);
    assert_eq!((after.kicks - before.kicks, after.interrupts - before.interrupts), (1, 1));
}

#[test]
fn a_paused_device_does_nothing_and_its_queues_can_be_saved() {
    let mut guest = Guest::new(raw(false), 2);
    assert_eq!(guest.write(0, &[1; 512]), OK);
    for reactor in &guest.reactors {
        reactor.pause();
    }
    guest.header(IN, 0);
    guest.queues[0].offer(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    guest.queues[0].kick();
    let states = guest.block.queue_states();
    assert_eq!(states.len(), 2);
    assert_eq!((states[0].next_avail, states[0].next_used), (1, 1));
    assert_eq!(guest.queues[0].take_used(), None);
    for reactor in &guest.reactors {
        reactor.resume();
    }
    assert_eq!(guest.queues[0].wait_used().1, 513);
}

#[test]
fn nothing_is_used_after_a_reset_and_the_device_can_begin_again() {
    let mut guest = disk();
    assert_eq!(guest.write(0, &[1; 512]), OK);
    guest.block.reset();
    guest.block.reset();
    assert!(guest.block.queue_states().is_empty());
    guest.queues[0].offer(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    guest.queues[0].kick();
    let features = guest.block.features();
    guest.activate(features);
    assert_eq!(guest.read(0, 512), vec![1; 512]);
    let activation = testing::activation(&guest.memory, &[], features, &Counters::default());
    assert!(matches!(guest.block.activate(activation), Err(ActivateError::NoQueue(0))));
}

#[test]
fn a_device_that_comes_back_serves_what_nobody_notifies_it_of() {
    let mut guest = disk();
    guest.block.reset();
    let mut queue = DriverQueue::new(&guest.memory, 0, QUEUE_SIZE);
    guest.memory.write_slice(&vec![0; 0xc000], GuestAddress(testing::RINGS)).unwrap();
    guest.header(IN, 0);
    queue.offer(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    let activation = testing::activation(&guest.memory, &[&queue], 0, guest.block.counters());
    guest.block.activate(activation).unwrap();
    assert_eq!(queue.wait_used().1, 513);
}

/// Another CPU of the guest: writes descriptors, headers and the ring's index, over and over, until it is told to end.
#[expect(clippy::cast_possible_truncation, reason = "any bits of a random word will do")]
fn scribble(memory: &GuestRam, end: &AtomicBool) {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let addresses = [HEADER, STATUS, DATA, testing::RINGS, u64::MAX, (4 << 20) - 8];
    let lengths = [16_u32, 1, 512, 4096, 0, u32::MAX];
    while !end.load(Ordering::Relaxed) {
        let word = next();
        let pick = |count: usize, shift: u32| (word >> shift) as usize % count;
        let descriptor = testing::RINGS + 16 * (word >> 32 & 15);
        memory.write_obj(addresses[pick(addresses.len(), 0)], GuestAddress(descriptor)).unwrap();
        memory.write_obj(lengths[pick(lengths.len(), 8)], GuestAddress(descriptor + 8)).unwrap();
        memory.write_obj(word as u32 & 0x000f_0007, GuestAddress(descriptor + 12)).unwrap();
        memory.write_obj((word >> 16) as u32 & 15, GuestAddress(HEADER)).unwrap();
        memory.write_obj(word >> 40 & 0xfff, GuestAddress(HEADER + 8)).unwrap();
        if word >> 60 == 0 {
            memory.write_obj(word as u16, GuestAddress(testing::RINGS + 0x8002)).unwrap();
        }
    }
}

#[test]
fn chains_that_change_while_they_are_read_do_not_stop_the_device() {
    let mut guest = disk();
    let features = guest.block.features();
    for _ in 0..20 {
        let end = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let memory = Arc::clone(&guest.memory);
            let end = &end;
            scope.spawn(move || scribble(&memory, end));
            for head in 0..200 {
                guest.queues[0].offer_head(head % 16);
                guest.queues[0].kick();
                std::thread::yield_now();
            }
            end.store(true, Ordering::Relaxed);
        });
        guest.block.reset();
        guest.activate(features);
        assert_eq!(guest.write(0, &[1; 512]), OK);
        assert_eq!(guest.read(0, 512), vec![1; 512]);
    }
    let counted = guest.block.counters().counted();
    assert!(counted.requests > 100, "the device took next to nothing: {counted:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn no_descriptor_can_stop_the_device(
        table in proptest::collection::vec(
            (prop_oneof![Just(HEADER), Just(DATA), Just(STATUS), Just(testing::RINGS), any::<u64>()],
             prop_oneof![0_u32..40, Just(512), Just(4096), any::<u32>()],
             0_u16..8,
             prop_oneof![0_u16..16, any::<u16>()]),
            16,
        ),
        kind in prop_oneof![Just(IN), Just(OUT), Just(FLUSH), Just(GET_ID), Just(DISCARD), Just(WRITE_ZEROES), any::<u32>()],
        sector in prop_oneof![0_u64..3000, any::<u64>()],
        heads in proptest::collection::vec(0_u16..16, 1..16),
    ) {
        let mut guest = disk();
        guest.block.reset();
        guest.header(kind, sector);
        for (index, descriptor) in table.into_iter().enumerate() {
            guest.queues[0].describe(u16::try_from(index).unwrap(), descriptor);
        }
        for &head in &heads {
            guest.queues[0].offer_head(head);
        }
        let features = guest.block.features();
        let interrupt = Interrupt::new().unwrap();
        let mut side = guest.queues[0].device_side(0, &interrupt, &Counters::default());
        // A chain may write over the rings, so this may fail; it must come back, and the next start must do.
        let _ = super::serve(&raw(false), &mut side, features);
        guest.activate(features);
        prop_assert_eq!(guest.write(0, &[1; 512]), OK);
        prop_assert_eq!(guest.read(0, 512), vec![1; 512]);
    }
}
