//! The transport: registers of virtio over MMIO, version 2 (virtio 1.2, section 4.2).

mod state;

use std::io;
use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::{
    ActivateError, Activation, Interrupt, VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1,
    VirtioDevice, Virtqueue,
};
use crate::bus::BusDevice;
use crate::memory::GuestRam;

pub use state::{Saved, SavedQueue, TransportState};

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// Says nothing of a device; the drivers do not look at it.
const VENDOR: u32 = u32::from_le_bytes(*b"CATL");
/// Configuration begins here.
const CONFIG: u64 = 0x100;
/// Where the driver writes a queue's number to notify the device.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// Device status bits (section 2.1).
mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// Features of the transport itself.
const TRANSPORT_FEATURES: u64 = VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC;

/// A virtio device behind its registers.
#[derive(Debug)]
pub struct Transport<D> {
    device: D,
    memory: GuestRam,
    interrupt: Interrupt,
    kicks: Vec<EventFd>,
    queues: Vec<Queue>,
    status: u32,
    features: u64,
    features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    active: bool,
}

impl<D: VirtioDevice> Transport<D> {
    /// Puts registers in front of a device that no driver has seen yet.
    pub fn new(device: D, memory: GuestRam) -> io::Result<Self> {
        let kicks = device.queue_sizes().iter().map(|_| super::event()).collect::<io::Result<_>>()?;
        let queues = fresh_queues(&device);
        Ok(Self {
            device,
            memory,
            interrupt: Interrupt::new()?,
            kicks,
            queues,
            status: 0,
            features: 0,
            features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            active: false,
        })
    }

