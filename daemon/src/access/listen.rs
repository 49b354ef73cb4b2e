//! Where the daemon listens: loopback addresses and a Unix socket, nothing that another machine could reach.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::str::FromStr;

use catalyst_api::Protocol;
use tokio::net::{TcpListener, TcpSocket};

use super::listener::LocalListener;
use super::owner::Owner;
use super::peer::Policy;
pub use super::port_holder::PortHolder;
use super::sock_diag::{self, SockDiagError};
use super::unix_socket::UnixSocket;
pub use super::unix_socket::UnixSocketError;

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 1024;
/// How often a port that is free for IPv4 is looked for, where the kernel chooses it and IPv6 has it taken.
const PORT_TRIES: u32 = 8;

/// `--listen ADDR:PORT`, loopback only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListenAddress {
    /// `localhost:PORT`: 127.0.0.1, and ::1 where there is IPv6.
    Localhost(u16),
    /// One loopback address.
    Address(SocketAddr),
}

/// Why an address is no place to listen.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ListenAddressError {
    /// Not of the form.
    #[error("{0:?} is not an address to listen on: give localhost:PORT, 127.0.0.1:PORT or [::1]:PORT")]
    Form(String),
    /// Other machines could reach it.
    #[error(
        "{0} is not a loopback address: the daemon listens for this machine only (give localhost:PORT; from \
         elsewhere use ssh -L)"
    )]
    NotLoopback(IpAddr),
}

/// Why the daemon cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another program has the port.
    #[error(
        "cannot listen on {address}: the port is taken by {holder}, or choose another with --listen localhost:PORT"
    )]
    PortTaken {
        /// The address with the port.
        address: SocketAddr,
        /// Who has it.
        holder: PortHolder,
    },
    /// Another reason.
    #[error("cannot listen on {address}")]
    Bind {
        /// The address with the port.
        address: SocketAddr,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Nobody could be told from anybody else.
    #[error(
        "cannot tell whose a connection to {address} is, so the daemon would have to refuse all (modprobe tcp_diag)"
    )]
    NoSockDiag {
        /// The address with the port.
        address: SocketAddr,
        /// The kernel's answer.
        #[source]
        source: SockDiagError,
    },
    /// The Unix socket could not be made.
    #[error("cannot listen on the Unix socket")]
    Unix(#[source] UnixSocketError),
}

impl FromStr for ListenAddress {
    type Err = ListenAddressError;

    fn from_str(text: &str) -> Result<Self, ListenAddressError> {
        let form = || ListenAddressError::Form(text.to_owned());
        if let Some(("localhost", port)) = text.rsplit_once(':') {
            if port.starts_with('+') {
                return Err(form());
            }
            return port.parse().map(Self::Localhost).map_err(|_| form());
        }
        let address: SocketAddr = text.parse().map_err(|_| form())?;
        if !address.ip().is_loopback() {
            return Err(ListenAddressError::NotLoopback(address.ip()));
        }
        Ok(Self::Address(address))
    }
}

/// Where to listen, and for whom.
#[derive(Debug, Clone, Copy)]
pub struct ListenOptions<'a> {
    /// The loopback address and port; port 0 lets the kernel choose.
    pub tcp: &'a ListenAddress,
    /// The Unix socket, if one is wanted: mode 0600, the owner's. A socket there that nobody serves is replaced.
    pub unix: Option<&'a Path>,
    /// The user who is served.
    pub owner: &'a Owner,
}

impl ListenOptions<'_> {
    /// Listens. Must be called in a tokio runtime.
    pub fn bind(&self) -> Result<LocalListener, ListenError> {
        let tcp = match *self.tcp {
            ListenAddress::Localhost(port) => bind_localhost(port)?,
            ListenAddress::Address(address) => vec![bind(address)?],
        };
        for listener in &tcp {
            check_sock_diag(listener)?;
        }
        let unix = self
            .unix
            .map(|path| UnixSocket::bind(path, self.owner))
            .transpose()
            .map_err(ListenError::Unix)?;
        Ok(LocalListener::new(tcp, unix, Policy::new(self.owner.uid)))
    }
}

