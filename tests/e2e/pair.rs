//! Two VMs that are on at once and send to each other at the same time; how they are shut down.

use catalyst_tests::world::HANG;
use catalyst_tests::{Checks, World};
use std::os::unix::net::UnixStream;

const VMS: [&str; 2] = ["web1", "web2"];
/// A container of the preloaded image takes what comes, to the end, into a file.
const TAKE: &str = "mkdir -p /run/in && docker run -d --rm --name in --net host -v /run/in:/in busybox \
    sh -c 'nc -l -p 5000 >/in/file; touch /in/done' && until ss -Hltn | grep -q :5000; do sleep 0.1; done";
/// Prints the sum of what it sends.
const SEND: &str =
    "head -c 8000000 /dev/urandom >/run/out; md5sum </run/out; exec 3<>/dev/tcp/$0/5000; cat /run/out >&3";
const TAKEN: &str = "while [ ! -e /run/in/done ]; do sleep 0.1; done; md5sum </run/in/file";

pub fn pair(checks: &mut Checks) {
    let mut world = World::new();
    talk(checks, &world);
    checks.check("one is shut down by its agent", || {
        world.catalyst(&["vmpower", "shutdown", VMS[1]]).ok();
        world.wait_for_state(VMS[1], "powered off", HANG);
    });
    checks.check("the other, whose agent cannot be reached, by the power button", || {
        world.kill_daemon();
        // A port takes one client at a time.
        let _first = UnixStream::connect(world.vm_dir(VMS[0]).join("run/agent.sock")).unwrap();
        world.start_daemon();
        world.wait_for_state(VMS[0], "powered on", HANG);
        let shown = world.curl("GET", "/v1/vms/web1", None).json();
        assert_eq!(
            (&shown["state"], &shown["guest"]["agent"]),
            (&"powered on".into(), &false.into()),
            "{shown}"
        );
        world.catalyst(&["vmpower", "shutdown", VMS[0]]).ok();
        world.wait_for_state(VMS[0], "powered off", HANG);
        let shown = world.curl("GET", "/v1/vms/web1", None).json();
        assert!(shown["reason"].as_str().unwrap().contains("guest"), "{shown}");
    });
    checks.check(
        "one that runs when the daemon is stopped with its VMs, as at the host's end, by its agent",
        || {
            world.catalyst(&["vmpower", "on", VMS[1], "--wait", "--timeout", "280"]).ok();
            world.catalyst(&["daemon", "stop", "--vms"]).ok();
            world.kill_daemon();
            world.start_daemon();
            let shown = world.curl("GET", "/v1/vms/web2", None).json();
            let how = (&shown["state"], &shown["reason"]);
            assert_eq!(how, (&"powered off".into(), &"the guest powered off".into()));
        },
    );
}

fn talk(checks: &mut Checks, world: &World) {
    let inside = |vm: &str, script: &str, argument: &str| {
        let ran =
            world.catalyst(&["guest", "exec", vm, "--timeout", "280", "--", "bash", "-c", script, argument]);
        ran.ok().to_owned()
    };
    checks.check("two VMs come up at once", || {
        for vm in VMS {
            world.catalyst(&["vm", "create", vm]).ok();
        }
        world.catalyst(&["vmpower", "on", VMS[0], VMS[1], "--wait", "--timeout", "280"]).ok();
    });
    checks.check("they send to each other at the same time, and all of it arrives", || {
        for vm in VMS {
            inside(vm, TAKE, "");
        }
        let sums = std::thread::scope(|scope| {
            let to = |from: usize| scope.spawn(move || inside(VMS[from], SEND, VMS[1 - from]));
            [to(0), to(1)].map(|sending| sending.join().unwrap())
        });
        assert_ne!(sums[0], sums[1]);
        assert_eq!([inside(VMS[1], TAKEN, ""), inside(VMS[0], TAKEN, "")], sums);
    });
    checks.check("they reach the host, which reaches them", || {
        for vm in VMS {
            let address = world.catalyst(&["guest", "getip", vm]).ok().to_owned();
            let mut ping = world.command("ping");
            ping.args(["-c", "2", "-w", "60", &address]);
            catalyst_tests::world::ran(ping).ok();
            inside(vm, "ping -c 2 -w 60 $(ip -4 route show default | cut -d' ' -f3)", "");
        }
    });
}
