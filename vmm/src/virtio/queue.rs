//! A virtqueue that is in use: the ring in guest memory, how the driver notifies and is notified.

use std::os::fd::{AsRawFd, RawFd};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::{Counters, Interrupt};
use crate::memory::GuestRam;

/// The guest's ring makes no sense: its indices run further ahead than it is long, or it lies outside RAM.
#[derive(Debug, thiserror::Error)]
#[error("The ring of queue {queue} cannot be used: {why}")]
pub struct QueueError {
    queue: usize,
    why: virtio_queue::Error,
}

/// A chain of descriptors of the guest. Its descriptors are followed at most as often as the queue is long, so
/// chains that loop end; addresses are checked when they are used.
pub type Chain = DescriptorChain<GuestRam>;

/// A virtqueue (virtio 1.2, section 2.7), set up by its driver.
#[derive(Debug)]
pub struct Virtqueue {
    index: usize,
    queue: Queue,
    memory: GuestRam,
    kick: EventFd,
    interrupt: Interrupt,
    counters: Counters,
}

impl Virtqueue {
    /// Puts together what the transport has.
    pub fn new(
        index: usize,
        queue: Queue,
        memory: GuestRam,
        kick: EventFd,
        interrupt: Interrupt,
        counters: Counters,
    ) -> Self {
        Self { index, queue, memory, kick, interrupt, counters }
    }

    /// Whether the driver has set it up, within guest memory.
    pub fn is_usable(&self) -> bool {
        self.queue.ready() && self.queue.is_valid(self.memory.as_ref())
    }

    /// The descriptor that becomes readable when the driver notifies; empty it with [`Virtqueue::take_kick`].
    pub fn kick_fd(&self) -> RawFd {
        self.kick.as_raw_fd()
    }

    /// Takes the notification that was waited for; false if there was none.
    pub fn take_kick(&self) -> bool {
        let kicked = self.kick.read().is_ok();
        if kicked {
            self.counters.kicked();
        }
        kicked
    }

    /// Notifies the device itself, for what it leaves to its next turn.
    pub fn kick_again(&self) {
        // Fails only when the counter is full, and then a notification is pending anyway.
        let _ = self.kick.write(1);
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestRam {
        &self.memory
    }

    /// The next chain that the driver offers, if there is one.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let memory = GuestRam::clone(&self.memory);
        // Unlike `pop_descriptor_chain` this tells of indices that make no sense.
        let mut chains = self.queue.iter(memory).map_err(|why| QueueError { queue: self.index, why })?;
        Ok(chains.next())
    }

    /// Offers the chain that was popped last once more at the next pop, when it could not be used now.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back to the driver, `written` bytes of it written.
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.counters.used();
        self.queue
            .add_used(self.memory.as_ref(), head, written)
            .map_err(|why| QueueError { queue: self.index, why })
    }

    /// Tells the driver of what was pushed, if it wants to know. Call it once after a batch of pushes.
    pub fn notify(&mut self) -> Result<(), QueueError> {
        let wanted = self
            .queue
            .needs_notification(self.memory.as_ref())
            .map_err(|why| QueueError { queue: self.index, why })?;
        if wanted {
            self.counters.interrupted();
            self.interrupt.used_buffer();
        }
        Ok(())
    }

    /// The driver need not notify: the device is looking.
    pub fn disable_kicks(&mut self) -> Result<(), QueueError> {
        self.queue
            .disable_notification(self.memory.as_ref())
            .map_err(|why| QueueError { queue: self.index, why })
    }

    /// Asks the driver to notify; true if there is more to pop already, for which it did not.
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        self.queue
            .enable_notification(self.memory.as_ref())
            .map_err(|why| QueueError { queue: self.index, why })
    }

    /// Tells the driver that the device cannot go on, and counts it.
    pub fn give_up(&self, error: &QueueError) {
        eprintln!("catalyst-vmm: {error}; the device waits for a reset");
        self.counters.failed();
        self.interrupt.needs_reset();
    }

    /// What is saved of it.
    pub fn state(&self) -> QueueState {
        self.queue.state()
    }
}
