//! Instant clone: warm templates, suspend and resume, clones of a VM that runs.

use std::collections::HashSet;
use std::time::Instant;

use catalyst_tests::world::HANG;
use catalyst_tests::{Checks, World};
use serde_json::Value;

use super::common::{clock_is_right, wait_until};

const VM: &str = "web1";
/// Clones that are made at once; the benchmark makes twenty.
const CLONES: usize = 5;
/// What tells one guest from another, a line each.
const SELF: &str = "hostname; cat /etc/machine-id; cat /sys/class/net/eth0/address; \
    ip -4 -o address show dev eth0 | tr -s ' ' | cut -d' ' -f4; cat /etc/ssh/ssh_host_ed25519_key.pub; \
    cat /proc/sys/kernel/random/boot_id; head -c16 /dev/urandom | od -An -tx1";
/// Starts an sshd that has read its keys, and does not listen yet: two more keys are FIFOs, and nobody writes the second for a while.
const SLOW_SSHD: &str = "mkfifo -m 600 /run/slow1 /run/slow2 && \
    printf 'HostKey /run/slow1\nHostKey /run/slow2\n' >/etc/ssh/sshd_config.d/zz-slow.conf && systemctl --no-block restart ssh && \
    : >/run/slow1 && for pause in '1 0' '2 2'; do set -- $pause; \
    setsid sh -c \"sleep $2; while :; do : >/run/slow$1; done\" >/dev/null 2>&1 </dev/null & done";

pub fn instant(checks: &mut Checks) {
    let mut world = World::new();
    let memory = warm(checks, &world);
    fresh(checks, &world);
    suspended(checks, &mut world);
    cloned(checks, &world);
    checks.check("no VM has written the template's memory", || {
        assert_eq!(digest(&memory), memory.1);
    });
    checks.check("all are deleted, and nothing is left of them", || {
        let vms = world.curl("GET", "/v1/vms", None).json();
        for vm in vms.as_array().unwrap() {
            world.catalyst(&["vm", "delete", "--force", vm["id"].as_str().unwrap()]).ok();
        }
        let left: Vec<_> = std::fs::read_dir(world.state_dir().join("vms")).unwrap().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(super::common::taps(&world), 0);
    });
}

fn guest(world: &World, vm: &str, script: &str) -> String {
    world.catalyst(&["guest", "exec", vm, "--", "sh", "-c", script]).ok().to_owned()
}

fn shown(world: &World, vm: &str) -> Value {
    world.curl("GET", &format!("/v1/vms/{vm}"), None).json()
}

/// The file of the template's memory, and its digest.
type Memory = (std::path::PathBuf, String);

fn digest(memory: &Memory) -> String {
    let mut sum = std::process::Command::new("sha256sum");
    sum.arg(&memory.0);
    catalyst_tests::world::ran(sum).ok().to_owned()
}

/// The warm state for VMs of the usual size; it is made if it is not there.
fn warm(checks: &mut Checks, world: &World) -> Memory {
    let mut memory = Memory::default();
    checks.check("a template has a warm state that fits", || {
        memory = (world.warm(), String::new());
        memory.1 = digest(&memory);
        assert!(world.catalyst(&["template", "show"]).ok().contains("fits"));
        assert!(world.catalyst(&["template", "list"]).ok().contains("lumen"));
    });
    memory
}

