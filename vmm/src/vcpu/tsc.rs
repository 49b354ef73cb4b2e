//! Time stamp counters: that of a guest which was saved goes on from where it stood, on all virtual CPUs alike.

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::{VcpuState, msrs};
use crate::vm::{VmError, call};

/// IA32_TIME_STAMP_COUNTER.
pub(super) const COUNTER: u32 = 0x10;
/// IA32_TSC_DEADLINE.
pub(super) const DEADLINE: u32 = 0x6e0;

vmm_sys_util::ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
vmm_sys_util::ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// What is added to the host's counter for this virtual CPU's (Linux 5.16 and later; kernel
/// virt/kvm/devices/vcpu.rst).
pub(super) fn offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0_u64;
    let attribute = attribute((&raw mut offset) as u64);
    // SAFETY: the kernel reads the attribute, and writes the eight bytes that it points to.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) };
    (result == 0).then_some(offset)
}

fn set_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), VmError> {
    let attribute = attribute((&raw const offset) as u64);
    // SAFETY: the kernel reads the attribute and the eight bytes that it points to.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) };
    if result == 0 { Ok(()) } else { Err(call("KVM_SET_DEVICE_ATTR")(errno::Error::last())) }
}

fn attribute(addr: u64) -> kvm_device_attr {
    kvm_device_attr { flags: 0, group: KVM_VCPU_TSC_CTRL, attr: KVM_VCPU_TSC_OFFSET.into(), addr }
}

/// Sets the counters of fresh virtual CPUs. With offsets they are as far apart as they were when they were saved, most
/// often not at all; without, KVM takes values that are written within a second of each other for one.
pub(super) fn restore(states: &[VcpuState], vcpus: &[VcpuFd]) -> Result<(), VmError> {
    let Some((first, vcpu)) = states.first().zip(vcpus.first()) else { return Ok(()) };
    match (first.msr(COUNTER), offset(vcpu)) {
        (Some(saved), Some(own)) => {
            // Written as a value, KVM might take a small one for that of a machine which has just begun.
            let now = msrs::read(vcpu, &[COUNTER])?.first().map_or(0, |msr| msr.data);
            let base = own.wrapping_add(saved).wrapping_sub(now);
            for (state, vcpu) in states.iter().zip(vcpus) {
                let apart = match (state.tsc_offset, first.tsc_offset) {
                    (Some(this), Some(first)) => this.wrapping_sub(first),
                    _ => 0,
                };
                set_offset(vcpu, base.wrapping_add(apart))?;
            }
        }
        _ => {
            for (state, vcpu) in states.iter().zip(vcpus) {
                let counter = state.msr(COUNTER).map(|data| kvm_msr_entry {
                    index: COUNTER,
                    data,
                    ..Default::default()
                });
                msrs::write(vcpu, counter.as_slice())?;
            }
        }
    }
    Ok(())
}
