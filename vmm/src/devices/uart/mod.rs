//! The first serial port: a 16550A, as `vm-superio` does it, at eight I/O ports.
//!
//! The guest writes byte by byte, each an exit. Bytes are gathered until a line ends, or for [`GATHER`], so that a
//! line costs one write(2) a destination and not one a byte; a timer writes what a guest that halts leaves behind.

mod device;
mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::time::Duration;

pub use device::Uart;
pub use state::UartState;

/// How long output waits for the rest of its line.
pub const GATHER: Duration = Duration::from_millis(4);
/// Bytes that are gathered at most.
const MOST_GATHERED: usize = 1024;

/// Why there is no serial port.
#[derive(Debug, thiserror::Error)]
pub enum UartError {
    /// The kernel gives no timer or does not watch it.
    #[error("Cannot set the serial port's timer and sockets up")]
    Io(#[from] io::Error),
    /// What was saved is not a serial port's.
    #[error("The saved state of the serial port holds {0} bytes of input, more than its FIFO")]
    State(usize),
}