fn fresh(checks: &mut Checks, world: &World) {
    checks.check("a fresh VM goes on from it, as itself", || {
        world.catalyst(&["vm", "create", VM]).ok();
        let begun = Instant::now();
        world.catalyst(&["vmpower", "on", VM]).ok();
        assert_eq!(world.catalyst(&["guest", "exec", VM, "--", "hostname"]).ok(), VM);
        println!("    a command's answer after {:.2} s", begun.elapsed().as_secs_f32());
        assert_eq!(shown(world, VM)["start_mode"], "warm");
        assert_eq!(world.catalyst(&["ssh", VM, "--", "hostname"]).ok(), VM);
        let address = world.catalyst(&["guest", "getip", VM]).ok().to_owned();
        assert!(guest(world, VM, SELF).contains(&format!("{address}/")));
        clock_is_right(world, VM);
    });
    checks.check("Docker runs containers in it, and reaches the host's network", || {
        let ran = world.catalyst(&["ssh", VM, "--", "docker run --rm busybox echo hello"]);
        assert_eq!(ran.ok(), "hello");
        guest(world, VM, "ping -c 1 -w 60 $(ip -4 route show default | cut -d' ' -f3)");
    });
    checks.check("its memory is shared with the template until it is written", || {
        let memory = world.curl("GET", "/v1/vms/web1/memory", None).json();
        let bytes = |what: &str| memory[what].as_u64().unwrap();
        assert_eq!(bytes("ram"), 1 << 30);
        assert!(bytes("private") < bytes("shared") && bytes("untouched") > 0, "{memory}");
        assert!(world.catalyst(&["vm", "show", VM]).ok().contains("shared"));
    });
    checks.check("the next power-on boots its own disk, on which all is still there", || {
        guest(world, VM, "echo kept >/root/file && sync");
        world.catalyst(&["vmpower", "shutdown", VM]).ok();
        assert_eq!(shown(world, VM)["reason"], "the guest powered off");
        world.catalyst(&["vmpower", "on", VM, "--wait", "--timeout", "280"]).ok();
        assert_eq!(shown(world, VM)["start_mode"], "cold");
        assert_eq!(guest(world, VM, "cat /root/file; hostname"), format!("kept\n{VM}"));
    });
    checks.check("a fresh VM boots where that is asked for", || {
        world.catalyst(&["vm", "create", "cold1"]).ok();
        world.catalyst(&["vmpower", "on", "--cold", "cold1"]).ok();
        assert_eq!(shown(world, "cold1")["start_mode"], "cold");
        world.catalyst(&["vm", "delete", "--force", "cold1"]).ok();
    });
}

fn suspended(checks: &mut Checks, world: &mut World) {
    let mut nonce = String::new();
    checks.check("suspended, a VM has no process, and another daemon knows it for what it is", || {
        nonce = guest(world, VM, "head -c16 /dev/urandom | od -An -tx1 | tr -d ' ' | tee /dev/shm/nonce");
        world.catalyst(&["vmpower", "suspend", VM]).ok();
        let pid = shown(world, VM)["pid"].clone();
        assert_eq!((shown(world, VM)["state"].as_str(), pid), (Some("suspended"), Value::Null));
        world.kill_daemon();
        world.start_daemon();
        world.wait_for_state(VM, "suspended", HANG);
        assert!(world.catalyst(&["vmpower", "list"]).ok().is_empty());
    });
    checks.check("it goes on where it was, with its memory and the right time", || {
        world.catalyst(&["vmpower", "on", VM]).ok();
        assert_eq!(shown(world, VM)["start_mode"], "resume");
        assert_eq!(guest(world, VM, "cat /dev/shm/nonce"), nonce.trim());
        clock_is_right(world, VM);
        assert_eq!(world.catalyst(&["ssh", VM, "--", "hostname"]).ok(), VM);
        assert!(!world.vm_dir(VM).join("suspended").exists());
    });
    checks.check("it can be suspended again at once, and given up", || {
        world.catalyst(&["vmpower", "suspend", VM]).ok();
        world.catalyst(&["vmpower", "on", VM]).ok();
        assert_eq!(guest(world, VM, "cat /dev/shm/nonce"), nonce.trim());
        world.catalyst(&["vmpower", "suspend", VM]).ok();
        world.catalyst(&["vmpower", "off", VM]).ok();
        assert_eq!(shown(world, VM)["state"], "powered off");
    });
    checks.check("a saved machine with a flipped bit, or cut short, is refused, and can be given up", || {
        world.catalyst(&["vm", "create", "hurt"]).ok();
        world.catalyst(&["vmpower", "on", "hurt"]).ok();
        world.catalyst(&["vmpower", "suspend", "hurt"]).ok();
        let saved = world.vm_dir("hurt").join("suspended");
        let state = std::fs::read(saved.join("state")).unwrap();
        let mut flipped = state.clone();
        flipped[state.len() / 2] ^= 4;
        std::fs::write(saved.join("state"), flipped).unwrap();
        let error = world.catalyst(&["vmpower", "on", "hurt"]).error(1).to_owned();
        assert!(error.contains("damaged") && error.contains("digest"), "{error}");
        std::fs::write(saved.join("state"), state).unwrap();
        let memory = std::fs::OpenOptions::new().write(true).open(saved.join("memory")).unwrap();
        memory.set_len((1 << 30) - 4096).unwrap();
        let error = world.catalyst(&["vmpower", "on", "hurt"]).error(1).to_owned();
        assert!(error.contains("not as long"), "{error}");
        assert_eq!(shown(world, "hurt")["state"], "suspended");
        world.catalyst(&["vmpower", "on", "--cold", "hurt"]).ok();
        assert_eq!(shown(world, "hurt")["start_mode"], "cold");
        world.catalyst(&["vm", "delete", "--force", "hurt"]).ok();
    });
}

