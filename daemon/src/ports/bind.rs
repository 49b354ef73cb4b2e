//! The host's end of a published port: sockets that listen.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use catalyst_api::{HostAddress, Protocol};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tokio::net::{TcpListener, UdpSocket};

use super::error::PortError;
use crate::access::port_holder::PortHolder;

/// Connections that may wait to be accepted; the kernel's own limit may be lower (net.core.somaxconn).
const BACKLOG: i32 = 4096;
/// How often a port that is free for IPv4 is looked for, where the kernel chooses it and IPv6 has it taken.
const TRIES: u32 = 8;

/// What listens for one port.
#[derive(Debug)]
pub(super) enum Sockets {
    Tcp(Vec<TcpListener>),
    Udp(Vec<UdpSocket>),
}

/// Listens, and tells on which port: 0 lets the kernel choose one.
pub(super) fn bind(address: HostAddress, port: u16, protocol: Protocol) -> Result<(u16, Sockets), PortError> {
    let bound = match address {
        HostAddress::Ip(ip) => vec![socket(SocketAddr::new(ip, port), protocol)?],
        HostAddress::Localhost => localhost(port, protocol)?,
    };
    let failed = |source| PortError::Bind { address: SocketAddr::new(IpAddr::from([0; 4]), port), source };
    let chosen = bound.first().map_or(Ok(port), port_of).map_err(failed)?;
    let sockets = match protocol {
        Protocol::Tcp => bound.into_iter().map(tcp).collect::<io::Result<_>>().map(Sockets::Tcp),
        Protocol::Udp => bound.into_iter().map(udp).collect::<io::Result<_>>().map(Sockets::Udp),
    };
    Ok((chosen, sockets.map_err(failed)?))
}

/// 127.0.0.1, and ::1 with the same port unless the host has no IPv6.
fn localhost(port: u16, protocol: Protocol) -> Result<Vec<OwnedFd>, PortError> {
    let mut tries = 0;
    loop {
        tries += 1;
        let four = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let bound = socket(four, protocol)?;
        let chosen = port_of(&bound).map_err(|source| PortError::Bind { address: four, source })?;
        match socket(SocketAddr::from((Ipv6Addr::LOCALHOST, chosen)), protocol) {
            Ok(six) => return Ok(vec![bound, six]),
            Err(PortError::NoAddress(_)) => return Ok(vec![bound]),
            Err(PortError::Taken { .. }) if port == 0 && tries < TRIES => {}
            Err(error) => return Err(error),
        }
    }
}

fn socket(address: SocketAddr, protocol: Protocol) -> Result<OwnedFd, PortError> {
    open(address, protocol).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => match PortHolder::find(protocol, address) {
            PortHolder::Process { pid, .. } if pid == std::process::id() => PortError::Own { address },
            holder => PortError::Taken { address, protocol, holder },
        },
        io::ErrorKind::AddrNotAvailable => PortError::NoAddress(address.ip()),
        _ if source.raw_os_error() == Some(libc::EAFNOSUPPORT) => PortError::NoAddress(address.ip()),
        _ => PortError::Bind { address, source },
    })
}

fn open(address: SocketAddr, protocol: Protocol) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let kind = match protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, kind, flags, None)?;
    if address.is_ipv6() {
        // Else :: would be all of IPv4 as well, which nobody has asked for.
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if protocol == Protocol::Tcp {
        // Lets a restarted daemon listen while connections to the one before still fade; two listeners are refused.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    if protocol == Protocol::Tcp {
        rustix::net::listen(&socket, BACKLOG)?;
    }
    Ok(socket)
}

fn port_of(socket: &OwnedFd) -> io::Result<u16> {
    let address = SocketAddr::try_from(rustix::net::getsockname(socket)?)?;
    Ok(address.port())
}

fn tcp(socket: OwnedFd) -> io::Result<TcpListener> {
    TcpListener::from_std(socket.into())
}

fn udp(socket: OwnedFd) -> io::Result<UdpSocket> {
    UdpSocket::from_std(socket.into())
}
