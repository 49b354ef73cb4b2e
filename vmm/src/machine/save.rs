//! What is saved of a machine that stands.

use std::fs::File;
use std::io;

use vm_memory::{GuestMemory, GuestMemoryRegion};

use super::{Machine, State, lock};
use crate::control::protocol::RamRange;
use crate::description::Format;
use crate::devices::block::ImageError;
use crate::memory;
use crate::snapshot::{self, MachineState, StateError};
use crate::vm::{VmError, call};

/// Why a machine is not saved. It goes on as it was.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// It runs.
    #[error("Cannot save the machine while it runs: pause it first")]
    Running,
    /// The guest has files of the host open.
    #[error(
        "Cannot save the machine while its guest has the shared folder mounted: let the guest unmount it first"
    )]
    Mounted,
    /// A disk's content is not on the disk.
    #[error("Cannot save the machine: the last writes to {disk} did not reach its image")]
    Flush {
        /// Its name.
        disk: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// KVM.
    #[error("Cannot save the machine")]
    Vm(#[from] VmError),
    /// The file.
    #[error("Cannot save the machine")]
    State(#[from] StateError),
}

/// Why a disk did not go on in another file. It goes on in the one that it has.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// It runs.
    #[error("Cannot give the machine another disk while it runs: pause it first")]
    Running,
    /// There is none.
    #[error("The machine has no disk")]
    NoDisk,
    /// The file.
    #[error("Cannot go on on another disk")]
    Image(#[from] ImageError),
}

impl Machine {
    /// The machine as a file (see [`snapshot`]). It must be paused: then no request of a device is half done, since each is
    /// served by one call of a handler. Images of disks are whole on the disk when this returns.
    pub fn save(&self) -> Result<Vec<u8>, SaveError> {
        let paused = self.state();
        let State::Paused(clock) = &*paused else { return Err(SaveError::Running) };
        let clock = match clock {
            Some(clock) => clock.clock,
            // It has never run.
            None => self.vm.fd().get_clock().map_err(call("KVM_GET_CLOCK"))?.clock,
        };
        if self.devices.is_mounted() {
            return Err(SaveError::Mounted);
        }
        self.devices.flush_disks().map_err(|(disk, source)| SaveError::Flush { disk, source })?;
        let (uart, rtc) = self.devices.save_legacy();
        let state = MachineState {
            memory_mib: memory::size(self.vm.memory()) >> 20,
            cpus: self.vcpus.save(&self.msrs)?,
            chips: self.vm.save_chips()?,
            clock,
            power: lock(&self.power).save(),
            rtc,
            uart,
            virtio: self.devices.save_virtio().map_err(StateError::Encode)?,
        };
        Ok(snapshot::encode(&state)?)
    }

    /// Where RAM lies.
    pub fn ram(&self) -> Vec<RamRange> {
        let range = |region: &vm_memory::GuestRegionMmap<()>| RamRange {
            guest: region.start_addr().0,
            host: region.as_ptr() as u64,
            length: region.len(),
        };
        self.vm.memory().iter().map(range).collect()
    }

    /// The first disk goes on in `overlay`, an empty qcow2 on what it was; `below`, if there is any, takes the place of what its file
    /// lay on, and holds the same. The machine must be paused.
    pub fn switch_disk(&self, overlay: File, below: Vec<(File, Format)>) -> Result<(), SwitchError> {
        let paused = self.state();
        let State::Paused(_) = &*paused else { return Err(SwitchError::Running) };
        self.devices.switch_disk(overlay, below)?.ok_or(SwitchError::NoDisk)
    }

    /// Puts the cables of all NICs in, or pulls them out.
    pub fn set_link(&self, up: bool) -> Result<(), String> {
        self.devices.set_link(up)
    }
}
