//! Datagrams: each client has a flow of its own to the guest, until neither has said anything for a while.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::SendFlags;
use tokio::net::UdpSocket;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::guest::{Room, Target};

/// A flow ends when nothing has gone through it for so long.
const IDLE: Duration = Duration::from_secs(90);
/// Flows of one socket at once. The one that was silent longest makes room for another.
const FLOWS: usize = 1024;
/// No datagram is larger.
const LARGEST: usize = 1 << 16;
/// Datagrams that are taken from one socket before others have their turn.
const BURST: usize = 64;

#[derive(Debug)]
struct Flow {
    socket: Arc<UdpSocket>,
    used: Arc<AtomicU64>,
    life: u64,
    task: AbortHandle,
    _room: Room,
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The flows of one socket, by client.
#[derive(Debug)]
struct Flows {
    began: Instant,
    by_client: Mutex<HashMap<SocketAddr, Flow>>,
}

impl Flows {
    fn all(&self) -> MutexGuard<'_, HashMap<SocketAddr, Flow>> {
        // Nothing panics while it holds the lock; if it did, the map would still be whole.
        self.by_client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Serves one socket until the task is aborted, and its flows with it.
pub(super) async fn serve(socket: UdpSocket, target: Arc<Target>) {
    let socket = Arc::new(socket);
    let flows = Arc::new(Flows { began: Instant::now(), by_client: Mutex::default() });
    let _ends = Ends(Arc::clone(&flows));
    let mut buffer = vec![0; LARGEST];
    loop {
        match socket.recv_from(&mut buffer).await {
            Ok((length, client)) => {
                if let Err(error) = send(&socket, &flows, &target, client, &buffer[..length]).await {
                    tracing::debug!(%client, %error, "a datagram does not reach its guest");
                }
            }
            // The kernel tells here that an answer was not wanted any more.
            Err(error) => tracing::debug!(%error, "a published port"),
        }
    }
}

/// Ends all flows: each task holds the map that holds it.
struct Ends(Arc<Flows>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.all().clear();
    }
}

/// Sends a datagram to the guest; one that is not there, or has no room, loses it, as networks do.
async fn send(
    socket: &Arc<UdpSocket>,
    flows: &Arc<Flows>,
    target: &Target,
    client: SocketAddr,
    datagram: &[u8],
) -> io::Result<()> {
    let Some(life) = target.life() else { return Ok(()) };
    let known = {
        let all = flows.all();
        all.get(&client).filter(|flow| flow.life == life).map(|flow| {
            flow.used.store(flows.now(), Ordering::Relaxed);
            Arc::clone(&flow.socket)
        })
    };
    let to_guest = match known {
        Some(flow) => flow,
        None => match open(socket, flows, target, (client, life)).await? {
            Some(flow) => flow,
            None => return Ok(()),
        },
    };
    // Past tokio, which would wait to hear that a new socket is writable.
    match rustix::net::send(&to_guest, datagram, SendFlags::DONTWAIT) {
        Err(Errno::AGAIN) => Ok(()),
        sent => Ok(sent.map(drop)?),
    }
}

/// A flow for a client that has none.
async fn open(
    socket: &Arc<UdpSocket>,
    flows: &Arc<Flows>,
    target: &Target,
    (client, life): (SocketAddr, u64),
) -> io::Result<Option<Arc<UdpSocket>>> {
    {
        let mut all = flows.all();
        all.remove(&client);
        if all.len() >= FLOWS {
            let oldest = all.iter().min_by_key(|(_, flow)| flow.used.load(Ordering::Relaxed));
            if let Some(oldest) = oldest.map(|(client, _)| *client) {
                all.remove(&oldest);
            }
        }
    }
    let Some(room) = target.room(1) else { return Ok(None) };
    let to_guest = Arc::new(target.flow().await?);
    let used = Arc::new(AtomicU64::new(flows.now()));
    let back =
        answers(Arc::clone(&to_guest), Arc::clone(socket), client, Arc::clone(&used), Arc::clone(flows));
    let mut all = flows.all();
    // Under the lock: the task removes the flow when it ends.
    let task = tokio::spawn(back).abort_handle();
    all.insert(client, Flow { socket: Arc::clone(&to_guest), used, life, task, _room: room });
    Ok(Some(to_guest))
}

/// Brings what the guest answers to the client, until the flow is idle.
async fn answers(
    from: Arc<UdpSocket>,
    to: Arc<UdpSocket>,
    client: SocketAddr,
    used: Arc<AtomicU64>,
    flows: Arc<Flows>,
) {
    loop {
        let idle = Duration::from_millis(flows.now().saturating_sub(used.load(Ordering::Relaxed)));
        let Some(left) = IDLE.checked_sub(idle).filter(|left| !left.is_zero()) else { break };
        match tokio::time::timeout(left, from.readable()).await {
            // It was used meanwhile, or is idle.
            Err(_) => {}
            Ok(Err(_)) => break,
            Ok(Ok(())) => {
                used.store(flows.now(), Ordering::Relaxed);
                bring(&from, &to, client);
                tokio::task::yield_now().await;
            }
        }
    }
    let mut all = flows.all();
    // Another may have taken its place.
    if all.get(&client).is_some_and(|flow| Arc::ptr_eq(&flow.socket, &from)) {
        all.remove(&client);
    }
}

fn bring(from: &UdpSocket, to: &UdpSocket, client: SocketAddr) {
    let mut buffer = vec![0; LARGEST];
    for _ in 0..BURST {
        match from.try_recv(&mut buffer) {
            // What the client's side has no room for is lost, as in networks.
            Ok(length) => drop(rustix::net::sendto(to, &buffer[..length], SendFlags::DONTWAIT, &client)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            // The guest says that nobody is there (ICMP); it may be later.
            Err(_) => {}
        }
    }
}
