//! Sockets of this machine, as the kernel knows them: sock_diag(7), `linux/inet_diag.h`.
//!
//! Requests are answered while they are sent, so that nothing here waits. Replies come from the kernel, but are read
//! as if they did not: bounded, every length checked.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recvfrom, sendto, socket,
};

/// TCP states (`net/tcp_states.h`).
pub(super) const ESTABLISHED: u8 = 1;
const LISTEN: u8 = 10;

/// Message types and flags (`linux/netlink.h`, `linux/sock_diag.h`).
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct nlmsghdr` and `struct inet_diag_req_v2`.
const REQUEST: usize = HEADER + 56;
/// `struct inet_diag_msg`.
const SOCKET: usize = 72;
/// One reply at the most: the kernel's own limit for a dump's part.
const REPLY: usize = 32 << 10;
/// Parts of a dump at the most: some 100,000 sockets.
const PARTS: usize = 512;
const ANY_STATE: u32 = u32::MAX;
const SEQUENCE: u32 = 1;

/// One socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Socket {
    /// Its own address, and that of its peer. IPv4 in IPv6 is given as IPv4.
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    /// Its TCP state.
    pub(super) state: u8,
    /// The user who made it; 0 also where the kernel no longer knows.
    pub(super) uid: u32,
    /// The inode of its file; 0 once it is closed.
    pub(super) inode: u32,
}

/// Why sockets could not be looked up.
#[derive(Debug, thiserror::Error)]
pub enum SockDiagError {
    /// The netlink socket could not be made or used.
    #[error("cannot ask the kernel for its TCP sockets (sock_diag: is the module tcp_diag there?)")]
    Netlink(#[source] Errno),
    /// The kernel's answer makes no sense.
    #[error("the kernel's answer about its TCP sockets is not understood")]
    Malformed,
    /// The two addresses are of different families.
    #[error("one address is IPv4 and one IPv6")]
    MixedFamilies,
}

/// The socket at `local` that is connected to `remote`; `None` if there is none.
///
/// The kernel falls back to a listening socket at `local`; that one is not taken.
pub(super) fn find(local: SocketAddr, remote: SocketAddr) -> Result<Option<Socket>, SockDiagError> {
    let (local, remote) = (canonical(local), canonical(remote));
    if local.is_ipv4() != remote.is_ipv4() {
        return Err(SockDiagError::MixedFamilies);
    }
    let request =
        request(family(local.ip()), libc::IPPROTO_TCP, NLM_F_REQUEST, ANY_STATE, Some((local, remote)));
    let mut found = None;
    let answer = exchange(&request, 1, |socket| found = Some(socket));
    match answer {
        Ok(()) => Ok(found.filter(|socket| socket.local == local && socket.remote == remote)),
        Err(SockDiagError::Netlink(Errno::ENOENT)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The TCP sockets that listen on `port`, at whatever address.
pub(super) fn listening(port: u16) -> Result<Vec<Socket>, SockDiagError> {
    on_port(libc::IPPROTO_TCP, 1 << LISTEN, port)
}

/// The UDP sockets that are bound to `port`, at whatever address.
pub(super) fn bound_udp(port: u16) -> Result<Vec<Socket>, SockDiagError> {
    on_port(libc::IPPROTO_UDP, ANY_STATE, port)
}

fn on_port(protocol: i32, states: u32, port: u16) -> Result<Vec<Socket>, SockDiagError> {
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let request = request(family, protocol, NLM_F_REQUEST | NLM_F_DUMP, states, None);
        exchange(&request, PARTS, |socket| {
            if socket.state < 32 && states & (1 << socket.state) != 0 && socket.local.port() == port {
                found.push(socket);
            }
        })?;
    }
    Ok(found)
}

/// Sends one request and reads at most `parts` replies, until the last.
fn exchange(request: &[u8], parts: usize, mut each: impl FnMut(Socket)) -> Result<(), SockDiagError> {
    let netlink = open().map_err(SockDiagError::Netlink)?;
    let kernel = NetlinkAddr::new(0, 0);
    sendto(netlink.as_raw_fd(), request, &kernel, MsgFlags::empty()).map_err(SockDiagError::Netlink)?;
    let mut buffer = vec![0; REPLY];
    for _ in 0..parts {
        let (length, sender) =
            recvfrom::<NetlinkAddr>(netlink.as_raw_fd(), &mut buffer).map_err(SockDiagError::Netlink)?;
        if sender.is_some_and(|sender| sender.pid() != 0) {
            return Err(SockDiagError::Malformed);
        }
        let reply = buffer.get(..length).ok_or(SockDiagError::Malformed)?;
        if read_reply(reply, &mut each)? == Progress::Done {
            return Ok(());
        }
    }
    Ok(())
}

fn open() -> nix::Result<OwnedFd> {
    socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::NetlinkSockDiag,
    )
}

#[derive(Debug, PartialEq, Eq)]
enum Progress {
    More,
    Done,
}

/// Reads the messages of one reply.
fn read_reply(mut rest: &[u8], each: &mut impl FnMut(Socket)) -> Result<Progress, SockDiagError> {
    while !rest.is_empty() {
        let length = usize::try_from(u32_at(rest, 0)?).map_err(|_| SockDiagError::Malformed)?;
        if length < HEADER {
            return Err(SockDiagError::Malformed);
        }
        let message = rest.get(..length).ok_or(SockDiagError::Malformed)?;
        if u32_at(message, 8)? != SEQUENCE {
            return Err(SockDiagError::Malformed);
        }
        let body = &message[HEADER..];
        match u16_at(message, 4)? {
            NLMSG_DONE => return Ok(Progress::Done),
            NLMSG_ERROR => {
                // The kernel writes the negated error number; 0 would be an acknowledgement that was not asked for.
                let code = i32::from_ne_bytes(bytes_at(body, 0)?);
                return Err(SockDiagError::Netlink(Errno::from_raw(code.saturating_neg())));
            }
            SOCK_DIAG_BY_FAMILY => each(read_socket(body)?),
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(Progress::More)
}

/// `struct inet_diag_req_v2` behind its header; an exact search where the addresses are given.
fn request(
    family: i32,
    protocol: i32,
    flags: u16,
    states: u32,
    addresses: Option<(SocketAddr, SocketAddr)>,
) -> Vec<u8> {
    let mut message = Vec::with_capacity(REQUEST);
    // Constants far below the types' ends.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let (length, family, protocol) = (REQUEST as u32, family as u8, protocol as u8);
    message.extend(length.to_ne_bytes());
    message.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend(SEQUENCE.to_ne_bytes());
    message.extend(0u32.to_ne_bytes());
    message.extend([family, protocol, 0, 0]);
    message.extend(states.to_ne_bytes());
    // struct inet_diag_sockid: both ports, both addresses, interface, and "any cookie".
    let (local, remote) = addresses.unwrap_or((UNSPECIFIED, UNSPECIFIED));
    message.extend(local.port().to_be_bytes());
    message.extend(remote.port().to_be_bytes());
    message.extend(address_bytes(local.ip()));
    message.extend(address_bytes(remote.ip()));
    message.extend(0u32.to_ne_bytes());
    message.extend([0xff; 8]);
    message
}

const UNSPECIFIED: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// `struct inet_diag_msg`.
fn read_socket(body: &[u8]) -> Result<Socket, SockDiagError> {
    if body.len() < SOCKET {
        return Err(SockDiagError::Malformed);
    }
    let address = |ip: usize, port: usize| -> Result<SocketAddr, SockDiagError> {
        let ip = match i32::from(body[0]) {
            libc::AF_INET => IpAddr::from(bytes_at::<4>(body, ip)?),
            libc::AF_INET6 => IpAddr::from(bytes_at::<16>(body, ip)?),
            _ => return Err(SockDiagError::Malformed),
        };
        Ok(canonical(SocketAddr::new(ip, u16::from_be_bytes(bytes_at(body, port)?))))
    };
    Ok(Socket {
        local: address(8, 4)?,
        remote: address(24, 6)?,
        state: body[1],
        uid: u32_at(body, 64)?,
        inode: u32_at(body, 68)?,
    })
}

/// IPv4 in IPv6 as IPv4, and nothing but address and port.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn family(ip: IpAddr) -> i32 {
    if ip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }
}

fn address_bytes(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
        IpAddr::V6(ip) => Ipv6Addr::octets(&ip),
    }
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], SockDiagError> {
    bytes.get(at..).and_then(<[u8]>::first_chunk).copied().ok_or(SockDiagError::Malformed)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, SockDiagError> {
    Ok(u32::from_ne_bytes(bytes_at(bytes, at)?))
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, SockDiagError> {
    Ok(u16::from_ne_bytes(bytes_at(bytes, at)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::unix::fs::MetadataExt;

    fn inode(stream: &TcpStream) -> u32 {
        let link = format!("/proc/self/fd/{}", stream.as_raw_fd());
        u32::try_from(std::fs::metadata(link).unwrap().ino()).unwrap()
    }

    /// The listener, the accepted end and the connecting end.
    fn connection(listen: &str, connect: impl Fn(u16) -> String) -> (TcpListener, TcpStream, TcpStream) {
        let listener = TcpListener::bind(listen).unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = TcpStream::connect(connect(port)).unwrap();
        let (server, _) = listener.accept().unwrap();
        (listener, server, client)
    }

    fn connecting_end(server: &TcpStream) -> Option<Socket> {
        find(server.peer_addr().unwrap(), server.local_addr().unwrap()).unwrap()
    }

    #[test]
    fn the_connecting_socket_is_found_by_both_addresses() {
        let (_listener, server, client) = connection("127.0.0.1:0", |port| format!("127.0.0.1:{port}"));
        let found = connecting_end(&server).unwrap();
        assert_eq!((found.state, found.inode), (ESTABLISHED, inode(&client)));
        assert_eq!(found.uid, nix::unistd::getuid().as_raw());
        assert_ne!(found.inode, inode(&server));
    }

    #[test]
    fn ipv6_and_ipv4_in_ipv6_are_found() {
        if let Err(error) = TcpListener::bind("[::1]:0") {
            eprintln!("SKIPPED: no IPv6 loopback here: {error}");
            return;
        }
        let (_listener, server, client) = connection("[::1]:0", |port| format!("[::1]:{port}"));
        assert_eq!(connecting_end(&server).unwrap().inode, inode(&client));
        // A socket for both families sees an IPv4 peer as ::ffff:127.0.0.1.
        let (_listener, server, client) = connection("[::]:0", |port| format!("127.0.0.1:{port}"));
        assert!(server.peer_addr().unwrap().is_ipv6());
        assert_eq!(connecting_end(&server).unwrap().inode, inode(&client));
        // And the other way round: an IPv6 socket that connects to an IPv4 address.
        let (_listener, server, client) =
            connection("127.0.0.1:0", |port| format!("[::ffff:127.0.0.1]:{port}"));
        assert!(client.peer_addr().unwrap().is_ipv6());
        assert_eq!(connecting_end(&server).unwrap().inode, inode(&client));
    }

    #[test]
    fn a_closed_connecting_socket_is_not_established_with_an_inode() {
        let (_listener, server, client) = connection("127.0.0.1:0", |port| format!("127.0.0.1:{port}"));
        drop(client);
        let after = connecting_end(&server);
        assert!(after.is_none_or(|socket| socket.state != ESTABLISHED && socket.inode == 0), "{after:?}");
    }

    #[test]
    fn a_half_closed_connecting_socket_is_not_established() {
        let (_listener, server, client) = connection("127.0.0.1:0", |port| format!("127.0.0.1:{port}"));
        client.shutdown(Shutdown::Write).unwrap();
        assert_ne!(connecting_end(&server).unwrap().state, ESTABLISHED);
    }

    #[test]
    fn a_listening_socket_is_not_taken_for_a_connected_one() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let other = SocketAddr::from(([127, 0, 0, 1], 1));
        assert_eq!(find(address, other).unwrap(), None);
        let listening = listening(address.port()).unwrap();
        assert!(listening.iter().any(|socket| socket.local == address), "{listening:?}");
    }

    #[test]
    fn mixed_families_are_refused() {
        let (four, six) = (SocketAddr::from(([127, 0, 0, 1], 1)), SocketAddr::from((Ipv6Addr::LOCALHOST, 2)));
        assert!(matches!(find(four, six), Err(SockDiagError::MixedFamilies)));
    }

    proptest::proptest! {
        #[test]
        fn any_reply_is_read_without_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..400)) {
            let _ = read_reply(&bytes, &mut |_| ());
        }

        #[test]
        fn any_body_behind_a_right_header_is_read_without_panic(
            kind in 0u16..24,
            claimed in 0u32..200,
            body in proptest::collection::vec(proptest::num::u8::ANY, 0..160),
        ) {
            let mut message = claimed.to_ne_bytes().to_vec();
            message.extend(kind.to_ne_bytes());
            message.extend([0; 2]);
            message.extend(SEQUENCE.to_ne_bytes());
            message.extend([0; 4]);
            message.extend(body);
            let _ = read_reply(&message, &mut |_| ());
        }
    }
}
