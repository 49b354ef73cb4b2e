//! Machines that are saved, and others that go on from there.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use catalyst_vmm::control::protocol::{Answer, Cause, Outcome, RunState};
use catalyst_vmm::description::{Disk, Format, Layer, MAX_NICS, Nic, Port, Serial, Vsock};
use catalyst_vmm::devices::power::{NEW_GENERATION, POWER_BUTTON};
use catalyst_vmm::{layout, snapshot};
use vm_memory::GuestAddress;

use crate::bad_input::refused;
use crate::devices::{Driver, WRITE};
use crate::guest::{Guest, Routine, until};
use crate::machine::{Machine, Plan, Snapshot};

/// Pages of a restored guest that may be its own before its first instruction.
const PRIVATE_PAGES: u64 = 16;
const NONCE: u64 = 0x5eed_0f74_151d;

/// The words of the counting program: counter, and whether to stop.
struct Counter {
    at: u64,
    pattern: u64,
}

impl Counter {
    fn start(guest: &Guest) -> Self {
        let counter = Self { at: guest.take(16), pattern: 0x0123_4567_89ab_cdef };
        guest.ask(Routine::CountUp, counter.at, counter.pattern, 0);
        counter
    }

    fn value(&self, guest: &Guest) -> u64 {
        guest.memory.read_obj(GuestAddress(self.at)).unwrap()
    }

    fn must_go_on(&self, guest: &Guest, from: u64) {
        until("it counts on", || self.value(guest) > from);
    }

    /// Stops it: register and memory were the same all the time.
    fn stop(&self, guest: &Guest) -> u64 {
        guest.memory.write_obj(1_u64, GuestAddress(self.at + 8)).unwrap();
        let count = guest.wait();
        assert_eq!(count, self.value(guest));
        count
    }
}

fn command(machine: &mut Machine, command: &str) -> Outcome {
    machine.control().ask(command)
}

#[test]
fn a_guest_goes_on_exactly_where_it_was_and_neither_it_nor_clones_nor_the_file_see_each_others_writes() {
    let Some(plan) = Plan::new() else { return };
    let mut machine = plan.start();
    let nonce = GuestAddress(machine.guest.take(8));
    machine.guest.memory.write_obj(NONCE, nonce).unwrap();
    let counter = Counter::start(&machine.guest);
    counter.must_go_on(&machine.guest, 1000);
    let snapshot = machine.save();
    let count = counter.value(&machine.guest);
    let in_file = || {
        let mut bytes = [0; 8];
        snapshot.memory.read_exact_at(&mut bytes, counter.at).unwrap();
        u64::from_le_bytes(bytes)
    };
    assert_eq!(in_file(), count);

    let [mut first, mut second] = [0, 1].map(|_| Plan::restoring(&snapshot).go_on(&machine.guest));
    for clone in [&mut first, &mut second] {
        let private = clone.private_pages();
        assert!(
            (1..=PRIVATE_PAGES).contains(&private),
            "{private} pages are private before the first instruction"
        );
        assert_eq!(counter.value(&clone.guest), count);
        assert_eq!(clone.guest.memory.read_obj::<u64>(nonce).unwrap(), NONCE);
    }
    first.command("resume");
    counter.must_go_on(&first.guest, count);
    assert_eq!([counter.value(&second.guest), counter.value(&machine.guest), in_file()], [count; 3]);
    machine.command("resume");
    counter.must_go_on(&machine.guest, count);
    assert_eq!([counter.value(&second.guest), in_file()], [count; 2]);
    assert!(counter.stop(&first.guest) > count);
    second.command("resume");
    counter.must_go_on(&second.guest, count);
    assert!(counter.stop(&second.guest) > count);
    assert!(counter.stop(&machine.guest) > count);
    assert_eq!(in_file(), count);
    for mut machine in [machine, first, second] {
        assert_eq!(machine.guest.memory.read_obj::<u64>(nonce).unwrap(), NONCE);
        machine.command("quit");
        assert_eq!(machine.ends(Cause::Quit), "");
    }
}

