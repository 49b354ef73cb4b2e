use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;

use vm_memory::{Bytes, GuestAddress};

use super::guest::{CID, GUEST_WINDOW, Guest, packet, wait_until};
use super::packet::Header;
use super::*;
use crate::virtio::VirtioDevice;

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from(at * 7 % 251).unwrap()).collect()
}

fn read(stream: &mut UnixStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_client_of_the_host_talks_with_the_guest() {
    let mut guest = Guest::new(8);
    let (mut client, port) = guest.accept(22);
    client.write_all(b"to the guest").unwrap();
    let (header, data) = guest.expect(op::RW);
    assert_eq!((header.src_port, header.dst_port, &data[..]), (port, 22, &b"to the guest"[..]));
    guest.send_data(packet(op::RW, 22, port), b"to the host");
    assert_eq!(read(&mut client, 11), b"to the host");
}

#[test]
fn what_a_client_writes_behind_its_line_is_the_connections() {
    let mut guest = Guest::new(8);
    let mut client = guest.host.client();
    client.write_all(b"CONNECT 7\nearly").unwrap();
    let (request, _) = guest.expect(op::REQUEST);
    guest.send(packet(op::RESPONSE, 7, request.src_port), &[]);
    assert_eq!(guest.expect(op::RW).1, b"early");
}

#[test]
fn the_guest_talks_with_whoever_is_upstream() {
    let mut guest = Guest::new(8);
    let mut stream = guest.connect(1000, 80);
    guest.send_data(packet(op::RW, 1000, 80), b"to the host");
    assert_eq!(read(&mut stream, 11), b"to the host");
    stream.write_all(b"to the guest").unwrap();
    assert_eq!(guest.expect(op::RW).1, b"to the guest");
}

#[test]
fn whoever_does_not_want_the_guests_connection_closes_it() {
    let mut guest = Guest::new(8);
    drop(guest.connect(1000, 80));
    let mut flags = 0;
    while flags != shut::BOTH {
        flags = guest.expect(op::SHUTDOWN).0.flags;
    }
    guest.send(packet(op::RST, 1000, 80), &[]);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_port_of_the_guest_that_nobody_listens_on_closes_the_client() {
    let mut guest = Guest::new(8);
    let mut client = guest.host.connect(9);
    let (request, _) = guest.expect(op::REQUEST);
    guest.send(packet(op::RST, 9, request.src_port), &[]);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_client_that_goes_before_the_guest_answers_is_taken_back() {
    let mut guest = Guest::new(8);
    let client = guest.host.connect(9);
    let (request, _) = guest.expect(op::REQUEST);
    drop(client);
    assert_eq!(guest.expect(op::RST).0.src_port, request.src_port);
    assert_eq!(guest.connections(), 0);
}

/// As a guest would: sends within its credit, takes what comes, gives credit at last.
fn echo_through(guest: &mut Guest, guest_port: u32, host_port: u32, bytes: &[u8]) -> Vec<u8> {
    let (mut sent, mut came) = (0_usize, Vec::new());
    let (mut window, mut forwarded) = (WINDOW, 0_u32);
    let (mut told, mut idle) = (0_u32, 0);
    while came.len() < bytes.len() {
        idle += 1;
        assert!(idle < 20_000, "stuck: sent {sent}, came {}", came.len());
        while let Some((header, data)) = guest.poll() {
            (window, forwarded, idle) = (header.buf_alloc, header.fwd_cnt, 0);
            assert!(matches!(header.op, op::RW | op::CREDIT_UPDATE | op::CREDIT_REQUEST), "{header:?}");
            came.extend(data);
            assert!(u32::try_from(came.len()).unwrap() - told <= GUEST_WINDOW, "beyond the guest's credit");
        }
        let count = u32::try_from(came.len()).unwrap();
        let flight = u32::try_from(sent).unwrap().wrapping_sub(forwarded);
        let chunk = (bytes.len() - sent).min(16 << 10).min((window - flight) as usize);
        let header = Header { fwd_cnt: count, ..packet(op::CREDIT_UPDATE, guest_port, host_port) };
        if chunk > 0 {
            guest.send_data(header, &bytes[sent..sent + chunk]);
            (sent, told, idle) = (sent + chunk, count, 0);
        } else if count - told >= GUEST_WINDOW / 2 || idle > 20 {
            guest.send(header, &[]);
            told = count;
            thread::sleep(std::time::Duration::from_millis(1));
        }
    }
    came
}

#[test]
fn megabytes_go_both_ways_within_small_windows_and_slow_readers() {
    let mut guest = Guest::new(16);
    let mut stream = guest.connect(1000, 80);
    let bytes = pattern(4 << 20);
    let echo = thread::spawn(move || {
        let mut buffer = vec![0; 10_000];
        loop {
            let count = stream.read(&mut buffer).unwrap();
            if count == 0 {
                return;
            }
            stream.write_all(&buffer[..count]).unwrap();
        }
    });
    assert!(echo_through(&mut guest, 1000, 80, &bytes) == bytes);
    guest.send(Header { flags: shut::BOTH, ..packet(op::SHUTDOWN, 1000, 80) }, &[]);
    echo.join().unwrap();
}

#[test]
fn a_host_that_does_not_read_holds_the_guest_at_its_window_and_loses_nothing() {
    let mut guest = Guest::new(8);
    let mut stream = guest.connect(1000, 80);
    let chunk = pattern(32 << 10);
    let (mut sent, mut forwarded) = (0_u32, 0);
    // Until the window is used up and nothing more of it is given back.
    while sent - forwarded + 32_768 <= WINDOW {
        guest.send_data(packet(op::RW, 1000, 80), &chunk);
        sent += 32_768;
        while let Some((header, _)) = guest.poll() {
            forwarded = header.fwd_cnt;
        }
    }
    assert!(sent > WINDOW, "the socket itself takes something");
    guest.send(Header { flags: shut::BOTH, ..packet(op::SHUTDOWN, 1000, 80) }, &[]);
    while guest.receive().0.op != op::RST {}
    assert_eq!(guest.connections(), 1, "it stays until its reader has all");
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), sent as usize);
    assert!(all.chunks(chunk.len()).all(|part| part == chunk));
    wait_until("the connection has gone", || guest.connections() == 0);
}

#[test]
fn a_guest_without_credit_is_asked_and_gets_the_rest_later() {
    let mut guest = Guest::new(8);
    let none = Header { buf_alloc: 5, ..packet(op::REQUEST, 1000, 80) };
    guest.send(none, &[]);
    let (_, mut stream) = guest.host.accept();
    guest.expect(op::RESPONSE);
    stream.write_all(b"0123456789").unwrap();
    assert_eq!(guest.expect(op::RW).1, b"01234");
    guest.expect(op::CREDIT_REQUEST);
    guest.send(Header { op: op::CREDIT_UPDATE, fwd_cnt: 0, ..none }, &[]);
    guest.send(Header { op: op::CREDIT_UPDATE, fwd_cnt: 5, ..none }, &[]);
    assert_eq!(guest.expect(op::RW).1, b"56789");
}

#[test]
fn each_direction_ends_by_itself() {
    let mut guest = Guest::new(8);
    let mut stream = guest.connect(1000, 80);
    guest.send_data(packet(op::RW, 1000, 80), b"last");
    guest.send(Header { flags: shut::SEND, ..packet(op::SHUTDOWN, 1000, 80) }, &[]);
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last");
    stream.write_all(b"answer").unwrap();
    assert_eq!(guest.expect(op::RW).1, b"answer");

    let mut stream = guest.connect(1001, 80);
    stream.write_all(b"question").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(op::RW).1, b"question");
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, shut::SEND);
    guest.send_data(packet(op::RW, 1001, 80), b"answer");
    assert_eq!(read(&mut stream, 6), b"answer");
    guest.send(Header { flags: shut::BOTH, ..packet(op::SHUTDOWN, 1001, 80) }, &[]);
    assert_eq!(guest.expect(op::RST).0.dst_port, 1001);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_guest_that_will_not_receive_stops_the_writer() {
    let mut guest = Guest::new(8);
    let mut stream = guest.connect(1000, 80);
    guest.send(Header { flags: shut::RECEIVE, ..packet(op::SHUTDOWN, 1000, 80) }, &[]);
    assert_eq!(stream.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    guest.send_data(packet(op::RW, 1000, 80), b"still");
    assert_eq!(read(&mut stream, 5), b"still");
}

#[test]
fn connections_take_turns() {
    let mut guest = Guest::new(4);
    let mut streams: Vec<_> = (0..4).map(|port| guest.connect(1000 + port, 80)).collect();
    // The first takes all four buffers, so all have to wait for more of them.
    streams[0].write_all(&pattern(20_000)).unwrap();
    for stream in &mut streams {
        stream.write_all(&pattern(12_000)).unwrap();
    }
    wait_until("all wait for their turn", || guest.device.worker().waiting() == 4);
    let mut ports = Vec::new();
    while ports.len() < 12 {
        ports.push(guest.expect(op::RW).0.dst_port);
    }
    assert_eq!(ports[..4], [1000; 4]);
    for turn in ports[4..].chunks(4) {
        assert!((1000..1004).all(|port| turn.contains(&port)), "{turn:?}");
    }
}

/// Milliseconds that the reactor's thread has run.
fn cpu_time() -> u64 {
    let of_thread = |folder: std::fs::DirEntry| {
        let read = |file| std::fs::read_to_string(folder.path().join(file)).unwrap_or_default();
        let nanoseconds = read("schedstat").split(' ').next().and_then(|field| field.parse::<u64>().ok());
        if read("comm").trim() == "vsock-idle" { nanoseconds } else { None }
    };
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    threads.filter_map(|folder| of_thread(folder.unwrap())).sum::<u64>() / 1_000_000
}

#[test]
fn without_buffers_of_the_guest_nothing_spins_and_nothing_is_lost() {
    let mut guest = Guest::named("vsock-idle", 1);
    let mut stream = guest.connect(1000, 80);
    stream.write_all(b"one").unwrap();
    let (_, data) = guest.expect(op::RW);
    assert_eq!(data, b"one");
    // The buffer that `expect` gave back is taken, and no other is offered.
    stream.write_all(b"two").unwrap();
    guest.rx.wait_used();
    stream.write_all(b"three").unwrap();
    let before = cpu_time();
    thread::sleep(std::time::Duration::from_millis(200));
    let spent = cpu_time() - before;
    assert!(spent < 100, "{spent} ms of 200 spent with nothing to do");
    guest.give_room();
    assert_eq!(guest.expect(op::RW).1, b"three");
}

#[test]
fn a_client_with_half_a_line_blocks_nobody() {
    let mut guest = Guest::new(8);
    let mut half = guest.host.client();
    half.write_all(b"CONN").unwrap();
    let silent: Vec<_> = (0..5).map(|_| guest.host.client()).collect();
    let _open = guest.accept(1);
    half.write_all(b"ECT 2\n").unwrap();
    assert_eq!(guest.expect(op::REQUEST).0.dst_port, 2);
    drop(silent);
    guest.accept(3);
}

#[test]
fn of_too_many_silent_clients_the_oldest_goes() {
    let mut guest = Guest::new(8);
    let mut clients: Vec<_> = (0..=MAX_CLIENTS).map(|_| guest.host.client()).collect();
    let _open = guest.accept(1);
    assert_eq!(clients[0].read(&mut [0]).unwrap(), 0);
    // The one that was let in last still can say what it wants.
    clients[MAX_CLIENTS].write_all(b"CONNECT 5\n").unwrap();
    assert_eq!(guest.expect(op::REQUEST).0.dst_port, 5);
}

#[test]
fn a_client_whose_line_is_wrong_or_too_long_is_sent_away() {
    let guest = Guest::new(8);
    for line in ["CONNECT x\n", "HELLO 1\n", "\n", "CONNECT 00000000000000000000000000001\n"] {
        let mut client = guest.host.client();
        client.write_all(line.as_bytes()).unwrap();
        let result = client.read(&mut [0]);
        let reset = |error: &std::io::Error| error.kind() == ErrorKind::ConnectionReset;
        assert!(matches!(&result, Ok(0)) || result.as_ref().is_err_and(reset), "{line:?}: {result:?}");
    }
    assert_eq!(guest.connections(), 0);
}

#[test]
fn after_a_transport_reset_connections_are_gone_and_the_guest_knows() {
    let mut guest = Guest::new(8);
    let mut stream = guest.connect(1000, 80);
    guest.device.transport_reset();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    // The guest offers its buffer for events late.
    let at = 0x2f_0000;
    guest.memory.write_slice(&[0xff; 4], GuestAddress(at)).unwrap();
    let head = guest.event.offer(&[(at, 4, true)]);
    guest.event.kick();
    assert_eq!(guest.event.wait_used(), (head, 4));
    assert_eq!(guest.memory.read_obj::<u32>(GuestAddress(at)).unwrap(), 0);
    guest.send_data(packet(op::RW, 1000, 80), b"old");
    assert_eq!(guest.expect(op::RST).0.dst_port, 1000);
    guest.accept(22);
    assert!(guest.event.take_used().is_none(), "it is told once");
}

#[test]
fn a_guest_that_comes_back_is_told_of_a_transport_reset() {
    let mut guest = Guest::new(8);
    let state = guest.device.save();
    guest.device.reset();
    guest.device.restore(&state).unwrap();
    guest.activate(8);
    let at = 0x2f_0000;
    guest.memory.write_slice(&[0xff; 4], GuestAddress(at)).unwrap();
    let head = guest.event.offer(&[(at, 4, true)]);
    guest.event.kick();
    assert_eq!(guest.event.wait_used(), (head, 4));
    assert_eq!(guest.memory.read_obj::<u32>(GuestAddress(at)).unwrap(), 0);
    guest.connect(1000, 80);
}

#[test]
fn a_reset_ends_connections_and_the_device_works_again_after_it() {
    let mut guest = Guest::new(8);
    let (mut client, _) = guest.accept(22);
    let mut stream = guest.connect(1000, 80);
    guest.device.reset();
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert!(guest.device.queue_states().is_empty());
    // A client that comes meanwhile waits for the driver.
    let waiting = guest.host.connect(5);
    guest.activate(8);
    assert_eq!(guest.expect(op::REQUEST).0.dst_port, 5);
    drop(waiting);
    guest.expect(op::RST);
    guest.connect(1000, 80);
    assert_eq!(guest.device.queue_states().len(), 3);
}

#[test]
fn the_driver_reads_its_cid() {
    let guest = Guest::new(0);
    let mut bytes = [0xff; 8];
    guest.device.read_config(0, &mut bytes);
    assert_eq!(u64::from_le_bytes(bytes), u64::from(CID));
    assert_eq!(guest.device.save(), VsockState { cid: CID });
}
