//! Pause and resume: at once, exactly, and as often as one likes.

use std::time::Duration;

use catalyst_vmm::control::protocol::{Cause, RunState};
use catalyst_vmm::devices::power;
use catalyst_vmm::layout;

use crate::guest::until;
use crate::machine::Plan;

#[test]
fn a_paused_guest_does_nothing_and_goes_on_where_it_was() {
    let Some(plan) = Plan::new() else { return };
    let mut machine = plan.start();
    machine.guest.out8(0x80, 0);
    machine.command("pause");
    assert_eq!(machine.state(), RunState::Paused);
    let rounds = machine.guest.idle_rounds();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(machine.guest.idle_rounds(), rounds);
    machine.command("resume");
    until("the guest goes on", || machine.guest.idle_rounds() > rounds);
}

#[test]
fn an_access_that_is_under_way_is_neither_lost_nor_done_twice() {
    let Some(mut plan) = Plan::new() else { return };
    plan.description.uart = Some(plan.console("uart"));
    let mut machine = plan.start();
    let text: Vec<u8> = (0..4000_u32).map(|at| b'a' + u8::try_from(at % 26).unwrap()).collect();
    machine.guest.ask_out(layout::UART_PORT, &text);
    let mut pauses = 0;
    while !machine.guest.is_done() || pauses < 200 {
        machine.command("pause");
        machine.command("resume");
        pauses += 1;
    }
    machine.command("quit");
    machine.wait();
    assert!(machine.log("uart") == text, "{pauses} pauses");
}

#[test]
fn pausing_and_resuming_twice_is_fine_and_several_vcpus_stand() {
    let Some(mut plan) = Plan::new() else { return };
    plan.description.cpus = 4;
    let mut machine = plan.start();
    for command in ["pause", "pause", "resume", "resume", "pause"] {
        machine.command(command);
    }
    assert_eq!(machine.state(), RunState::Paused);
    machine.command("quit");
    machine.ends(Cause::Quit);
}

#[test]
fn a_button_pressed_while_paused_is_seen_after() {
    let Some(plan) = Plan::new() else { return };
    let mut machine = plan.start();
    machine.guest.enable_interrupts();
    machine.guest.route(layout::POWER_GSI);
    machine.command("pause");
    machine.command("power-button");
    assert_eq!(machine.guest.interrupts(layout::POWER_GSI), 0);
    machine.command("resume");
    until("the interrupt comes", || machine.guest.interrupts(layout::POWER_GSI) == 1);
    assert_eq!(machine.guest.read32(layout::POWER_START), u32::from(power::POWER_BUTTON));
    assert_eq!(machine.guest.read32(layout::POWER_START), 0);
}
