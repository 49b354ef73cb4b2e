//! Measures the promises of docs/SPECIFICATION.md and prints them as a table; ends with 1 if one is broken.
//!
//!     make bench                # all that take no image build
//!     make bench BENCH=create   # rows whose name has the word
//!     make bench BENCH=image    # builds the image anew, with a warm package cache

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use catalyst_tests::world::{engine, image_dir, programs, ran};
use catalyst_tests::{World, containers, instant, load};

struct Row {
    name: &'static str,
    promise: f64,
    unit: &'static str,
    measured: f64,
}

type Measure = (&'static str, f64, &'static str, fn() -> f64);

const ROWS: &[Measure] = &[
    ("create in the daemon", 25.0, "ms", create_in_daemon),
    ("create by the CLI", 60.0, "ms", create_by_cli),
    ("disk of a new VM, 64 GiB", 1024.0, "KiB", || disk_of_new_vm("64")),
    ("disk of a new VM, 16384 GiB", 1024.0, "KiB", || disk_of_new_vm("16384")),
    ("list of 1,000 VMs", 20.0, "ms", list_of_thousand),
    ("200 reads a second while VMs start: 99th percentile", 50.0, "ms", load::reads),
    ("daemon idle: memory", 30.0, "MiB", idle_memory),
    ("daemon idle: wake-ups", 5.0, "/s", idle_wakeups),
    ("probe of KVM", 200.0, "ms", probe),
    ("base disk", 550.0, "MB", base_disk),
    ("instant: nothing to SSH banner", 600.0, "ms", instant::to_banner),
    ("instant: power on to a command's answer", 400.0, "ms", instant::to_exec),
    ("instant: private memory of an idle clone", 40.0, "MiB", instant::idle_private),
    ("instant: twenty at once to SSH banner", 10.0, "s", instant::many_to_banner),
    ("instant: memory of twenty idle clones", 1.2, "GiB", instant::many_memory),
    ("instant: a running VM stands while it is cloned", 300.0, "ms", instant::frozen),
    ("containers: docker run to its output", 1.2, "s", containers::to_output),
    ("containers: ten docker run --detach at once", 10.0, "s", containers::many),
    ("cold boot to docker run, 2 CPUs", 30.0, "s", || cold_boot("2")),
    ("cold boot to docker run, 1 CPU", 40.0, "s", || cold_boot("1")),
];

/// Promises of engine kvm, which the lab shows (`make bench-kvm`): its times alone say little about a machine of metal.
const KVM: &[Measure] = &[
    ("instant: power on to SSH and Docker, of a boot's time", 0.1, "", instant::part_of_boot),
    ("instant: private memory of an idle clone", 8.0, "MiB", instant::idle_private),
    ("instant: memory of twenty idle clones", 0.4, "GiB", instant::many_memory),
    ("instant: a running VM stands while it is cloned", 300.0, "ms", instant::frozen),
    ("containers: docker run to its output, but 0.3 s, of runc's time", 2.0, "", containers::of_runcs_time),
];

const ASKED_FOR: &[Measure] = &[("image build, warm package cache", 150.0, "s", image_build)];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |name: &str| words.iter().any(|word| name.contains(word.as_str()));
    let rows = if engine() == "kvm" { KVM } else { ROWS };
    let all = rows.iter().filter(|row| words.is_empty() || wanted(row.0));
    let rows: Vec<Row> = all
        .chain(ASKED_FOR.iter().filter(|row| wanted(row.0)))
        .map(|(name, promise, unit, measure)| {
            eprintln!("measuring: {name}");
            Row { name, promise: *promise, unit, measured: measure() }
        })
        .collect();
    println!("| what | promise | measured | |\n|---|---:|---:|---|");
    for Row { name, promise, unit, measured } in &rows {
        let verdict = if measured <= promise { "holds" } else { "BROKEN" };
        println!("| {name} | {promise} {unit} | {measured:.2} {unit} | {verdict} |");
    }
    ExitCode::from(u8::from(rows.iter().any(|row| row.measured > row.promise)))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn seconds(body: impl FnOnce()) -> f64 {
    let started = Instant::now();
    body();
    started.elapsed().as_secs_f64()
}

