//! Snapshots: of memory and disk, of the disk alone; gone back to, deleted; chains of layers that stay short.

use std::fs;
use std::os::unix::fs::MetadataExt;

use catalyst_tests::world::HANG;
use catalyst_tests::{Checks, World};

use crate::common::{clock_is_right, healthy, v1_error, vm, wait_until};

const VM: &str = "web1";
/// Clones of a VM that runs add a layer to its disk each, if nothing takes them away.
const LAYERS: usize = 20;

/// The group.
pub fn snapshots(checks: &mut Checks) {
    let world = World::new();
    running(checks, &world);
    still(checks, &world);
    wrong(checks, &world);
    checks.check("the chain of a VM that is cloned again and again stays short", || {
        for _ in 0..LAYERS {
            guest(&world, "echo more >>/root/more; sync");
            world.catalyst(&["vm", "clone", VM, "copy"]).ok();
            world.catalyst(&["vm", "delete", "--force", "copy"]).ok();
        }
        let layers = layers(&world);
        assert!(layers <= 10, "{layers} layers");
        world.catalyst(&["vmpower", "off", VM]).ok();
        world.catalyst(&["vmpower", "on", VM, "--wait", "--timeout", "280"]).ok();
        assert_eq!(guest(&world, "wc -l </root/more"), LAYERS.to_string());
    });
    checks.check("a VM with snapshots is deleted as a whole", || {
        world.catalyst(&["vm", "snapshot", "create", VM, "last"]).ok();
        world.catalyst(&["vm", "delete", "--force", VM]).ok();
        assert_eq!(fs::read_dir(world.state_dir().join("vms")).unwrap().count(), 0);
        healthy(&world);
    });
}

fn running(checks: &mut Checks, world: &World) {
    let mut nonce = String::new();
    checks.check("a snapshot of a VM that runs has its memory; the VM runs on", || {
        world.warm();
        world.catalyst(&["vm", "create", VM]).ok();
        world.catalyst(&["vm", "snapshot", "create", VM, "never on"]).ok();
        world.catalyst(&["vmpower", "on", VM, "--wait"]).ok();
        assert_eq!(vm(world, VM)["start_mode"], "warm", "a snapshot of nothing changes nothing");
        nonce = guest(world, "head -c16 /dev/urandom | od -An -tx1 | tr -d ' ' | tee /dev/shm/nonce");
        set(world, "one");
        let made =
            world.catalyst(&["--json", "vm", "snapshot", "create", VM, "one", "--description", "the first"]);
        let made: serde_json::Value = serde_json::from_str(made.ok()).unwrap();
        assert_eq!(
            (&made["memory"], &made["parent"], &made["current"]),
            (&true.into(), &"never on".into(), &true.into())
        );
        assert_eq!(guest(world, "cat /dev/shm/nonce"), nonce);
    });
    checks.check(
        "going back is exact: memory, disk, and what a program was doing; the time is today's",
        || {
            guest(world, "(while :; do cat /dev/shm/at >/dev/shm/seen; sleep 0.1; done) >/dev/null 2>&1 &");
            world.catalyst(&["vm", "snapshot", "create", VM, "two"]).ok();
            set(world, "three");
            world.catalyst(&["vm", "snapshot", "restore", VM, "one"]).ok();
            assert_eq!(vm(world, VM)["start_mode"], "resume");
            assert_eq!(
                guest(world, "cat /dev/shm/nonce /dev/shm/at /root/at; cat /dev/shm/seen || echo none"),
                format!("{nonce}\none\none\nnone")
            );
            world.catalyst(&["vm", "snapshot", "restore", VM, "two"]).ok();
            guest(world, "echo now >/dev/shm/at");
            wait_until("the program goes on", HANG, || guest(world, "cat /dev/shm/seen") == "now");
            clock_is_right(world, VM);
            assert_eq!(world.catalyst(&["ssh", VM, "--", "hostname"]).ok(), VM);
        },
    );
    checks.check("no two goings back have their random numbers in common", || {
        let random = || {
            world.catalyst(&["vm", "snapshot", "restore", VM, "one"]).ok();
            // The seed is on the way when the VM is on, and comes with the time.
            clock_is_right(world, VM);
            guest(world, "head -c16 /dev/urandom | od -An -tx1")
        };
        assert_ne!(random(), random());
    });
    checks.check("the tree shows what comes from what, a list its names", || {
        world.catalyst(&["vm", "snapshot", "create", VM, "branch"]).ok();
        let tree = world.catalyst(&["vm", "snapshot", "tree", VM]);
        assert_eq!(
            tree.ok(),
            "└── never on\n    └── one\n        ├── two\n        └── branch\n            └── (now)"
        );
        assert_eq!(world.catalyst(&["vm", "snapshot", "list", VM]).ok(), "never on\none\ntwo\nbranch");
        assert!(world.catalyst(&["vm", "snapshot", "ls", "-l", VM]).ok().contains("the first"));
    });
    checks.check("going back without going on leaves the VM suspended there", || {
        world.catalyst(&["vm", "snapshot", "restore", VM, "two", "--no-start"]).ok();
        assert_eq!(vm(world, VM)["state"], "suspended");
        // A suspended VM has its memory on disk already.
        world.catalyst(&["vm", "snapshot", "create", VM, "asleep"]).ok();
        world.catalyst(&["vmpower", "on", VM]).ok();
        assert_eq!(guest(world, "cat /dev/shm/nonce"), nonce);
    });
    checks.check("deletion gives the space back, and takes nothing from the others", || {
        let before = allocated(&world.vm_dir(VM));
        for name in ["one", "branch", "asleep"] {
            world.catalyst(&["vm", "snapshot", "delete", VM, name]).ok();
        }
        let after = allocated(&world.vm_dir(VM));
        assert!(after + (250 << 20) < before, "{before} {after}");
        assert!(layers(world) <= 3, "{} layers", layers(world));
        world.catalyst(&["vm", "snapshot", "restore", VM, "two"]).ok();
        assert_eq!(guest(world, "cat /dev/shm/nonce /root/at"), format!("{nonce}\none"));
    });
}

