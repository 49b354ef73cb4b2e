//! What a machine is while it stands, but for its memory and its disks: saved as one file of bytes, restored by another
//! process.
//!
//! Guest memory is copied from outside (control command `ram` says where it lies), and what the copy is becomes the
//! description's `memory` of the machine that is restored. The content of disks is their images'.

mod file;

use serde::{Deserialize, Serialize};

use crate::description::Description;
use crate::devices::power::PowerState;
use crate::devices::rtc::RtcState;
use crate::devices::uart::UartState;
use crate::vcpu::VcpuState;
use crate::vm::ChipsState;

#[cfg(any(test, feature = "testing"))]
pub use file::seal;
pub use file::{MAX_LENGTH, StateError, VERSION, decode, encode, read};

/// A machine. Whatever is added, taken away or understood otherwise takes another [`VERSION`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Virtual CPUs.
    pub cpus: Vec<VcpuState>,
    /// What the kernel has besides them.
    pub chips: ChipsState,
    /// The guest's clock in nanoseconds (KVM_GET_CLOCK), as it was when it was paused.
    pub clock: u64,
    /// Power and ACPI events.
    pub power: PowerState,
    /// The CMOS clock.
    pub rtc: RtcState,
    /// The serial port, if there is one.
    pub uart: Option<UartState>,
    /// The virtio devices, in the order in which the guest finds them.
    pub virtio: Vec<DeviceState>,
}

/// A virtio device.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    /// Its name, as in the statistics.
    pub name: String,
    /// Its transport's state ([`crate::virtio::mmio::TransportState`]), which only a device of its kind understands.
    pub state: serde_json::Value,
}

/// A description of another machine.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("The machine was saved with {saved}, and the description has {given}; describe it as it was")]
pub struct Mismatch {
    saved: String,
    given: String,
}

impl MachineState {
    /// Whether this is a machine as described, as far as that can be told without making it.
    pub fn check(&self, description: &Description) -> Result<(), Mismatch> {
        let same = |saved: String, given: String| {
            if saved == given { Ok(()) } else { Err(Mismatch { saved, given }) }
        };
        let cpus = |count: usize| format!("{count} virtual CPUs");
        same(cpus(self.cpus.len()), cpus(description.cpus.into()))?;
        let memory = |mib: u64| format!("{mib} MiB of memory");
        same(memory(self.memory_mib), memory(description.memory_mib))?;
        let uart = |is_there: bool| if is_there { "a serial port" } else { "no serial port" }.to_owned();
        same(uart(self.uart.is_some()), uart(description.uart.is_some()))?;
        let devices = |names: Vec<String>| format!("the devices [{}]", names.join(", "));
        let saved = self.virtio.iter().map(|device| device.name.clone()).collect();
        same(devices(saved), devices(description.virtio_devices()))
    }

    /// What is saved of a virtio device.
    pub fn device(&self, name: &str) -> Option<&serde_json::Value> {
        self.virtio.iter().find(|device| device.name == name).map(|device| &device.state)
    }
}

#[cfg(test)]
mod tests;