/// What curl says the whole request took, in ms.
fn request_ms(world: &World, method: &str, path: &str, body: Option<&str>) -> f64 {
    let mut command = world.command("curl");
    command.args(["-s", "-o", "/dev/null", "-w", "%{time_total}", "-X", method]);
    if let Some(body) = body {
        command.args(["-d", body]);
    }
    command.arg(format!("http://localhost:8080{path}"));
    ran(command).ok().parse::<f64>().expect("curl tells the time") * 1000.0
}

fn create_in_daemon() -> f64 {
    let world = World::new();
    let times = (0..21).map(|n| request_ms(&world, "POST", "/v1/vms", Some(&format!(r#"{{"id":"vm{n}"}}"#))));
    median(times.collect())
}

fn create_by_cli() -> f64 {
    let world = World::new();
    let one = |n: i32| {
        seconds(|| {
            world.catalyst(&["vm", "create", &format!("vm{n}")]).ok();
        })
    };
    median((0..21).map(one).collect()) * 1000.0
}

fn disk_of_new_vm(gib: &str) -> f64 {
    let world = World::new();
    world.catalyst(&["vm", "create", "vm", "--disk", &format!("{gib}G")]).ok();
    kib(&world.vm_dir("vm"))
}

/// What a folder takes on disk.
fn kib(path: &Path) -> f64 {
    let own = path.symlink_metadata().expect("it is there").blocks() / 2;
    let inner = std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| kib(&entry.path()));
    #[allow(clippy::cast_precision_loss)]
    let own = own as f64;
    own + inner.sum::<f64>()
}

fn list_of_thousand() -> f64 {
    let mut world = World::empty();
    for n in 0..1000 {
        let dir = world.vm_dir(&format!("vm{n}"));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(format!("vm{n}.vmx")), "memsize = \"1024\"\n").unwrap();
    }
    world.start_daemon();
    median((0..21).map(|_| request_ms(&world, "GET", "/api/vms", None)).collect())
}

fn idle_memory() -> f64 {
    let world = World::new();
    world.catalyst(&["vm", "list"]).ok();
    std::thread::sleep(Duration::from_secs(6));
    let status = std::fs::read_to_string(format!("/proc/{}/status", world.daemon_pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1024.0
}

fn idle_wakeups() -> f64 {
    let world = World::new();
    world.catalyst(&["vm", "list"]).ok();
    // Threads that were needed to start end after five idle seconds.
    std::thread::sleep(Duration::from_secs(6));
    let switches = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", world.daemon_pid())).unwrap().flatten();
        let count = tasks.filter_map(|task| {
            let status = std::fs::read_to_string(task.path().join("status")).ok()?;
            let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
            line.trim().parse::<f64>().ok()
        });
        count.sum::<f64>()
    };
    let before = switches();
    std::thread::sleep(Duration::from_secs(10));
    (switches() - before) / 10.0
}

fn probe() -> f64 {
    let one = || {
        seconds(|| {
            let mut command = Command::new(programs().join("catalyst-vmm"));
            command.args(["probe", "--json"]).stdout(Stdio::null()).status().expect("the probe runs");
        })
    };
    median((0..7).map(|_| one()).collect()) * 1000.0
}

fn base_disk() -> f64 {
    kib(&image_dir().join("lumen/current/").canonicalize().unwrap().join("disk.raw")) * 1024.0 / 1e6
}

fn cold_boot(cpus: &str) -> f64 {
    let once = || {
        let world = World::new();
        world.catalyst(&["vm", "create", "vm", "--cpus", cpus]).ok();
        seconds(|| {
            world.catalyst(&["vmpower", "on", "--cold", "vm", "--wait", "--timeout", "280"]).ok();
            world.catalyst(&["ssh", "vm", "--", "docker run --rm busybox true"]).ok();
        })
    };
    median((0..3).map(|_| once()).collect())
}

fn image_build() -> f64 {
    let build = |force: &[&str]| {
        let mut command = Command::new(programs().join("catalyst-image"));
        command.args(["build", "--store"]).arg(image_dir()).args(force);
        ran(command).ok().to_owned()
    };
    build(&[]);
    seconds(|| drop(build(&["--force"])))
}
