//! Builds a machine from its description.

use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_clock_data;
use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use super::descriptors::Descriptors;
use super::devices::{Devices, Wiring};
use super::{BuildError, Ended, Machine, MemoryUse, State, lock};
use crate::boot::acpi::{self, Platform};
use crate::boot::{self, Kernel};
use crate::bus::Attached;
use crate::confine::Role;
use crate::control::protocol::Cause;
use crate::description::{Description, DescriptionError};
use crate::devices::block::NoRoom;
use crate::devices::fs::ShareRoot;
use crate::devices::power::{NEW_GENERATION, Power, PowerRequest};
use crate::layout;
use crate::memory::{self, Backing, GuestRam};
use crate::snapshot::{self, MachineState};
use crate::vcpu::{VcpuState, Vcpus, cpuid, msrs, registers};
use crate::vm::{self, Vm, call};

/// Called first by each thread, with its role: where it gets its system call filter.
pub type Begin = Arc<dyn Fn(Role) + Send + Sync>;

/// What a machine is built with besides its description.
#[expect(missing_debug_implementations, reason = "of functions")]
pub struct Surroundings {
    /// The description's descriptors.
    pub descriptors: Descriptors,
    /// See [`Begin`].
    pub begin: Begin,
    /// Told once when the guest came to an end, from any thread.
    pub ended: Ended,
    /// Told that the machine is to be paused, since a disk's image has no room.
    pub no_room: NoRoom,
    /// What the file system device shares, if the description has one.
    pub share: Option<ShareRoot>,
    /// Opened while there was a /proc.
    pub memory_use: MemoryUse,
}

impl Machine {
    /// Builds the machine, paused, and gives back the socket of its control protocol. The description's descriptors
    /// are taken over.
    pub fn build(
        description: &Description,
        surroundings: Surroundings,
    ) -> Result<(Self, UnixListener), BuildError> {
        let Surroundings { mut descriptors, begin, ended, no_room, share, memory_use } = surroundings;
        let control = descriptors.listener(description.control)?;
        let kvm = vm::take_kvm(descriptors.file(description.kvm)?)?;
        let start = Start::take(description, &mut descriptors)?;
        let memory = guest_memory(description, &mut descriptors)?;
        let vm = Vm::new(&kvm, Arc::clone(&memory))?;

        // Before the devices: an interrupt that one of them raises as it comes back must find whom it is for.
        let vcpus = match &start {
            Start::Boot(_) => make_vcpus(&kvm, &vm, description.cpus)?,
            Start::Restore(saved) => restore_vcpus(&vm, saved)?,
        };
        let mut wiring = Wiring::new(&vm, begin.clone(), no_room, start.saved());
        let devices = Devices::make(description, &mut descriptors, share, &mut wiring, &ended)?;
        let power = power(&mut wiring, &ended)?;
        let (buses, reactors) = wiring.finish();

        write_generation_id(&memory, description)?;
        let clock = match start {
            Start::Boot(kernel) => {
                let platform = Platform {
                    cpus: description.cpus,
                    virtio_devices: devices.virtio_devices(),
                    uart: description.uart.is_some(),
                };
                let entry = boot::load(&memory, kernel, &acpi::tables(&platform))?;
                registers::set_entry(&memory, &vcpus[0], entry)?;
                None
            }
            Start::Restore(saved) => {
                let mut power = lock(&power);
                power.restore(saved.power);
                // It is there before the guest's first instruction.
                power.raise(NEW_GENERATION);
                Some(kvm_clock_data { clock: saved.clock, ..Default::default() })
            }
        };
        let msrs = msrs::known(&kvm)?;
        let vcpu_begin = move || begin(Role::Vcpu);
        let vcpus = Vcpus::spawn(vcpus, buses, ended, vcpu_begin)
            .map_err(|error| BuildError::Io("the threads of the virtual CPUs", error))?;
        let state = Mutex::new(State::Paused(clock));
        Ok((Self { vcpus, reactors, devices, power, vm, state, memory_use, msrs }, control))
    }
}

/// How a machine begins.
enum Start {
    Boot(Kernel),
    Restore(Box<MachineState>),
}

