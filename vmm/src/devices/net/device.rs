//! The NIC as its driver and the machine see it.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use virtio_queue::QueueState;

use super::tap::Tap;
use super::worker::Worker;
use super::{NetError, NetState, QUEUE_SIZE, RECEIVE, SEND};
use crate::reactor::Reactor;
use crate::virtio::{
    ActivateError, Activation, Counters, Interrupt, RestoreError, VirtioDevice, Virtqueue, read_config_bytes,
};

/// Fragments of UDP (`*_UFO`) are not offered: Linux makes none any more.
const FEATURES: [u32; 11] = [
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_MRG_RXBUF,
];
/// Most frames that are thrown away when the link comes up: more than a tap's queue holds, unless someone fills it
/// at the same time.
const STALE_FRAMES: usize = 4096;

/// A NIC on a tap.
#[derive(Debug)]
pub struct Net {
    tap: Arc<Tap>,
    mac: [u8; 6],
    link_up: bool,
    reactor: Arc<Reactor>,
    counters: Counters,
    active: Option<Active>,
}

#[derive(Debug)]
struct Active {
    worker: Arc<Mutex<Worker>>,
    interrupt: Interrupt,
}

impl Net {
    /// Takes a tap that was opened with `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`, sets it non-blocking and its
    /// offloads off. The link is up. Frames are moved by `reactor`'s thread.
    pub fn new(tap: File, mac: [u8; 6], reactor: Arc<Reactor>) -> Result<Self, NetError> {
        let tap = Arc::new(Tap::new(tap)?);
        Ok(Self { tap, mac, link_up: true, reactor, counters: Counters::default(), active: None })
    }

    /// Pulls the cable out, or puts it in, and tells the driver. While it is out, frames of the guest are thrown
    /// away, and so are those that came for it meanwhile.
    pub fn set_link(&mut self, up: bool) {
        if self.link_up == up {
            return;
        }
        self.link_up = up;
        let worker = self.active.as_ref().map(|active| lock(&active.worker));
        if up {
            self.tap.discard(STALE_FRAMES);
        }
        if let Some(mut worker) = worker {
            worker.set_link(up);
        }
        if let Some(active) = &self.active {
            active.interrupt.config_change();
        }
    }

    fn config(&self) -> [u8; 8] {
        let mut config = [0; 8];
        config[..6].copy_from_slice(&self.mac);
        let status = if self.link_up { VIRTIO_NET_S_LINK_UP } else { 0 };
        config[6..].copy_from_slice(&status.to_le_bytes()[..2]);
        config
    }
}

impl VirtioDevice for Net {
    type State = NetState;

    const TYPE: u32 = virtio_bindings::virtio_ids::VIRTIO_ID_NET;

    fn features(&self) -> u64 {
        FEATURES.iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut queues = activation.queues.into_iter();
        let mut next =
            |index| queues.next().filter(Virtqueue::is_usable).ok_or(ActivateError::NoQueue(index));
        let (receive, send) = (next(RECEIVE)?, next(SEND)?);
        self.tap.set_offloads(activation.features).map_err(|source| ActivateError::Io {
            what: "set the offloads of the NIC's tap that the driver took",
            source,
        })?;
        let worker = Worker::new(
            Arc::clone(&self.tap),
            receive,
            send,
            self.counters.clone(),
            activation.features,
            self.link_up,
        );
        let worker = Arc::new(Mutex::new(worker));
        let registration = self.reactor.register(Arc::clone(&worker) as _);
        let started = lock(&worker).start(registration);
        self.active = Some(Active { worker, interrupt: activation.interrupt });
        started.map_err(|source| {
            self.reset();
            ActivateError::Io { what: "wait for the NIC's tap and its driver", source }
        })
    }

    fn reset(&mut self) {
        let Some(active) = self.active.take() else { return };
        // Once it is stopped, a call that is on its way already does nothing.
        let registration = lock(&active.worker).stop();
        drop(registration);
        // A tap that has gone needs none.
        let _ = self.tap.set_offloads(0);
    }

    fn queue_states(&self) -> Vec<QueueState> {
        self.active.as_ref().map(|active| lock(&active.worker).queue_states()).unwrap_or_default()
    }

    fn save(&self) -> NetState {
        NetState { mac: self.mac, link_up: self.link_up }
    }

    /// The address stays the one that the guest knows: it is the guest's to change.
    fn restore(&mut self, state: &NetState) -> Result<(), RestoreError> {
        self.mac = state.mac;
        self.link_up = state.link_up;
        Ok(())
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.reset();
    }
}

/// A panic ends the monitor's process, so no lock is ever found poisoned there.
fn lock(worker: &Mutex<Worker>) -> MutexGuard<'_, Worker> {
    worker.lock().unwrap_or_else(PoisonError::into_inner)
}
