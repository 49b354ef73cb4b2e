//! A VM with several CPUs: all of them work, and it goes down in order.

use catalyst_tests::world::HANG;
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
        world.wait_for_state(VM, "powered off", HANG);
    });
}
