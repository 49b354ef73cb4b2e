//! Model-specific registers: those that a processor begins with, and those that KVM is told of the host.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::vm::{VmError, call};

/// IA32_MISC_ENABLE: fast strings.
const MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
/// IA32_MTRR_DEF_TYPE: MTRRs enabled, write-back where none says otherwise.
const MTRR_DEF_TYPE: u32 = 0x2ff;
const ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
/// IA32_ARCH_CAPABILITIES: which flaws the processor does not have. A feature MSR.
const ARCH_CAPABILITIES: u32 = 0x10a;

/// Registers that are zero at the start, as a boot loader leaves them.
const ZERO: &[u32] = &[
    0x174,       // IA32_SYSENTER_CS
    0x175,       // IA32_SYSENTER_ESP
    0x176,       // IA32_SYSENTER_EIP
    0xc000_0081, // STAR
    0xc000_0082, // LSTAR
    0xc000_0083, // CSTAR
    0xc000_0084, // FMASK
    0xc000_0102, // KERNEL_GS_BASE
];

/// Sets what a vCPU begins with.
pub fn set_boot_msrs(kvm: &Kvm, vcpu: &VcpuFd) -> Result<(), VmError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let mut entries: Vec<_> = ZERO.iter().map(|&index| entry(index, 0)).collect();
    entries.push(entry(MISC_ENABLE, FAST_STRINGS));
    entries.push(entry(MTRR_DEF_TYPE, ENABLED_WRITE_BACK));
    entries.extend(arch_capabilities(kvm));
    for entry in entries {
        let set = set_msrs(vcpu, &[entry])?;
        // Every processor has all of these but two, which a KVM may not model.
        if set != 1 && !matches!(entry.index, MISC_ENABLE | ARCH_CAPABILITIES) {
            return Err(call("KVM_SET_MSRS")(vmm_sys_util::errno::Error::new(libc::EINVAL)));
        }
    }
    Ok(())
}

/// The host's, where KVM tells it (KVM_GET_MSRS on /dev/kvm itself reads feature MSRs).
fn arch_capabilities(kvm: &Kvm) -> Option<kvm_msr_entry> {
    let known = kvm.get_msr_feature_index_list().ok()?;
    known.as_slice().contains(&ARCH_CAPABILITIES).then_some(())?;
    let asked = kvm_msr_entry { index: ARCH_CAPABILITIES, ..Default::default() };
    let mut msrs = Msrs::from_entries(&[asked]).ok()?;
    (kvm.get_msrs(&mut msrs).ok()? == 1).then(|| msrs.as_slice()[0])
}

/// Sets registers; how many were, since KVM stops at the first that it refuses.
pub(super) fn set_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<usize, VmError> {
    let msrs = Msrs::from_entries(entries)
        .map_err(|_| call("KVM_SET_MSRS of so many")(vmm_sys_util::errno::Error::new(libc::E2BIG)))?;
    vcpu.set_msrs(&msrs).map_err(call("KVM_SET_MSRS"))
}
