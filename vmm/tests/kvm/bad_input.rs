//! What cannot be is refused: one line that says what is wrong, exit status 1, and nothing of Rust in it.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;

use catalyst_vmm::boot::testing::elf;
use catalyst_vmm::control::protocol::{Answer, Cause, Outcome};
use catalyst_vmm::description::{Disk, Format, Layer};

use crate::machine::{Plan, file};

/// Starts the plan and expects that it is refused with these words.
pub fn refused(plan: Plan, words: &[&str]) {
    let text = serde_json::to_vec(&plan.description).unwrap();
    refused_text(plan, &text, words);
}

fn refused_text(plan: Plan, text: &[u8], words: &[&str]) {
    let (status, said) = plan.start_text(text).wait();
    assert_eq!(status.code(), Some(1), "{said}");
    for word in words {
        assert!(said.contains(word), "'{word}' in: {said}");
    }
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 1, "{said}");
    for rust in ["panicked", "unwrap", "Err(", "Os {", "::"] {
        assert!(!said.contains(rust), "{said}");
    }
}

#[test]
fn descriptions_that_cannot_be_are_refused() {
    let Some(plan) = Plan::new() else { return };
    refused_text(plan, b"{", &["machine description"]);
    let plan = Plan::new().unwrap();
    let text = serde_json::to_string(&plan.description).unwrap();
    refused_text(plan, text.replace("\"version\":1", "\"version\":7").as_bytes(), &["version 7"]);
    refused_text(Plan::new().unwrap(), &vec![b' '; 2 << 20], &["longer than 1048576 bytes"]);
    let mut plan = Plan::new().unwrap();
    plan.description.control = 999;
    refused(plan, &["control", "descriptor 999, which is not open"]);
    let mut plan = Plan::new().unwrap();
    plan.description.memory_mib = 1 << 40;
    refused(plan, &["Guest memory of", "the host's memory"]);
}

#[test]
fn descriptors_of_the_wrong_kind_are_refused() {
    let Some(mut plan) = Plan::new() else { return };
    plan.description.kvm = plan.give(file(b"no KVM"));
    refused(plan, &["/dev/kvm"]);
    let mut plan = Plan::new().unwrap();
    plan.description.nics = vec![catalyst_vmm::description::Nic {
        tap: plan.give(file(b"no tap")),
        mac: [2, 0, 0, 0, 0, 1],
        link_up: None,
    }];
    refused(plan, &["nic0"]);
}

#[test]
fn kernels_that_cannot_be_are_refused() {
    let Some(plan) = Plan::with_kernel(b"") else { return };
    refused(plan, &["neither an ELF image", "bzImage"]);
    refused(Plan::with_kernel(&[0x5a; 4096]).unwrap(), &["neither an ELF image"]);
    let whole = elf(&[0x90; 512], 0x20_0000, 0x1000, None);
    refused(Plan::with_kernel(&whole[..whole.len() - 100]).unwrap(), &["cut off"]);
    refused(
        Plan::with_kernel(&elf(&[0x90; 16], 0x20_0000, 1 << 30, None)).unwrap(),
        &["outside the machine's memory"],
    );
}

#[test]
fn disks_that_cannot_be_are_refused() {
    let Some(mut plan) = Plan::new() else { return };
    let layer = |fd, format| Layer { fd, format };
    let disk = |layers| vec![Disk { layers, read_only: false, queues: 1, serial: String::new() }];
    let garbage = plan.give(file(b"QFI\xfb\0\0\0\x03 and no more"));
    plan.description.disks = disk(vec![layer(garbage, Format::Qcow2)]);
    refused(plan, &["disk0"]);

    let mut plan = Plan::new().unwrap();
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let open = || File::options().read(true).write(true).open(image.path()).unwrap();
    let (first, second) = (plan.give(open()), plan.give(open()));
    plan.description.disks = disk(vec![layer(first, Format::Raw), layer(second, Format::Raw)]);
    refused(plan, &["disk0"]);
}

#[test]
fn clients_of_the_control_socket_cannot_disturb_a_running_machine() {
    let Some(plan) = Plan::new() else { return };
    let mut machine = plan.start();
    let mut half = machine.connect();
    half.stream.get_mut().write_all(b"{\"id\":1,\"comm").unwrap();
    let mut endless = machine.connect();
    let chunk = vec![b'x'; 1 << 16];
    assert!((0..1 << 14).any(|_| endless.stream.get_mut().write_all(&chunk).is_err()), "a gigabyte is taken");
    assert!(half.stream.get_ref().as_raw_fd() >= 0);
    assert!(matches!(machine.control().ask("state"), Outcome::Ok(Answer::State(_))));
    machine.guest.out8(0x80, 0);
    machine.command("quit");
    machine.ends(Cause::Quit);
}
