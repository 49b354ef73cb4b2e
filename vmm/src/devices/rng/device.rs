//! The device as its driver sees it. It has no configuration, and nothing of it is saved but its queue.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

use virtio_queue::QueueState;
use vmm_sys_util::epoll::EventSet;

use super::QUEUE_SIZE;
use super::worker::{KICK, TIMER, Worker};
use crate::reactor::{EventHandler, Reactor, Registration};
use crate::virtio::{ActivateError, Activation, Counters, RestoreError, VirtioDevice, Virtqueue};

/// The entropy device.
#[derive(Debug)]
pub struct Rng {
    reactor: Arc<Reactor>,
    active: Option<(Arc<Mutex<Worker>>, Registration)>,
    counters: Counters,
}

impl Rng {
    /// A device that works on `reactor`.
    pub fn new(reactor: Arc<Reactor>) -> Self {
        Self { reactor, active: None, counters: Counters::default() }
    }
}

impl VirtioDevice for Rng {
    type State = ();
    const TYPE: u32 = 4;

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queue = activation.queues.into_iter().next().filter(Virtqueue::is_usable);
        let queue = queue.ok_or(ActivateError::NoQueue(0))?;
        let failed = |source| ActivateError::Io { what: "watch the entropy device's queue", source };
        let kick = queue.kick_fd();
        let worker = Worker::new(queue, self.counters.clone()).map_err(failed)?;
        let timer = worker.timer.as_raw_fd();
        let worker = Arc::new(Mutex::new(worker));
        let handler: Arc<Mutex<dyn EventHandler>> = worker.clone();
        let registration = self.reactor.register(handler);
        // What was offered before is found by the timer, which runs out at once.
        registration.watch(timer, TIMER, EventSet::IN).map_err(failed)?;
        registration.watch(kick, KICK, EventSet::IN).map_err(failed)?;
        self.active = Some((worker, registration));
        Ok(())
    }

    fn reset(&mut self) {
        let Some((worker, registration)) = self.active.take() else { return };
        if let Some(queue) = worker.lock().unwrap_or_else(PoisonError::into_inner).queue.take() {
            // It was watched since the activation.
            let _ = registration.unwatch(queue.kick_fd());
        }
    }

    fn queue_states(&self) -> Vec<QueueState> {
        let worker =
            self.active.iter().map(|(worker, _)| worker.lock().unwrap_or_else(PoisonError::into_inner));
        worker.filter_map(|worker| worker.queue.as_ref().map(Virtqueue::state)).collect()
    }

    fn save(&self) {}

    fn restore(&mut self, (): &()) -> Result<(), RestoreError> {
        Ok(())
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }
}

impl Drop for Rng {
    fn drop(&mut self) {
        self.reset();
    }
}
