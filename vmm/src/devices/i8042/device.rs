//! The controller's two ports. Nothing of it is saved.

use std::io;

use vm_superio::{I8042Device, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// Offset of the status and command port.
const COMMAND: u64 = 4;
/// Status: the output buffer is full, the input buffer is not.
const OUTPUT_FULL: u8 = 1;

/// The keyboard controller.
#[derive(Debug)]
pub struct I8042(I8042Device<Reset>);

#[derive(Debug)]
struct Reset(EventFd);

impl Trigger for Reset {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl I8042 {
    /// A controller that writes `reset` when the guest asks for a reset.
    pub fn new(reset: EventFd) -> Self {
        Self(I8042Device::new(Reset(reset)))
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
            // A full counter means that a reset is asked for already.
            let _ = self.0.write(offset, *value);
        }
    }
}