#[test]
fn a_restored_machine_can_be_saved_again_and_runs_at_once_where_it_is_not_to_stand() {
    let Some(plan) = Plan::new() else { return };
    let mut machine = plan.start();
    let counter = Counter::start(&machine.guest);
    counter.must_go_on(&machine.guest, 1000);
    let snapshot = machine.save();
    let mut clone = Plan::restoring(&snapshot).go_on(&machine.guest);
    let again = clone.save();
    let decoded = [&snapshot, &again].map(|snapshot| snapshot::decode(&snapshot.state).unwrap());
    assert_eq!(decoded[0].clock, decoded[1].clock, "the guest's clock stands");
    clone.command("resume");
    counter.must_go_on(&clone.guest, counter.value(&machine.guest));
    let later = clone.save();
    let count = counter.value(&clone.guest);
    assert!(snapshot::decode(&later.state).unwrap().clock > decoded[0].clock);

    let mut plan = Plan::restoring(&later);
    plan.description.paused = false;
    let text = serde_json::to_vec(&plan.description).unwrap();
    let mut third = plan.start_text(&text);
    third.connect_control();
    until("it runs", || third.state() == RunState::Running);
    third.reach(&machine.guest);
    counter.must_go_on(&third.guest, count);
    assert!(counter.stop(&third.guest) > count);
}

#[test]
fn several_virtual_cpus_come_back_and_their_counters_of_time_agree() {
    let Some(mut plan) = Plan::new() else { return };
    plan.description.cpus = 3;
    let mut machine = plan.start();
    let counter = Counter::start(&machine.guest);
    counter.must_go_on(&machine.guest, 100);
    let snapshot = machine.save();
    let mut plan = Plan::restoring(&snapshot);
    plan.description.cpus = 3;
    let mut clone = plan.go_on(&machine.guest);
    let again = clone.save();
    let [before, after] = [&snapshot, &again].map(|snapshot| snapshot::decode(&snapshot.state).unwrap());
    let tsc = |state: &snapshot::MachineState, cpu: usize| state.cpus[cpu].msr(0x10).unwrap();
    for cpu in 0..3 {
        assert_eq!(before.cpus[cpu].mp_state.mp_state, after.cpus[cpu].mp_state.mp_state);
        assert!(tsc(&after, cpu) >= tsc(&before, cpu), "time does not go back on {cpu}");
        assert_eq!(after.cpus[cpu].tsc_offset, after.cpus[0].tsc_offset);
    }
    clone.command("resume");
    assert!(counter.stop(&clone.guest) > 100);
}

#[test]
fn a_new_generation_and_a_button_that_nobody_took_are_told_with_an_interrupt() {
    let Some(mut plan) = Plan::new() else { return };
    plan.description.generation_id = Some([1; 16]);
    let mut machine = plan.start();
    machine.guest.enable_interrupts();
    machine.guest.route(layout::POWER_GSI);
    machine.command("pause");
    machine.command("power-button");
    let snapshot = machine.save();
    for id in [Some([2; 16]), None] {
        let mut plan = Plan::restoring(&snapshot);
        plan.description.generation_id = id;
        let mut clone = plan.go_on(&machine.guest);
        let written = clone.guest.bytes(layout::GENERATION_ID, 16);
        assert!(id.map_or(written != [1; 16] && written != [0; 16], |id| written == id), "{written:?}");
        clone.command("resume");
        until("the interrupt comes", || clone.guest.interrupts(layout::POWER_GSI) >= 1);
        assert_eq!(clone.guest.read32(layout::POWER_START), u32::from(NEW_GENERATION | POWER_BUTTON));
        assert_eq!(clone.guest.read32(layout::POWER_START), 0);
    }
}

