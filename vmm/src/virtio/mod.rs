//! Virtio (version 1.2): what every device has in common, and the transport over memory-mapped registers.
//!
//! A device knows its [`Virtqueue`]s, guest memory and descriptors that it was given; it knows neither KVM nor
//! another device. [`mmio::Transport`] stands between it and the guest's driver: features, status, queue addresses.

pub mod counters;
pub mod interrupt;
pub mod mmio;
pub mod queue;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

use std::fmt::Debug;
use std::io;

use serde::Serialize;
use serde::de::DeserializeOwned;
use vmm_sys_util::eventfd::EventFd;

pub use counters::Counters;
pub use interrupt::Interrupt;
pub use queue::{QueueError, Virtqueue};

use crate::memory::GuestRam;

/// Feature bit of devices that follow version 1 (virtio 1.2, section 6). The transport offers it for all.
pub const VIRTIO_F_VERSION_1: u64 = 1 << 32;
/// Feature bit of notifications that are asked for by index (section 2.7.7). The transport offers it for all.
pub const VIRTIO_F_EVENT_IDX: u64 = 1 << 29;
/// Feature bit of descriptors in a table of their own (section 2.7.5.3). The transport offers it for all.
pub const VIRTIO_F_INDIRECT_DESC: u64 = 1 << 28;

/// What a device works with once its driver is ready.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory.
    pub memory: GuestRam,
    /// All queues of the device; those that the driver left out are not ready.
    pub queues: Vec<Virtqueue>,
    /// How the driver is told of changes (also in each queue).
    pub interrupt: Interrupt,
    /// The features that the driver took.
    pub features: u64,
}

/// Why a device did not begin to work. The driver sees that the device needs a reset.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// A system call failed.
    #[error("Cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The driver left out a queue that the device cannot do without.
    #[error("The driver did not set queue {0} up")]
    NoQueue(usize),
    /// A queue that cannot be read and written.
    #[error("Queue {0} lies outside memory or overlaps its end")]
    Outside(usize),
}

/// Why a device cannot go on as it was saved. It is of no use then.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The device is not the one that was saved.
    #[error("Its {what} was {saved} when it was saved, and the description makes it {given}")]
    Differs {
        /// What differs.
        what: &'static str,
        /// As it was saved.
        saved: String,
        /// As it is.
        given: String,
    },
    /// What was saved is not of such a device.
    #[error("What was saved of it is damaged: {0}")]
    Damaged(String),
    /// It cannot be set to work again.
    #[error("It cannot go on working")]
    Activate(#[from] ActivateError),
}

impl RestoreError {
    /// [`RestoreError::Differs`], if it does.
    pub fn unless_same<T: PartialEq + Debug>(what: &'static str, saved: &T, given: &T) -> Result<(), Self> {
        if saved == given {
            return Ok(());
        }
        Err(Self::Differs { what, saved: format!("{saved:?}"), given: format!("{given:?}") })
    }
}

/// A virtio device, as the transport sees it.
pub trait VirtioDevice: Send + Debug {
    /// What is saved of it besides its queues: plain data.
    type State: Serialize + DeserializeOwned + Clone + Debug + PartialEq;

    /// The device's number (virtio 1.2, section 5).
    const TYPE: u32;

    /// Features that the device offers, besides those that the transport offers for all.
    fn features(&self) -> u64;

    /// The longest that each queue may be; a power of two each.
    fn queue_sizes(&self) -> &[u16];

    /// The driver reads configuration; what is beyond its end stays as it is in `data`.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver writes configuration.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready: the device begins to work, most often by registering a handler with a reactor.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// The driver resets the device: it stops and gives its queues up. When this returns no thread touches guest
    /// memory for this device any more. A device that is not active does nothing.
    fn reset(&mut self);

    /// The device's queues while it is active, for saving; nothing may be running then (see `reactor`).
    fn queue_states(&self) -> Vec<virtio_queue::QueueState>;

    /// What is saved of the device, besides its queues.
    fn save(&self) -> Self::State;

    /// Takes over what was saved of such a device. It comes before the activation, if there is one: what the driver is
    /// to be told is told then.
    fn restore(&mut self, state: &Self::State) -> Result<(), RestoreError>;

    /// What the device has done so far.
    fn counters(&self) -> &Counters;
}

/// Reads configuration from the bytes that it consists of.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    if let Some(rest) = config.get(start..) {
        let length = rest.len().min(data.len());
        data[..length].copy_from_slice(&rest[..length]);
    }
}

/// An eventfd that neither blocks nor is inherited.
pub(crate) fn event() -> io::Result<EventFd> {
    EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK | vmm_sys_util::eventfd::EFD_CLOEXEC)
}
