//! Suspend and resume, clone and delete, over and over: nothing is left behind.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use catalyst_tests::world::HANG;
use catalyst_tests::{Checks, World};

use crate::common::{healthy, taps, vm_processes};

const VM: &str = "web1";

/// What a world has at a moment, by what it is.
type Holdings = BTreeMap<&'static str, usize>;

/// The group.
pub fn rounds(checks: &mut Checks) {
    let full = std::env::var_os("CATALYST_TEST_FULL").is_some();
    let (suspends, clones) = if full { (200, 500) } else { (20, 50) };
    let world = World::new();
    world.warm();
    world.catalyst(&["vm", "create", VM]).ok();
    world.catalyst(&["vmpower", "on", VM, "--wait"]).ok();
    let nonce = guest(&world, VM, "head -c16 /dev/urandom | od -An -tx1 | tr -d ' ' | tee /dev/shm/nonce");
    let suspend = || {
        world.catalyst(&["vmpower", "suspend", VM]).ok();
        world.catalyst(&["vmpower", "on", VM]).ok();
        assert_eq!(guest(&world, VM, "cat /dev/shm/nonce"), nonce);
    };
    checks.check("a VM that is suspended again and again leaves nothing behind", || {
        // What is made once and kept is there after a few.
        (0..3).for_each(|_| suspend());
        let before = holdings(&world);
        (0..suspends).for_each(|_| suspend());
        unchanged(&world, &before);
    });
    let clone = || {
        world.catalyst(&["vm", "clone", VM, "copy"]).ok();
        assert_eq!(guest(&world, "copy", "cat /dev/shm/nonce"), nonce);
        world.catalyst(&["vm", "delete", "--force", "copy"]).ok();
    };
    checks.check("a VM that is cloned again and again leaves nothing behind", || {
        (0..10).for_each(|_| clone());
        let before = holdings(&world);
        (0..clones).for_each(|_| clone());
        unchanged(&world, &before);
    });
    checks.check("fresh VMs that come and go leave nothing behind", || {
        let one = || {
            world.catalyst(&["vm", "create", "fresh"]).ok();
            world.catalyst(&["vmpower", "on", "fresh"]).ok();
            assert_eq!(guest(&world, "fresh", "hostname"), "fresh");
            world.catalyst(&["vm", "delete", "--force", "fresh"]).ok();
        };
        (0..3).for_each(|_| one());
        let before = holdings(&world);
        (0..suspends).for_each(|_| one());
        unchanged(&world, &before);
        healthy(&world);
    });
}

fn guest(world: &World, vm: &str, script: &str) -> String {
    world.catalyst(&["guest", "exec", vm, "--", "sh", "-c", script]).ok().to_owned()
}

fn holdings(world: &World) -> Holdings {
    let pid = world.daemon_pid();
    let vm = world.curl("GET", &format!("/v1/vms/{VM}"), None).json()["pid"].as_u64().unwrap();
    let count = |path: String| fs::read_dir(path).unwrap().count();
    let rss = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let rss = rss.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let network = world.curl("GET", "/v1/network", None).json();
    let leases = network["leases"].as_u64().and_then(|count| usize::try_from(count).ok());
    [
        ("processes of VMs", vm_processes(world).len()),
        ("descriptors", count(format!("/proc/{pid}/fd"))),
        ("descriptors of the VM", count(format!("/proc/{vm}/fd"))),
        ("taps", taps(world)),
        ("VM folders", count(world.state_dir().join("vms").display().to_string())),
        ("files of the VM", count(world.vm_dir(VM).display().to_string())),
        ("leases", leases.unwrap()),
        ("KiB of the daemon", rss.split_whitespace().next().unwrap().parse().unwrap()),
    ]
    .into()
}

/// Memory may grow by what an allocator keeps; layers of the disk by those that wait to be merged, on disk and in the VM's process; the
/// rest not at all. What belongs to the last round may still be on its way to be closed.
fn unchanged(world: &World, before: &Holdings) {
    let begun = Instant::now();
    loop {
        let after = holdings(world);
        let most = |what: &str| {
            before[what]
                + match what {
                    "KiB of the daemon" => 8 * 1024,
                    "files of the VM" => 8,
                    "descriptors" => 4,
                    // Layers that wait to be merged, each open twice.
                    "descriptors of the VM" => 24,
                    _ => 0,
                }
        };
        let more: Vec<&str> =
            after.iter().filter(|(what, now)| **now > most(what)).map(|(what, _)| *what).collect();
        if more.is_empty() {
            println!("    {after:?}");
            return;
        }
        assert!(begun.elapsed() < HANG, "{more:?}: {before:?} before, {after:?} now");
        std::thread::sleep(Duration::from_millis(100));
    }
}
