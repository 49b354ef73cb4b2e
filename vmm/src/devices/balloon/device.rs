//! The device as its driver sees it.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

use virtio_queue::QueueState;
use vmm_sys_util::epoll::EventSet;

use super::worker::{AGAIN, KICKS, Worker};
use super::{
    BalloonState, DEFLATE, INFLATE, QUEUE_SIZE, VIRTIO_BALLOON_F_DEFLATE_ON_OOM, VIRTIO_BALLOON_F_REPORTING,
};
use crate::reactor::{EventHandler, Reactor, Registration};
use crate::virtio::{
    ActivateError, Activation, Counters, Interrupt, RestoreError, VirtioDevice, Virtqueue, read_config_bytes,
};

/// The balloon.
#[derive(Debug)]
pub struct Balloon {
    reactor: Arc<Reactor>,
    active: Option<Active>,
    state: BalloonState,
    counters: Counters,
}

#[derive(Debug)]
struct Active {
    worker: Arc<Mutex<Worker>>,
    registration: Registration,
    interrupt: Interrupt,
}

impl Balloon {
    /// An empty balloon that works on `reactor`.
    pub fn new(reactor: Arc<Reactor>) -> Self {
        Self { reactor, active: None, state: BalloonState::default(), counters: Counters::default() }
    }

    /// Asks the guest to give up `pages` pages of 4 KiB in all. What it does is its own affair; see
    /// [`Balloon::actual`].
    pub fn set_target(&mut self, pages: u32) {
        self.state.target = pages;
        if let Some(active) = &self.active {
            active.interrupt.config_change();
        }
    }

    /// Pages of 4 KiB that the guest says it has given up by being asked.
    pub fn actual(&self) -> u32 {
        self.state.actual
    }
}

impl VirtioDevice for Balloon {
    type State = BalloonState;
    const TYPE: u32 = 5;

    fn features(&self) -> u64 {
        VIRTIO_BALLOON_F_DEFLATE_ON_OOM | VIRTIO_BALLOON_F_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 3]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 8];
        config[..4].copy_from_slice(&self.state.target.to_le_bytes());
        config[4..].copy_from_slice(&self.state.actual.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (4, Ok(actual)) = (offset, <[u8; 4]>::try_from(data)) {
            self.state.actual = u32::from_le_bytes(actual);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if let Some(missing) =
            [INFLATE, DEFLATE].into_iter().find(|index| !activation.queues[*index].is_usable())
        {
            return Err(ActivateError::NoQueue(missing));
        }
        let failed = |source| ActivateError::Io { what: "watch the balloon's queues", source };
        let kicks: Vec<_> =
            activation.queues.iter().map(|queue| (queue.kick_fd(), queue.is_usable())).collect();
        let worker = Worker::new(activation.queues, self.counters.clone()).map_err(failed)?;
        let again = worker.again.as_raw_fd();
        let worker = Arc::new(Mutex::new(worker));
        let handler: Arc<Mutex<dyn EventHandler>> = worker.clone();
        let registration = self.reactor.register(handler);
        registration.watch(again, AGAIN, EventSet::IN).map_err(failed)?;
        for (token, (kick, _)) in (KICKS..).zip(kicks).filter(|(_, (_, usable))| *usable) {
            registration.watch(kick, token, EventSet::IN).map_err(failed)?;
        }
        self.active = Some(Active { worker, registration, interrupt: activation.interrupt });
        Ok(())
    }

    fn reset(&mut self) {
        let Some(Active { worker, registration, .. }) = self.active.take() else { return };
        for queue in worker.lock().unwrap_or_else(PoisonError::into_inner).queues.drain(..) {
            // It fails for a queue that the driver did not set up.
            let _ = registration.unwatch(queue.kick_fd());
        }
        self.state.actual = 0;
    }

    fn queue_states(&self) -> Vec<QueueState> {
        let Some(active) = &self.active else { return Vec::new() };
        let worker = active.worker.lock().unwrap_or_else(PoisonError::into_inner);
        worker.queues.iter().map(Virtqueue::state).collect()
    }

    fn save(&self) -> BalloonState {
        self.state
    }

    fn restore(&mut self, state: &BalloonState) -> Result<(), RestoreError> {
        self.state = *state;
        Ok(())
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }
}

impl Drop for Balloon {
    fn drop(&mut self) {
        self.reset();
    }
}
