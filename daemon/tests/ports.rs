//! The relay of published ports alone: a listener on loopback stands for the guest.

// Helper functions of tests are tests.
#![allow(clippy::unwrap_used)]

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use catalyst_api::PublishPort;
use catalyst_daemon::ports::Ports;
use catalyst_daemon::store::VmId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

/// The guest's address: loopback is the interface that leads there.
const GUEST: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const GIB: usize = 1 << 30;
/// Bytes that repeat: a prime number of them, so that a piece that is lost or comes twice shows.
const PATTERN: usize = 1_048_583;

struct Published {
    ports: Ports,
    vm: VmId,
    port: u16,
}

impl Published {
    /// A port of a guest that is there.
    async fn new(guest: u16, protocol: &str) -> Self {
        let (ports, vm) = (Ports::new("lo", 0, 16384), VmId::parse("web1").unwrap());
        let wanted: PublishPort = format!("0:{guest}/{protocol}").parse().unwrap();
        let port = ports.publish(&vm, GUEST, &[wanted]).await.unwrap()[0].host_port;
        ports.set_open(&vm, true);
        Self { ports, vm, port }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await.unwrap()
    }
}

async fn guest() -> (TcpListener, u16) {
    let listener = TcpListener::bind((GUEST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

fn pattern() -> Arc<Vec<u8>> {
    let mut state = 88_172_645_463_325_252_u64;
    let byte = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[4]
    };
    Arc::new((0..PATTERN).map(byte).collect())
}

async fn send(to: &mut (impl AsyncWriteExt + Unpin), pattern: &[u8], bytes: usize) {
    let mut left = bytes;
    while left > 0 {
        let piece = &pattern[..left.min(pattern.len())];
        to.write_all(piece).await.unwrap();
        left -= piece.len();
    }
    to.shutdown().await.unwrap();
}

/// Reads to the end, compares, and tells how many bytes there were.
async fn receive(from: &mut (impl AsyncReadExt + Unpin), pattern: &[u8]) -> usize {
    let (mut buffer, mut total) = (vec![0; 256 << 10], 0);
    loop {
        let at = total % pattern.len();
        let most = buffer.len().min(pattern.len() - at);
        let length = from.read(&mut buffer[..most]).await.unwrap();
        if length == 0 {
            return total;
        }
        assert!(
            buffer[..length] == pattern[at..at + length],
            "a byte is wrong between {total} and {length} on"
        );
        total += length;
    }
}

/// Sends `bytes` to whatever is at `address` and has it received by `listener`; seconds it took.
async fn one_way(address: SocketAddr, listener: &TcpListener, pattern: &Arc<Vec<u8>>, bytes: usize) -> f64 {
    let began = Instant::now();
    let mut to = TcpStream::connect(address).await.unwrap();
    let (mut from, _) = listener.accept().await.unwrap();
    let sent = Arc::clone(pattern);
    let sender = tokio::spawn(async move {
        send(&mut to, &sent, bytes).await;
        to
    });
    assert_eq!(receive(&mut from, pattern).await, bytes);
    drop(from);
    sender.await.unwrap();
    began.elapsed().as_secs_f64()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gibibyte_goes_through_without_a_byte_wrong() {
    let (listener, port) = guest().await;
    let published = Published::new(port, "tcp").await;
    let pattern = pattern();
    let direct = one_way(SocketAddr::from((GUEST, port)), &listener, &pattern, GIB).await;
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, published.port));
    let relayed = one_way(at, &listener, &pattern, GIB).await;
    println!(
        "    1 GiB: {:.0} MiB/s direct, {:.0} MiB/s through the port",
        1024.0 / direct,
        1024.0 / relayed
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_directions_are_whole_at_once() {
    let (listener, port) = guest().await;
    let published = Published::new(port, "tcp").await;
    let pattern = pattern();
    let (client, server) = tokio::join!(published.connect(), listener.accept());
    let tasks: Vec<_> = [client, server.unwrap().0]
        .into_iter()
        .map(|stream| {
            let (pattern, bytes) = (Arc::clone(&pattern), GIB / 8);
            tokio::spawn(async move {
                let (mut read, mut write) = stream.into_split();
                let (received, ()) =
                    tokio::join!(receive(&mut read, &pattern), send(&mut write, &pattern, bytes));
                assert_eq!(received, bytes);
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test]
async fn what_does_not_end_well_is_reset_on_both_sides() {
    let (listener, port) = guest().await;
    let published = Published::new(port, "tcp").await;
    let mut byte = [0];
    // The guest resets.
    let (mut client, server) = tokio::join!(published.connect(), listener.accept());
    let mut server = server.unwrap().0;
    client.write_all(b"x").await.unwrap();
    server.read_exact(&mut byte).await.unwrap();
    server.set_zero_linger().unwrap();
    drop(server);
    assert_eq!(client.read(&mut byte).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    // The client does.
    let (client, server) = tokio::join!(published.connect(), listener.accept());
    client.set_zero_linger().unwrap();
    drop(client);
    assert_eq!(server.unwrap().0.read(&mut byte).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    // The guest is gone, then the port.
    for end in [0, 1] {
        let (mut client, server) = tokio::join!(published.connect(), listener.accept());
        if end == 0 {
            published.ports.cut(&published.vm);
        } else {
            published.ports.forget(&published.vm).await;
        }
        assert_eq!(client.read(&mut byte).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert_eq!(server.unwrap().0.read(&mut byte).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    let refused = TcpStream::connect((Ipv4Addr::LOCALHOST, published.port)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
}

#[tokio::test]
async fn more_connections_than_a_port_may_have_are_reset_and_the_others_stay() {
    const MOST: usize = 2048;
    catalyst_daemon::settings::raise_descriptors();
    if catalyst_daemon::settings::descriptors() < 5 * MOST {
        println!("SKIPPED: this process may not have so many descriptors");
        return;
    }
    let (listener, port) = guest().await;
    let published = Published::new(port, "tcp").await;
    let mut held = Vec::new();
    for _ in 0..MOST {
        let (client, server) = tokio::join!(published.connect(), listener.accept());
        held.push((client, server.unwrap().0));
    }
    let mut byte = [0];
    let mut surplus = published.connect().await;
    assert_eq!(surplus.read(&mut byte).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    let (mut client, mut server) = held.pop().unwrap();
    client.write_all(b"x").await.unwrap();
    server.read_exact(&mut byte).await.unwrap();
    drop((client, server));
    // There is room again as soon as the relay has seen their end.
    let began = Instant::now();
    loop {
        let mut client = published.connect().await;
        let server = tokio::time::timeout(Duration::from_millis(200), listener.accept()).await;
        if let Ok(Ok((mut server, _))) = server {
            client.write_all(b"x").await.unwrap();
            server.read_exact(&mut byte).await.unwrap();
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "there is no room");
    }
}

#[tokio::test]
async fn datagrams_find_their_clients_and_many_clients_find_room() {
    let server = UdpSocket::bind((GUEST, 0)).await.unwrap();
    let published = Published::new(server.local_addr().unwrap().port(), "udp").await;
    let echo = tokio::spawn(async move {
        let mut buffer = vec![0; 1 << 16];
        loop {
            let (length, from) = server.recv_from(&mut buffer).await.unwrap();
            server.send_to(&buffer[..length], from).await.unwrap();
        }
    });
    let at = (Ipv4Addr::LOCALHOST, published.port);
    // More than there may be flows: the first make room for the last.
    let mut clients = Vec::new();
    for number in 0..1500_u32 {
        let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        client.connect(at).await.unwrap();
        client.send(&number.to_le_bytes()).await.unwrap();
        let mut answer = [0; 4];
        let came = tokio::time::timeout(Duration::from_secs(20), client.recv(&mut answer)).await;
        assert_eq!((came.unwrap().unwrap(), u32::from_le_bytes(answer)), (4, number));
        clients.push(client);
    }
    // The largest datagram, and an empty one, from the one that lost its flow.
    let client = &clients[0];
    for length in [65_507, 0] {
        let sent = vec![7; length];
        client.send(&sent).await.unwrap();
        let mut answer = vec![0; 1 << 16];
        let came = tokio::time::timeout(Duration::from_secs(20), client.recv(&mut answer)).await;
        assert_eq!(answer[..came.unwrap().unwrap()], sent);
    }
    echo.abort();
}

#[tokio::test]
async fn nobody_but_the_guest_can_answer_a_client() {
    let server = UdpSocket::bind((GUEST, 0)).await.unwrap();
    let published = Published::new(server.local_addr().unwrap().port(), "udp").await;
    let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    client.connect((Ipv4Addr::LOCALHOST, published.port)).await.unwrap();
    client.send(b"who is there?").await.unwrap();
    let mut buffer = [0; 64];
    let (_, flow) = server.recv_from(&mut buffer).await.unwrap();
    let stranger = UdpSocket::bind((GUEST, 0)).await.unwrap();
    stranger.send_to(b"not me", (Ipv4Addr::LOCALHOST, flow.port())).await.unwrap();
    stranger.send_to(b"not me", flow).await.unwrap();
    server.send_to(b"me", flow).await.unwrap();
    let length = client.recv(&mut buffer).await.unwrap();
    assert_eq!(&buffer[..length], b"me");
}