#[test]
fn the_serial_port_goes_on() {
    const SCRATCH: u16 = layout::UART_PORT + 7;
    let Some(mut plan) = Plan::new() else { return };
    plan.description.uart = Some(plan.console("uart"));
    let mut machine = plan.start();
    machine.guest.out8(SCRATCH, 0x5a);
    // No line, so it waits to be written.
    machine.guest.out8(layout::UART_PORT, b'a');
    let snapshot = machine.save();
    assert_eq!(machine.log("uart"), b"a");
    let mut plan = Plan::restoring(&snapshot);
    plan.description.uart = Some(plan.console("uart"));
    let mut clone = plan.go_on(&machine.guest);
    clone.command("resume");
    assert_eq!(clone.guest.in8(SCRATCH), 0x5a);
    clone.guest.out8(layout::UART_PORT, b'b');
    until("the rest is written", || clone.log("uart") == b"b");
}

/// A disk of one MiB whose sectors are `byte`.
fn disk(plan: &mut Plan, byte: u8) -> tempfile::NamedTempFile {
    let image = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(image.path(), vec![byte; 1 << 20]).unwrap();
    let fd = plan.give(File::options().read(true).write(true).open(image.path()).unwrap());
    let layers = vec![Layer { fd, format: Format::Raw }];
    plan.description.disks = vec![Disk { layers, read_only: false, queues: 1, serial: "disk".into() }];
    image
}

fn add_devices(plan: &mut Plan, cid: u32) -> tempfile::NamedTempFile {
    let image = disk(plan, 7);
    let port = Port { name: "org.catalyst.agent.0".into(), listener: plan.listen("agent") };
    plan.description.serial = Some(Serial { console: None, ports: vec![port] });
    (plan.description.rng, plan.description.balloon) = (true, true);
    plan.description.vsock = Some(Vsock { cid, listener: Some(plan.listen("vsock")), upstream: None });
    image
}

const DISK: u32 = 0;
const RNG: u32 = 2;
const VSOCK: u32 = 4;

#[test]
fn queues_go_on_and_a_chain_that_was_offered_before_is_used_after() {
    let Some(mut plan) = Plan::new() else { return };
    let image = add_devices(&mut plan, 3);
    let mut machine = plan.start();
    machine.guest.enable_interrupts();
    let (rng, disk, vsock) =
        (Driver::new(&machine, RNG, 4), Driver::new(&machine, DISK, 2), Driver::new(&machine, VSOCK, 19));
    let (mut random, mut sectors) = (rng.queue(0), disk.queue(0));
    let [_, _, mut events] = [0, 1, 2].map(|number| vsock.queue(number));
    rng.ready();
    disk.ready();
    let event = machine.guest.take(8);
    machine.guest.memory.write_obj(u64::MAX, GuestAddress(event)).unwrap();
    vsock.offer(&mut events, &[(event, 8, WRITE)]);
    vsock.ready();
    let buffer = machine.guest.take(0x1000);
    assert_eq!(rng.request(&mut random, &[(buffer, 64, WRITE)]), 64);
    let write = |machine: &Machine, driver: &Driver<'_>, queue: &mut _, byte: u8| {
        let memory = &machine.guest.memory;
        memory
            .write_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0xff], GuestAddress(buffer))
            .unwrap();
        memory.write_slice(&[byte; 512], GuestAddress(buffer + 512)).unwrap();
        driver.request(queue, &[(buffer, 16, 0), (buffer + 512, 512, 0), (buffer + 16, 1, WRITE)]);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(buffer + 16)).unwrap(), 0);
    };
    write(&machine, &disk, &mut sectors, 0xa5);
    let waiting = machine.guest.take(0x1000);
    let (rng_interrupts, disk_queue) =
        (machine.guest.interrupts(layout::VIRTIO_FIRST_GSI + RNG), sectors.clone());
    machine.command("pause");
    Driver::again(&machine, RNG).offer(&mut random, &[(waiting, 32, WRITE)]);
    let snapshot = machine.save();

    let mut plan = Plan::restoring(&snapshot);
    let clones_image = add_devices(&mut plan, 77);
    let mut clone = plan.go_on(&machine.guest);
    let private = clone.private_pages();
    assert!(private <= PRIVATE_PAGES, "{private}");
    assert_eq!(clone.guest.bytes(waiting, 32), [0; 32]);
    clone.command("resume");
    let rng = Driver::again(&clone, RNG);
    assert_eq!(rng.used(&random, rng_interrupts), 32);
    assert_ne!(clone.guest.bytes(waiting, 32), [0; 32]);
    assert_eq!(rng.request(&mut random, &[(buffer, 64, WRITE)]), 64);
    let mut queue = disk_queue;
    write(&clone, &Driver::again(&clone, DISK), &mut queue, 0x3c);
    let sector = |image: &tempfile::NamedTempFile| std::fs::read(image.path()).unwrap()[5 * 512];
    assert_eq!([sector(&image), sector(&clones_image)], [0xa5, 0x3c]);
    // The vsock's connections are gone, and the guest has another number.
    until("the transport's reset is told", || {
        clone.guest.memory.read_obj::<u32>(GuestAddress(event)).unwrap() == 0
    });
    assert_eq!(Driver::again(&clone, VSOCK).read(0x100), 77);
    machine.command("quit");
    clone.command("quit");
    assert_eq!([machine.ends(Cause::Quit), clone.ends(Cause::Quit)], ["", ""]);
}

