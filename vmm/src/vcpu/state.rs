//! Everything that a virtual CPU is, as plain data: saved while it is paused, restored into a fresh one.
//!
//! The order is what KVM wants (api.rst; the traps are named at each step).

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::msrs::set_msrs;
use crate::vm::{VmError, call};

/// IA32_TSC_DEADLINE: armed only once the local APIC is there, so it is set last.
const TSC_DEADLINE: u32 = 0x6e0;

/// A virtual CPU.
#[derive(Debug, Serialize, Deserialize)]
#[expect(clippy::unsafe_derive_deserialize, reason = "every content is plain data; KVM checks it")]
pub struct VcpuState {
    /// What CPUID says.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Rate of its time stamp counter, in kHz; 0 if KVM does not tell.
    pub tsc_khz: u32,
    /// Whether it runs, halts, or waits for its startup message.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// System registers.
    pub sregs: kvm_sregs,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// x87, SSE, AVX and the rest of what XSAVE saves.
    pub xsave: kvm_xsave,
    /// Debug registers.
    pub debug: kvm_debugregs,
    /// Local APIC.
    pub lapic: kvm_lapic_state,
    /// Model-specific registers.
    pub msrs: Vec<kvm_msr_entry>,
    /// Exceptions and interrupts that are being delivered.
    pub events: kvm_vcpu_events,
}

impl VcpuState {
    /// Reads all of a virtual CPU that does not run. It must have come out of KVM_RUN by `immediate_exit`, so that no
    /// access to a device is half done.
    pub fn save(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Self, VmError> {
        // First: reading it makes KVM take in startup messages that are pending.
        let mp_state = vcpu.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?;
        let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_CPUID2"))?;
        Ok(Self {
            mp_state,
            cpuid: cpuid.as_slice().to_vec(),
            tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
            regs: vcpu.get_regs().map_err(call("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?,
            xcrs: vcpu.get_xcrs().map_err(call("KVM_GET_XCRS"))?,
            xsave: vcpu.get_xsave().map_err(call("KVM_GET_XSAVE"))?,
            debug: vcpu.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?,
            lapic: vcpu.get_lapic().map_err(call("KVM_GET_LAPIC"))?,
            msrs: get_msrs(kvm, vcpu)?,
            events: vcpu.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Makes a fresh virtual CPU into this one.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), VmError> {
        let too_many =
            |_| call("KVM_SET_CPUID2 with so many leaves")(vmm_sys_util::errno::Error::new(libc::E2BIG));
        // Before all else: it says which registers there are, and how fast the counter runs.
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(too_many)?;
        vcpu.set_cpuid2(&cpuid).map_err(call("KVM_SET_CPUID2"))?;
        if self.tsc_khz != 0 && vcpu.get_tsc_khz() != Ok(self.tsc_khz) {
            vcpu.set_tsc_khz(self.tsc_khz).map_err(call("KVM_SET_TSC_KHZ"))?;
        }
        vcpu.set_mp_state(self.mp_state).map_err(call("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(call("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(call("KVM_SET_SREGS"))?;
        // SAFETY: kvm_xsave holds all that KVM reads here: features whose state is longer need a permission that this
        // process never asks for (AMX).
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(call("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(call("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debug).map_err(call("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(call("KVM_SET_LAPIC"))?;
        let (last, first): (Vec<_>, Vec<_>) = self.msrs.iter().partition(|msr| msr.index == TSC_DEADLINE);
        for msr in first.into_iter().chain(last) {
            if set_msrs(vcpu, &[msr])? != 1 {
                return Err(call("KVM_SET_MSRS")(vmm_sys_util::errno::Error::new(libc::EINVAL)));
            }
        }
        // Last: setting registers would drop what is being delivered.
        vcpu.set_vcpu_events(&self.events).map_err(call("KVM_SET_VCPU_EVENTS"))
    }
}

/// All registers that KVM says it saves and that can be read.
fn get_msrs(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, VmError> {
    let known = kvm.get_msr_index_list().map_err(call("KVM_GET_MSR_INDEX_LIST"))?;
    let mut values = Vec::new();
    let mut left = known.as_slice();
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

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;
    use crate::memory::{Backing, map};
    use crate::vcpu::{cpuid, msrs};
    use crate::vm::{Vm, take_kvm};

    /// Registers that go on by themselves, or hold a time.
    const CLOCKS: [u32; 2] = [0x10, 0x3b];
    const KERNEL_GS_BASE: u32 = 0xc000_0102;

    fn made(kvm: &Kvm) -> (Vm, VcpuFd) {
        let vm = Vm::new(kvm, map(2, Backing::Anonymous, false).unwrap()).unwrap();
        let vcpu = vm.fd().create_vcpu(0).unwrap();
        (vm, vcpu)
    }

    #[test]
    fn a_virtual_cpu_is_the_same_after_it_was_saved_as_text_and_restored_into_another_vm() {
        let Ok(file) = OpenOptions::new().read(true).write(true).open("/dev/kvm") else {
            eprintln!("SKIPPED: /dev/kvm does not open");
            return;
        };
        let kvm = take_kvm(file).unwrap();
        let (_vm, vcpu) = made(&kvm);
        vcpu.set_cpuid2(&cpuid::Template::new(&kvm, 1).unwrap().for_vcpu(0).unwrap()).unwrap();
        msrs::set_boot_msrs(&kvm, &vcpu).unwrap();
        vcpu.set_regs(&kvm_regs {
            rax: 1,
            r15: 0x1234_5678_9abc,
            rip: 0x7c00,
            rflags: 2,
            ..kvm_regs::default()
        })
        .unwrap();
        let gs = kvm_msr_entry { index: KERNEL_GS_BASE, data: 0x7777_0000, ..kvm_msr_entry::default() };
        assert_eq!(set_msrs(&vcpu, &[gs]).unwrap(), 1);
        let mut lapic = vcpu.get_lapic().unwrap();
        // The task priority (SDM 3A, table 11-1).
        lapic.regs[0x80] = 0x20;
        vcpu.set_lapic(&lapic).unwrap();
        let saved = VcpuState::save(&kvm, &vcpu).unwrap();
        assert!(
            saved.msrs.iter().any(|msr| (msr.index, msr.data) == (gs.index, gs.data)),
            "{:x?}",
            saved.msrs
        );

        let text = serde_json::to_string(&saved).unwrap();
        let (_vm, other) = made(&kvm);
        serde_json::from_str::<VcpuState>(&text).unwrap().restore(&other).unwrap();
        let [before, after] = [saved, VcpuState::save(&kvm, &other).unwrap()].map(|mut state| {
            state.msrs.retain(|msr| !CLOCKS.contains(&msr.index));
            serde_json::to_value(state).unwrap()
        });
        for (part, value) in before.as_object().unwrap() {
            assert_eq!(value, &after[part], "{part}");
        }
    }
}
