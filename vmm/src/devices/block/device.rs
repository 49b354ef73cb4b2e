//! The disk as its driver sees it: features, configuration, activation.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_queue::QueueState;
use vmm_sys_util::epoll::EventSet;

use super::image::{Image, ImageError};
use super::state::BlockState;
use super::worker::{Complaints, Disk, Worker};
use super::{
    MAX_DISCARD_RANGES, MAX_RANGE_SECTORS, MAX_SEGMENTS, MAX_ZERO_RANGES, NoRoom, QUEUE_SIZE, SECTOR,
    SERIAL_LENGTH,
};
use crate::description::Format;
use crate::reactor::{Reactor, Registration};
use crate::virtio::{
    ActivateError, Activation, Counters, RestoreError, VirtioDevice, Virtqueue, read_config_bytes,
};

/// Length of the configuration (section 5.2.4), without what belongs to features that are not offered.
const CONFIG_LENGTH: usize = 60;
/// The guest had better write 2 to the power of this many sectors at once: a page of the host's cache.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;

/// A disk.
pub struct Block {
    image: Image,
    serial: [u8; SERIAL_LENGTH],
    reactors: Vec<Arc<Reactor>>,
    queue_sizes: Vec<u16>,
    config: [u8; CONFIG_LENGTH],
    counters: Counters,
    complaints: Arc<Complaints>,
    no_room: NoRoom,
    active: Vec<Active>,
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Block")
            .field("image", &self.image)
            .field("active", &self.active)
            .finish_non_exhaustive()
    }
}

/// A queue while the device is active.
#[derive(Debug)]
struct Active {
    worker: Arc<Mutex<Worker>>,
    /// None for a queue that the driver left out.
    registration: Option<Registration>,
}

impl Block {
    /// A disk with a queue for each of `reactors`. Of `serial` at most [`SERIAL_LENGTH`] bytes are seen.
    pub fn new(image: Image, serial: &str, reactors: Vec<Arc<Reactor>>, no_room: NoRoom) -> Self {
        let mut padded = [0; SERIAL_LENGTH];
        let seen = serial.len().min(SERIAL_LENGTH);
        padded[..seen].copy_from_slice(&serial.as_bytes()[..seen]);
        Self {
            serial: padded,
            queue_sizes: vec![QUEUE_SIZE; reactors.len()],
            config: config(&image, reactors.len()),
            image,
            reactors,
            counters: Counters::default(),
            complaints: Arc::default(),
            no_room,
            active: Vec::new(),
        }
    }

    /// The disk's content, to be flushed when the machine ends.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// What is written goes into `overlay` from now on, an empty qcow2 on what the disk was. Threads of devices must be
    /// paused. `below` takes the place of what the disk's own file lay on, if there is any.
    pub fn switch(&mut self, overlay: File, below: Vec<(File, Format)>) -> Result<(), ImageError> {
        let image = self.image.under(overlay, below)?;
        for active in &self.active {
            active.worker.lock().unwrap_or_else(PoisonError::into_inner).disk.image = image.clone();
        }
        self.image = image;
        Ok(())
    }

    fn start(&self, index: usize, queue: Virtqueue, features: u64) -> Result<Active, ActivateError> {
        let usable = queue.is_usable();
        let kick = queue.kick_fd();
        let disk = Disk {
            image: self.image.clone(),
            serial: self.serial,
            features,
            counters: self.counters.clone(),
            complaints: Arc::clone(&self.complaints),
            no_room: Arc::clone(&self.no_room),
        };
        // A device that comes back from saved state may have requests that nobody notifies it of any more.
        if usable {
            queue.kick_again();
        }
        let worker = Arc::new(Mutex::new(Worker { queue: Some(queue), disk }));
        let registration = match self.reactors.get(index).filter(|_| usable) {
            None => None,
            Some(reactor) => {
                let handler = Arc::clone(&worker);
                let registration = reactor.register(handler);
                registration
                    .watch(kick, 0, EventSet::IN)
                    .map_err(|source| ActivateError::Io { what: "watch a disk's queue", source })?;
                Some(registration)
            }
        };
        Ok(Active { worker, registration })
    }
}

