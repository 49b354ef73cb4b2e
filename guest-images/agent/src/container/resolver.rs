//! Names that programs in the container ask for, at 127.0.0.11 as in Docker's networks: the host answers them.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use catalyst_agent_protocol::container::MAX_QUERY;
use catalyst_agent_protocol::{Content, Control};

/// Where it is asked.
pub const ADDRESS: ([u8; 4], u16) = ([127, 0, 0, 11], 53);
/// How long an answer may take.
const ANSWERED_WITHIN: Duration = Duration::from_secs(10);
/// Questions that wait for an answer at once.
const MOST_WAITING: usize = 256;
/// Connections at once.
const MOST_CONNECTIONS: usize = 32;
/// A DNS message's header (RFC 1035, section 4.1.1); what is shorter is none.
const HEADER: usize = 12;

/// Says something to the host; false if there is none.
type Tell = Box<dyn Fn(&Control) -> bool + Send + Sync>;

/// Passes questions on and answers back.
pub struct Resolver {
    tell: Tell,
    udp: UdpSocket,
    state: Mutex<State>,
    connections: AtomicUsize,
}

#[derive(Default)]
struct State {
    last: u32,
    waiting: HashMap<u32, Asker>,
}

struct Asker {
    since: Instant,
    way: Way,
}

enum Way {
    Udp(SocketAddr),
    Tcp(SyncSender<Vec<u8>>),
}

impl std::fmt::Debug for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resolver").finish_non_exhaustive()
    }
}

impl Resolver {
    /// Begins to listen.
    pub fn begin(at: SocketAddr, tell: Tell) -> io::Result<Arc<Self>> {
        let udp = UdpSocket::bind(at)?;
        let tcp = TcpListener::bind(udp.local_addr()?)?;
        let (state, connections) = (Mutex::default(), AtomicUsize::new(0));
        let resolver = Arc::new(Self { tell, udp, state, connections });
        let of_udp = Arc::clone(&resolver);
        thread::spawn(move || of_udp.serve_udp());
        let of_tcp = Arc::clone(&resolver);
        thread::spawn(move || of_tcp.serve_tcp(&tcp));
        Ok(resolver)
    }