/// A new tap as the monitor wants it, which goes when it is closed.
fn tap() -> std::io::Result<File> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // struct ifreq; the kernel gives it a name. IFF_TAP, IFF_NO_PI, IFF_VNET_HDR.
    let mut request = [0_u8; 40];
    request[16..18].copy_from_slice(&(2_u16 | 0x1000 | 0x4000).to_ne_bytes());
    // SAFETY: the request is as long as struct ifreq.
    match unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) } {
        0 => Ok(file),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn add_nic(plan: &mut Plan, link_up: Option<bool>) {
    let last = u8::try_from(plan.description.nics.len()).unwrap() + 1;
    let (tap, mac) = (plan.give(tap().unwrap()), [2, 0, 0, 0, 0, last]);
    plan.description.nics.push(Nic { tap, mac, link_up });
}

#[test]
fn as_many_nics_as_there_can_be_and_no_disk_are_found_in_order_and_go_on() {
    let Some(mut plan) = Plan::new() else { return };
    if let Err(error) = tap() {
        println!("SKIPPED: no tap can be made here: {error}");
        return;
    }
    for _ in 0..MAX_NICS {
        add_nic(&mut plan, None);
    }
    let mut machine = plan.start();
    // The last two bytes of each address, and its status.
    let found = |machine: &Machine| (0..4).map(|at| Driver::again(machine, at).read(0x104)).collect();
    let [up, down]: [Vec<u32>; 2] = [1, 0].map(|up| (1..=4).map(|last| up << 16 | last << 8).collect());
    let now: Vec<u32> = found(&machine);
    assert_eq!(now, up);
    machine.command(r#"{"set-link":false}"#);
    let mut plan = Plan::restoring(&machine.save());
    for _ in 0..MAX_NICS {
        add_nic(&mut plan, None);
    }
    let mut clone = plan.go_on(&machine.guest);
    clone.command("resume");
    let now: Vec<u32> = found(&clone);
    assert_eq!(now, down);
}

#[test]
fn a_link_goes_down_and_up_and_stays_as_it_was_saved_where_nothing_else_is_said() {
    let Some(mut plan) = Plan::new() else { return };
    if let Err(error) = tap() {
        println!("SKIPPED: no tap can be made here: {error}");
        return;
    }
    add_nic(&mut plan, None);
    let mut machine = plan.start();
    machine.guest.enable_interrupts();
    let nic = Driver::new(&machine, 0, 1);
    let (_receive, _send) = (nic.queue(0), nic.queue(1));
    nic.ready();
    // Its configuration: six bytes of address, two of status.
    let is_up = |machine: &Machine| Driver::again(machine, 0).read(0x104) >> 16 == 1;
    let interrupts = |machine: &Machine| machine.guest.interrupts(layout::VIRTIO_FIRST_GSI);
    assert!(is_up(&machine));
    machine.command(r#"{"set-link":false}"#);
    until("the driver is told", || interrupts(&machine) == 1);
    assert!(!is_up(&machine));
    let snapshot = machine.save();
    for (said, up) in [(None, false), (Some(false), false), (Some(true), true)] {
        let mut plan = Plan::restoring(&snapshot);
        add_nic(&mut plan, said);
        let mut clone = plan.go_on(&machine.guest);
        clone.command("resume");
        assert_eq!(is_up(&clone), up, "{said:?}");
        // The one that was not acknowledged comes again, in any case.
        until("the driver is told", || interrupts(&clone) >= 2);
        clone.command(r#"{"set-link":true}"#);
        assert!(is_up(&clone));
    }
}

#[test]
fn what_is_not_possible_now_is_said() {
    let Some(mut plan) = Plan::new() else { return };
    plan.description.paused = true;
    let mut machine = plan.start_paused();
    let error = |outcome| match outcome {
        Outcome::Error(why) => why,
        Outcome::Ok(answer) => panic!("{answer:?}"),
    };
    let never_ran = machine.save();
    machine.command("resume");
    assert!(error(command(&mut machine, "save")).contains("pause it first"));
    assert!(error(command(&mut machine, r#"{"set-link":false}"#)).contains("no NIC"));
    let Outcome::Ok(Answer::Ram(ram)) = command(&mut machine, "ram") else { panic!() };
    assert_eq!((ram.len(), ram[0].guest, ram[0].length), (1, 0, crate::machine::MEMORY << 20));
    assert_eq!(ram[0].host % (2 << 20), 0);
    machine.guest.out8(0x80, 0);
    // A machine that never ran begins where it would have.
    let mut clone = Plan::restoring(&never_ran).go_on(&machine.guest);
    clone.command("resume");
    until("the clone runs", || clone.guest.idle_rounds() > 0);
}

#[test]
fn what_cannot_be_restored_is_refused() {
    let Some(mut plan) = Plan::new() else { return };
    plan.description.rng = true;
    let mut machine = plan.start();
    machine.guest.out8(0x80, 0);
    let snapshot = machine.save();
    let plan = || {
        let mut plan = Plan::restoring(&snapshot);
        plan.description.rng = true;
        plan
    };
    let refused_with = |words: &[&str], change: &dyn Fn(&mut Plan)| {
        let mut plan = plan();
        change(&mut plan);
        refused(plan, words);
    };
    refused_with(&["1 virtual CPUs", "2 virtual CPUs"], &|plan| plan.description.cpus = 2);
    refused_with(&["32 MiB", "64 MiB"], &|plan| plan.description.memory_mib = 64);
    refused_with(&["no serial port", "a serial port"], &|plan| {
        plan.description.uart = Some(plan.console("uart"));
    });
    refused_with(&["[rng]", "[rng, balloon]"], &|plan| plan.description.balloon = true);
    refused_with(&["[rng]", "[]"], &|plan| plan.description.rng = false);
    refused_with(&["either this or restore"], &|plan| plan.description.restore = None);
    refused_with(&["the file of the saved memory"], &|plan| plan.description.memory = None);
    for length in [0, (crate::machine::MEMORY << 20) - 4096, (crate::machine::MEMORY << 20) + 1] {
        let words = format!("has {length} bytes");
        refused_with(&[&words], &|plan| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(length).unwrap();
            plan.description.memory = Some(plan.give(file));
        });
    }
    let with_state = |words: &[&str], state: &[u8]| {
        refused_with(words, &|plan| {
            plan.description.restore = Some(plan.give(crate::machine::file(state)));
        });
    };
    let state = &snapshot.state;
    with_state(&["no saved machine"], b"");
    with_state(&["bytes where"], &state[..state.len() - 1]);
    for at in [0, 8, 12, 30, 52, 60, state.len() / 2, state.len() - 1] {
        let mut changed = state.clone();
        changed[at] ^= 0x10;
        with_state(&["machine"], &changed);
    }
}

#[test]
fn a_machine_is_saved_and_restored_confined_as_the_daemon_starts_it() {
    // SAFETY: it only answers.
    if unsafe { libc::geteuid() } != 0 {
        println!("SKIPPED: needs root to start a monitor as another user");
        return;
    }
    let Some(mut plan) = Plan::new() else { return };
    plan.as_user = true;
    add_devices(&mut plan, 3);
    let mut machine = plan.start();
    let counter = Counter::start(&machine.guest);
    counter.must_go_on(&machine.guest, 100);
    let snapshot: Snapshot = machine.save();
    let mut plan = Plan::restoring(&snapshot);
    plan.as_user = true;
    add_devices(&mut plan, 3);
    let mut clone = plan.go_on(&machine.guest);
    clone.command("resume");
    assert!(counter.stop(&clone.guest) > 100);
    assert_eq!(clone.said(), "");
}

#[test]
fn a_disk_goes_on_in_an_overlay_and_what_it_was_is_written_no_more() {
    let Some(mut plan) = Plan::new() else { return };
    // SAFETY: it only answers.
    plan.as_user = unsafe { libc::geteuid() } == 0;
    let image = add_devices(&mut plan, 3);
    let mut machine = plan.start();
    machine.guest.enable_interrupts();
    let driver = Driver::new(&machine, DISK, 2);
    let mut queue = driver.queue(0);
    driver.ready();
    let buffer = machine.guest.take(0x1000);
    let write = |machine: &Machine, queue: &mut _, byte: u8| {
        let memory = &machine.guest.memory;
        let head = [1, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0xff];
        memory.write_slice(&head, GuestAddress(buffer)).unwrap();
        memory.write_slice(&[byte; 512], GuestAddress(buffer + 512)).unwrap();
        let chain = [(buffer, 16, 0), (buffer + 512, 512, 0), (buffer + 16, 1, WRITE)];
        Driver::again(machine, DISK).request(queue, &chain);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(buffer + 16)).unwrap(), 0);
    };
    write(&machine, &mut queue, 0x11);
    let overlay = tempfile::NamedTempFile::new().unwrap();
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(image.path())
        .arg(overlay.path())
        .arg("1M")
        .status();
    if !made.is_ok_and(|made| made.success()) {
        println!("SKIPPED: qemu-img (Debian: qemu-utils) is not installed");
        return;
    }
    let switch = |machine: &mut Machine| {
        let file = File::options().read(true).write(true).open(overlay.path()).unwrap();
        let mut control = machine.connect();
        control.ask_with("\"switch-disk\"", &file)
    };
    assert!(matches!(switch(&mut machine), Outcome::Error(why) if why.contains("pause it first")));
    machine.command("pause");
    let without = command(&mut machine, "switch-disk");
    assert!(matches!(without, Outcome::Error(why) if why.contains("without a descriptor")));
    assert_eq!(switch(&mut machine), Outcome::Ok(Answer::Done));
    machine.command("resume");
    write(&machine, &mut queue, 0x22);
    machine.command("quit");
    assert_eq!(machine.ends(Cause::Quit), "");
    assert_eq!(std::fs::read(image.path()).unwrap()[5 * 512], 0x11);
    let flat = tempfile::NamedTempFile::new().unwrap();
    let converted = std::process::Command::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "raw"])
        .args([overlay.path(), flat.path()])
        .status();
    assert!(converted.unwrap().success());
    assert_eq!(std::fs::read(flat.path()).unwrap()[5 * 512], 0x22);
}
