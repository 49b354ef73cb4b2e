//! Names that programs of the container ask for: passed to Docker's resolver in the container's network namespace.
//!
//! Where that one has no answer although the network leads out, the host's name servers are asked from the host's namespace: Docker's
//! resolver may be meant to ask servers that are reached from there alone.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use catalyst_agent_link::{AgentLink, Notice};
use catalyst_agent_protocol::container::MAX_QUERY;
use nix::sched::{CloneFlags, setns};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::memory::Short;

/// Docker's resolver.
const INSIDE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 11)), 53);
/// Questions at once; what is more is asked again by whoever asked.
const AT_ONCE: usize = 64;
/// How long an answer may take; resolvers ask again after 5 s.
const LIMIT: Duration = Duration::from_secs(10);
/// The same for one of the host's name servers.
const OUTSIDE_LIMIT: Duration = Duration::from_secs(3);
/// Header of a message (RFC 1035, section 4.1.1).
const HEADER: usize = 12;
/// Longest message by UDP.
const LONGEST_UDP: usize = 65_535;

/// The host's name servers, from the host's namespace.
#[derive(Debug)]
pub struct Outside {
    namespace: File,
    servers: Vec<IpAddr>,
}

impl Outside {
    /// Of this thread's network namespace.
    pub fn here() -> io::Result<Self> {
        let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        Ok(Self { namespace: File::open("/proc/thread-self/ns/net")?, servers: servers(&text) })
    }

    async fn ask(self: Arc<Self>, message: Vec<u8>) -> Option<Vec<u8>> {
        let (tell, told) = oneshot::channel();
        // A thread of its own, since a thread is in one namespace.
        let asking = move || {
            let answer = self.ask_here(&message);
            let _ = tell.send(answer);
        };
        std::thread::Builder::new().name("names".to_owned()).stack_size(256 * 1024).spawn(asking).ok()?;
        told.await.ok()?
    }

    fn ask_here(&self, message: &[u8]) -> Option<Vec<u8>> {
        setns(&self.namespace, CloneFlags::CLONE_NEWNET).ok()?;
        self.servers.iter().find_map(|server| ask_udp_at((*server, 53).into(), message).ok())
    }
}

fn servers(text: &str) -> Vec<IpAddr> {
    let named = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse().ok()).flatten()
    };
    text.lines().filter_map(named).take(3).collect()
}

fn ask_udp_at(server: SocketAddr, message: &[u8]) -> io::Result<Vec<u8>> {
    let own: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(own)?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(OUTSIDE_LIMIT))?;
    socket.send(message)?;
    let mut answer = vec![0; LONGEST_UDP];
    loop {
        let length = socket.recv(&mut answer)?;
        if answers(message, &answer[..length]) {
            answer.truncate(length);
            return Ok(answer);
        }
    }
}

/// Hears what the guest says until it is gone.
pub async fn serve(
    link: AgentLink,
    mut notices: mpsc::Receiver<Notice>,
    outside: Arc<Outside>,
    leads_out: Arc<AtomicBool>,
    short: Arc<Short>,
) {
    let at_once = Arc::new(Semaphore::new(AT_ONCE));
    while let Some(notice) = notices.recv().await {
        let (query, tcp, message) = match notice {
            Notice::OutOfMemory(container) => {
                short.note(container);
                continue;
            }
            Notice::Resolve { query, tcp, message } => (query, tcp, message),
        };
        let Ok(permit) = Arc::clone(&at_once).try_acquire_owned() else { continue };
        let (link, outside) = (link.clone(), Arc::clone(&outside));
        let leads_out = leads_out.load(Ordering::Relaxed);
        tokio::spawn(async move {
            if let Some(answer) = resolve(&message, tcp, leads_out.then_some(outside)).await {
                // The guest may be gone, and with it the question.
                let _ = link.resolved(query, answer).await;
            }
            drop(permit);
        });
    }
}