    /// The host's answer; one that nobody waits for any more goes nowhere.
    pub fn answer(&self, query: u32, message: &[u8]) {
        let Some(asker) = self.lock().waiting.remove(&query) else { return };
        match asker.way {
            // Who asked may be gone.
            Way::Udp(to) => drop(self.udp.send_to(message, to)),
            Way::Tcp(to) => drop(to.try_send(message.to_vec())),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes a question on; false if too many wait, or nobody is there.
    fn ask(&self, message: &[u8], way: Way) -> bool {
        let tcp = matches!(way, Way::Tcp(_));
        let mut state = self.lock();
        state.waiting.retain(|_, asker| asker.since.elapsed() < ANSWERED_WITHIN);
        if state.waiting.len() >= MOST_WAITING {
            return false;
        }
        state.last = state.last.wrapping_add(1);
        let query = state.last;
        state.waiting.insert(query, Asker { since: Instant::now(), way });
        drop(state);
        let told = (self.tell)(&Control::Resolve { query, tcp, message: Content(message.to_vec()) });
        if !told {
            self.lock().waiting.remove(&query);
        }
        told
    }

    fn serve_udp(&self) {
        let mut buffer = vec![0; MAX_QUERY];
        loop {
            match self.udp.recv_from(&mut buffer) {
                Ok((count, from)) if count >= HEADER => {
                    self.ask(&buffer[..count], Way::Udp(from));
                }
                Ok(_) => {}
                // Word of an answer that did not arrive.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    eprintln!("catalyst-agent: names are not asked for any more: {error}");
                    return;
                }
            }
        }
    }

    fn serve_tcp(self: &Arc<Self>, listener: &TcpListener) {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { continue };
            if self.connections.fetch_add(1, Ordering::Relaxed) >= MOST_CONNECTIONS {
                self.connections.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let resolver = Arc::clone(self);
            thread::spawn(move || {
                // It ends when the other side does, or asks nothing that can be answered.
                let _ = resolver.converse(stream);
                resolver.connections.fetch_sub(1, Ordering::Relaxed);
            });
        }
    }

    /// One question after another, each with its length before it (RFC 1035, section 4.2.2).
    fn converse(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_read_timeout(Some(ANSWERED_WITHIN))?;
        stream.set_write_timeout(Some(ANSWERED_WITHIN))?;
        loop {
            let mut length = [0; 2];
            stream.read_exact(&mut length)?;
            let length = usize::from(u16::from_be_bytes(length));
            if !(HEADER..=MAX_QUERY).contains(&length) {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let mut message = vec![0; length];
            stream.read_exact(&mut message)?;
            let (to, answer) = sync_channel(1);
            if !self.ask(&message, Way::Tcp(to)) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let answer = answer.recv_timeout(ANSWERED_WITHIN).map_err(io::Error::other)?;
            let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
            stream.write_all(&[&length.to_be_bytes()[..], &answer].concat())?;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    /// Number of a question, whether it came by TCP, and what it was.
    type Heard = (u32, bool, Vec<u8>);

    fn resolver() -> (Arc<Resolver>, SocketAddr, Receiver<Heard>) {
        let (told, heard) = channel();
        let tell = move |control: &Control| match control {
            Control::Resolve { query, tcp, message } => told.send((*query, *tcp, message.0.clone())).is_ok(),
            _ => false,
        };
        let resolver = Resolver::begin(([127, 0, 0, 1], 0).into(), Box::new(tell)).unwrap();
        let at = resolver.udp.local_addr().unwrap();
        (resolver, at, heard)
    }

    #[test]
    fn answers_come_to_those_who_asked() {
        let (resolver, at, heard) = resolver();
        let askers = [UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap()];
        let mut queries = Vec::new();
        for (number, asker) in askers.iter().enumerate() {
            asker.set_read_timeout(Some(ANSWERED_WITHIN)).unwrap();
            asker.send_to(b"short", at).unwrap();
            asker.send_to(&[u8::try_from(number).unwrap(); 20], at).unwrap();
            let (query, tcp, message) = heard.recv_timeout(ANSWERED_WITHIN).unwrap();
            assert_eq!((tcp, message.len()), (false, 20), "what is no message is not passed on");
            queries.push((query, message));
        }
        // The second is answered first, and the first once.
        resolver.answer(queries[1].0, &queries[1].1);
        resolver.answer(queries[0].0, &queries[0].1);
        resolver.answer(queries[0].0, b"again");
        for (number, asker) in askers.iter().enumerate() {
            let mut buffer = [0; 100];
            let count = asker.recv(&mut buffer).unwrap();
            assert_eq!(buffer[..count], [u8::try_from(number).unwrap(); 20]);
        }
    }

    #[test]
    fn a_connection_is_answered_as_often_as_it_asks() {
        let (resolver, at, heard) = resolver();
        let mut stream = TcpStream::connect(at).unwrap();
        stream.set_read_timeout(Some(ANSWERED_WITHIN)).unwrap();
        for size in [12_u16, 3000] {
            stream.write_all(&size.to_be_bytes()).unwrap();
            stream.write_all(&vec![7; size.into()]).unwrap();
            let (query, tcp, message) = heard.recv_timeout(ANSWERED_WITHIN).unwrap();
            assert_eq!((tcp, message.len()), (true, usize::from(size)));
            resolver.answer(query, b"the answer to it");
            let mut answer = [0; 18];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"\0\x10the answer to it");
        }
        stream.write_all(&[0, 5]).unwrap();
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0, "what cannot be a message ends it");
    }

    #[test]
    fn only_so_many_questions_wait() {
        let (resolver, _, heard) = resolver();
        let nobody: SocketAddr = ([127, 0, 0, 1], 9).into();
        let asked = (0..MOST_WAITING + 5).filter(|_| resolver.ask(&[0; 12], Way::Udp(nobody))).count();
        assert_eq!(asked, MOST_WAITING);
        assert_eq!(heard.try_iter().count(), MOST_WAITING);
    }
}
