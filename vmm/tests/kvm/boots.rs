//! Many boots: none fails, and nothing is left behind.

use catalyst_vmm::control::protocol::Cause;
use catalyst_vmm::devices::power;
use catalyst_vmm::layout;

use crate::ends::OFF;
use crate::guest::Routine;
use crate::machine::Plan;

#[test]
fn a_hundred_boots_in_a_row_end_well_and_hold_no_more_memory_each() {
    let Some(_) = crate::machine::kvm() else { return };
    let mut overhead = Vec::new();
    for boot in 0..100 {
        let mut plan = Plan::new().unwrap();
        plan.description.rng = true;
        let mut machine = plan.start();
        overhead.push(machine.stats().memory.overhead);
        machine.guest.ask(Routine::Write8, layout::POWER_START + power::SLEEP_CONTROL, OFF.into(), 0);
        assert_eq!(machine.ends(Cause::PowerOff), "", "boot {boot}");
    }
    overhead.sort_unstable();
    // Debug builds are larger, and the kernel's counters are rough; growth would be without bound.
    assert!(overhead[99] < overhead[50] + (4 << 20), "{overhead:?}");
}

/// Other tests of this process come and go meanwhile, so what a machine holds is looked at in its own process.
#[test]
fn resetting_a_device_a_hundred_times_keeps_no_descriptor_and_no_thread() {
    let Some(mut plan) = Plan::new() else { return };
    plan.description.rng = true;
    let machine = plan.start();
    let status = layout::VIRTIO_START + 0x70;
    let count =
        |what: &str| std::fs::read_dir(format!("/proc/{}/{what}", machine.child.id())).unwrap().count();
    let activate = || {
        for value in [0, 1, 3] {
            machine.guest.write32(status, value);
        }
        machine.guest.write32(layout::VIRTIO_START + 0x24, 1);
        machine.guest.write32(layout::VIRTIO_START + 0x20, 1);
        for value in [11, 15, 0] {
            machine.guest.write32(status, value);
        }
    };
    activate();
    let (descriptors, threads) = (count("fd"), count("task"));
    for _ in 0..100 {
        activate();
    }
    assert_eq!((count("fd"), count("task")), (descriptors, threads));
}