fn still(checks: &mut Checks, world: &World) {
    checks.check(
        "a snapshot of a VM that is off is of its disk; one of a VM that never was on is fresh again",
        || {
            set(world, "off");
            world.catalyst(&["vmpower", "shutdown", VM]).ok();
            world.catalyst(&["vm", "snapshot", "create", VM, "off"]).ok();
            world.catalyst(&["vmpower", "on", VM, "--wait", "--timeout", "280"]).ok();
            set(world, "later");
            world.catalyst(&["vm", "snapshot", "restore", VM, "off"]).ok();
            assert_eq!(vm(world, VM)["state"], "powered off");
            world.catalyst(&["vmpower", "on", VM, "--wait", "--timeout", "280"]).ok();
            assert_eq!(guest(world, "cat /root/at"), "off");
            world.catalyst(&["vm", "snapshot", "restore", VM, "never on"]).ok();
            world.catalyst(&["vmpower", "on", VM]).ok();
            assert_eq!(vm(world, VM)["start_mode"], "warm");
            assert_eq!(guest(world, "cat /root/at || echo none"), "none");
        },
    );
    checks.check("when all are deleted while it is off, nothing but its disk is left", || {
        world.catalyst(&["vm", "snapshot", "restore", VM, "off"]).ok();
        world.catalyst(&["vm", "snapshot", "delete", VM, "two", "off", "never on"]).ok();
        assert_eq!(layers(world), 0);
        world.catalyst(&["vmpower", "on", VM, "--wait", "--timeout", "280"]).ok();
        assert_eq!(guest(world, "cat /root/at"), "off");
    });
}

fn wrong(checks: &mut Checks, world: &World) {
    checks.check("wrong names and snapshots that are not there are refused with a word", || {
        world.catalyst(&["vm", "snapshot", "create", VM, "twice"]).ok();
        let error = world.catalyst(&["vm", "snapshot", "create", VM, "twice"]).error(1).to_owned();
        assert!(error.contains("already"), "{error}");
        for name in ["", "a/b", "..", "a\nb", &"x".repeat(81)] {
            let body = serde_json::json!({ "name": name }).to_string();
            let answer = world.curl_with(
                &["-X", "POST", "-H", "Content-Type: application/json"],
                &format!("/v1/vms/{VM}/snapshots"),
                Some(body.as_bytes()),
            );
            v1_error(&answer, "invalid_request");
        }
        for verb in ["restore", "delete"] {
            let error = world.catalyst(&["vm", "snapshot", verb, VM, "no\u{1b}[2Jthing"]).error(1).to_owned();
            assert!(error.contains("has no snapshot") && !error.contains('\u{1b}'), "{error}");
        }
        assert_eq!(vm(world, VM)["state"], "powered on");
        world.catalyst(&["vm", "snapshot", "delete", VM, "twice"]).ok();
    });
}

/// Writes a word to memory and disk.
fn set(world: &World, word: &str) {
    guest(world, &format!("echo {word} >/dev/shm/at; echo {word} >/root/at; sync"));
}

fn guest(world: &World, script: &str) -> String {
    world.catalyst(&["guest", "exec", VM, "--", "sh", "-c", script]).ok().to_owned()
}

fn layers(world: &World) -> usize {
    let names = fs::read_dir(world.vm_dir(VM)).unwrap().flatten();
    names.filter(|entry| entry.file_name().to_string_lossy().starts_with("layer-")).count()
}

/// Bytes on disk of a folder's files; one that has several names counts once.
fn allocated(folder: &std::path::Path) -> u64 {
    let mut seen = std::collections::BTreeSet::new();
    let mut folders = vec![folder.to_owned()];
    let mut sum = 0;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            let about = entry.metadata().unwrap();
            if about.is_dir() {
                folders.push(entry.path());
            } else if seen.insert(about.ino()) {
                sum += about.blocks() * 512;
            }
        }
    }
    sum
}
