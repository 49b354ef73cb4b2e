//! A published port of a container whose Docker daemon has a network namespace of its own (`catalyst docker up`).
//!
//! Docker's daemon runs this in place of its `docker-proxy`, with the same arguments, for each port (`userland-proxy-path` of its
//! settings). It listens in the host's network namespace, where users look for the port, and in that of Docker's daemon, which
//! pulls from registries on loopback; from both it passes on to the container's address. It ends when Docker's daemon says so.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::sockopt::{Ipv6V6Only, ReuseAddr};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket,
};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;

use crate::failure::{Failure, Outcome, Tried, chain, said};

/// Names the host's network namespace.
const HOST_NET: &str = "CATALYST_OCI_HOST_NET";
/// Where Docker's daemon hears how it went: `0`, or `1` and why not, each on a line.
const TOLD: i32 = 3;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;
/// A client that sends datagrams has a socket of its own until it has been silent for so long.
const IDLE: Duration = Duration::from_secs(90);
/// So many of them at once; datagrams of others are lost, as in networks.
const FLOWS: usize = 1024;
/// No datagram is larger.
const LARGEST: usize = 1 << 16;
/// How long to leave a listener alone that cannot accept, for want of descriptors say: nothing tells when it can again.
const PAUSE: Duration = Duration::from_millis(200);

/// What is published where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Port {
    udp: bool,
    host: SocketAddr,
    container: SocketAddr,
}

/// Serves the port until it is killed.
pub fn run() -> i32 {
    // SAFETY: Docker's daemon opened it for this, and nobody else here uses it.
    let told = File::from(unsafe { OwnedFd::from_raw_fd(TOLD) });
    match serve(told) {
        Ok(()) => 0,
        Err(failure) => {
            eprintln!("{}", chain(&failure));
            1
        }
    }
}

fn serve(mut told: File) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.tried(|| "serve a port".to_owned())?;
    let listening = Port::parse(std::env::args().skip(1)).and_then(|port| Ok((port, listeners(port)?)));
    let answer = match &listening {
        Ok(_) => "0\n".to_owned(),
        Err(failure) => format!("1\n{}", chain(failure)),
    };
    // It may have given up meanwhile, and then ends this process too.
    let _ = told.write_all(answer.as_bytes());
    drop(told);
    let (port, sockets) = listening?;
    runtime.block_on(async {
        let mut serving = JoinSet::new();
        for socket in sockets {
            if port.udp {
                let socket = UdpSocket::from_std(socket.into()).tried(|| "serve a port".to_owned())?;
                serving.spawn(datagrams(Arc::new(socket), port.container));
            } else {
                let listener = TcpListener::from_std(socket.into()).tried(|| "serve a port".to_owned())?;
                serving.spawn(connections(listener, port.container));
            }
        }
        serving.join_all().await;
        Ok(())
    })
}

impl Port {
    /// Go's flags, as `docker-proxy` takes them.
    fn parse(mut words: impl Iterator<Item = String>) -> Outcome<Self> {
        let mut values = HashMap::new();
        while let Some(word) = words.next() {
            let name = word.trim_start_matches('-').to_owned();
            let (name, value) = match name.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (name, words.next()),
            };
            values.insert(name, value.unwrap_or_default());
        }
        let end = |of: &str| -> Outcome<SocketAddr> {
            let value = |what: &str| values.get(&format!("{of}-{what}")).map_or("", String::as_str);
            match (value("ip").parse::<IpAddr>(), value("port").parse()) {
                (Ok(ip), Ok(port)) => Ok(SocketAddr::new(ip, port)),
                _ => {
                    said(format!("a port is published by -{of}-ip and -{of}-port, which are not understood"))
                }
            }
        };
        let udp = match values.get("proto").map(String::as_str) {
            Some("tcp") => false,
            Some("udp") => true,
            other => return said(format!("ports of '{}' cannot be published", other.unwrap_or_default())),
        };
        Ok(Self { udp, host: end("host")?, container: end("container")? })
    }
}

/// Sockets in both namespaces; in the own one where it has the address.
fn listeners(port: Port) -> Outcome<Vec<OwnedFd>> {
    let path = std::env::var_os(HOST_NET).unwrap_or_default();
    let host = File::open(&path).tried(|| "open the host's network namespace".to_owned())?;
    // A thread of its own, which ends there.
    let in_host = std::thread::spawn(move || {
        setns(host, CloneFlags::CLONE_NEWNET)?;
        open(port)
    });
    let in_host = in_host.join().unwrap_or_else(|_| Err(io::Error::other("its thread failed")));
    let missing = |error: &io::Error| {
        let code = error.raw_os_error();
        code == Some(libc::EAFNOSUPPORT) || (port.host.is_ipv6() && code == Some(libc::EADDRNOTAVAIL))
    };
    let mut sockets = Vec::new();
    match in_host {
        Ok(socket) => sockets.push(socket),
        // A host without IPv6 has no port of it.
        Err(error) if missing(&error) => {}
        Err(source) => return Err(Failure::System { what: format!("listen at {}", port.host), source }),
    }
    // Docker's daemon itself looks there for registries that are containers of its own.
    sockets.extend(open(port).ok());
    Ok(sockets)
}

