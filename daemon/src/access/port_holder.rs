//! Which program holds a port: the kernel's sockets, and `/proc` for the process with that socket open.

use std::fmt;
use std::fs;
use std::net::SocketAddr;

use catalyst_api::Protocol;

use super::sock_diag::{self, Socket};
use crate::privilege::as_root;

/// Processes looked at, at the most.
const MOST_PROCESSES: usize = 100_000;

/// Who listens on a port, as far as this process may know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortHolder {
    /// A process that could be seen.
    Process {
        /// Its program's name, as the kernel keeps it (at most 15 bytes).
        program: String,
        /// Its number.
        pid: u32,
    },
    /// A process of this user, whose open files may not be seen.
    User {
        /// The socket's user.
        uid: u32,
    },
    /// Nobody was found; it may be gone by now.
    Unknown,
}

impl PortHolder {
    /// Looks for who keeps others from `address`. Reads all of `/proc`: for error messages only.
    pub(crate) fn find(protocol: Protocol, address: SocketAddr) -> Self {
        let sockets = match protocol {
            Protocol::Tcp => sock_diag::listening(address.port()),
            Protocol::Udp => sock_diag::bound_udp(address.port()),
        };
        let Ok(mut sockets) = sockets else { return Self::Unknown };
        let (ip, all) = (address.ip(), address.ip().is_unspecified());
        sockets.retain(|socket| all || socket.local.ip().is_unspecified() || socket.local.ip() == ip);
        let process = as_root(|| sockets.iter().find_map(|socket| process_with(*socket)));
        match (process, sockets.first()) {
            (Some((pid, program)), _) => Self::Process { program, pid },
            (None, Some(socket)) => Self::User { uid: socket.uid },
            (None, None) => Self::Unknown,
        }
    }
}

impl fmt::Display for PortHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { program, pid } => {
                write!(f, "{program} (pid {pid}); stop it (kill {pid})")
            }
            Self::User { uid } => {
                write!(f, "a program of uid {uid} (sudo ss -ltnp shows which); stop it")
            }
            Self::Unknown => f.write_str("another program (sudo ss -ltnp shows which); stop it"),
        }
    }
}

fn process_with(socket: Socket) -> Option<(u32, String)> {
    let link = format!("socket:[{}]", socket.inode);
    let numbers =
        fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let pid = numbers.take(MOST_PROCESSES).find(|pid| has_open(*pid, &link))?;
    let program = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    // A process may call itself anything, control characters included.
    Some((pid, program.trim_end_matches('\n').escape_debug().to_string()))
}

fn has_open(pid: u32, link: &str) -> bool {
    fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|files| {
        files.flatten().any(|file| fs::read_link(file.path()).is_ok_and(|to| to.as_os_str() == link))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn the_program_that_listens_is_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let found = PortHolder::find(Protocol::Tcp, listener.local_addr().unwrap());
        let PortHolder::Process { pid, .. } = found else { panic!("{found:?}") };
        assert_eq!(pid, std::process::id());
    }

    #[test]
    fn the_program_that_waits_for_datagrams_is_found() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        match PortHolder::find(Protocol::Udp, address) {
            PortHolder::Process { pid, .. } => assert_eq!(pid, std::process::id()),
            PortHolder::Unknown => eprintln!("SKIPPED: this kernel does not tell of UDP sockets (udp_diag)"),
            other @ PortHolder::User { .. } => panic!("{other:?}"),
        }
        let other = SocketAddr::from(([127, 9, 9, 9], address.port()));
        assert_eq!(PortHolder::find(Protocol::Udp, other), PortHolder::Unknown);
    }

    #[test]
    fn a_port_without_a_listener_is_held_by_nobody() {
        // Nothing can listen on port 0.
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        assert_eq!(PortHolder::find(Protocol::Tcp, nowhere), PortHolder::Unknown);
    }
}