impl VirtioDevice for Block {
    type State = BlockState;

    const TYPE: u32 = 2;

    fn features(&self) -> u64 {
        let mut bits =
            vec![VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_TOPOLOGY];
        if self.image.is_read_only() {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        if self.reactors.len() > 1 {
            bits.push(VIRTIO_BLK_F_MQ);
        }
        bits.into_iter().map(|bit| 1 << bit).sum()
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        if !activation.queues.first().is_some_and(Virtqueue::is_usable) {
            return Err(ActivateError::NoQueue(0));
        }
        for (index, queue) in activation.queues.into_iter().enumerate() {
            match self.start(index, queue, activation.features) {
                Ok(active) => self.active.push(active),
                Err(error) => {
                    self.reset();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        for Active { worker, registration } in self.active.drain(..) {
            let kick = lock(&worker).queue.as_ref().map(Virtqueue::kick_fd);
            if let (Some(registration), Some(kick)) = (registration, kick) {
                // It was watched; and a reactor that ends watches nothing anyway.
                let _ = registration.unwatch(kick);
            }
            // The lock is free only when no request is being served; a late call of the handler finds no queue.
            lock(&worker).queue = None;
        }
    }

    fn queue_states(&self) -> Vec<QueueState> {
        self.active
            .iter()
            .filter_map(|active| lock(&active.worker).queue.as_ref().map(Virtqueue::state))
            .collect()
    }

    fn save(&self) -> BlockState {
        let serial = self.serial.iter().take_while(|&&byte| byte != 0).copied().collect::<Vec<_>>();
        BlockState {
            sectors: self.image.size() / SECTOR,
            read_only: self.image.is_read_only(),
            queues: self.queue_sizes.len().try_into().unwrap_or(u16::MAX),
            serial: String::from_utf8_lossy(&serial).into_owned(),
        }
    }

    fn restore(&mut self, state: &BlockState) -> Result<(), RestoreError> {
        let own = self.save();
        RestoreError::unless_same("size in sectors", &state.sectors, &own.sectors)?;
        RestoreError::unless_same("being read-only", &state.read_only, &own.read_only)?;
        RestoreError::unless_same("number of queues", &state.queues, &own.queues)?;
        RestoreError::unless_same("serial number", &state.serial, &own.serial)
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.reset();
    }
}

/// The configuration (section 5.2.4), in little-endian order.
fn config(image: &Image, queues: usize) -> [u8; CONFIG_LENGTH] {
    let mut config = [0; CONFIG_LENGTH];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    let granularity = u32::try_from(image.granularity() / SECTOR).unwrap_or(1);
    put(0, &(image.size() / SECTOR).to_le_bytes());
    put(12, &MAX_SEGMENTS.to_le_bytes());
    #[expect(clippy::cast_possible_truncation, reason = "512")]
    put(20, &(SECTOR as u32).to_le_bytes());
    put(24, &[PHYSICAL_BLOCK_EXPONENT]);
    put(26, &(1_u16 << PHYSICAL_BLOCK_EXPONENT).to_le_bytes());
    // The host's cache is written back.
    put(32, &[1]);
    put(34, &u16::try_from(queues).unwrap_or(u16::MAX).to_le_bytes());
    put(36, &MAX_RANGE_SECTORS.to_le_bytes());
    put(40, &MAX_DISCARD_RANGES.to_le_bytes());
    put(44, &granularity.to_le_bytes());
    put(48, &MAX_RANGE_SECTORS.to_le_bytes());
    put(52, &MAX_ZERO_RANGES.to_le_bytes());
    // Zeroing may give space back.
    put(56, &[1]);
    config
}

fn lock(worker: &Mutex<Worker>) -> MutexGuard<'_, Worker> {
    worker.lock().unwrap_or_else(PoisonError::into_inner)
}