fn cloned(checks: &mut Checks, world: &World) {
    let mut nonce = String::new();
    checks.check("a VM that runs is cloned with its memory, and both go on", || {
        world.catalyst(&["vm", "create", "source"]).ok();
        world.catalyst(&["vmpower", "on", "source"]).ok();
        nonce = guest(
            world,
            "source",
            "head -c16 /dev/urandom | od -An -tx1 | tr -d ' ' | tee /dev/shm/nonce /root/nonce",
        );
        world.catalyst(&["vm", "clone", "source", "copy"]).ok();
        assert_eq!(shown(world, "copy")["start_mode"], "clone");
        for vm in ["source", "copy"] {
            assert_eq!(guest(world, vm, "cat /dev/shm/nonce"), nonce.trim());
            assert_eq!(guest(world, vm, "cat /root/nonce"), nonce.trim());
            assert_eq!(world.catalyst(&["ssh", vm, "--", "hostname"]).ok(), vm);
            clock_is_right(world, vm);
        }
    });
    checks.check(
        "a clone of a guest whose clock is forty days behind has the right time, and nothing fails for that",
        || {
            guest(world, "source", "date -s '40 days ago' >/dev/null");
            world.catalyst(&["vm", "clone", "source", "late"]).ok();
            clock_is_right(world, "late");
            assert_eq!(guest(world, "late", "systemctl --failed --no-legend --plain"), "");
            assert_eq!(guest(world, "late", "docker run --rm busybox echo hello"), "hello");
            world.catalyst(&["vm", "delete", "--force", "late"]).ok();
        },
    );
    checks.check("the hooks of a clone are done before anybody reaches it, and only in clones", || {
        let hook = "mkdir -p /etc/catalyst/clone.d && printf '#!/bin/sh\\necho $CATALYST_NAME $CATALYST_ADDRESS >/root/hook' \
            >/etc/catalyst/clone.d/10-note && chmod 755 /etc/catalyst/clone.d/10-note";
        guest(world, "source", hook);
        world.catalyst(&["vm", "clone", "source", "hooked"]).ok();
        let address = shown(world, "hooked")["address"].as_str().unwrap().to_owned();
        assert_eq!(world.catalyst(&["ssh", "hooked", "--", "sudo cat /root/hook"]).ok(), format!("hooked {address}"));
        assert_eq!(guest(world, "source", "rm /etc/catalyst/clone.d/10-note; cat /root/hook || echo none"), "none");
        world.catalyst(&["vm", "delete", "--force", "hooked"]).ok();
    });
    checks.check("what one writes, to memory or disk, the other never sees", || {
        guest(world, "copy", "echo copy >/dev/shm/own; echo copy >/root/own; sync");
        assert_eq!(guest(world, "source", "cat /dev/shm/own /root/own 2>/dev/null; echo none"), "none");
        guest(world, "source", "echo source >/dev/shm/own; echo source >/root/own; sync");
        assert_eq!(guest(world, "copy", "cat /dev/shm/own /root/own"), "copy\ncopy");
        assert_eq!(guest(world, "source", "cat /dev/shm/own /root/own"), "source\nsource");
    });
    checks.check("many clones at once are all somebody else", || {
        let count = CLONES.to_string();
        let begun = Instant::now();
        world.catalyst(&["vm", "clone", "source", "c", "--count", &count]).ok();
        let ids: Vec<String> = (1..=CLONES).map(|number| format!("c-{number}")).collect();
        let told: Vec<String> = std::thread::scope(|scope| {
            let asking: Vec<_> = ids
                .iter()
                .map(|id| scope.spawn(move || world.catalyst(&["ssh", id, "--", SELF]).ok().to_owned()))
                .collect();
            asking.into_iter().map(|asked| asked.join().unwrap()).collect()
        });
        println!("    all answered after {:.1} s", begun.elapsed().as_secs_f32());
        let mut all = told;
        all.push(guest(world, "source", SELF));
        let lines: Vec<Vec<&str>> = all.iter().map(|text| text.lines().collect()).collect();
        assert!(lines.iter().all(|own| own.len() == 7), "{lines:?}");
        for what in 0..7 {
            let different: HashSet<&str> = lines.iter().map(|own| own[what]).collect();
            assert_eq!(different.len(), CLONES + 1, "line {what} of {lines:?}");
        }
    });
    checks.check("a clone runs containers, is suspended and boots like any other VM", || {
        assert_eq!(guest(world, "c-1", "docker run --rm busybox echo hello"), "hello");
        world.catalyst(&["vmpower", "suspend", "c-1"]).ok();
        world.catalyst(&["vmpower", "on", "c-1"]).ok();
        assert_eq!(guest(world, "c-1", "cat /dev/shm/nonce"), nonce.trim());
        world.catalyst(&["vmpower", "off", "copy"]).ok();
        world.catalyst(&["vmpower", "on", "copy", "--wait", "--timeout", "280"]).ok();
        assert_eq!(
            guest(world, "copy", "cat /root/nonce /root/own; hostname"),
            format!("{}\ncopy\ncopy", nonce.trim())
        );
    });
    checks.check("a clone whose guest resets itself is started again from its own disk", || {
        world.catalyst(&["ssh", "c-3", "--", "sudo systemctl reboot"]);
        wait_until("it starts again", HANG, || shown(world, "c-3")["start_mode"] == "cold");
        assert_eq!(guest(world, "c-3", "cat /root/nonce; hostname"), format!("{}\nc-3", nonce.trim()));
    });
    checks.check("a clone of a guest whose sshd is just starting has the clone's keys", || {
        guest(world, "source", SLOW_SSHD);
        world.catalyst(&["vm", "clone", "source", "early"]).ok();
        assert_eq!(world.catalyst(&["ssh", "early", "--", "hostname"]).ok(), "early");
        world.catalyst(&["vm", "delete", "--force", "early"]).ok();
    });
    checks.check("the source can go first; a clone of a clone is a clone", || {
        world.catalyst(&["vm", "delete", "--force", "source"]).ok();
        world.catalyst(&["vm", "clone", "c-2", "grandchild"]).ok();
        assert_eq!(
            guest(world, "grandchild", "cat /dev/shm/nonce; hostname"),
            format!("{}\ngrandchild", nonce.trim())
        );
        assert_eq!(shown(world, "grandchild")["state"], "powered on");
    });
}
