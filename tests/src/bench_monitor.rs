//! Our monitor beside QEMU, where there is a genuine /dev/kvm: `make bench-monitor` runs it in the lab.
//!
//! Each figure is the median of runs that alternate between the two. The last line is the ratio of the boots; the exit
//! status is 1 if a promise of docs/SPECIFICATION.md is broken. Words `boot`, `restore`, `block`, `net` make it do those alone.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, ExitCode};

use catalyst_tests::monitor::machine::Extras;
use catalyst_tests::monitor::{Machine, Which, guest};
use catalyst_tests::world::{programs, ran};
use nix::sys::memfd::{MFdFlags, memfd_create};

const RUNS: usize = 5;
/// Runs of disk and network, which take longer.
const LONG_RUNS: usize = 3;
/// Runs of what is quick.
const RESTORES: usize = 10;
const RAM: u64 = 256 << 20;
/// How much slower than QEMU's a median may be and still count as equal.
const NOISE: f64 = 0.95;

/// What a table row says.
struct Row {
    what: String,
    ours: f64,
    qemu: Option<f64>,
    unit: &'static str,
    promise: String,
    holds: bool,
}

fn main() -> ExitCode {
    let folder = tempfile::tempdir().unwrap();
    let initrd = guest::write_initrd(folder.path());
    let mut rows = Vec::new();
    let only: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |what: &str| only.is_empty() || only.iter().any(|word| word == what);
    let ratio = wanted("boot").then(|| boot(folder.path(), &initrd, &mut rows));
    if wanted("boot") {
        rows.push(binary());
    }
    if wanted("restore") {
        restore(folder.path(), &initrd, &mut rows);
    }
    io(folder.path(), &initrd, &wanted, &mut rows);
    println!("| what | ours | QEMU | promise | |\n|---|---:|---:|---|---|");
    for Row { what, ours, qemu, unit, promise, holds } in &rows {
        let qemu = qemu.map_or_else(String::new, |qemu| format!("{qemu:.2} {unit}"));
        let verdict = if *holds { "holds" } else { "BROKEN" };
        println!("| {what} | {ours:.2} {unit} | {qemu} | {promise} | {verdict} |");
    }
    if let Some(ratio) = ratio {
        println!("ratio boot OURS/QEMU {ratio:.2}");
    }
    ExitCode::from(u8::from(rows.iter().any(|row| !row.holds)))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Time to the guest's first line, and memory at that moment. Machines have no PCI: ours tells its guest so, QEMU as its
/// manual starts it lets the guest search for it, and a third run shows what that alone makes.
fn boot(folder: &Path, initrd: &Path, rows: &mut Vec<Row>) -> f64 {
    let sorts = [(Which::Ours, false), (Which::Qemu, false), (Which::Qemu, true)];
    let (mut times, mut memory) = ([const { Vec::new() }; 3], [const { Vec::new() }; 3]);
    for run in 0..RUNS {
        for (at, (which, told_no_pci)) in sorts.into_iter().enumerate() {
            let extras = Extras { told_no_pci, ..Extras::default() };
            let mut machine = Machine::start(which, folder, initrd, extras);
            let (seconds, _) = machine.wait_for(guest::MARKER);
            eprintln!(
                "boot {run} {which:?}{}: {seconds:.2} s",
                if told_no_pci { ", told of no PCI" } else { "" }
            );
            times[at].push(seconds);
            memory[at].push(mib(machine.overhead_kib(RAM)));
        }
    }
    let extras = Extras { everything: true, ..Extras::default() };
    let mut full = Machine::start(Which::Ours, folder, initrd, extras);
    full.wait_for(guest::MARKER);
    let all_devices = mib(full.overhead_kib(RAM));
    let [ours, qemu, told] = times.map(median);
    let ratio = ours / qemu;
    let mut row = |what: &str, qemu, promise: &str, holds| {
        let what = format!("process start to the guest's first line, 1 vCPU, 256 MiB{what}");
        rows.push(Row { what, ours, qemu: Some(qemu), unit: "s", promise: promise.into(), holds });
    };
    row("", qemu, "at most half", ratio <= 0.5);
    row(", QEMU's guest told that there is no PCI", told, "less", ours < told);
    let [ours, qemu, _] = memory.map(median);
    for (what, ours, qemu) in [("a serial port", ours, Some(qemu)), ("every device", all_devices, None)] {
        rows.push(Row {
            what: format!("resident memory besides RAM, with {what}"),
            ours,
            qemu,
            unit: "MiB",
            promise: "at most 4 MiB".into(),
            holds: ours <= 4.0,
        });
    }
    ratio
}

/// Time from the start of a process that goes on from a saved machine to the guest's answer to what was typed before, beside
/// its boot to the same; and the guest's pages that are the process's own before the first instruction.
fn restore(folder: &Path, initrd: &Path, rows: &mut Vec<Row>) {
    const MOST_PAGES: f64 = 16.0;
    let memory = File::from(memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap());
    memory.set_len(RAM).unwrap();
    let typed = |word: &str| format!("{}{word}", guest::SAYS);
    let first = Extras { work: "answer", memory: Some(&memory), typed: Some(""), ..Extras::default() };
    let mut machine = Machine::start(Which::Ours, folder, initrd, first);
    machine.wait_for(guest::BEGINS);
    machine.type_in("up\n");
    let (boot, _) = machine.wait_for(&typed("up"));
    machine.ask("pause");
    let hex = machine.ask("save");
    let hex = hex["saved"].as_str().expect("the machine is saved").as_bytes();
    let state = folder.join("state");
    std::fs::write(&state, hex.chunks(2).map(byte).collect::<Vec<u8>>()).unwrap();
    drop(machine);

    let again = Extras { memory: Some(&memory), restore: Some(&state), ..Extras::default() };
    let stands = Machine::start(Which::Ours, folder, initrd, Extras { paused: true, ..again });
    assert_eq!(stands.ask("state")["state"], "paused");
    #[expect(clippy::cast_precision_loss, reason = "a small figure")]
    let pages = stands.private_kib(RAM) as f64 / 4.0;
    drop(stands);
    let one = |run: usize| {
        let mut machine =
            Machine::start(Which::Ours, folder, initrd, Extras { typed: Some("go\n"), ..again });
        let (seconds, _) = machine.wait_for(&typed("go"));
        eprintln!("restore {run}: {seconds:.3} s");
        seconds
    };
    let answer = median((0..RESTORES).map(one).collect());
    let mut row = |what: &str, ours, unit, promise: &str, holds| {
        rows.push(Row { what: what.into(), ours, qemu: None, unit, promise: promise.into(), holds });
    };
    row(
        "process start to the guest's answer, restored, 256 MiB",
        answer,
        "s",
        "at most 0.27 s",
        answer <= 0.27,
    );
    row("the same, of the time from boot to it", answer / boot, "", "at most a tenth", answer / boot <= 0.1);
    row("private pages of RAM before the first instruction", pages, "", "at most 16", pages <= MOST_PAGES);
}

/// A byte of two hexadecimal digits.
fn byte(digits: &[u8]) -> u8 {
    u8::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap()
}

#[expect(clippy::cast_precision_loss, reason = "small figures")]
fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

fn binary() -> Row {
    let folder = tempfile::tempdir().unwrap();
    let stripped = folder.path().join("stripped");
    let mut strip = Command::new("strip");
    strip.arg("-o").arg(&stripped).arg(programs().join("catalyst-vmm"));
    ran(strip).ok();
    let size = stripped.metadata().unwrap().len();
    #[expect(clippy::cast_precision_loss, reason = "a small figure")]
    let ours = size as f64 / 1e6;
    Row {
        what: "program, stripped".into(),
        ours,
        qemu: None,
        unit: "MB",
        promise: "at most 6 MB".into(),
        holds: ours <= 6.0,
    }
}

/// What was measured of one kind of work: units of 4 KiB a second and interrupts a unit, by the guest; exits a unit, by the
/// host's kernel.
struct Measured {
    name: String,
    rate: f64,
    interrupts: f64,
    exits: f64,
}

/// The kinds of work that the guest does with its disk, and those that it does with its network.
const WORK: [(&str, &[&str]); 2] =
    [("block", &["seq-write", "seq-read", "rand-write", "rand-read"]), ("net", &["net-send"])];

/// Disk and network, as the guest sees them.
fn io(folder: &Path, initrd: &Path, wanted: &dyn Fn(&str) -> bool, rows: &mut Vec<Row>) {
    let works: Vec<(&str, &[&str])> = WORK.into_iter().filter(|(work, _)| wanted(work)).collect();
    if works.is_empty() {
        return;
    }
    let base = folder.join("base.raw");
    let mut dd = Command::new("dd");
    dd.args(["if=/dev/urandom", "bs=1M", "count=256", "status=none", &format!("of={}", base.display())]);
    ran(dd).ok();
    let mut ip = Command::new("sh");
    ip.args([
        "-c",
        "ip tuntap add dev bench0 mode tap vnet_hdr && ip address add 192.0.2.1/24 dev bench0 && ip link set bench0 up",
    ]);
    ran(ip).ok();
    std::thread::spawn(sink);
    let mut all: [Vec<Measured>; 2] = Default::default();
    for run in 0..LONG_RUNS {
        for (at, which) in [Which::Ours, Which::Qemu].into_iter().enumerate() {
            let measured = io_run(which, folder, initrd, &base, &works);
            for one in &measured {
                eprintln!(
                    "io {run} {which:?} {}: {:.0}/s, {:.2} interrupts, {:.2} exits",
                    one.name, one.rate, one.interrupts, one.exits
                );
            }
            all[at].extend(measured);
        }
    }
    for name in works.iter().flat_map(|(_, kinds)| *kinds) {
        let of = |at: usize, value: fn(&Measured) -> f64| {
            median(all[at].iter().filter(|one| one.name == *name).map(value).collect())
        };
        let (ours, qemu) = (of(0, |one| one.rate), of(1, |one| one.rate));
        rows.push(Row {
            what: format!("{name}, 4 KiB units"),
            ours,
            qemu: Some(qemu),
            unit: "/s",
            promise: "at least QEMU's".into(),
            holds: ours >= qemu * NOISE,
        });
        rows.push(no_more(
            format!("{name}, interrupts a unit"),
            [0, 1].map(|at| of(at, |one| one.interrupts)),
        ));
        rows.push(no_more(format!("{name}, exits a unit"), [0, 1].map(|at| of(at, |one| one.exits))));
    }
    for (work, kinds) in works {
        let calls =
            [Which::Ours, Which::Qemu].map(|which| system_calls(which, folder, initrd, &base, (work, kinds)));
        rows.push(no_more(format!("{work}, system calls a unit"), calls));
    }
}

/// A row for what costs, whose figure may be no greater than QEMU's.
fn no_more(what: String, [ours, qemu]: [f64; 2]) -> Row {
    let holds = ours * NOISE <= qemu + 0.01;
    Row { what, ours, qemu: Some(qemu), unit: "", promise: "at most QEMU's".into(), holds }
}

/// Exits of the virtual CPUs of all VMs that live (KVM's debugfs).
fn exits() -> f64 {
    const FILE: &str = "/sys/kernel/debug/kvm/exits";
    if !Path::new(FILE).exists() {
        let mut mount = Command::new("mount");
        mount.args(["-t", "debugfs", "debugfs", "/sys/kernel/debug"]);
        ran(mount).ok();
    }
    std::fs::read_to_string(FILE).unwrap().trim().parse().unwrap()
}

fn io_machine(which: Which, folder: &Path, initrd: &Path, base: &Path, work: &str) -> Machine {
    let overlay = folder.join("overlay.qcow2");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(base).arg(&overlay);
    ran(create).ok();
    let extras = Extras { work, disk: Some((&overlay, base)), tap: Some("bench0"), ..Extras::default() };
    Machine::start(which, folder, initrd, extras)
}

/// The words of the machine's next line of result: kind, units, seconds, interrupts.
fn result(machine: &mut Machine) -> (String, [f64; 3]) {
    let (_, line) = machine.wait_for("RESULT");
    let words: Vec<&str> = line.split_whitespace().skip_while(|word| *word != "RESULT").collect();
    (words[1].to_owned(), [2, 3, 4].map(|at: usize| words[at].parse().unwrap()))
}

fn io_run(
    which: Which,
    folder: &Path,
    initrd: &Path,
    base: &Path,
    works: &[(&str, &[&str])],
) -> Vec<Measured> {
    let mut measured = Vec::new();
    for (work, kinds) in works.iter().copied() {
        let mut machine = io_machine(which, folder, initrd, base, work);
        machine.wait_for(guest::BEGINS);
        let mut before = exits();
        for _ in kinds {
            let (name, [units, seconds, interrupts]) = result(&mut machine);
            let after = exits();
            measured.push(Measured {
                name,
                rate: units / seconds.max(0.01),
                interrupts: interrupts / units,
                exits: (after - before) / units,
            });
            before = after;
        }
    }
    measured
}

/// System calls a unit of all threads of the monitor while the guest works, as strace(1) counts them.
fn system_calls(
    which: Which,
    folder: &Path,
    initrd: &Path,
    base: &Path,
    (work, kinds): (&str, &[&str]),
) -> f64 {
    let mut machine = io_machine(which, folder, initrd, base, work);
    machine.wait_for(guest::MARKER);
    let counted = folder.join("strace");
    let mut strace = Command::new("strace")
        .args(["-f", "-c", "-qq", "-p", &machine.pid().to_string(), "-o"])
        .arg(&counted)
        .spawn()
        .expect("strace");
    let units: f64 = kinds.iter().map(|_| result(&mut machine).1[0]).sum();
    drop(machine);
    strace.wait().unwrap();
    let text = std::fs::read_to_string(&counted).unwrap();
    let calls = |line: &str| -> Option<(f64, String)> {
        let words: Vec<&str> = line.split_whitespace().collect();
        Some((words.get(3)?.parse().ok()?, (*words.last()?).to_owned()))
    };
    let mut all: Vec<(f64, String)> =
        text.lines().filter_map(calls).filter(|(_, name)| name != "total").collect();
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (count, name) in all.iter().take(6) {
        eprintln!("calls {work} {which:?} {name}: {:.2} a unit", count / units);
    }
    all.iter().map(|(count, _)| count).sum::<f64>() / units
}

/// Takes what guests send, and looks at none of it.
fn sink() {
    let listener = TcpListener::bind((guest::HOST, guest::PORT)).unwrap();
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || {
            let mut stream = stream;
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        });
    }
}
