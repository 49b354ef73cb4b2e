//! Model-specific registers: those that a processor begins with, and those that KVM is told of the host.

use std::ops::RangeInclusive;

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

/// Registers that KVM may refuse to take although it gave them: of no use to a guest, whose CPUID does not have them.
const MAY_BE_REFUSED: &[RangeInclusive<u32>] = &[
    0xc1..=0xc8,               // IA32_PMC: performance counters, all masked
    0x186..=0x18d,             // IA32_PERFEVTSEL
    0x309..=0x30c,             // IA32_FIXED_CTR
    0x345..=0x345,             // IA32_PERF_CAPABILITIES
    0x38d..=0x390,             // their control
    0x3f1..=0x3f2,             // IA32_PEBS_ENABLE, PEBS_DATA_CFG
    0x600..=0x600,             // IA32_DS_AREA
    0xc000_0300..=0xc000_0303, // their control, AMD
    0xc001_0000..=0xc001_0007, // performance counters, AMD
    0xc001_0200..=0xc001_020b, // the same, newer ones
    0x4000_0000..=0x4000_0118, // Hyper-V's, which is not offered
    MISC_ENABLE..=MISC_ENABLE,
    ARCH_CAPABILITIES..=ARCH_CAPABILITIES,
];

/// The registers that KVM says it saves.
pub fn known(kvm: &Kvm) -> Result<Vec<u32>, VmError> {
    let list = kvm.get_msr_index_list().map_err(call("KVM_GET_MSR_INDEX_LIST"))?;
    Ok(list.as_slice().to_vec())
}

/// All of `known` that can be read.
pub(super) fn read(vcpu: &VcpuFd, known: &[u32]) -> Result<Vec<kvm_msr_entry>, VmError> {
    let mut values = Vec::new();
    let mut left = known;
    while !left.is_empty() {
        let asked: Vec<_> = left.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&asked)
            .map_err(|_| call("KVM_GET_MSRS of so many")(vmm_sys_util::errno::Error::new(libc::E2BIG)))?;
        let read = vcpu.get_msrs(&mut msrs).map_err(call("KVM_GET_MSRS"))?;
        values.extend_from_slice(&msrs.as_slice()[..read]);
        // KVM stops at the first that this guest does not have: it has no value to save.
        left = &left[(read + 1).min(left.len())..];
    }
    Ok(values)
}

/// Writes all of them, in order, but for those that KVM refuses and may refuse.
pub(super) fn write(vcpu: &VcpuFd, mut entries: &[kvm_msr_entry]) -> Result<(), VmError> {
    while !entries.is_empty() {
        let written = set_msrs(vcpu, entries)?;
        let Some(refused) = entries.get(written) else { break };
        if !MAY_BE_REFUSED.iter().any(|range| range.contains(&refused.index)) {
            return Err(VmError::Msr { index: refused.index, value: refused.data });
        }
        entries = &entries[written + 1..];
    }
    Ok(())
}

/// Sets registers; how many were, since KVM stops at the first that it refuses.
fn set_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<usize, VmError> {
    let msrs = Msrs::from_entries(entries)
        .map_err(|_| call("KVM_SET_MSRS of so many")(vmm_sys_util::errno::Error::new(libc::E2BIG)))?;
    vcpu.set_msrs(&msrs).map_err(call("KVM_SET_MSRS"))
}
