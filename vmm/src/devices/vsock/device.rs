//! The device as its driver sees it.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::QueueState;

use super::VsockState;
use super::host::Host;
use super::worker::Worker;
use crate::reactor::Reactor;
use crate::virtio::{ActivateError, Activation, Counters, RestoreError, VirtioDevice, read_config_bytes};

/// Feature bit: streams (virtio 1.2, section 5.10.3).
const VIRTIO_VSOCK_F_STREAM: u64 = 1 << 0;
/// rx, tx, events.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// A socket device over Unix sockets (virtio 1.2, section 5.10), streams only.
#[derive(Debug)]
pub struct Vsock {
    cid: u32,
    reactor: Arc<Reactor>,
    worker: Arc<Mutex<Worker>>,
    counters: Counters,
}

impl Vsock {
    /// A device of the guest's context ID `cid` (3 or more). Clients of `listener` reach ports of the guest; what
    /// the guest connects to goes to `upstream`, a Unix seqpacket socket (see [`super`]). Without one of them that
    /// direction is refused. It works on the reactor's thread.
    pub fn new(
        cid: u32,
        listener: Option<UnixListener>,
        upstream: Option<OwnedFd>,
        reactor: Arc<Reactor>,
    ) -> Self {
        let counters = Counters::default();
        let worker = Worker::new(cid, Host::new(listener, upstream), counters.clone());
        Self { cid, reactor, worker: Arc::new(Mutex::new(worker)), counters }
    }

    /// Drops all connections, but not the listener, and tells the guest so (section 5.10.6.7). The guest then reads
    /// its CID anew.
    pub fn transport_reset(&mut self) {
        self.worker().transport_reset();
    }

    /// A panic ends the monitor's process, so the lock is never found poisoned there.
    pub(super) fn worker(&self) -> MutexGuard<'_, Worker> {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for Vsock {
    type State = VsockState;

    const TYPE: u32 = VIRTIO_ID_VSOCK;

    fn features(&self) -> u64 {
        VIRTIO_VSOCK_F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        for index in 0..QUEUE_SIZES.len() {
            if !activation.queues.get(index).is_some_and(crate::virtio::Virtqueue::is_usable) {
                return Err(ActivateError::NoQueue(index));
            }
        }
        self.reset();
        let failed = |source| ActivateError::Io { what: "watch the queues of the vsock", source };
        let again = crate::virtio::event().map_err(failed)?;
        let handler = Arc::clone(&self.worker);
        let registration = self.reactor.register(handler);
        let started = self.worker().start(activation, registration, again);
        if let Err(source) = started {
            self.reset();
            return Err(failed(source));
        }
        Ok(())
    }

    fn reset(&mut self) {
        // Apart, since the registration must not be dropped while the worker is locked.
        let registration = self.worker().stop();
        drop(registration);
    }

    fn queue_states(&self) -> Vec<QueueState> {
        self.worker().queue_states()
    }

    fn save(&self) -> VsockState {
        VsockState { cid: self.cid }
    }

    /// What the guest knows of its connections is worth nothing, and its CID may be another now: it is told so by a
    /// transport reset once the device works.
    fn restore(&mut self, _: &VsockState) -> Result<(), RestoreError> {
        self.worker().owe_reset();
        Ok(())
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.reset();
    }
}
