//! What is saved of a transport, and how it goes on from that.

use std::fmt::Debug;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState};

use super::{Transport, fresh_queues, status};
use crate::virtio::{RestoreError, VirtioDevice};

/// What is saved of a transport and its device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState<S> {
    /// The device's own.
    pub device: S,
    /// Device status.
    pub status: u32,
    /// Features that the driver took.
    pub features: u64,
    /// Which half of the device's features the driver reads.
    pub features_select: u32,
    /// Which half of its own features the driver writes.
    pub driver_features_select: u32,
    /// Which queue the driver speaks of.
    pub queue_select: u32,
    /// InterruptStatus.
    pub interrupt_status: u32,
    /// Whether the device had given up.
    pub needs_reset: bool,
    /// The queues.
    pub queues: Vec<SavedQueue>,
}

/// A queue, as it is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    /// Longest size.
    pub max_size: u16,
    /// Size that the driver chose.
    pub size: u16,
    /// Whether the driver has set it up.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest physical address of the available ring.
    pub avail_ring: u64,
    /// Guest physical address of the used ring.
    pub used_ring: u64,
    /// Index of the next chain to take.
    pub next_avail: u16,
    /// Index of the next chain to give back.
    pub next_used: u16,
    /// Whether notifications are asked for by index.
    pub event_idx_enabled: bool,
}

impl From<QueueState> for SavedQueue {
    fn from(state: QueueState) -> Self {
        Self {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx_enabled,
        }
    }
}

impl From<SavedQueue> for QueueState {
    fn from(saved: SavedQueue) -> Self {
        Self {
            max_size: saved.max_size,
            size: saved.size,
            ready: saved.ready,
            desc_table: saved.desc_table,
            avail_ring: saved.avail_ring,
            used_ring: saved.used_ring,
            next_avail: saved.next_avail,
            next_used: saved.next_used,
            event_idx_enabled: saved.event_idx_enabled,
        }
    }
}

impl<D: VirtioDevice> Transport<D> {
    /// What is to be saved. Device threads must be paused.
    pub fn save(&self) -> TransportState<D::State> {
        let own = self.queues.iter().map(Queue::state);
        let mut queues: Vec<QueueState> =
            if self.active { self.device.queue_states() } else { own.collect() };
        if queues.len() != self.kicks.len() {
            // A device that gave up may have dropped them; it waits for a reset, after which they are such.
            queues = fresh_queues(&self.device).iter().map(Queue::state).collect();
        }
        TransportState {
            device: self.device.save(),
            status: self.status,
            features: self.features,
            features_select: self.features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            interrupt_status: self.interrupt.status(),
            needs_reset: self.interrupt.is_reset_needed(),
            queues: queues.into_iter().map(SavedQueue::from).collect(),
        }
    }

    /// Goes on from what was saved of such a device; the transport must be fresh. What was saved is checked like what
    /// a driver writes. A device that worked works again once its thread runs: it looks at each of its queues, and an
    /// interrupt that the driver has not acknowledged is raised. No guest memory is written here.
    pub fn restore(&mut self, state: &TransportState<D::State>) -> Result<(), RestoreError> {
        self.device.restore(&state.device)?;
        self.check(state)?;
        self.queues = self.saved_queues(&state.queues)?;
        self.status = state.status;
        self.features = state.features;
        self.features_select = state.features_select;
        self.driver_features_select = state.driver_features_select;
        self.queue_select = state.queue_select;
        self.interrupt.restore(state.interrupt_status, state.needs_reset);
        // One that had given up, or never began, waits for its driver's reset.
        if state.status & status::DRIVER_OK != 0 && !state.needs_reset {
            self.try_activate()?;
            self.kick_all(&state.queues);
        }
        Ok(())
    }

    fn check(&self, state: &TransportState<D::State>) -> Result<(), RestoreError> {
        let damaged = |what: String| Err(RestoreError::Damaged(what));
        let known =
            status::ACKNOWLEDGE | status::DRIVER | status::DRIVER_OK | status::FEATURES_OK | status::FAILED;
        if state.status & !known != 0 {
            return damaged(format!("no device has the status {:#x}", state.status));
        }
        let set = |bit: u32| state.status & bit != 0;
        if set(status::DRIVER_OK) && !set(status::FEATURES_OK) {
            return damaged("its driver works without having settled features".into());
        }
        if set(status::FEATURES_OK) && !self.are_right(state.features) {
            let offered = self.offered();
            return damaged(format!("its driver took features {:#x} of {offered:#x}", state.features));
        }
        RestoreError::unless_same("number of queues", &state.queues.len(), &self.kicks.len())
    }

    fn saved_queues(&self, saved: &[SavedQueue]) -> Result<Vec<Queue>, RestoreError> {
        let mut queues = Vec::new();
        for (queue, longest) in saved.iter().zip(self.device.queue_sizes()) {
            RestoreError::unless_same("longest queue", &queue.max_size, longest)?;
            let queue = Queue::try_from(QueueState::from(*queue))
                .map_err(|error| RestoreError::Damaged(format!("queue {}: {error}", queues.len())))?;
            queues.push(queue);
        }
        Ok(queues)
    }

    /// The device may have been notified just before it was saved.
    fn kick_all(&self, queues: &[SavedQueue]) {
        for (kick, _) in self.kicks.iter().zip(queues).filter(|(_, queue)| queue.ready) {
            // Full means notified.
            let _ = kick.write(1);
        }
    }
}

/// A transport whose device is not known by type: what a machine saves of each.
pub trait Saved: Send + Debug {
    /// What [`Transport::save`] gives.
    fn save(&self) -> serde_json::Result<serde_json::Value>;

    /// [`Transport::restore`].
    fn restore(&mut self, state: &serde_json::Value) -> Result<(), RestoreError>;
}

impl<D: VirtioDevice> Saved for Transport<D> {
    fn save(&self) -> serde_json::Result<serde_json::Value> {
        serde_json::to_value(Transport::save(self))
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), RestoreError> {
        let state = TransportState::<D::State>::deserialize(state)
            .map_err(|error| RestoreError::Damaged(error.to_string()))?;
        Transport::restore(self, &state)
    }
}