    /// The device's interrupt; an interrupt controller waits for its event.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// One eventfd a queue; whoever can, writes them for the guest's writes to [`QUEUE_NOTIFY`].
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// The device behind the registers.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device behind the registers, for what the host asks of it.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    fn offered(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(self.queue_select as usize)
    }

    /// The selected queue, while the driver may change it: before it is ready, and before the device is.
    fn queue_in_setup(&mut self, readied: bool) -> Option<&mut Queue> {
        if self.active || self.status & status::FAILED != 0 {
            return None;
        }
        self.queues.get_mut(self.queue_select as usize).filter(|queue| readied || !queue.ready())
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => D::TYPE,
            0x00c => VENDOR,
            0x010 => half(self.offered(), self.features_select),
            0x034 => self.queue().map_or(0, |queue| u32::from(queue.max_size())),
            0x044 => self.queue().map_or(0, |queue| u32::from(queue.ready())),
            0x060 => self.interrupt.status(),
            0x070 => self.status(),
            // Shared memory regions, of which there are none: all ones.
            0x0b0..0x0c0 => u32::MAX,
            // Also ConfigGeneration (0xfc): configuration that changes is told by an interrupt, and read whole.
            _ => 0,
        }
    }

    fn status(&self) -> u32 {
        let needs_reset = if self.interrupt.is_reset_needed() { status::NEEDS_RESET } else { 0 };
        self.status | needs_reset
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            0x014 => self.features_select = value,
            0x020 => self.set_driver_features(value),
            0x024 => self.driver_features_select = value,
            0x030 => self.queue_select = value,
            0x038 => {
                if let (Some(queue), Ok(size)) = (self.queue_in_setup(false), u16::try_from(value)) {
                    queue.set_size(size);
                }
            }
            0x044 => {
                if let Some(queue) = self.queue_in_setup(true) {
                    queue.set_ready(value == 1);
                }
            }
            QUEUE_NOTIFY => {
                if let Some(kick) = self.kicks.get(value as usize) {
                    // Full means notified.
                    let _ = kick.write(1);
                }
            }
            0x064 => self.interrupt.acknowledge(value),
            0x070 => self.set_status(value),
            0x080..=0x0a4 => self.set_queue_address(offset, value),
            _ => {}
        }
    }

    fn set_driver_features(&mut self, value: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        match self.driver_features_select {
            0 => self.features = self.features & !0xffff_ffff | u64::from(value),
            1 => self.features = self.features & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    fn set_queue_address(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.queue_in_setup(false) else { return };
        match offset {
            0x080 => queue.set_desc_table_address(Some(value), None),
            0x084 => queue.set_desc_table_address(None, Some(value)),
            0x090 => queue.set_avail_ring_address(Some(value), None),
            0x094 => queue.set_avail_ring_address(None, Some(value)),
            0x0a0 => queue.set_used_ring_address(Some(value), None),
            0x0a4 => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    /// The driver writes device status: bits are only added, but for zero, which resets (section 3.1.1).
    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let known = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        let added = value & (known | status::FAILED) & !self.status;
        if self.status & !(value | status::FAILED) != 0 {
            return;
        }
        self.status |= added & !(status::FEATURES_OK | status::DRIVER_OK);
        if added & status::FEATURES_OK != 0 && self.are_right(self.features) {
            self.status |= status::FEATURES_OK;
        }
        if added & status::DRIVER_OK != 0 && self.status & status::FEATURES_OK != 0 {
            self.status |= status::DRIVER_OK;
            self.activate();
        }
    }

    fn are_right(&self, features: u64) -> bool {
        features & !self.offered() == 0 && features & VIRTIO_F_VERSION_1 != 0
    }

    fn activate(&mut self) {
        if let Err(error) = self.try_activate() {
            eprintln!("catalyst-vmm: virtio device {}: the driver's set-up cannot be used: {error}", D::TYPE);
            // As far as its queues go the device is a fresh one; the driver has to begin anew.
            self.queues = fresh_queues(&self.device);
            self.interrupt.needs_reset();
        }
    }

    fn try_activate(&mut self) -> Result<(), ActivateError> {
        let event_idx = self.features & VIRTIO_F_EVENT_IDX != 0;
        let mut queues = Vec::new();
        for (index, queue) in self.queues.iter_mut().enumerate() {
            queue.set_event_idx(event_idx);
            let kick = self.kicks[index]
                .try_clone()
                .map_err(|source| ActivateError::Io { what: "have a queue's eventfd once more", source })?;
            let own = std::mem::replace(queue, placeholder());
            let memory = Arc::clone(&self.memory);
            let counters = self.device.counters().clone();
            queues.push(Virtqueue::new(index, own, memory, kick, self.interrupt.clone(), counters));
        }
        // A ring outside memory would be found out at its first use; here the driver learns it at once.
        if let Some(index) = queues.iter().position(|queue| queue.state().ready && !queue.is_usable()) {
            return Err(ActivateError::Outside(index));
        }
        self.device.activate(Activation {
            memory: Arc::clone(&self.memory),
            queues,
            interrupt: self.interrupt.clone(),
            features: self.features,
        })?;
        self.active = true;
        Ok(())
    }

    fn reset(&mut self) {
        self.device.reset();
        self.active = false;
        self.interrupt.clear();
        for kick in &self.kicks {
            // What was notified before is of no interest after.
            let _ = kick.read();
        }
        self.queues = fresh_queues(&self.device);
        self.status = 0;
        self.features = 0;
        self.features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
    }
}

impl<D: VirtioDevice> BusDevice for Transport<D> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            data.fill(0);
            self.device.read_config(offset, data);
        } else if let (Ok(data), 0) = (<&mut [u8; 4]>::try_from(data), offset % 4) {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            if self.status & status::DRIVER != 0 {
                self.device.write_config(offset, data);
            }
        } else if let (Ok(data), 0) = (<[u8; 4]>::try_from(data), offset % 4) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}

/// 32 bits of 64.
fn half(value: u64, select: u32) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "the lower half is meant")]
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn fresh_queues<D: VirtioDevice>(device: &D) -> Vec<Queue> {
    device.queue_sizes().iter().map(|&size| Queue::new(size).unwrap_or_else(|_| placeholder())).collect()
}

/// What stands in for a queue that the device has.
fn placeholder() -> Queue {
    #[expect(clippy::expect_used, reason = "1 is a power of two, which is all that is asked of a size")]
    Queue::new(1).expect("a queue of one")
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
