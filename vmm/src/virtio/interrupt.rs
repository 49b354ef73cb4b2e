//! How a device tells its driver of something.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// InterruptStatus: a queue was used (virtio 1.2, section 4.2.2).
pub const USED_BUFFER: u32 = 1;
/// InterruptStatus: the configuration changed.
pub const CONFIG_CHANGE: u32 = 2;

/// A device's interrupt: a status word that the driver reads and acknowledges, and an eventfd on which the
/// interrupt controller waits. Clones are one interrupt.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    status: AtomicU32,
    needs_reset: AtomicBool,
    event: EventFd,
}

impl Interrupt {
    /// A new one with nothing to tell.
    pub fn new() -> io::Result<Self> {
        let inner =
            Inner { status: AtomicU32::new(0), needs_reset: AtomicBool::new(false), event: super::event()? };
        Ok(Self(Arc::new(inner)))
    }

    /// Buffers of a queue were used.
    pub fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// The configuration changed.
    pub fn config_change(&self) {
        self.raise(CONFIG_CHANGE);
    }

    /// The device met what it cannot go on from, such as a ring that makes no sense (section 2.1.2).
    pub fn needs_reset(&self) {
        self.0.needs_reset.store(true, Ordering::SeqCst);
        self.raise(CONFIG_CHANGE);
    }

    /// Whether it did since the last [`Interrupt::clear`].
    pub fn is_reset_needed(&self) -> bool {
        self.0.needs_reset.load(Ordering::SeqCst)
    }

    /// What the driver reads as InterruptStatus.
    pub fn status(&self) -> u32 {
        self.0.status.load(Ordering::SeqCst)
    }

    /// The driver has seen these bits.
    pub fn acknowledge(&self, bits: u32) {
        self.0.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Forgets everything, as a reset does.
    pub fn clear(&self) {
        self.0.status.store(0, Ordering::SeqCst);
        self.0.needs_reset.store(false, Ordering::SeqCst);
    }

    /// Sets what [`Interrupt::status`] says, when a saved device comes back. What the driver has not acknowledged is told
    /// once more: whether the interrupt had reached it, nobody knows.
    pub fn restore(&self, status: u32, needs_reset: bool) {
        self.0.needs_reset.store(needs_reset, Ordering::SeqCst);
        let status = status & (USED_BUFFER | CONFIG_CHANGE);
        if status != 0 {
            self.raise(status);
        }
    }

    /// The eventfd that is written for each interrupt.
    pub fn event(&self) -> &EventFd {
        &self.0.event
    }

    fn raise(&self, bits: u32) {
        self.0.status.fetch_or(bits, Ordering::SeqCst);
        // Fails only when the counter is full, and then the interrupt is pending anyway.
        let _ = self.0.event.write(1);
    }
}
