//! A disk: virtio-blk (virtio 1.2, section 5.2) over raw and qcow2 images.
//!
//! Each queue has a thread, and a request is served on it from beginning to end, straight between guest memory and
//! the file: one system call for what lies in one place. What the guest writes goes to the host's page cache; a flush puts
//! it to the disk. [`image`] says what a killed process loses. A request that finds no room on the host is not failed, which
//! would cost the guest its file system: it waits ([`NoRoom`]).

pub mod device;
mod header;
pub mod image;
mod request;
pub mod state;
mod storage;
mod worker;

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod image_tests;
#[cfg(test)]
mod tests;

pub use device::Block;
pub use image::{Image, ImageError};
pub use state::BlockState;

/// Told, from the thread of a queue, that a request found no room on the file system of the disk's image: the machine is
/// to be paused. Until that is done the request is tried again and again; once more when the machine goes on.
pub type NoRoom = std::sync::Arc<dyn Fn() + Send + Sync>;

/// Bytes of a sector, the unit of every number that the driver gives.
pub const SECTOR: u64 = 512;
/// Longest that a queue may be.
pub const QUEUE_SIZE: u16 = 256;
/// Most data segments of a request: what is left of a queue's length beside header and status.
pub const MAX_SEGMENTS: u32 = 254;
/// Most ranges of one discard request.
pub const MAX_DISCARD_RANGES: u32 = 16;
/// Most ranges of one request to write zeroes.
pub const MAX_ZERO_RANGES: u32 = 1;
/// Most sectors of one range (1 GiB), so that no request keeps the disk for long.
pub const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Length of the serial number that the driver reads, in bytes.
pub const SERIAL_LENGTH: usize = 20;

/// Serves what a queue holds on this thread, as the queue's own would: for fuzz targets. `features` are those that
/// the driver took; false if more may be left.
#[cfg(any(test, feature = "testing"))]
pub fn serve(
    image: &Image,
    queue: &mut crate::virtio::Virtqueue,
    features: u64,
) -> Result<bool, crate::virtio::QueueError> {
    let disk = worker::Disk {
        image: image.clone(),
        serial: [b'x'; SERIAL_LENGTH],
        features,
        counters: crate::virtio::Counters::default(),
        complaints: std::sync::Arc::default(),
        no_room: std::sync::Arc::new(|| ()),
    };
    disk.serve(queue)
}
