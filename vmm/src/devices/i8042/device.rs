//! The controller's two ports. Nothing of it is saved.

use std::convert::Infallible;
use std::fmt::Debug;

use vm_superio::{I8042Device, Trigger};

use crate::bus::BusDevice;

/// Offset of the status and command port.
const COMMAND: u64 = 4;
/// Status: the output buffer is full, the input buffer is not.
const OUTPUT_FULL: u8 = 1;

/// The keyboard controller.
pub struct I8042(I8042Device<Reset>);

/// Called when the guest asks for a reset.
struct Reset(Box<dyn Fn() + Send>);

impl Trigger for Reset {
    type E = Infallible;
    fn trigger(&self) -> Result<(), Infallible> {
        (self.0)();
        Ok(())
    }
}

impl I8042 {
    /// A controller that calls `reset` when the guest asks for a reset. It must not block.
    pub fn new(reset: impl Fn() + Send + 'static) -> Self {
        Self(I8042Device::new(Reset(Box::new(reset))))
    }
}

impl Debug for I8042 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("I8042")
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (COMMAND, [status]) = (offset, data) {
            *status = OUTPUT_FULL;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset), [value]) = (u8::try_from(offset), data) {
            // It cannot fail.
            let _ = self.0.write(offset, *value);
        }
    }
}
