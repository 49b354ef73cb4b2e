//! A WebSocket (RFC 6455) to the daemon that never blocks once it is open.

use std::io::{self, Read};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use catalyst_api::ApiError;
use tungstenite::handshake::client::Response;
use tungstenite::protocol::WebSocketConfig;
use tungstenite::{Error, HandshakeError, Message, WebSocket, client::client_with_config};

use crate::error::PlainIo;
use crate::host::Host;

/// Longest wait for a connection, and for each step of the handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Largest message of the daemon, in bytes.
const MAX_MESSAGE: usize = 4 << 20;
/// Largest body of a refusal that is read, in bytes.
const MAX_REFUSAL: usize = 64 << 10;

/// Why there is no WebSocket, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No connection.
    #[error("cannot connect to the daemon at {host}")]
    Connect {
        /// Where.
        host: Host,
        /// Why.
        source: PlainIo,
    },
    /// The daemon said no.
    #[error(transparent)]
    Refused(#[from] ApiError),
    /// It did not speak WebSocket, or broke its rules.
    #[error(
        "cannot understand the daemon at {host}; daemon and command line may be of different versions \
             (see catalyst version)"
    )]
    Garbled {
        /// Where.
        host: Host,
    },
    /// The connection broke.
    #[error("lost the connection to the daemon at {host}")]
    Lost {
        /// Where.
        host: Host,
        /// Why.
        source: PlainIo,
    },
    /// The other side closed it in good order.
    #[error("the daemon at {host} closed the connection")]
    Closed {
        /// Where.
        host: Host,
    },
}

/// An open WebSocket.
#[derive(Debug)]
pub struct Link {
    socket: WebSocket<TcpStream>,
    host: Host,
    unsent: bool,
}

impl Link {
    /// Opens a WebSocket to `target` (path and query) of the daemon.
    pub fn open(host: &Host, target: &str) -> Result<Self, LinkError> {
        let broken = |error: io::Error| LinkError::Connect { host: host.clone(), source: PlainIo(error) };
        let stream = connect(host).map_err(broken)?;
        stream.set_nodelay(true).map_err(broken)?;
        stream.set_read_timeout(Some(HANDSHAKE)).map_err(broken)?;
        stream.set_write_timeout(Some(HANDSHAKE)).map_err(broken)?;
        // A second handle: a refusal's body may come after its headers.
        let rest = stream.try_clone().map_err(broken)?;
        let config = WebSocketConfig::default()
            .read_buffer_size(32 << 10)
            .max_message_size(Some(MAX_MESSAGE))
            .max_frame_size(Some(MAX_MESSAGE));
        let socket = match client_with_config(format!("ws://{host}{target}"), stream, Some(config)) {
            Ok((socket, _)) => socket,
            Err(HandshakeError::Interrupted(_)) => return Err(broken(io::ErrorKind::TimedOut.into())),
            Err(HandshakeError::Failure(Error::Http(response))) => {
                return Err(refusal(*response, rest, host));
            }
            Err(HandshakeError::Failure(error)) => return Err(failure(error, host)),
        };
        socket.get_ref().set_nonblocking(true).map_err(broken)?;
        Ok(Self { socket, host: host.clone(), unsent: false })
    }

    /// Sends a message, as far as it goes now; the rest goes with [`Self::flush`].
    pub fn send(&mut self, message: Message) -> Result<(), LinkError> {
        let sent = self.socket.write(message);
        self.settle(sent)?;
        self.flush()
    }

    /// Sends on what could not be sent yet.
    pub fn flush(&mut self) -> Result<(), LinkError> {
        let sent = self.socket.flush();
        self.settle(sent)
    }

    /// Whether something waits to be sent: more should not be put in.
    pub const fn is_full(&self) -> bool {
        self.unsent
    }

    /// The next message, or `None` if none is here yet.
    pub fn receive(&mut self) -> Result<Option<Message>, LinkError> {
        match self.socket.read() {
            Ok(message) => Ok(Some(message)),
            Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(failure(error, &self.host)),
        }
    }

    fn settle(&mut self, result: tungstenite::Result<()>) -> Result<(), LinkError> {
        self.unsent = matches!(&result, Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock);
        match result {
            Err(error) if !self.unsent => Err(failure(error, &self.host)),
            _ => Ok(()),
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }
}

fn connect(host: &Host) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in (host.name.as_str(), host.port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, HANDSHAKE) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn failure(error: Error, host: &Host) -> LinkError {
    let host = host.clone();
    match error {
        Error::ConnectionClosed | Error::AlreadyClosed => LinkError::Closed { host },
        Error::Io(error) => LinkError::Lost { host, source: PlainIo(error) },
        Error::Protocol(tungstenite::error::ProtocolError::ResetWithoutClosingHandshake) => {
            LinkError::Lost { host, source: PlainIo(io::ErrorKind::UnexpectedEof.into()) }
        }
        _ => LinkError::Garbled { host },
    }
}

/// The error in an HTTP reply that is no upgrade.
fn refusal(response: Response, rest: TcpStream, host: &Host) -> LinkError {
    let (parts, body) = response.into_parts();
    let mut body = body.unwrap_or_default();
    let length = parts.headers.get("content-length").and_then(|value| value.to_str().ok()?.parse().ok());
    let wanted = usize::min(length.unwrap_or(0), MAX_REFUSAL);
    if let Some(missing) = wanted.checked_sub(body.len()) {
        // What cannot be read makes the text no JSON, which is told below.
        let _ = rest.take(missing as u64).read_to_end(&mut body);
    }
    match serde_json::from_slice::<ApiError>(&body) {
        Ok(error) => error.into(),
        Err(_) => LinkError::Garbled { host: host.clone() },
    }
}
