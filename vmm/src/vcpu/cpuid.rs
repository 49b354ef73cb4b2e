//! What CPUID says in the guest: what KVM supports, less what a guest here cannot use, with this VM's topology: one
//! socket, each vCPU a core with one thread. APIC IDs are vCPU numbers.
//!
//! Leaves are those of Intel SDM volume 2A, "CPUID", and AMD APM volume 3, appendix E.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::vm::{VmError, call};

/// A register of a leaf and the bits that are taken out of it.
type Mask = (u32, u32, Register, u32);

#[derive(Clone, Copy, Debug)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

/// Features that no guest gets: virtualization of its own, performance counters, SGX, AMX (whose state needs a
/// permission and KVM_GET_XSAVE2), and sleeping in MWAIT, which KVM would make a busy loop.
const MASKED: &[Mask] = &[
    // MONITOR, DTES64, DS-CPL, VMX, SMX, EST, TM2, PDCM.
    (1, 0, Ecx, 1 << 3 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 15),
    // DS.
    (1, 0, Edx, 1 << 21),
    // Turbo, HWP and the rest of power management, but for ARAT: its timer never stops.
    (6, 0, Eax, !(1 << 2)),
    (6, 0, Ecx, u32::MAX),
    // SGX.
    (7, 0, Ebx, 1 << 2),
    // SGX launch configuration; five-level paging, whose walks are longer and which so little memory has no use for.
    (7, 0, Ecx, 1 << 30 | 1 << 16),
    // AMX-BF16, AMX-TILE, AMX-INT8.
    (7, 0, Edx, 1 << 22 | 1 << 24 | 1 << 25),
    // AMX-FP16.
    (7, 1, Eax, 1 << 21),
    // AMX-COMPLEX.
    (7, 1, Edx, 1 << 8),
    // SVM, IBS, performance counters of core and north bridge, of the last level, MWAITX.
    (0x8000_0001, 0, Ecx, 1 << 2 | 1 << 10 | 1 << 23 | 1 << 24 | 1 << 28 | 1 << 29),
];

/// Leaves that say nothing: performance monitoring of Intel and AMD, SGX, AMX tiles, SVM, IBS, and RDT.
const EMPTIED: &[u32] =
    &[0x5, 0xa, 0xf, 0x10, 0x12, 0x1d, 0x1e, 0x8000_000a, 0x8000_001b, 0x8000_0022, 0x8000_0020];

/// XCR0 bits of AMX: tile configuration and data.
const XCR0_AMX: u32 = 1 << 17 | 1 << 18;

/// What all vCPUs have in common.
#[derive(Clone, Debug)]
pub struct Template {
    entries: Vec<kvm_cpuid_entry2>,
    cpus: u8,
}

