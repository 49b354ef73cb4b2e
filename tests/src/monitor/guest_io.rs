//! What a guest of the benchmarks does with its disk and its network. A program of its own, linked statically and put into
//! the guest's initial RAM disk: `guest-io block|net`. Prints `RESULT NAME UNITS SECONDS INTERRUPTS` for each piece of work.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Instant;

const UNIT: usize = 4096;
/// Bytes of the part of the disk that is read and written.
const SPAN: u64 = 128 << 20;
const REQUESTS: u64 = 2000;
const SENT: usize = 64 << 20;
/// open(2): past the guest's page cache.
const O_DIRECT: i32 = 0o40000;

fn main() {
    match std::env::args().nth(1).as_deref() {
        Some("block") => block(),
        Some("net") => net(),
        other => panic!("block or net, not {other:?}"),
    }
}

/// Interrupts of virtio devices since the start (proc(5), /proc/interrupts).
fn interrupts() -> u64 {
    let text = fs::read_to_string("/proc/interrupts").unwrap();
    let count = |line: &str| line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
    text.lines().filter(|line| line.contains("virtio")).filter_map(count).sum()
}

fn measured(name: &str, units: u64, work: impl FnOnce()) {
    let (begun, before) = (Instant::now(), interrupts());
    work();
    println!("RESULT {name} {units} {} {}", begun.elapsed().as_secs_f64(), interrupts() - before);
}

fn block() {
    let disk = OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open("/dev/vda").unwrap();
    let mut room = vec![0x5a; 2 * UNIT];
    let skip = room.as_ptr().align_offset(UNIT);
    let page = &mut room[skip..skip + UNIT];
    let sequential = |n: u64| n * UNIT as u64;
    // Every page of the span in an order that looks like none: the step has no factor of two.
    let random = |n: u64| n * 2_654_435_761 % (SPAN / UNIT as u64) * UNIT as u64;
    measured("seq-write", REQUESTS, || write(&disk, page, sequential));
    measured("seq-read", REQUESTS, || read(&disk, page, sequential));
    measured("rand-write", REQUESTS, || write(&disk, page, random));
    measured("rand-read", REQUESTS, || read(&disk, page, random));
}

fn write(disk: &File, page: &[u8], at: impl Fn(u64) -> u64) {
    for n in 0..REQUESTS {
        disk.write_all_at(page, at(n)).unwrap();
    }
}

fn read(disk: &File, page: &mut [u8], at: impl Fn(u64) -> u64) {
    for n in 0..REQUESTS {
        disk.read_exact_at(page, at(n)).unwrap();
    }
}

fn net() {
    let mut stream = TcpStream::connect("192.0.2.1:5001").unwrap();
    let chunk = vec![0; 64 << 10];
    measured("net-send", (SENT / UNIT) as u64, || {
        for _ in 0..SENT / chunk.len() {
            stream.write_all(&chunk).unwrap();
        }
    });
}