fn open(port: Port) -> io::Result<OwnedFd> {
    let family = if port.host.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let kind = if port.udp { SockType::Datagram } else { SockType::Stream };
    let fd = socket(family, kind, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    if port.host.is_ipv6() {
        // Docker's daemon asks for IPv4 by itself.
        setsockopt(&fd, Ipv6V6Only, &true)?;
    }
    if !port.udp {
        setsockopt(&fd, ReuseAddr, &true)?;
    }
    bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &SockaddrStorage::from(port.host))?;
    if !port.udp {
        listen(&fd, Backlog::new(BACKLOG)?)?;
    }
    Ok(fd)
}

async fn connections(listener: TcpListener, container: SocketAddr) {
    loop {
        match listener.accept().await {
            Ok((client, _)) => drop(tokio::spawn(relay(client, container))),
            // That client is gone already (accept(2)).
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// What does not end well is reset: a reader takes a plain end for an answer that is whole.
async fn relay(mut client: TcpStream, container: SocketAddr) {
    let passed = async {
        client.set_nodelay(true)?;
        let mut inside = TcpStream::connect(container).await?;
        inside.set_nodelay(true)?;
        tokio::io::copy_bidirectional(&mut client, &mut inside).await
    };
    if passed.await.is_err() {
        // Nothing is left to do where the socket does not take it.
        let _ = client.set_zero_linger();
    }
}

type Flows = Arc<Mutex<HashMap<SocketAddr, Arc<UdpSocket>>>>;

async fn datagrams(socket: Arc<UdpSocket>, container: SocketAddr) {
    let flows = Flows::default();
    let mut buffer = vec![0; LARGEST];
    loop {
        // An error tells that an answer was not wanted any more.
        let Ok((length, client)) = socket.recv_from(&mut buffer).await else { continue };
        let known = flows.lock().unwrap_or_else(PoisonError::into_inner).get(&client).cloned();
        let flow = match known {
            Some(flow) => Some(flow),
            None => open_flow(&socket, &flows, client, container).await.ok().flatten(),
        };
        if let Some(flow) = flow {
            // One that the container does not take is lost, as in networks.
            let _ = flow.send(&buffer[..length]).await;
        }
    }
}

async fn open_flow(
    socket: &Arc<UdpSocket>,
    flows: &Flows,
    client: SocketAddr,
    container: SocketAddr,
) -> io::Result<Option<Arc<UdpSocket>>> {
    if flows.lock().unwrap_or_else(PoisonError::into_inner).len() >= FLOWS {
        return Ok(None);
    }
    let any: SocketAddr = if container.is_ipv4() { ([0_u8; 4], 0).into() } else { ([0_u16; 8], 0).into() };
    let flow = Arc::new(UdpSocket::bind(any).await?);
    flow.connect(container).await?;
    flows.lock().unwrap_or_else(PoisonError::into_inner).insert(client, Arc::clone(&flow));
    let (back, from, flows) = (Arc::clone(socket), Arc::clone(&flow), Arc::clone(flows));
    tokio::spawn(async move {
        let mut buffer = vec![0; LARGEST];
        while let Ok(answer) = tokio::time::timeout(IDLE, from.recv(&mut buffer)).await {
            // The container may say that nobody is there (ICMP), and listen later.
            if let Ok(length) = answer {
                let _ = back.send_to(&buffer[..length], client).await;
            }
        }
        flows.lock().unwrap_or_else(PoisonError::into_inner).remove(&client);
    });
    Ok(Some(flow))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Outcome<Port> {
        Port::parse(line.split(' ').map(str::to_owned))
    }

    #[test]
    fn what_docker_asks_for_is_understood() {
        let line = "-proto tcp -host-ip 0.0.0.0 -host-port 8080 -container-ip 172.17.0.2 -container-port 80";
        let port = parsed(line).unwrap();
        assert_eq!(port.host, "0.0.0.0:8080".parse().unwrap());
        assert_eq!((port.udp, port.container), (false, "172.17.0.2:80".parse().unwrap()));
        let line = "-proto=udp -host-ip=:: -host-port=53 -container-ip=172.17.0.2 -container-port=53";
        assert!(parsed(line).unwrap().udp);
        for bad in ["", "-proto sctp -host-ip 0.0.0.0", "-proto tcp -host-ip x -host-port 1", "-proto"] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn connections_are_passed_on_both_ways_and_refusals_are_resets() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let inside = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let front = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = front.local_addr().unwrap();
        let served = tokio::spawn(connections(front, inside.local_addr().unwrap()));
        let mut client = TcpStream::connect(at).await.unwrap();
        client.write_all(b"ping").await.unwrap();
        client.shutdown().await.unwrap();
        let (mut guest, _) = inside.accept().await.unwrap();
        let mut heard = String::new();
        guest.read_to_string(&mut heard).await.unwrap();
        guest.write_all(b"pong").await.unwrap();
        drop(guest);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!((heard.as_str(), answer.as_str()), ("ping", "pong"));
        drop(inside);
        let mut late = TcpStream::connect(at).await.unwrap();
        let error = late.read(&mut [0; 1]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        served.abort();
    }

    #[tokio::test]
    async fn datagrams_find_their_way_back() {
        let inside = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let front = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let at = front.local_addr().unwrap();
        let served = tokio::spawn(datagrams(Arc::new(front), inside.local_addr().unwrap()));
        let mut buffer = [0; 16];
        for word in [&b"one"[..], b"two"] {
            let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            client.send_to(word, at).await.unwrap();
            let (length, from) = inside.recv_from(&mut buffer).await.unwrap();
            inside.send_to(&buffer[..length], from).await.unwrap();
            let (length, _) = client.recv_from(&mut buffer).await.unwrap();
            assert_eq!(&buffer[..length], word);
        }
        served.abort();
    }
}