impl Template {
    /// Asks KVM what it supports and shapes it for a VM with `cpus` vCPUs.
    pub fn new(kvm: &Kvm, cpus: u8) -> Result<Self, VmError> {
        let supported =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self::from_supported(supported.as_slice(), cpus, deadline))
    }

    fn from_supported(supported: &[kvm_cpuid_entry2], cpus: u8, tsc_deadline: bool) -> Self {
        let mut entries: Vec<_> =
            supported.iter().copied().filter(|entry| !EMPTIED.contains(&entry.function)).collect();
        for &(function, index, register, bits) in MASKED {
            for entry in entries.iter_mut().filter(|entry| (entry.function, entry.index) == (function, index))
            {
                *of(entry, register) &= !bits;
            }
        }
        for entry in &mut entries {
            if entry.function == 1 {
                // The hypervisor bit, without which no guest looks for KVM's own leaf.
                entry.ecx |= 1 << 31;
                entry.ecx = entry.ecx & !(1 << 24) | u32::from(tsc_deadline) << 24;
            }
        }
        remove_amx_state(&mut entries);
        Self { entries, cpus }
    }

    /// The leaves of one vCPU.
    pub fn for_vcpu(&self, index: u8) -> Result<CpuId, VmError> {
        let mut entries: Vec<_> =
            self.entries.iter().copied().filter(|entry| !is_topology(entry.function)).collect();
        let is_amd = self.entries.iter().any(|entry| entry.function == 0x8000_001e);
        for entry in &mut entries {
            self.place(entry, index);
        }
        if let Some(leaf0) = self.entries.iter().find(|entry| entry.function == 0) {
            for function in [0xb, 0x1f].into_iter().filter(|leaf| *leaf <= leaf0.eax) {
                entries.extend(self.topology(function, index));
            }
        }
        debug_assert!(!is_amd || entries.iter().any(|entry| entry.function == 0x8000_001e));
        CpuId::from_entries(&entries).map_err(|_| {
            call("KVM_SET_CPUID2 with so many leaves")(vmm_sys_util::errno::Error::new(libc::E2BIG))
        })
    }

    /// Bits of an APIC ID that number the cores.
    fn core_bits(&self) -> u32 {
        u32::from(self.cpus.max(1)).next_power_of_two().trailing_zeros()
    }

    fn place(&self, entry: &mut kvm_cpuid_entry2, index: u8) {
        let (id, cpus) = (u32::from(index), u32::from(self.cpus));
        match entry.function {
            1 => {
                // Initial APIC ID, and how many there may be; the latter counts only with HTT.
                entry.ebx = entry.ebx & 0xffff | (1 << self.core_bits()) << 16 | id << 24;
                entry.edx = entry.edx & !(1 << 28) | u32::from(cpus > 1) << 28;
            }
            // Caches of Intel: cores in the package; threads that share: one core's, or all for the third level.
            4 if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { (1 << self.core_bits()) - 1 } else { 0 };
                let cores = (1 << self.core_bits()) - 1;
                entry.eax = entry.eax & 0x3fff | sharing << 14 | cores.min(63) << 26;
            }
            // The same of AMD, without the cores.
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { cpus - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14;
            }
            // Cores of AMD's package, and the bits that number them.
            0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | self.core_bits() << 12 | (cpus - 1),
            // AMD's extended APIC ID; core number, one thread each; node 0 of one.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0),
            // CMP_LEGACY: the cores of 0x8000_0008 are cores, not threads.
            0x8000_0001 => entry.ecx = entry.ecx & !(1 << 1) | u32::from(cpus > 1) << 1,
            _ => {}
        }
    }

    /// Extended topology: level 0 is threads (one a core), level 1 cores, then the end.
    fn topology(&self, function: u32, index: u8) -> [kvm_cpuid_entry2; 3] {
        let level = |number: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
            function,
            index: number,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: kind << 8 | number,
            edx: u32::from(index),
            ..Default::default()
        };
        [level(0, 0, 1, 1), level(1, self.core_bits(), u32::from(self.cpus), 2), level(2, 0, 0, 0)]
    }
}

fn is_topology(function: u32) -> bool {
    matches!(function, 0xb | 0x1f)
}

/// Takes AMX out of what XSAVE saves, and its size out of the area's (leaf 0xD).
fn remove_amx_state(entries: &mut Vec<kvm_cpuid_entry2>) {
    entries.retain(|entry| entry.function != 0xd || !matches!(entry.index, 17 | 18));
    let end = entries
        .iter()
        .filter(|entry| entry.function == 0xd && entry.index >= 2 && entry.ecx & 1 == 0)
        .map(|entry| entry.ebx.saturating_add(entry.eax))
        .max();
    // The legacy area and the header come first.
    let size = end.unwrap_or(0).max(512 + 64);
    for entry in entries.iter_mut().filter(|entry| entry.function == 0xd && entry.index == 0) {
        if entry.eax & XCR0_AMX != 0 {
            entry.eax &= !XCR0_AMX;
            entry.ecx = size;
        }
    }
}

fn of(entry: &mut kvm_cpuid_entry2, register: Register) -> &mut u32 {
    match register {
        Eax => &mut entry.eax,
        Ebx => &mut entry.ebx,
        Ecx => &mut entry.ecx,
        Edx => &mut entry.edx,
    }
}

#[cfg(test)]
#[path = "cpuid_tests.rs"]
mod tests;