impl Start {
    fn take(description: &Description, descriptors: &mut Descriptors) -> Result<Self, BuildError> {
        match (&description.boot, description.restore) {
            (_, Some(fd)) => {
                let saved = snapshot::read(&descriptors.file(fd)?)?;
                saved.check(description)?;
                Ok(Self::Restore(Box::new(saved)))
            }
            (Some(boot), None) => Ok(Self::Boot(Kernel {
                image: descriptors.file(boot.kernel)?,
                initrd: boot.initrd.map(|fd| descriptors.file(fd)).transpose()?,
                command_line: boot.command_line.clone(),
                protocol: boot.protocol,
            })),
            (None, None) => {
                let (field, why) = ("boot".to_owned(), "it takes this or restore".to_owned());
                Err(DescriptionError::Value { field, why }.into())
            }
        }
    }

    fn saved(&self) -> Option<&MachineState> {
        match self {
            Self::Boot(_) => None,
            Self::Restore(saved) => Some(saved),
        }
    }
}

fn guest_memory(description: &Description, descriptors: &mut Descriptors) -> Result<GuestRam, BuildError> {
    let file = description.memory.map(|fd| descriptors.file(fd)).transpose()?;
    let backing = match &file {
        None => Backing::Anonymous,
        Some(file) if description.restore.is_some() => Backing::Private(file),
        Some(file) => Backing::Shared(file),
    };
    Ok(memory::map(description.memory_mib, backing, description.huge_pages)?)
}

fn make_vcpus(kvm: &Kvm, vm: &Vm, count: u8) -> Result<Vec<VcpuFd>, BuildError> {
    let template = cpuid::Template::new(kvm, count)?;
    let mut vcpus = Vec::new();
    for index in 0..count {
        let vcpu = vm.fd().create_vcpu(index.into()).map_err(call("KVM_CREATE_VCPU"))?;
        vcpu.set_cpuid2(&template.for_vcpu(index)?).map_err(call("KVM_SET_CPUID2"))?;
        msrs::set_boot_msrs(kvm, &vcpu)?;
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

fn restore_vcpus(vm: &Vm, saved: &MachineState) -> Result<Vec<VcpuFd>, BuildError> {
    let vcpus = (0..saved.cpus.len() as u64)
        .map(|index| vm.fd().create_vcpu(index).map_err(call("KVM_CREATE_VCPU")))
        .collect::<Result<Vec<_>, _>>()?;
    VcpuState::restore_all(&saved.cpus, &vcpus)?;
    vm.restore_chips(&saved.chips)?;
    Ok(vcpus)
}

fn power(wiring: &mut Wiring<'_>, ended: &Ended) -> Result<Arc<Mutex<Power>>, BuildError> {
    let interrupt = wiring.interrupt(layout::POWER_GSI)?;
    let ended = Arc::clone(ended);
    let power = Power::new(interrupt, move |request| {
        ended(match request {
            PowerRequest::Off => Cause::PowerOff,
            PowerRequest::Reset => Cause::Reset,
        });
    });
    let power = Arc::new(Mutex::new(power));
    wiring.attach_mmio(layout::POWER_START, layout::POWER_SIZE, power.clone() as Attached)?;
    Ok(power)
}

/// The guest's kernel takes it for what it is worth: a sign that this is not the machine it was.
fn write_generation_id(memory: &GuestRam, description: &Description) -> Result<(), BuildError> {
    let id = description.generation_id.map_or_else(random_id, Ok)?;
    memory
        .write_slice(&id, GuestAddress(layout::GENERATION_ID))
        .map_err(|_| boot::BootError::Table("generation ID").into())
}

fn random_id() -> Result<[u8; 16], BuildError> {
    let mut id = [0; 16];
    // SAFETY: the kernel writes at most as many bytes as there are.
    let got = unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) };
    // So few come all at once (getrandom(2)).
    if usize::try_from(got).is_ok_and(|got| got == id.len()) {
        Ok(id)
    } else {
        Err(BuildError::Io("a generation ID", std::io::Error::last_os_error()))
    }
}
