//! Where connections begin on the host: clients of the listener, and whoever is upstream.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::MAX_CLIENTS;
use super::links::watched;
use crate::reactor::Registration;

/// Set in the tokens of clients' sockets.
pub const CLIENT_TOKEN: u32 = 1 << 30;
/// The longest line: `CONNECT 4294967295\r\n`.
const MAX_LINE: usize = 20;
/// Clients that are let in at once, before others get their turn.
const ACCEPT_BATCH: usize = 16;

/// The host's side of a vsock.
#[derive(Debug)]
pub struct Host {
    listener: Option<UnixListener>,
    /// Given up when there are no descriptors left, so that a client can be sent away rather than wait for ever.
    spare: Option<UnixListener>,
    upstream: Option<UnixDatagram>,
    clients: VecDeque<(u32, UnixStream)>,
    last_client: u32,
}

impl Host {
    /// Neither socket will block from now on.
    pub fn new(listener: Option<UnixListener>, upstream: Option<OwnedFd>) -> Self {
        // The calls that they are used with bear no other kind; what speaks against it here shows there.
        let upstream = upstream.map(UnixDatagram::from);
        let _ = upstream.as_ref().map(|upstream| upstream.set_nonblocking(true));
        let _ = listener.as_ref().map(|listener| listener.set_nonblocking(true));
        let spare = listener.as_ref().and_then(|listener| listener.try_clone().ok());
        Self { listener, spare, upstream, clients: VecDeque::new(), last_client: 0 }
    }

    /// The listener's descriptor.
    pub fn listener_fd(&self) -> Option<RawFd> {
        self.listener.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Sends all clients away that have not said what they want.
    pub fn drop_clients(&mut self) {
        self.clients.clear();
    }

    /// Lets clients in. An error says that none can be let in any more.
    pub fn accept(&mut self, registration: &Registration) -> io::Result<()> {
        for _ in 0..ACCEPT_BATCH {
            let Some(listener) = &self.listener else { return Ok(()) };
            match listener.accept() {
                Ok((client, _)) => self.let_in(client, registration),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                    return self.send_away(error);
                }
                // Others are of the client that has gone meanwhile.
                Err(error)
                    if matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn let_in(&mut self, client: UnixStream, registration: &Registration) {
        self.last_client = (self.last_client + 1) % CLIENT_TOKEN;
        let token = CLIENT_TOKEN | self.last_client;
        let good = client
            .set_nonblocking(true)
            .and_then(|()| registration.watch(client.as_raw_fd(), token, watched(false)));
        if good.is_err() {
            return;
        }
        if self.clients.len() == MAX_CLIENTS {
            self.clients.pop_front();
        }
        self.clients.push_back((token, client));
    }

    /// With no descriptor left for it the client would be accepted again and again.
    fn send_away(&mut self, error: io::Error) -> io::Result<()> {
        let Some(listener) = &self.listener else { return Ok(()) };
        if self.spare.take().is_none() {
            return Err(error);
        }
        drop(listener.accept());
        self.spare = listener.try_clone().ok();
        Ok(())
    }

    /// A client has written or gone. Returns the port that it wants with its stream, once its line is whole.
    pub fn client(&mut self, token: u32, events: EventSet) -> Option<(u32, UnixStream)> {
        let at = self.clients.iter().position(|(own, _)| *own == token)?;
        let line = read_line(&self.clients[at].1);
        let waits = matches!(line, Ok(None)) && !events.contains(EventSet::READ_HANG_UP);
        if waits {
            return None;
        }
        let (_, stream) = self.clients.remove(at)?;
        let port = parse(&line.ok()??)?;
        Some((port, stream))
    }

    /// Offers a connection from the guest to whoever is upstream, and returns our end of it.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let upstream = self.upstream.as_ref().ok_or(ErrorKind::ConnectionRefused)?;
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        upstream.send_with_fd(&port.to_le_bytes()[..], theirs.as_raw_fd())?;
        Ok(ours)
    }
}

/// Reads a line and nothing beyond it: what follows is the connection's. None while it is not whole.
fn read_line(mut stream: &UnixStream) -> io::Result<Option<Vec<u8>>> {
    let mut line = [0; MAX_LINE];
    let seen = match peek(stream, &mut line) {
        Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
        Ok(seen) => seen,
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
        Err(error) => return Err(error),
    };
    match line[..seen].iter().position(|&byte| byte == b'\n') {
        Some(end) => {
            stream.read_exact(&mut line[..=end])?;
            Ok(Some(line[..end].to_vec()))
        }
        None if seen == MAX_LINE => Err(ErrorKind::InvalidData.into()),
        None => Ok(None),
    }
}

fn peek(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is ours and as long as is said; the descriptor is open as long as `stream` is borrowed.
    let count =
        unsafe { libc::recv(stream.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_PEEK) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

fn parse(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let port = line.strip_suffix('\r').unwrap_or(line).strip_prefix("CONNECT ")?;
    // `parse` alone would take a sign as well.
    if port.bytes().all(|byte| byte.is_ascii_digit()) { port.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn a_line_names_a_port_or_nothing() {
        assert_eq!(parse(b"CONNECT 4294967295"), Some(u32::MAX));
        assert_eq!(parse(b"CONNECT 22\r"), Some(22));
        let bad: [&[u8]; 7] = [
            b"",
            b"CONNECT",
            b"CONNECT ",
            b"CONNECT +1",
            b"CONNECT 4294967296",
            b"connect 1",
            b"CONNECT \xff",
        ];
        for line in bad {
            assert_eq!(parse(line), None);
        }
    }
}