/// 127.0.0.1, and ::1 with the same port unless the machine has no IPv6.
fn bind_localhost(port: u16) -> Result<Vec<TcpListener>, ListenError> {
    let mut tries = 0;
    loop {
        tries += 1;
        let four = bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?;
        let chosen = four.local_addr().map_or(port, |address| address.port());
        match bind(SocketAddr::from((Ipv6Addr::LOCALHOST, chosen))) {
            Ok(six) => return Ok(vec![four, six]),
            Err(ListenError::Bind { source, .. }) if is_without_ipv6(&source) => return Ok(vec![four]),
            Err(ListenError::PortTaken { .. }) if port == 0 && tries < PORT_TRIES => {}
            Err(error) => return Err(error),
        }
    }
}

/// No IPv6 in the kernel, or none on the loopback interface.
fn is_without_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

fn bind(address: SocketAddr) -> Result<TcpListener, ListenError> {
    listen(address).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => {
            ListenError::PortTaken { address, holder: PortHolder::find(Protocol::Tcp, address) }
        }
        _ => ListenError::Bind { address, source },
    })
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // Lets a restarted daemon listen while connections to the one before still fade; two listeners are refused still.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// A kernel that does not find this very listener would not find connections either.
fn check_sock_diag(listener: &TcpListener) -> Result<(), ListenError> {
    let Ok(address) = listener.local_addr() else { return Ok(()) };
    let failed = |source| ListenError::NoSockDiag { address, source };
    let sockets = sock_diag::listening(address.port()).map_err(failed)?;
    if sockets.iter().any(|socket| socket.local == address) {
        Ok(())
    } else {
        Err(failed(SockDiagError::Malformed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_addresses_are_taken() {
        for (text, address) in [
            ("localhost:8080", ListenAddress::Localhost(8080)),
            ("localhost:0", ListenAddress::Localhost(0)),
            ("127.0.0.1:8080", ListenAddress::Address("127.0.0.1:8080".parse().unwrap())),
            ("127.9.9.9:1", ListenAddress::Address("127.9.9.9:1".parse().unwrap())),
            ("[::1]:8080", ListenAddress::Address("[::1]:8080".parse().unwrap())),
        ] {
            assert_eq!(text.parse(), Ok(address), "{text}");
        }
    }

    #[test]
    fn addresses_that_others_could_reach_are_refused() {
        for text in
            ["0.0.0.0:8080", "[::]:8080", "192.168.1.1:80", "[::ffff:127.0.0.1]:80", "[2001:db8::1]:80"]
        {
            let error = text.parse::<ListenAddress>().unwrap_err();
            assert!(matches!(error, ListenAddressError::NotLoopback(_)), "{text}");
            assert!(error.to_string().contains("not a loopback address"), "{error}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "8080",
            ":8080",
            "localhost",
            "localhost:",
            "localhost:+1",
            "localhost:65536",
            "example:80",
            "::1:80",
        ] {
            assert_eq!(text.parse::<ListenAddress>(), Err(ListenAddressError::Form(text.to_owned())));
        }
    }

    #[tokio::test]
    async fn a_taken_port_names_its_holder_and_what_to_do() {
        let first = bind_localhost(0).unwrap();
        let port = first[0].local_addr().unwrap().port();
        let error = bind_localhost(port).unwrap_err();
        let message = error.to_string();
        assert!(matches!(error, ListenError::PortTaken { .. }), "{message}");
        for part in
            [format!("127.0.0.1:{port}"), format!("pid {}", std::process::id()), "--listen".to_owned()]
        {
            assert!(message.contains(&part), "{message}");
        }
    }

    #[tokio::test]
    async fn localhost_is_both_addresses_on_one_port() {
        let bound = bind_localhost(0).unwrap();
        let addresses: Vec<_> = bound.iter().map(|listener| listener.local_addr().unwrap()).collect();
        assert_eq!(addresses[0].ip(), IpAddr::from(Ipv4Addr::LOCALHOST));
        if addresses.len() == 1 {
            eprintln!("SKIPPED: no IPv6 loopback here");
            return;
        }
        assert_eq!(addresses[1], SocketAddr::from((Ipv6Addr::LOCALHOST, addresses[0].port())));
    }

    #[tokio::test]
    async fn a_port_taken_on_ipv6_only_is_refused_too() {
        let Ok(six) = std::net::TcpListener::bind("[::1]:0") else {
            eprintln!("SKIPPED: no IPv6 loopback here");
            return;
        };
        let error = bind_localhost(six.local_addr().unwrap().port()).unwrap_err();
        assert!(error.to_string().contains("[::1]"), "{error}");
    }
}