async fn resolve(message: &[u8], tcp: bool, outside: Option<Arc<Outside>>) -> Option<Vec<u8>> {
    if message.len() < HEADER {
        return None;
    }
    let asked = async { if tcp { ask_tcp(message).await } else { ask_udp(message).await } };
    let inside = tokio::time::timeout(LIMIT, asked).await.ok().and_then(Result::ok);
    let inside = inside.filter(|answer| answer.len() <= MAX_QUERY && answers(message, answer));
    let outside = outside.filter(|_| is_external(message) && inside.as_deref().is_none_or(has_failed));
    if let Some(outside) = outside
        && let Some(answer) = outside.ask(message.to_vec()).await
        && answer.len() <= MAX_QUERY
    {
        return Some(answer);
    }
    inside
}

async fn ask_udp(message: &[u8]) -> io::Result<Vec<u8>> {
    let socket = tokio::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    socket.connect(INSIDE).await?;
    socket.send(message).await?;
    let mut answer = vec![0; LONGEST_UDP];
    loop {
        let length = socket.recv(&mut answer).await?;
        if answers(message, &answer[..length]) {
            answer.truncate(length);
            return Ok(answer);
        }
    }
}

async fn ask_tcp(message: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let mut stream = tokio::net::TcpStream::connect(INSIDE).await?;
    stream.write_all(&[&length.to_be_bytes()[..], message].concat()).await?;
    let mut answer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

/// Whether it is an answer, to that question: the same ID, and the bit QR.
fn answers(message: &[u8], answer: &[u8]) -> bool {
    answer.len() >= HEADER && answer[..2] == message[..2] && answer[2] & 0x80 != 0
}

/// RCODE 2: the server could not.
fn has_failed(answer: &[u8]) -> bool {
    answer.get(3).is_some_and(|byte| byte & 0x0f == 2)
}

/// Whether the name asked for has more than one part: Docker's own names have one.
fn is_external(message: &[u8]) -> bool {
    let first = message.get(HEADER).copied().map_or(0, usize::from);
    (1..=63).contains(&first) && message.get(HEADER + 1 + first).is_some_and(|next| (1..=63).contains(next))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(name: &[&str]) -> Vec<u8> {
        let mut message = vec![7, 9, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for part in name {
            message.push(u8::try_from(part.len()).unwrap());
            message.extend(part.as_bytes());
        }
        message.extend([0, 0, 1, 0, 1]);
        message
    }

    #[test]
    fn names_with_a_dot_are_external() {
        assert!(is_external(&question(&["deb", "debian", "org"])));
        for name in [&["web"][..], &[]] {
            assert!(!is_external(&question(name)), "{name:?}");
        }
        assert!(!is_external(&[0; 12]) && !is_external(&[0; 3]));
    }

    #[test]
    fn an_answer_is_to_the_question() {
        let asked = question(&["a"]);
        let mut answer = asked.clone();
        assert!(!answers(&asked, &answer));
        answer[2] |= 0x80;
        assert!(answers(&asked, &answer) && !has_failed(&answer));
        answer[3] = 0x82;
        assert!(has_failed(&answer));
        answer[0] = 8;
        assert!(!answers(&asked, &answer) && !answers(&asked, &answer[..5]));
    }

    #[test]
    fn a_server_is_asked_and_what_is_no_answer_is_passed_over() {
        let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = server.local_addr().unwrap();
        let serving = std::thread::spawn(move || {
            let mut bytes = [0; 512];
            let (length, from) = server.recv_from(&mut bytes).unwrap();
            server.send_to(b"noise", from).unwrap();
            bytes[2] |= 0x80;
            server.send_to(&bytes[..length], from).unwrap();
        });
        let asked = question(&["a", "b"]);
        assert!(answers(&asked, &ask_udp_at(address, &asked).unwrap()));
        serving.join().unwrap();
    }

    #[test]
    fn the_host_s_servers_are_read() {
        let found = servers("# nameserver 1.1.1.1\nnameserver 10.0.0.1\nnameserver fd00::1\nnameserver x\n");
        assert_eq!(found, ["10.0.0.1".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
    }
}
