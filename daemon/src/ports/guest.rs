//! The guest's end of its published ports: where it is, whether it is there, and how much it may hold.

use std::future::pending;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;

/// How long a guest that runs may take to answer a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// Connections of one VM at once, all its ports together.
const VM_CONNECTIONS: usize = 4096;
/// Connections of one port at once.
const PORT_CONNECTIONS: usize = 2048;

/// Whether there is a guest, and which: another one knows nothing of the connections of the one before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct There {
    open: bool,
    life: u64,
}

/// The guest of one VM.
#[derive(Debug)]
pub(super) struct Guest {
    address: Ipv4Addr,
    /// The interface that leads to it. Without it, a packet to a network that is down would go wherever the host's
    /// routes send it.
    device: String,
    there: watch::Sender<There>,
    connections: Arc<Semaphore>,
    /// What all VMs share: descriptors that published ports may have.
    descriptors: Arc<Semaphore>,
}

impl Guest {
    pub(super) fn new(address: Ipv4Addr, device: &str, descriptors: &Arc<Semaphore>) -> Self {
        Self {
            address,
            device: device.to_owned(),
            there: watch::Sender::default(),
            connections: Arc::new(Semaphore::new(VM_CONNECTIONS)),
            descriptors: Arc::clone(descriptors),
        }
    }

    pub(super) fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Whether new connections are tried.
    pub(super) fn set_open(&self, open: bool) {
        self.there.send_if_modified(|there| std::mem::replace(&mut there.open, open) != open);
    }

    /// The guest is gone, and with it all that it knew.
    pub(super) fn cut(&self) {
        self.there.send_modify(|there| there.life += 1);
    }
}

/// One port of a guest, as what serves it knows it.
#[derive(Debug)]
pub(super) struct Target {
    guest: Arc<Guest>,
    port: u16,
    connections: Arc<Semaphore>,
    gone: CancellationToken,
}

/// The right to one connection or flow.
#[derive(Debug)]
pub(super) struct Room(#[allow(dead_code, reason = "it is held")] [OwnedSemaphorePermit; 3]);

impl Target {
    pub(super) fn new(guest: &Arc<Guest>, port: u16) -> Self {
        Self {
            guest: Arc::clone(guest),
            port,
            connections: Arc::new(Semaphore::new(PORT_CONNECTIONS)),
            gone: CancellationToken::new(),
        }
    }

    /// Ends the port and all that goes through it.
    pub(super) fn end(&self) {
        self.gone.cancel();
    }

    /// Room for a connection or flow of so many descriptors, if there is some.
    pub(super) fn room(&self, descriptors: u32) -> Option<Room> {
        Some(Room([
            Arc::clone(&self.connections).try_acquire_owned().ok()?,
            Arc::clone(&self.guest.connections).try_acquire_owned().ok()?,
            Arc::clone(&self.guest.descriptors).try_acquire_many_owned(descriptors).ok()?,
        ]))
    }

    /// Whether there is a guest to speak with; its life, if so.
    pub(super) fn life(&self) -> Option<u64> {
        let there = *self.guest.there.borrow();
        there.open.then_some(there.life)
    }

    /// Waits for the end of the guest's `life`, or of the port.
    pub(super) async fn over(&self, life: u64) {
        let mut there = self.guest.there.subscribe();
        let another = async {
            if there.wait_for(|there| there.life != life).await.is_err() {
                // Its sender is in this very object.
                pending::<()>().await;
            }
        };
        tokio::select! {
            () = self.gone.cancelled() => {}
            () = another => {}
        }
    }

    /// A connection to the guest's port, which is reset when it is dropped, until that is changed.
    pub(super) async fn connect(&self) -> io::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        socket.bind_device(Some(self.guest.device.as_bytes()))?;
        socket.set_zero_linger()?;
        tokio::time::timeout(CONNECT, socket.connect(self.address())).await?
    }

    /// A socket that hears the guest's port alone.
    pub(super) async fn flow(&self) -> io::Result<UdpSocket> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
        socket.bind_device(Some(self.guest.device.as_bytes()))?;
        socket.connect(self.address()).await?;
        Ok(socket)
    }

    fn address(&self) -> SocketAddr {
        SocketAddr::from((self.guest.address, self.port))
    }
}
