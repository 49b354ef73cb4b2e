//! Many VMs at once.

use std::collections::HashSet;

use catalyst_tests::{Checks, World};

/// As many as the promise says.
const COUNT: usize = 10;

pub fn many(checks: &mut Checks) {
    let world = World::new();
    let ids: Vec<String> = (0..COUNT).map(|n| format!("vm{n}")).collect();
    checks.check("ten VMs created and powered on at once have distinct addresses and answer SSH", || {
        std::thread::scope(|scope| {
            for id in &ids {
                scope.spawn(|| {
                    // The shortest memory that runs Docker: ten of them share this machine.
                    world.catalyst(&["vm", "create", id, "--memory", "512"]).ok();
                    world.catalyst(&["vmpower", "on", id]).ok();
                });
            }
        });
        let addresses: HashSet<String> = std::thread::scope(|scope| {
            let waiting: Vec<_> = ids
                .iter()
                .map(|id| {
                    let world = &world;
                    scope.spawn(move || {
                        let wait = ["--timeout", "290"];
                        let name = world.catalyst(&[&["ssh", id][..], &wait, &["--", "hostname"]].concat());
                        assert_eq!(name.ok(), id);
                        world.catalyst(&["guest", "getip", id]).ok().to_owned()
                    })
                })
                .collect();
            waiting.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(addresses.len(), COUNT, "{addresses:?}");
    });
    checks.check("a guest finds another by its name", || {
        let ran = world.catalyst(&["guest", "exec", "vm0", "--", "getent", "hosts", "vm1.catalyst"]);
        let address = world.catalyst(&["guest", "getip", "vm1"]).ok().to_owned();
        assert!(ran.ok().starts_with(&address), "{}", ran.stdout);
    });
    checks.check("all are deleted, running as they are", || {
        let mut args = vec!["vm", "delete", "--force"];
        args.extend(ids.iter().map(String::as_str));
        assert!(world.catalyst(&args).status.success());
        assert_eq!(world.curl("GET", "/api/vms", None).body, "[]");
    });
}
