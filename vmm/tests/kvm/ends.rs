//! Every end of a guest: the event that clients are told, and the exit status.

use std::io::Write as _;

use catalyst_vmm::boot::testing::elf;
use catalyst_vmm::control::protocol::{Answer, Cause, Event, Outcome};
use catalyst_vmm::devices::power;
use catalyst_vmm::layout;

use crate::guest::Routine;
use crate::machine::Plan;

/// Sleep enable and sleep type S5 of the sleep control register.
pub const OFF: u8 = 1 << 5 | power::SLEEP_TYPE_OFF << 2;

#[test]
fn a_write_to_the_sleep_register_powers_off() {
    let Some(plan) = Plan::new() else { return };
    let machine = plan.start();
    machine.guest.ask(Routine::Write8, layout::POWER_START + power::SLEEP_CONTROL, OFF.into(), 0);
    assert_eq!(machine.ends(Cause::PowerOff), "");
}

#[test]
fn other_writes_to_the_sleep_register_do_nothing() {
    let Some(plan) = Plan::new() else { return };
    let machine = plan.start();
    for value in [0, power::SLEEP_TYPE_OFF << 2, 1 << 5 | 3 << 2] {
        machine.guest.write8(layout::POWER_START + power::SLEEP_CONTROL, value);
    }
    machine.guest.write8(layout::POWER_START + power::RESET, 2);
    machine.guest.ask(Routine::Write8, layout::POWER_START + power::RESET, power::RESET_VALUE.into(), 0);
    machine.ends(Cause::Reset);
}

#[test]
fn the_keyboard_controller_resets() {
    let Some(plan) = Plan::new() else { return };
    let machine = plan.start();
    assert_eq!(machine.guest.in8(layout::I8042_COMMAND_PORT), 1);
    machine.guest.ask(Routine::Out8, layout::I8042_COMMAND_PORT.into(), 0xfe, 0);
    machine.ends(Cause::Reset);
}

#[test]
fn a_jump_to_the_reset_vector_resets() {
    let Some(plan) = Plan::new() else { return };
    let machine = plan.start();
    machine.guest.ask(Routine::ResetVector, 0, 0, 0);
    machine.ends(Cause::Reset);
}

#[test]
fn a_triple_fault_ends_the_machine() {
    let Some(plan) = Plan::new() else { return };
    let machine = plan.start();
    machine.guest.ask_triple_fault();
    machine.ends(Cause::TripleFault);
}

#[test]
fn quit_is_answered_and_then_ends_the_machine() {
    let Some(plan) = Plan::new() else { return };
    let mut machine = plan.start();
    let mut other = machine.connect();
    assert!(matches!(other.ask("state"), Outcome::Ok(Answer::State(_))));
    machine.command("quit");
    machine.ends(Cause::Quit);
    assert_eq!(other.line(), "{\"event\":\"exit\",\"cause\":\"quit\"}\n");
    assert_eq!(other.line(), "");
}

#[test]
fn quit_ends_a_paused_machine_too() {
    let Some(plan) = Plan::new() else { return };
    let mut machine = plan.start();
    machine.command("pause");
    machine.command("quit");
    machine.ends(Cause::Quit);
}

/// `fstp tbyte ptr [0xd0000000]` in 32-bit code: KVM emulates no x87 access to a device.
const X87_TO_DEVICE: [u8; 6] = [0xdb, 0x3d, 0, 0, 0, 0xd0];

#[test]
fn an_instruction_that_kvm_does_not_emulate_is_a_failure_that_names_it() {
    let Some(mut plan) = Plan::with_kernel(&elf(&X87_TO_DEVICE, 0x20_0000, 0x1000, Some(0x20_0000))) else {
        return;
    };
    plan.description.paused = true;
    let mut machine = plan.start_paused();
    // It ends at once: whether an answer still comes does not matter.
    let control = machine.control();
    control.stream.get_mut().write_all(b"{\"id\":99,\"command\":\"resume\"}\n").unwrap();
    let lines: Vec<String> =
        std::iter::repeat_with(|| control.line()).take_while(|line| !line.is_empty()).collect();
    let mut events = lines.iter().filter_map(|line| serde_json::from_str::<Event>(line).ok());
    assert_eq!(events.next(), Some(Event::Exit { cause: Cause::Failure }), "{lines:?}");
    let (status, said) = machine.wait();
    assert_eq!(status.code(), Some(Cause::Failure.exit_status().into()), "{said}");
    assert!(said.contains("could not emulate an instruction at 0x200000"), "{said}");
    assert!(said.contains("bytes db 3d 00 00 00 d0") && said.contains("catalyst doctor"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn a_breakpoint_is_a_failure_where_kvm_interprets_without_it() {
    let Some(plan) = Plan::new() else { return };
    let mut machine = plan.start();
    // A genuine KVM delivers the exception, for which there is no handler.
    machine.guest.ask(Routine::Int3, 0, 0, 0);
    let event = machine.control().event();
    let (status, said) = machine.wait();
    if status.code() == Some(Cause::TripleFault.exit_status().into()) {
        println!("SKIPPED: this KVM runs int3 itself: {event:?}");
        return;
    }
    assert_eq!(status.code(), Some(Cause::Failure.exit_status().into()), "{said}");
    assert!(said.contains("bytes cc") && said.contains("catalyst doctor"), "{said}");
}
