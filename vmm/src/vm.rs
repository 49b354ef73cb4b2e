//! The VM as KVM has it: memory slots, the interrupt controllers in the kernel, what wakes whom by eventfd.

mod chips;

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use vm_memory::{GuestMemory, GuestMemoryRegion};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use crate::layout;
use crate::memory::GuestRam;

pub use chips::ChipsState;

/// What KVM must be able to do, with its names.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
];

/// Why there is no VM.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The descriptor is not KVM's, or KVM is too old.
    #[error("The descriptor of /dev/kvm cannot be used: KVM's API version is {0}, not 12")]
    Version(i32),
    /// KVM lacks something.
    #[error("KVM lacks {0} on this machine; see: catalyst doctor")]
    Lacks(&'static str),
    /// A call of KVM failed.
    #[error("KVM refused {call}; see: catalyst doctor")]
    Call {
        /// The call.
        call: &'static str,
        /// Why.
        #[source]
        source: errno::Error,
    },
    /// A model-specific register of a guest that was saved.
    #[error("KVM refused the value {value:#x} of register {index:#x}, which the saved guest has")]
    Msr {
        /// Its number.
        index: u32,
        /// The value.
        value: u64,
    },
    /// Guest memory cannot be given to KVM.
    #[error("Guest memory at {0:#x} cannot be given to KVM")]
    Memory(u64),
}

/// Names the call that failed.
pub(crate) fn call(call: &'static str) -> impl FnOnce(errno::Error) -> VmError {
    move |source| VmError::Call { call, source }
}

/// Takes the open `/dev/kvm` over.
pub fn take_kvm(file: File) -> Result<Kvm, VmError> {
    // SAFETY: the descriptor is open, since a File owned it, and is now owned by the Kvm alone.
    let kvm = unsafe { Kvm::from_raw_fd(file.into_raw_fd()) };
    let version = kvm.get_api_version();
    if version != 12 {
        return Err(VmError::Version(version));
    }
    for (cap, name) in NEEDED {
        if !kvm.check_extension(*cap) {
            return Err(VmError::Lacks(name));
        }
    }
    Ok(kvm)
}

/// A VM of KVM, and the memory that it has.
#[derive(Debug)]
pub struct Vm {
    // Closed before the memory that it refers to goes.
    fd: VmFd,
    memory: GuestRam,
}

impl Vm {
    /// Makes a VM with this memory and with PIC, IOAPIC and PIT in the kernel.
    pub fn new(kvm: &Kvm, memory: GuestRam) -> Result<Self, VmError> {
        let fd = create(kvm)?;
        // Pages of its own that KVM wants on Intel without unrestricted guests, before the first vCPU (api.rst).
        fd.set_identity_map_address(layout::IDENTITY_MAP).map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        let tss = usize::try_from(layout::TSS).map_err(|_| VmError::Memory(layout::TSS))?;
        fd.set_tss_address(tss).map_err(call("KVM_SET_TSS_ADDR"))?;
        for (slot, region) in (0..).zip(memory.iter()) {
            let start = region.start_addr();
            let host = memory.get_host_address(start).map_err(|_| VmError::Memory(start.0))?;
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: start.0,
                memory_size: region.len(),
                userspace_addr: host as u64,
            };
            // SAFETY: the region is exactly a mapping that `memory` owns, and `Vm` keeps that until after `fd` is
            // closed (fields are dropped in order); vCPUs are ended before their Vm.
            unsafe { fd.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
        }
        fd.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(call("KVM_CREATE_PIT2"))?;
        Ok(Self { fd, memory })
    }

    /// The VM's descriptor.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Its memory.
    pub fn memory(&self) -> &GuestRam {
        &self.memory
    }

    /// Each write of `event` raises the interrupt `gsi`, an edge.
    pub fn wire_interrupt(&self, event: &EventFd, gsi: u32) -> Result<(), VmError> {
        self.fd.register_irqfd(event, gsi).map_err(call("KVM_IRQFD"))
    }

    /// The guest's 32-bit writes of `value` to `address` write `event`, without an exit to this process.
    pub fn wire_doorbell(&self, event: &EventFd, address: u64, value: u32) -> Result<(), VmError> {
        self.fd.register_ioevent(event, &IoEventAddress::Mmio(address), value).map_err(call("KVM_IOEVENTFD"))
    }
}

/// KVM_CREATE_VM is interrupted by signals, and then just asks to be called again.
fn create(kvm: &Kvm) -> Result<VmFd, VmError> {
    const TRIES: u32 = 5;
    let mut result = kvm.create_vm();
    for _ in 1..TRIES {
        match result {
            Err(error) if error.errno() == libc::EINTR => result = kvm.create_vm(),
            _ => break,
        }
    }
    result.map_err(call("KVM_CREATE_VM"))
}
