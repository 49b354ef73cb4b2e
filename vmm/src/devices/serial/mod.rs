//! The console device (virtio 1.2, section 5.3) with several ports: the console `hvc0`, and named ports that the guest
//! finds as `/dev/virtio-ports/<name>`.
//!
//! Port 0 is the console's, whether there is one or not; named ports have the numbers from 1 on. The rules between
//! guest and client are QEMU's (hw/char/virtio-serial-bus.c), for which the guest's agent was made:
//!
//! - Nothing is read from a client while the guest has not opened the port; it waits in the socket.
//! - What the guest writes to a named port waits in its queue while the client does not read. Without a client it is
//!   discarded, and so is what waits when the client goes. The guest is told whether there is one.
//! - A client that goes while the port is closed in the guest takes with it what was not read.
//!
//! Other than QEMU, what a client sent before it went is read to its end where the guest has the port open. The
//! console never makes the guest wait: a client that does not read loses output.

mod control;
mod device;
mod port;
mod state;
#[cfg(test)]
mod tests;
mod transfer;
mod worker;

pub use device::Serial;
pub use state::{PortState, SavedPort, SerialState};

/// Feature: the driver can do several ports and the control queues.
pub const VIRTIO_CONSOLE_F_MULTIPORT: u64 = 1 << 1;
/// Length of each queue; a driver has so many pages to receive a port's data.
const QUEUE_SIZE: u16 = 128;
/// Queue on which the device sends control messages.
const CONTROL_RECEIVE: usize = 2;
/// Queue on which the driver sends control messages.
const CONTROL_TRANSMIT: usize = 3;
/// Rounds of work for one queue before the others get their turn.
const ROUNDS: u32 = 16;

/// Index of a port's receiving queue; the transmitting one follows (section 5.3.2).
fn receive_queue(port: u32) -> usize {
    if port == 0 { 0 } else { 2 * (port as usize + 1) }
}

/// Why there is no console device.
#[derive(Debug, thiserror::Error)]
#[error("Cannot set the console device's sockets up")]
pub struct SerialError(#[from] std::io::Error);
