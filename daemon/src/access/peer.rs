//! Whose the other end of a connection is.
//!
//! For TCP the kernel is asked for the connecting socket, by both addresses, exactly. Its uid alone says too little:
//! a socket that its sender has closed belongs to nobody, and reads as uid 0 (Linux 6.1, `sock_i_uid`). So only an
//! established socket with an inode counts; a client that closes or half-closes before it has its answer is refused.

use std::net::SocketAddr;

use super::sock_diag::{self, ESTABLISHED, SockDiagError, Socket};

/// The other end of an accepted connection. Handlers get it as `ConnectInfo<Peer>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// A TCP connection on a loopback address.
    Tcp {
        /// The daemon's end.
        local: SocketAddr,
        /// The client's end.
        remote: SocketAddr,
        /// The inode of the client's socket when the connection was accepted.
        inode: u32,
    },
    /// A connection to the Unix socket.
    Unix {
        /// The user who connected (unix(7), `SO_PEERCRED`).
        uid: u32,
        /// The process that did, as it is numbered here; `None` where it has no number here.
        pid: Option<u32>,
    },
}

/// Whom the daemon serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    owner: u32,
}

/// Why a connection is refused.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// It belongs to another user.
    #[error("this daemon serves uid {owner} and root only; the connection belongs to uid {uid}")]
    OtherUser {
        /// Whom the daemon serves.
        owner: u32,
        /// Whose the connection is.
        uid: u32,
    },
    /// Its sender has closed it, wholly or for sending, or was never there.
    #[error("the connection was closed by its sender before its request could be acted on")]
    Closed,
    /// The addresses are the same as at accept, the socket is another.
    #[error("the connection is no longer the one that was accepted")]
    Changed,
    /// The kernel did not say.
    #[error("cannot find out whose the connection is")]
    Lookup(#[source] SockDiagError),
}

impl Peer {
    /// Whether root is at the other end, now.
    pub fn is_root(&self) -> Result<bool, PeerError> {
        match *self {
            Self::Unix { uid, .. } => Ok(uid == 0),
            Self::Tcp { local, remote, inode } => {
                let socket = sock_diag::find(remote, local).map_err(PeerError::Lookup)?;
                Ok(socket.is_some_and(|socket| {
                    socket.state == ESTABLISHED && inode != 0 && socket.inode == inode && socket.uid == 0
                }))
            }
        }
    }
}

impl Policy {
    /// Serves the user `owner`, and root.
    pub fn new(owner: u32) -> Self {
        Self { owner }
    }

    /// Looks up a TCP connection that was just accepted.
    pub fn accept_tcp(&self, local: SocketAddr, remote: SocketAddr) -> Result<Peer, PeerError> {
        let inode = self.inode_of(sock_diag::find(remote, local).map_err(PeerError::Lookup)?)?;
        Ok(Peer::Tcp { local, remote, inode })
    }

    /// Judges a connection to the Unix socket by its `SO_PEERCRED`.
    pub fn accept_unix(&self, uid: u32, pid: Option<u32>) -> Result<Peer, PeerError> {
        self.admit(uid)?;
        Ok(Peer::Unix { uid, pid })
    }

    /// Looks at the connection again, which must be done before each request is acted on. Costs some 20 µs and never
    /// waits.
    pub fn verify(&self, peer: &Peer) -> Result<(), PeerError> {
        match *peer {
            Peer::Unix { uid, .. } => self.admit(uid),
            Peer::Tcp { local, remote, inode } => match self.accept_tcp(local, remote)? {
                Peer::Tcp { inode: now, .. } if now == inode => Ok(()),
                _ => Err(PeerError::Changed),
            },
        }
    }

    /// The inode of an established socket of an admitted user.
    fn inode_of(self, socket: Option<Socket>) -> Result<u32, PeerError> {
        match socket {
            Some(socket) if socket.state == ESTABLISHED && socket.inode != 0 => {
                self.admit(socket.uid)?;
                Ok(socket.inode)
            }
            _ => Err(PeerError::Closed),
        }
    }

    fn admit(self, uid: u32) -> Result<(), PeerError> {
        if uid == self.owner || uid == 0 {
            Ok(())
        } else {
            Err(PeerError::OtherUser { owner: self.owner, uid })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: u32 = 1000;

    fn judge(state: u8, uid: u32, inode: u32) -> Result<u32, PeerError> {
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        Policy::new(OWNER).inode_of(Some(Socket { local: address, remote: address, state, uid, inode }))
    }

    #[test]
    fn owner_and_root_are_admitted_and_others_are_not() {
        assert_eq!(judge(ESTABLISHED, OWNER, 7).unwrap(), 7);
        assert_eq!(judge(ESTABLISHED, 0, 7).unwrap(), 7);
        for uid in [1, 999, 1001, 65534, u32::MAX] {
            assert!(matches!(judge(ESTABLISHED, uid, 7), Err(PeerError::OtherUser { .. })));
            assert!(Policy::new(OWNER).accept_unix(uid, None).is_err());
        }
        assert!(Policy::new(OWNER).accept_unix(OWNER, None).is_ok());
    }

    #[test]
    fn uid_0_without_an_inode_is_a_closed_socket_and_not_root() {
        for state in 0..=13 {
            assert!(matches!(judge(state, 0, 0), Err(PeerError::Closed)), "state {state}");
        }
    }

    #[test]
    fn only_established_sockets_count() {
        for state in (0..=13).filter(|state| *state != ESTABLISHED) {
            assert!(matches!(judge(state, OWNER, 7), Err(PeerError::Closed)), "state {state}");
        }
        assert!(matches!(Policy::new(OWNER).inode_of(None), Err(PeerError::Closed)));
    }
}
