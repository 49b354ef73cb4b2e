use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::bus::BusDevice;
use crate::console::Console;
use crate::console::tests::{connect, listener};
use crate::reactor::Reactor;

/// One for all tests.
fn reactor() -> &'static Reactor {
    static REACTOR: LazyLock<Reactor> = LazyLock::new(|| Reactor::spawn("test", || ()).unwrap());
    &REACTOR
}

fn uart(console: Console) -> (Uart, EventFd) {
    let reactor = reactor();
    let interrupt = crate::virtio::event().unwrap();
    (Uart::new(console, interrupt.try_clone().unwrap(), reactor).unwrap(), interrupt)
}

fn read(uart: &mut Uart, register: u64) -> u8 {
    let mut data = [0xff];
    uart.read(register, &mut data);
    data[0]
}

/// Reads as a driver does: while there is data, ten seconds at most for `count` bytes.
fn receive(uart: &mut Uart, count: usize) -> Vec<u8> {
    let begun = Instant::now();
    let mut bytes = Vec::new();
    while bytes.len() < count {
        if read(uart, 5) & 1 == 1 {
            bytes.push(read(uart, 0));
        } else {
            assert!(begun.elapsed() < Duration::from_secs(10), "{} of {count} bytes", bytes.len());
            std::thread::yield_now();
        }
    }
    bytes
}

fn say(uart: &mut Uart, text: &[u8]) {
    for byte in text {
        uart.write(0, &[*byte]);
    }
}

#[test]
fn a_line_is_written_at_once_and_a_prompt_soon() {
    let (folder, listener) = listener();
    let (mut uart, _) = uart(Console::new(Some(listener), None));
    let mut client = connect(folder.path());
    client.write_all(b"x").unwrap();
    assert_eq!(receive(&mut uart, 1), b"x");
    say(&mut uart, b"hello\nlogin: ");
    let mut bytes = [0; 13];
    client.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello\nlogin: ");
    uart.end();
}

#[test]
fn a_line_is_one_message_and_not_one_a_byte() {
    // Each write to a socket of packets is one packet, so this counts system calls.
    let (ours, theirs) = nonblocking_packets();
    let (mut uart, _) = uart(Console::default());
    uart.attach(ours).unwrap();
    for _ in 0..20 {
        say(&mut uart, &[&[b'x'; 79][..], b"\n"].concat());
    }
    let mut buffer = [0; 4096];
    let mut packets = 0;
    let mut bytes = 0;
    while bytes < 1600 {
        bytes += (&theirs).read(&mut buffer).unwrap();
        packets += 1;
    }
    // One a line, and one more for each time that the timer ran out in a line.
    assert!((20..=40).contains(&packets), "{packets}");
    uart.end();
}

fn nonblocking_packets() -> (UnixStream, UnixStream) {
    use std::os::fd::FromRawFd;
    let mut fds = [0; 2];
    // SAFETY: the array has room for the two descriptors that are returned.
    let made = unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0, fds.as_mut_ptr()) };
    assert_eq!(made, 0);
    // SAFETY: both are new and nobody else's.
    fds.map(|fd| unsafe { UnixStream::from_raw_fd(fd) }).into()
}

#[test]
fn pasted_input_arrives_whole_and_raises_interrupts() {
    let (folder, listener) = listener();
    let (mut uart, interrupt) = uart(Console::new(Some(listener), None));
    uart.write(1, &[1]);
    let text: Vec<u8> = (0..100_000_u32).map(|at| b'a' + (at % 26) as u8).collect();
    let mut client = connect(folder.path());
    let sent = text.clone();
    // It closes right after, as `echo | socat` does.
    let writer = std::thread::spawn(move || client.write_all(&sent).unwrap());
    assert_eq!(receive(&mut uart, text.len()), text);
    writer.join().unwrap();
    assert!(interrupt.read().unwrap() > 0);
    uart.end();
}

#[test]
fn input_in_loopback_mode_waits_for_its_end() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let (mut uart, _) = uart(Console::default());
    uart.write(4, &[0x10]);
    theirs.write_all(b"typed").unwrap();
    uart.attach(ours).unwrap();
    say(&mut uart, b"loop");
    assert_eq!(receive(&mut uart, 4), b"loop");
    uart.write(4, &[0x08]);
    assert_eq!(receive(&mut uart, 5), b"typed");
    uart.end();
}

#[test]
fn the_log_has_everything_at_the_end_and_the_state_comes_back() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let log = || File::options().append(true).open(file.path()).unwrap();
    let (mut uart, interrupt) = uart(Console::new(None, Some(log())));
    say(&mut uart, b"no end of li");
    uart.write(7, &[0x5a]);
    uart.flush();
    assert_eq!(std::fs::read(file.path()).unwrap(), b"no end of li");
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"unread").unwrap();
    uart.attach(ours).unwrap();
    while read(&mut uart, 5) & 1 == 0 {
        std::thread::yield_now();
    }
    let state = uart.save();
    let text = serde_json::to_string(&state).unwrap();
    let state: UartState = serde_json::from_str(&text).unwrap();
    uart.end();
    let reactor = reactor();
    let mut uart = Uart::restore(&state, Console::new(None, Some(log())), interrupt, reactor).unwrap();
    assert_eq!(read(&mut uart, 7), 0x5a);
    assert_eq!(receive(&mut uart, 6), b"unread");
    let too_long = UartState { received: vec![0; 65], ..state };
    let refused = Uart::restore(&too_long, Console::default(), crate::virtio::event().unwrap(), reactor);
    assert!(matches!(refused, Err(UartError::State(65))));
    uart.end();
}
