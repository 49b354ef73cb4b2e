//! A machine: built from its description, run until it ends, commanded meanwhile.
//!
//! Everything that has state hangs together here and nowhere else: what is paused first (virtual CPUs) and last (the
//! threads of devices), what is flushed before the process ends.

mod build;
mod commands;
mod descriptors;
mod devices;
mod memory_use;
mod save;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_clock_data;

use crate::boot::BootError;
use crate::control::protocol::{RunState, Stats};
use crate::description::DescriptionError;
use crate::devices::power::Power;
use crate::memory::MemoryError;
use crate::reactor::Reactor;
use crate::snapshot::{Mismatch, StateError};
use crate::vcpu::Vcpus;
use crate::vcpu::runner::Report;
use crate::virtio::RestoreError;
use crate::vm::{Vm, VmError};

pub use build::{Begin, Surroundings};
pub use commands::Commands;
pub use descriptors::Descriptors;
pub use memory_use::MemoryUse;
pub use save::SaveError;

use devices::Devices;

/// A machine. It is built paused.
#[derive(Debug)]
pub struct Machine {
    // The virtual CPUs end first, then the threads of devices, then the VM that all of them refer to.
    vcpus: Vcpus,
    reactors: Vec<Arc<Reactor>>,
    devices: Devices,
    power: Arc<Mutex<Power>>,
    vm: Vm,
    state: Mutex<State>,
    memory_use: MemoryUse,
    /// Model-specific registers that are saved.
    msrs: Vec<u32>,
}

/// Whether it runs; the guest's clock while it does not.
#[derive(Debug)]
enum State {
    Running,
    Paused(Option<kvm_clock_data>),
}

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The description is no use.
    #[error(transparent)]
    Description(#[from] DescriptionError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel.
    #[error("Cannot boot")]
    Boot(#[from] BootError),
    /// KVM.
    #[error("Cannot make the virtual machine")]
    Vm(#[from] VmError),
    /// A device.
    #[error("Cannot make {device}")]
    Device {
        /// Its name in the description.
        device: String,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What was saved is no use.
    #[error(transparent)]
    State(#[from] StateError),
    /// What was saved is another machine.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// A device that cannot go on.
    #[error("Cannot restore {device}")]
    Restore {
        /// Its name in the description.
        device: String,
        /// Why not.
        #[source]
        source: Box<RestoreError>,
    },
    /// A thread or an eventfd.
    #[error("Cannot make {0}")]
    Io(&'static str, #[source] std::io::Error),
}

impl Machine {
    /// Lets the guest run, from its beginning or from where it was paused.
    pub fn resume(&self) -> Result<(), VmError> {
        let mut state = self.state();
        if let State::Paused(clock) = &mut *state {
            if let Some(mut clock) = clock.take() {
                // The guest's clock goes on from where it stood: only the value counts, not when it was read.
                clock.flags = 0;
                self.vm.fd().set_clock(&clock).map_err(crate::vm::call("KVM_SET_CLOCK"))?;
            }
            for reactor in &self.reactors {
                reactor.resume();
            }
            self.vcpus.resume();
            *state = State::Running;
        }
        Ok(())
    }

    /// Stops the guest: no instruction of it runs, no device touches its memory when this returns.
    pub fn pause(&self) -> Result<(), VmError> {
        let mut state = self.state();
        if matches!(*state, State::Running) {
            self.stand_still();
            let clock = self.vm.fd().get_clock().map_err(crate::vm::call("KVM_GET_CLOCK"))?;
            *state = State::Paused(Some(clock));
        }
        Ok(())
    }

    /// Whether it runs.
    pub fn run_state(&self) -> RunState {
        match *self.state() {
            State::Running => RunState::Running,
            State::Paused(_) => RunState::Paused,
        }
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        lock(&self.power).press_button();
    }

    /// What has happened so far.
    pub fn stats(&self) -> Stats {
        Stats {
            exits: self.vcpus.exits().by_name(),
            devices: self.devices.counted(),
            memory: self.memory_use.read(self.vm.memory()),
        }
    }

    /// Stops the guest for good and writes out what is still held back: the console's last bytes, images' tables.
    pub fn finish(&self) {
        let _state = self.state();
        self.stand_still();
        self.devices.flush();
    }

    fn stand_still(&self) {
        self.vcpus.pause();
        for reactor in &self.reactors {
            reactor.pause();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Told when the guest came to an end, by whatever part found out.
type Ended = Report;
