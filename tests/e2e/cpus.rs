//! A VM with several CPUs: all of them work, and it goes down in order.

use std::time::{Duration, Instant};

use catalyst_tests::{Checks, World};

const VM: &str = "web1";
/// Each CPU is kept busy by a process that may run on no other, and all of them finish.
const ALL_BUSY: &str = "n=$(nproc); i=0; while [ $i -lt $n ]; do \
taskset -c $i sh -c 'x=0; while [ $x -lt 20000 ]; do x=$((x + 1)); done; echo done' & i=$((i + 1)); done; wait";

pub fn cpus(checks: &mut Checks) {
    let world = World::new();
    checks.check("a VM of two CPUs has two, both work, and it shuts down", || {
        world.catalyst(&["vm", "create", VM, "--cpus", "2"]).ok();
        world.catalyst(&["vmpower", "on", VM, "--wait", "--timeout", "280"]).ok();
        assert_eq!(world.catalyst(&["guest", "exec", VM, "--", "nproc"]).ok(), "2");
        assert_eq!(world.catalyst(&["guest", "exec", VM, "--", "sh", "-c", ALL_BUSY]).ok(), "done\ndone");
        world.catalyst(&["vmpower", "shutdown", VM]).ok();
        let begun = Instant::now();
        // The daemon's answer to the shutdown came before the guest went down.
        while world.curl("GET", "/v1/vms/web1", None).json()["state"] != "powered off" {
            assert!(begun.elapsed() < Duration::from_mins(2), "it does not go off");
            std::thread::sleep(Duration::from_millis(200));
        }
    });
}
