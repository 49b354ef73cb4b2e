//! One listener over both loopback addresses and the Unix socket, which lets in only whom the policy admits.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::peer::{Peer, PeerError, Policy};
use super::refusal;
use super::unix_socket::UnixSocket;

/// Refused connections that get an answer at one time; more are closed without one.
const ANSWERED_REFUSALS: usize = 16;
/// The longest that a refused connection is kept.
const REFUSAL_TIME: Duration = Duration::from_secs(1);
/// The pause after an error that only time can mend (no file descriptors left).
const PAUSE: Duration = Duration::from_millis(500);

/// Accepts connections of the owner and of root on all of the daemon's addresses.
#[derive(Debug)]
pub struct LocalListener {
    sockets: Vec<Socket>,
    /// Which socket is asked first; it moves on, so that a busy one does not starve the others.
    next: usize,
    policy: Policy,
    answers: Arc<Semaphore>,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixSocket),
}

/// An accepted connection.
#[derive(Debug)]
pub enum LocalStream {
    /// By a loopback address.
    Tcp(TcpStream),
    /// By the Unix socket.
    Unix(UnixStream),
}

impl LocalListener {
    pub(super) fn new(tcp: Vec<TcpListener>, unix: Option<UnixSocket>, policy: Policy) -> Self {
        let sockets = tcp.into_iter().map(Socket::Tcp).chain(unix.map(Socket::Unix)).collect();
        Self { sockets, next: 0, policy, answers: Arc::new(Semaphore::new(ANSWERED_REFUSALS)) }
    }

    /// Whom it lets in; the guard before the handlers wants to know.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// The TCP addresses, with the port that the kernel chose where 0 was asked for.
    pub fn tcp_addresses(&self) -> Vec<SocketAddr> {
        let address = |socket: &Socket| match socket {
            Socket::Tcp(listener) => listener.local_addr().ok(),
            Socket::Unix(_) => None,
        };
        self.sockets.iter().filter_map(address).collect()
    }

    fn poll_accept(&mut self, context: &mut Context<'_>) -> Poll<io::Result<LocalStream>> {
        let count = self.sockets.len();
        for offset in 0..count {
            let index = (self.next + offset) % count;
            let accepted = match &self.sockets[index] {
                Socket::Tcp(listener) => {
                    listener.poll_accept(context).map_ok(|(tcp, _)| LocalStream::Tcp(tcp))
                }
                Socket::Unix(socket) => {
                    let listener: &UnixListener = socket.listener();
                    listener.poll_accept(context).map_ok(|(unix, _)| LocalStream::Unix(unix))
                }
            };
            if accepted.is_ready() {
                self.next = index + 1;
                return accepted;
            }
        }
        Poll::Pending
    }

    /// Answers a refused connection in the background, if not too many are being answered already.
    fn refuse(&self, stream: LocalStream, reason: PeerError) {
        tracing::debug!(%reason, "connection refused");
        let Ok(permit) = Arc::clone(&self.answers).try_acquire_owned() else { return };
        tokio::spawn(async move {
            // The other side may go, or stay silent: it is refused either way.
            let _ = tokio::time::timeout(REFUSAL_TIME, refusal::refuse(stream, &reason)).await;
            drop(permit);
        });
    }
}

impl Listener for LocalListener {
    type Io = LocalStream;
    type Addr = Peer;

    async fn accept(&mut self) -> (LocalStream, Peer) {
        loop {
            match poll_fn(|context| self.poll_accept(context)).await {
                Ok(stream) => match stream.peer(self.policy) {
                    Ok(peer) => return (stream, peer),
                    Err(reason) => self.refuse(stream, reason),
                },
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot accept connections");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// There is none: a `Peer` is the other end. See [`LocalListener::tcp_addresses`].
    fn local_addr(&self) -> io::Result<Peer> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "the daemon listens on several addresses"))
    }
}

/// Errors of a connection that was gone before it was accepted (accept(2)).
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset
    )
}

impl LocalStream {
    fn peer(&self, policy: Policy) -> Result<Peer, PeerError> {
        match self {
            Self::Tcp(stream) => {
                // Answers are small and waited for. Where the option fails they are slower, no more.
                let _ = stream.set_nodelay(true);
                // Without a peer's address the connection is gone.
                let (Ok(local), Ok(remote)) = (stream.local_addr(), stream.peer_addr()) else {
                    return Err(PeerError::Closed);
                };
                policy.accept_tcp(local, remote)
            }
            Self::Unix(stream) => {
                let peer = stream.peer_cred().map_err(|_| PeerError::Closed)?;
                let pid = peer.pid().and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0);
                policy.accept_unix(peer.uid(), pid)
            }
        }
    }
}

impl Connected<IncomingStream<'_, LocalListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, LocalListener>) -> Self {
        *stream.remote_addr()
    }
}

/// Calls the same method on whichever stream it is.
macro_rules! either {
    ($self:expr, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            LocalStream::Tcp(stream) => {
                let $stream = Pin::new(stream);
                $call
            }
            LocalStream::Unix(stream) => {
                let $stream = Pin::new(stream);
                $call
            }
        }
    };
}

impl AsyncRead for LocalStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_read(context, buffer))
    }
}

impl AsyncWrite for LocalStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        either!(self, stream => stream.poll_write(context, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_shutdown(context))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => stream.poll_write_vectored(context, bytes))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.is_write_vectored(),
            Self::Unix(stream) => stream.is_write_vectored(),
        }
    }
}
