//! Everything that a virtual CPU is, as plain data: saved while it is paused, restored into a fresh one.
//!
//! Any thread may do it while the virtual CPU stands (KVM takes its own lock, and [`super::Vcpus`] one before that): the
//! control thread saves, and who builds a machine restores before the threads of virtual CPUs are there. The order is what
//! KVM wants (api.rst; the traps are named at each step).

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::{msrs, tsc};
use crate::vm::{VmError, call};

/// Local APIC, offset of the timer's entry in its vector table (SDM 3A, table 11-1): what drives the timer.
const LVT_TIMER: usize = 0x320;
/// The timer's mode, and in it the deadline by the time stamp counter (section 11.5.4).
const TIMER_MODE: u32 = 3 << 17;
const DEADLINE_MODE: u32 = 2 << 17;

/// A virtual CPU.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::unsafe_derive_deserialize, reason = "every content is plain data; KVM checks it")]
pub struct VcpuState {
    /// What CPUID says.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Rate of its time stamp counter, in kHz; 0 if KVM does not tell.
    pub tsc_khz: u32,
    /// By how much its time stamp counter differs from the host's; none if KVM does not tell. Of use only beside that of
    /// other virtual CPUs that were saved with it.
    pub tsc_offset: Option<u64>,
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
    /// Reads all of a virtual CPU that does not run; `known` are the registers that [`msrs::known`] gave. It must have
    /// come out of KVM_RUN by `immediate_exit`, so that no access to a device is half done.
    pub fn save(vcpu: &VcpuFd, known: &[u32]) -> Result<Self, VmError> {
        // First: reading it makes KVM take in startup messages that are pending.
        let mp_state = vcpu.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?;
        let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_CPUID2"))?;
        // Before the local APIC: a timer that runs out between the two is in one of them, and twice is better than never.
        let msrs = msrs::read(vcpu, known)?;
        Ok(Self {
            mp_state,
            cpuid: cpuid.as_slice().to_vec(),
            tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
            tsc_offset: tsc::offset(vcpu),
            regs: vcpu.get_regs().map_err(call("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?,
            xcrs: vcpu.get_xcrs().map_err(call("KVM_GET_XCRS"))?,
            xsave: vcpu.get_xsave().map_err(call("KVM_GET_XSAVE"))?,
            debug: vcpu.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?,
            lapic: vcpu.get_lapic().map_err(call("KVM_GET_LAPIC"))?,
            msrs,
            events: vcpu.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// The value of a model-specific register.
    pub fn msr(&self, index: u32) -> Option<u64> {
        self.msrs.iter().find(|msr| msr.index == index).map(|msr| msr.data)
    }

    /// Makes fresh virtual CPUs into these, as many of them as there are states.
    pub fn restore_all(states: &[Self], vcpus: &[VcpuFd]) -> Result<(), VmError> {
        for (state, vcpu) in states.iter().zip(vcpus) {
            state.restore_registers(vcpu)?;
        }
        // One right after the other: the guest takes it that they go on together.
        tsc::restore(states, vcpus)?;
        for (state, vcpu) in states.iter().zip(vcpus) {
            state.restore_timer(vcpu)?;
            // Last: setting registers would drop what is being delivered.
            vcpu.set_vcpu_events(&state.events).map_err(call("KVM_SET_VCPU_EVENTS"))?;
        }
        Ok(())
    }

    fn restore_registers(&self, vcpu: &VcpuFd) -> Result<(), VmError> {
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
        let clocks = [tsc::COUNTER, tsc::DEADLINE];
        let others: Vec<_> = self.msrs.iter().filter(|msr| !clocks.contains(&msr.index)).copied().collect();
        msrs::write(vcpu, &others)
    }

    /// The deadline means nothing before the local APIC and the time stamp counter are there.
    fn restore_timer(&self, vcpu: &VcpuFd) -> Result<(), VmError> {
        let Some(deadline) = self.msr(tsc::DEADLINE) else { return Ok(()) };
        let regs = &self.lapic.regs;
        let timer = [0, 1, 2, 3].map(|byte| regs[LVT_TIMER + byte].cast_unsigned());
        let by_deadline = u32::from_le_bytes(timer) & TIMER_MODE == DEADLINE_MODE;
        // None may mean that it has just passed, and the interrupt may have gone with it: Firecracker has seen virtual
        // CPUs that slept for ever. One interrupt for nothing does no harm, so it passes again.
        let data = if by_deadline { deadline.max(1) } else { deadline };
        msrs::write(vcpu, &[kvm_msr_entry { index: tsc::DEADLINE, data, ..Default::default() }])
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;
    use kvm_ioctls::Kvm;

    use crate::memory::{Backing, map};
    use crate::vcpu::cpuid;
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
        msrs::write(&vcpu, &[gs]).unwrap();
        let mut lapic = vcpu.get_lapic().unwrap();
        // The task priority (SDM 3A, table 11-1).
        lapic.regs[0x80] = 0x20;
        vcpu.set_lapic(&lapic).unwrap();
        let known = msrs::known(&kvm).unwrap();
        let saved = VcpuState::save(&vcpu, &known).unwrap();
        assert!(
            saved.msrs.iter().any(|msr| (msr.index, msr.data) == (gs.index, gs.data)),
            "{:x?}",
            saved.msrs
        );

        let text = serde_json::to_string(&saved).unwrap();
        let (_vm, other) = made(&kvm);
        let others = [other];
        VcpuState::restore_all(&[serde_json::from_str(&text).unwrap()], &others).unwrap();
        let again = VcpuState::save(&others[0], &known).unwrap();
        let counter = |state: &VcpuState| state.msr(tsc::COUNTER).unwrap();
        let elapsed = counter(&again).wrapping_sub(counter(&saved));
        assert!(elapsed < u64::from(saved.tsc_khz.max(1 << 20)) * 1000, "a second: {elapsed}");
        let [before, after] = [saved, again].map(|mut state| {
            state.msrs.retain(|msr| !CLOCKS.contains(&msr.index));
            state.tsc_offset = None;
            serde_json::to_value(state).unwrap()
        });
        for (part, value) in before.as_object().unwrap() {
            assert_eq!(value, &after[part], "{part}");
        }
    }
}
