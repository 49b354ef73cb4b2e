//! rtnetlink(7), as little of it as one address and one route need.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

/// Bytes before a message's body.
const HEADER: usize = 16;
/// Messages of one dump at most; a guest has a handful of links and addresses.
const DUMP_MAX: usize = 4096;

/// One socket to the kernel.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

/// A message that is being made: the family's fixed header, then attributes.
#[derive(Debug)]
pub struct Message {
    kind: u16,
    flags: i32,
    body: Vec<u8>,
}

impl Message {
    /// A message of a kind (`RTM_…`) with flags (`NLM_F_…`) and its family's header.
    pub fn new(kind: u16, flags: i32, header: &[u8]) -> Self {
        Self { kind, flags, body: header.to_vec() }
    }

    /// Adds an attribute.
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.body.extend(length.to_ne_bytes());
        self.body.extend(kind.to_ne_bytes());
        self.body.extend(value);
        self.body.resize(self.body.len().next_multiple_of(4), 0);
        self
    }
}

impl Netlink {
    /// Opens a socket. The kernel answers at once: five seconds without an answer are an error.
    pub fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(5))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends a request and waits until the kernel has done it.
    pub fn change(&mut self, message: Message) -> io::Result<()> {
        let flags = message.flags | libc::NLM_F_ACK;
        self.exchange(&Message { flags, ..message }).map(drop)
    }

    /// Asks for all objects of a kind: the bodies of the answers.
    pub fn dump(&mut self, kind: u16, header: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        self.exchange(&Message::new(kind, libc::NLM_F_DUMP, header))
    }

    fn exchange(&mut self, message: &Message) -> io::Result<Vec<Vec<u8>>> {
        self.sequence += 1;
        let flags = u16::try_from(message.flags | libc::NLM_F_REQUEST).unwrap_or(0);
        let length = u32::try_from(HEADER + message.body.len()).unwrap_or(u32::MAX);
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(message.kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(self.sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(&message.body);
        let kernel = NetlinkAddr::new(0, 0);
        sendto(self.socket.as_raw_fd(), &bytes, &kernel, MsgFlags::empty())?;
        self.receive()
    }

    fn receive(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut bodies = Vec::new();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let count = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            for (kind, sequence, body) in messages(&buffer[..count]) {
                if sequence != self.sequence {
                    continue;
                }
                match i32::from(kind) {
                    libc::NLMSG_DONE => return Ok(bodies),
                    libc::NLMSG_ERROR => return result(body).map(|()| bodies),
                    _ if bodies.len() >= DUMP_MAX => return Err(io::ErrorKind::InvalidData.into()),
                    _ => bodies.push(body.to_vec()),
                }
            }
        }
    }
}

fn result(body: &[u8]) -> io::Result<()> {
    match word(body, 0) {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(error.cast_signed().wrapping_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, u32, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::try_from(word(bytes, 0)?).ok()?;
        let body = bytes.get(HEADER..length)?;
        let message = (half(bytes, 4)?, word(bytes, 8)?, body);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The value of an attribute in an answer's body after its family's header of `header` bytes.
pub fn attribute(body: &[u8], header: usize, kind: u16) -> Option<&[u8]> {
    let mut rest = body.get(header..)?;
    loop {
        let length = usize::from(half(rest, 0)?);
        let value = rest.get(4..length)?;
        if half(rest, 2)? == kind {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

/// The 32-bit number at an offset, in the machine's order as netlink's are.
pub fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The 16-bit number at an offset.
pub fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}
