//! Accesses to ports and to registers in memory: where they arrive, and that they are counted.

use std::io::Write;

use catalyst_vmm::control::protocol::{Answer, Cause, Outcome};
use catalyst_vmm::layout;

use crate::guest::{Routine, until};
use crate::machine::{Plan, read_exact};

/// Line status: there is a byte to be read.
const DATA_READY: u8 = 1;
const INTERRUPT_ENABLE: u16 = layout::UART_PORT + 1;
const LINE_STATUS: u16 = layout::UART_PORT + 5;

#[test]
fn what_the_guest_writes_to_its_serial_port_arrives_at_log_and_socket() {
    let Some(mut plan) = Plan::new() else { return };
    plan.description.uart = Some(plan.console("uart"));
    let machine = plan.start();
    let client = machine.client("uart");
    // It is accepted when the monitor gets to it; until then output goes to the log alone.
    let line = b"hello from the guest\n";
    client.set_nonblocking(true).unwrap();
    let mut heard = Vec::new();
    until("the client hears of the guest", || {
        machine.guest.ask_out(layout::UART_PORT, line);
        machine.guest.wait();
        let mut buffer = [0; 256];
        while let Ok(count @ 1..) = std::io::Read::read(&mut &client, &mut buffer) {
            heard.extend_from_slice(&buffer[..count]);
        }
        heard.ends_with(line)
    });
    let log = machine.log("uart");
    assert!(log.len() >= heard.len() && log.ends_with(line) && log.len() % line.len() == 0);
}

#[test]
fn output_without_a_line_s_end_does_not_stay_behind() {
    let Some(mut plan) = Plan::new() else { return };
    plan.description.uart = Some(plan.console("uart"));
    let mut machine = plan.start();
    machine.guest.ask_out(layout::UART_PORT, b"login: ");
    machine.guest.wait();
    until("the prompt is in the log", || machine.log("uart") == b"login: ");
    // Nor at the end.
    machine.guest.ask_out(layout::UART_PORT, b"bye");
    machine.guest.wait();
    machine.command("quit");
    let (_, said) = machine.wait();
    assert_eq!((machine.log("uart"), said.as_str()), (b"login: bye".to_vec(), ""));
}

#[test]
fn input_reaches_the_guest_with_its_interrupt() {
    let Some(mut plan) = Plan::new() else { return };
    plan.description.uart = Some(plan.console("uart"));
    let machine = plan.start();
    let guest = &machine.guest;
    guest.enable_interrupts();
    guest.route(layout::UART_GSI);
    guest.out8(INTERRUPT_ENABLE, 1);
    assert_eq!((guest.in8(LINE_STATUS) & DATA_READY, guest.interrupts(layout::UART_GSI)), (0, 0));
    machine.client("uart").write_all(b"ok").unwrap();
    until("the interrupt comes", || guest.interrupts(layout::UART_GSI) > 0);
    assert_eq!(guest.in8(LINE_STATUS) & DATA_READY, DATA_READY);
    assert_eq!([guest.in8(layout::UART_PORT), guest.in8(layout::UART_PORT)], *b"ok");
    assert_eq!(guest.in8(LINE_STATUS) & DATA_READY, 0);
}

#[test]
fn a_control_connection_becomes_the_terminal() {
    let Some(mut plan) = Plan::new() else { return };
    plan.description.uart = Some(plan.console("uart"));
    let machine = plan.start();
    let mut terminal = machine.connect();
    assert_eq!(terminal.ask("attach-console"), Outcome::Ok(Answer::Done));
    let mut second = machine.connect();
    until("the console is taken", || matches!(second.ask("attach-console"), Outcome::Error(_)));
    machine.guest.ask_out(layout::UART_PORT, b"x\n");
    assert_eq!(read_exact(&mut terminal.stream, 2), b"x\n");
    terminal.stream.get_mut().write_all(b"y").unwrap();
    machine.guest.wait();
    until("the byte is there", || machine.guest.in8(LINE_STATUS) & DATA_READY != 0);
    assert_eq!(machine.guest.in8(layout::UART_PORT), b'y');
}

#[test]
fn exits_are_counted_by_kind() {
    let Some(plan) = Plan::new() else { return };
    let mut machine = plan.start();
    machine.guest.out8(0x80, 0);
    let before = machine.stats().exits;
    for _ in 0..3 {
        assert_eq!(machine.guest.in8(0x1234), 0xff, "where nothing is");
    }
    machine.guest.ask_out(0x1234, &[0; 5]);
    machine.guest.wait();
    machine.guest.ask(Routine::ReadMany, layout::POWER_START + 0x800, 0, 7);
    assert_eq!(machine.guest.wait(), 0);
    assert_eq!(machine.guest.call(Routine::Read64, layout::VIRTIO_START, 0), u64::MAX, "no device");
    machine.guest.write32(layout::POWER_START + 0x800, 1);
    let after = machine.stats().exits;
    let difference = |kind: &str| after[kind] - before[kind];
    let counts = ["port-in", "port-out", "mmio-read", "mmio-write", "other"].map(difference);
    assert_eq!(counts, [3, 5, 8, 1, 0]);
    machine.command("quit");
    machine.ends(Cause::Quit);
}

#[test]
fn memory_is_told_in_the_statistics() {
    let Some(plan) = Plan::new() else { return };
    let mut machine = plan.start();
    machine.guest.write8(0x1f0_0000, 1);
    let memory = machine.stats().memory;
    assert_eq!(memory.ram, crate::machine::MEMORY << 20);
    assert!(memory.ram_resident >= 0x1000 && memory.ram_resident < memory.ram / 2, "{memory:?}");
    assert!(memory.overhead > 0, "{memory:?}");
}
