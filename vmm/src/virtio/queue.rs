//! A virtqueue that is in use: the ring in guest memory, how the driver notifies and is notified.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};
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
    /// Chains pushed since the last notification.
    unannounced: u16,
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
        Self { index, queue, memory, kick, interrupt, counters, unannounced: 0 }
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
        self.push_all(&[(head, written)])
    }

    /// Gives several chains back at once, as (head, bytes written): the driver sees all of them or none, as it must
    /// where they hold one frame together (section 5.1.6.4).
    pub fn push_all(&mut self, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        self.try_push_all(chains).map_err(|why| QueueError { queue: self.index, why })
    }

    fn try_push_all(&mut self, chains: &[(u16, u32)]) -> Result<(), Error> {
        let Some((&(last, last_written), others)) = chains.split_last() else { return Ok(()) };
        for &(head, written) in others {
            self.write_used(head, written)?;
            self.queue.set_next_used(self.queue.next_used().wrapping_add(1));
            self.announce_later();
        }
        // Only this makes the driver see the ring's new index.
        self.queue.add_used(self.memory.as_ref(), last, last_written)?;
        self.announce_later();
        Ok(())
    }

    /// Fills the next element of the used ring (section 2.7.8).
    fn write_used(&self, head: u16, written: u32) -> Result<(), Error> {
        if head >= self.queue.size() {
            return Err(Error::InvalidDescriptorIndex);
        }
        let slot = u64::from(self.queue.next_used() % self.queue.size());
        let at = self.queue.used_ring().checked_add(4 + 8 * slot).ok_or(Error::AddressOverflow)?;
        let element = u64::from(head) | u64::from(written) << 32;
        self.memory.write_obj(element.to_le(), GuestAddress(at)).map_err(Error::GuestMemory)
    }

    fn announce_later(&mut self) {
        self.counters.used();
        self.unannounced = self.unannounced.saturating_add(1);
    }

    /// Tells the driver of what was pushed, if it wants to know. Call it once after a batch of pushes.
    pub fn notify(&mut self) -> Result<(), QueueError> {
        if self.unannounced == 0 {
            return Ok(());
        }
        let wanted = self.wants_notification().map_err(|why| QueueError { queue: self.index, why })?;
        self.unannounced = 0;
        if wanted {
            self.counters.interrupted();
            self.interrupt.used_buffer();
        }
        Ok(())
    }

    /// Whether what was pushed passes the index that the driver waits for (section 2.7.7.2). The library's own
    /// answer counts the last chain only of those that were pushed at once.
    fn wants_notification(&mut self) -> Result<bool, Error> {
        let last = self.queue.needs_notification(self.memory.as_ref())?;
        if last || self.unannounced < 2 || !self.queue.event_idx_enabled() {
            return Ok(last);
        }
        let at = self.queue.avail_ring().checked_add(4 + 2 * u64::from(self.queue.size()));
        let at = GuestAddress(at.ok_or(Error::AddressOverflow)?);
        let event: u16 = self.memory.load(at, Ordering::Relaxed).map_err(Error::GuestMemory)?;
        let beyond = self.queue.next_used().wrapping_sub(u16::from_le(event)).wrapping_sub(1);
        Ok(beyond < self.unannounced)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{self, DriverQueue};

    #[test]
    fn chains_that_are_pushed_at_once_come_back_in_order_and_are_announced() {
        let memory = testing::memory();
        let mut driver = DriverQueue::new(&memory, 0, 8);
        let counters = Counters::default();
        let mut queue = driver.device_side(0, &Interrupt::new().unwrap(), &counters);
        queue.queue.set_event_idx(true);
        let event = GuestAddress(driver.avail + 4 + 2 * 8);
        // The driver waits for: nothing that is near, the first, the second, the last of three; each time the ring
        // has turned further.
        for (wanted, interrupts) in [(100, 0), (3, 1), (7, 2), (11, 3), (15, 3), (11, 3)] {
            memory.write_obj::<u16>(wanted, event).unwrap();
            queue.push_all(&[(1, 10), (2, 20), (3, 30)]).unwrap();
            queue.notify().unwrap();
            queue.notify().unwrap();
            assert_eq!(counters.counted().interrupts, interrupts, "{wanted}");
            let back: Vec<_> = std::iter::from_fn(|| driver.take_used()).collect();
            assert_eq!(back, [(1, 10), (2, 20), (3, 30)]);
        }
        assert_eq!(counters.counted().requests, 18);
        assert!(queue.push_all(&[(8, 0), (1, 0)]).is_err());
        assert!(driver.take_used().is_none());
        queue.push_all(&[]).unwrap();
    }
}
