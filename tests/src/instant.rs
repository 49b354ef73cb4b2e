//! Figures of instant clone, as a user would see them.

use std::time::{Duration, Instant};

use crate::World;
use crate::world::ran;

/// Medians are of so many.
const RUNS: usize = 10;
/// Pairs of a warm start and a boot.
const BOOTS: usize = 3;
/// VMs that are asked for at once.
const MANY: usize = 20;
/// What a VM that is left alone does by itself has an end after this.
const IDLE: Duration = Duration::from_secs(10);
/// Many on few processors take longer: they are at rest when all together take less than this part of one.
const AT_REST: f64 = 0.1;
/// And no longer than this.
const AT_REST_WITHIN: Duration = Duration::from_mins(10);

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A world whose VMs go on from a warm state, of which the copy in memory is there.
///
/// # Panics
/// If there is none.
fn warmed() -> World {
    let world = World::new();
    world.warm();
    world.catalyst(&["vm", "create", "first"]).ok();
    world.catalyst(&["vmpower", "on", "first", "--wait"]).ok();
    let first = world.curl("GET", "/v1/vms/first", None).json();
    assert_eq!(first["start_mode"], "warm", "it was made warm");
    world.catalyst(&["vm", "delete", "--force", "first"]).ok();
    world
}

/// Waits for the first bytes of the guest's sshd at its own address.
fn banner(world: &World, vm: &str) {
    let vm = world.curl("GET", &format!("/v1/vms/{vm}"), None).json();
    let address = vm["address"].as_str().expect("an address");
    let mut bash = world.command("timeout");
    // "No route to host" is said while nobody answers by ARP.
    let script =
        format!("until exec 3<>/dev/tcp/{address}/22; do sleep 0.05; done 2>/dev/null; head -c 4 <&3");
    bash.args(["300", "bash", "-c", &script]);
    assert_eq!(ran(bash).ok(), "SSH-");
}

/// From nothing to an SSH banner: `vm create`, `vmpower on`, and the banner, in ms.
pub fn to_banner() -> f64 {
    let world = warmed();
    median((0..RUNS).map(|run| one_banner(&world, &format!("vm{run}"))).collect())
}

fn one_banner(world: &World, vm: &str) -> f64 {
    let begun = Instant::now();
    world.catalyst(&["vm", "create", vm]).ok();
    world.catalyst(&["vmpower", "on", vm]).ok();
    banner(world, vm);
    let taken = begun.elapsed().as_secs_f64() * 1000.0;
    world.catalyst(&["vm", "delete", "--force", vm]).ok();
    taken
}

/// From the request to power on to the answer of a command in the guest, in ms.
pub fn to_exec() -> f64 {
    let world = warmed();
    let one = |run: usize| {
        let vm = format!("vm{run}");
        world.catalyst(&["vm", "create", &vm]).ok();
        let begun = Instant::now();
        world.catalyst(&["vmpower", "on", &vm]).ok();
        world.catalyst(&["guest", "exec", &vm, "--", "true"]).ok();
        let taken = begun.elapsed().as_secs_f64() * 1000.0;
        world.catalyst(&["vm", "delete", "--force", &vm]).ok();
        taken
    };
    median((0..RUNS).map(one).collect())
}

/// From the request to power on until SSH and Docker answer, going on from a warm state, as part of what booting takes.
pub fn part_of_boot() -> f64 {
    let world = warmed();
    let one = |vm: &str, how: &[&str]| {
        world.catalyst(&["vm", "create", vm]).ok();
        let begun = Instant::now();
        world.catalyst(&[&["vmpower", "on", vm, "--wait", "--timeout", "280"], how].concat()).ok();
        let taken = begun.elapsed().as_secs_f64();
        world.catalyst(&["vm", "delete", "--force", vm]).ok();
        taken
    };
    let (warm, cold): (Vec<f64>, Vec<f64>) = (0..BOOTS)
        .map(|run| (one(&format!("warm{run}"), &[]), one(&format!("cold{run}"), &["--cold"])))
        .unzip();
    let (warm, cold) = (median(warm), median(cold));
    eprintln!("  warm {warm:.2} s, cold {cold:.2} s");
    warm / cold
}

/// Private memory of a clone that was left alone: its guest's and its process's own, in MiB.
pub fn idle_private() -> f64 {
    let world = warmed();
    world.catalyst(&["vm", "create", "vm"]).ok();
    world.catalyst(&["vmpower", "on", "vm"]).ok();
    std::thread::sleep(IDLE);
    let memory = world.curl("GET", "/v1/vms/vm/memory", None).json();
    let mib = |what: &str| memory[what].as_f64().unwrap_or_default() / f64::from(1 << 20);
    eprintln!("  guest {:.1} MiB, process {:.1} MiB", mib("private"), mib("overhead"));
    mib("private") + mib("overhead")
}

/// Processor time of processes (proc_pid_stat(5), fields 14 and 15, in hundredths of a second).
fn processor_time(pids: &[u32]) -> f64 {
    let of = |pid: &u32| -> f64 {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
        let after_name = text.rsplit_once(") ").expect("its name").1;
        after_name.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<f64>().expect("ticks")).sum()
    };
    pids.iter().map(of).sum::<f64>() / 100.0
}

/// Clones asked for at once until the last answers SSH, in s; then their memory (PSS) after they were left alone, in GiB.
fn many() -> (f64, f64) {
    let world = warmed();
    let ids: Vec<String> = (0..MANY).map(|number| format!("vm{number}")).collect();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for id in &ids {
            let world = &world;
            scope.spawn(move || {
                world.catalyst(&["vm", "create", id]).ok();
                world.catalyst(&["vmpower", "on", id]).ok();
                banner(world, id);
            });
        }
    });
    let taken = begun.elapsed().as_secs_f64();
    let pids: Vec<u32> = ids.iter().map(|id| world.vm_pid(id).expect("it runs")).collect();
    let begun = Instant::now();
    loop {
        let before = processor_time(&pids);
        std::thread::sleep(IDLE);
        let busy = (processor_time(&pids) - before) / IDLE.as_secs_f64();
        if busy < AT_REST || begun.elapsed() > AT_REST_WITHIN {
            eprintln!("  after {:.0} s they take {busy:.2} of a processor", begun.elapsed().as_secs_f64());
            break;
        }
    }
    let pss = |id: &String| {
        let pid = world.vm_pid(id).expect("it runs");
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("smaps_rollup");
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).expect("Pss");
        line.split_whitespace().next().and_then(|kib| kib.parse::<f64>().ok()).expect("KiB")
    };
    (taken, ids.iter().map(pss).sum::<f64>() / f64::from(1 << 20))
}

/// See [`many`].
pub fn many_to_banner() -> f64 {
    many().0
}

/// See [`many`].
pub fn many_memory() -> f64 {
    many().1
}

/// How long a VM stands while it is cloned with its memory, in ms, as its daemon logs it.
pub fn frozen() -> f64 {
    let world = warmed();
    world.catalyst(&["vm", "create", "vm"]).ok();
    world.catalyst(&["vmpower", "on", "vm", "--wait"]).ok();
    for run in 0..RUNS {
        world.catalyst(&["vm", "clone", "vm", &format!("copy{run}")]).ok();
        world.catalyst(&["vm", "delete", "--force", &format!("copy{run}")]).ok();
    }
    let log = world.daemon_log();
    let told = log.lines().filter(|line| line.contains("it stood for that long"));
    let ms =
        told.filter_map(|line| line.rsplit_once("ms=")?.1.split_whitespace().next()?.parse::<f64>().ok());
    median(ms.collect())
}
