//! File systems of the host that are full while VMs with memory are suspended, cloned, kept and made warm.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use catalyst_tests::world::{HANG, run};
use catalyst_tests::{Checks, World};

use super::common::{Room, healthy, taps, v1_error, vm, vm_processes, wait_until};

const VM: &str = "web1";

/// The group.
pub fn full(checks: &mut Checks) {
    running(checks);
    warming(checks);
}

fn running(checks: &mut Checks) {
    let mut world = World::empty();
    let state = world.state_dir();
    fs::create_dir(&state).unwrap();
    let room = Room::on_disk(&state, &world.path("room.img"), 768 << 20);
    world.start_daemon();
    world.warm();
    world.catalyst(&["vm", "create", VM]).ok();
    world.catalyst(&["vmpower", "on", VM, "--wait", "--timeout", "280"]).ok();
    let nonce = guest(&world, "head -c16 /dev/urandom | od -An -tx1 | tr -d ' ' | tee /dev/shm/nonce");
    saved(checks, &world, &room, &nonce);
    written(checks, &mut world, &room, &nonce);
    checks.check("a VM that was full goes as a whole, and so does what it left", || {
        world.catalyst(&["vm", "delete", "--force", VM]).ok();
        assert_eq!(fs::read_dir(world.state_dir().join("vms")).unwrap().count(), 0);
        healthy(&world);
    });
}

/// What writes much is refused, and all is as before.
fn saved(checks: &mut Checks, world: &World, room: &Room, nonce: &str) {
    let goes_on = || {
        room.make();
        // Its own writes may have found no room as well.
        world.catalyst(&["vmpower", "unpause", VM]).ok();
        assert_eq!(guest(world, "cat /dev/shm/nonce"), nonce);
    };
    let refused = |what: &str, body: &str| {
        let before = files(world);
        room.fill();
        let answer = world.curl("POST", &format!("/v1/vms/{VM}/{what}"), Some(body));
        v1_error(&answer, "disk_full");
        goes_on();
        assert_eq!(files(world), before, "{what} left something");
    };
    checks.check("a full disk: a VM that cannot be suspended runs on", || {
        refused("power", r#"{"op":"suspend"}"#);
        assert_eq!(vm(world, VM)["state"], "powered on");
    });
    checks.check("a full disk: a snapshot that does not fit is not there", || {
        refused("snapshots", r#"{"name":"one"}"#);
        let all = world.curl("GET", &format!("/v1/vms/{VM}/snapshots"), None).json();
        assert!(all.as_array().unwrap().is_empty());
    });
    checks.check("a full disk: a clone that does not fit is not there, and its source runs on", || {
        refused("clones", r#"{"ids":["copy"]}"#);
        assert_eq!(world.curl("GET", "/v1/vms/copy", None).status, 404);
        assert_eq!(fs::read_dir(world.state_dir().join("vms")).unwrap().count(), 1);
    });
    checks.check("a full disk: a VM goes back to a snapshot, or says why not and is as it was", || {
        let at = |text: &str| guest(world, &format!("echo {text} >/dev/shm/at"));
        at("then");
        world.catalyst(&["vm", "snapshot", "create", VM, "one"]).ok();
        at("now");
        room.fill();
        let answer = world.curl("POST", &format!("/v1/vms/{VM}/snapshots/one/restore"), Some("{}"));
        let done = answer.status == 200;
        if !done {
            v1_error(&answer, "disk_full");
        }
        goes_on();
        assert_eq!(guest(world, "cat /dev/shm/at"), if done { "then" } else { "now" });
        world.catalyst(&["vm", "snapshot", "restore", VM, "one"]).ok();
        assert_eq!(guest(world, "cat /dev/shm/at /dev/shm/nonce"), format!("then\n{nonce}"));
    });
    checks.check("a full disk: what is suspended stays so until it can go on", || {
        world.catalyst(&["vmpower", "suspend", VM]).ok();
        room.fill();
        let answer = world.curl("POST", &format!("/v1/vms/{VM}/power"), Some(r#"{"op":"on"}"#));
        if answer.status != 200 {
            v1_error(&answer, "disk_full");
            assert_eq!(vm(world, VM)["state"], "suspended");
        }
        room.make();
        world.catalyst(&["vmpower", "on", VM]).ok();
        goes_on();
    });
}

/// What the guest writes waits for room.
fn written(checks: &mut Checks, world: &mut World, room: &Room, nonce: &str) {
    const BYTES: &str = "head -c $((32 << 20)) /dev/zero | tr '\\0' x";
    checks.check("a guest whose writes find no room stands until there is, and loses nothing", || {
        room.fill();
        guest(world, &format!("({BYTES} >/root/much; sync; touch /dev/shm/written) >/dev/null 2>&1 &"));
        world.wait_for_state(VM, "paused", HANG);
        let told = vm(world, VM);
        let reason = told["reason"].as_str().unwrap();
        assert!(reason.contains("full") && reason.contains("vmpower unpause web1"), "{reason}");
        assert!(world.catalyst(&["vm", "show", VM]).ok().contains("is full"), "people are told");
        // Without more room it stands again at once.
        world.catalyst(&["vmpower", "unpause", VM]).ok();
        world.wait_for_state(VM, "paused", HANG);
        // Another daemon leaves it as it is.
        world.kill_daemon();
        world.start_daemon();
        world.wait_for_state(VM, "paused", HANG);
        room.make();
        world.catalyst(&["vmpower", "unpause", VM]).ok();
        wait_until("the guest has written", HANG, || {
            guest(world, "test -e /dev/shm/written && echo yes || true") == "yes"
        });
        assert_eq!(
            guest(
                world,
                &format!("{BYTES} | cmp - /root/much; cat /dev/shm/nonce; dmesg | grep -c 'I/O error'; true")
            ),
            format!("{nonce}\n0")
        );
    });
}

/// A template that is made warm where there is no room, and by a daemon that is killed.
fn warming(checks: &mut Checks) {
    let mut world = World::empty();
    let images = Images::new(&world);
    let image = fs::canonicalize(images.path.join("lumen/current")).unwrap();
    let warm = image.join("warm");
    let room = Room::in_memory(&warm, "20m");
    world.images.clone_from(&images.path);
    world.start_daemon();
    checks.check("a full disk: a template that does not become warm leaves nothing", || {
        let text = world.catalyst(&["template", "warm"]).error(1).to_owned();
        assert!(text.contains("space") || text.contains("full"), "{text}");
        assert_eq!(names(&warm), [".lock"]);
        nothing_runs(&world);
    });
    checks.check(
        "a daemon that is killed while it makes a template warm leaves nothing that is used",
        || {
            room.grow("2g");
            let answer = world.curl("POST", "/v1/templates/lumen/warm", Some("{}"));
            let task = answer.json()["id"].as_u64().unwrap();
            let begun = Instant::now();
            let saving = || {
                let told = world.curl("GET", &format!("/v1/tasks/{task}"), None).json();
                assert!(told["state"] != "failed" && begun.elapsed() < HANG * 2, "{told}");
                names(&warm).iter().any(|name| name.starts_with(".new-"))
            };
            while !saving() {
                std::thread::sleep(Duration::from_millis(5));
            }
            world.kill_daemon();
            world.start_daemon();
            nothing_runs(&world);
            let template = world.curl("GET", "/v1/templates/lumen", None).json();
            assert!(template["warm"].as_array().unwrap().is_empty(), "{template}");
            world.catalyst(&["template", "warm"]).ok();
            assert_eq!(names(&warm).len(), 2, "{:?}", names(&warm));
            world.catalyst(&["vm", "create", VM]).ok();
            world.catalyst(&["vmpower", "on", VM]).ok();
            assert_eq!(vm(&world, VM)["start_mode"], "warm");
            assert_eq!(guest(&world, "hostname"), VM);
            world.catalyst(&["vm", "delete", "--force", VM]).ok();
            healthy(&world);
        },
    );
}

/// No process of a VM, no tap and no lease is left.
fn nothing_runs(world: &World) {
    wait_until("the template's VM has gone", HANG, || vm_processes(world).is_empty() && taps(world) == 0);
    let leases = || world.curl("GET", "/v1/network", None).json()["leases"].clone();
    wait_until("its lease has gone", HANG, || leases() == 0);
}

fn guest(world: &World, script: &str) -> String {
    world.catalyst(&["guest", "exec", VM, "--", "sh", "-c", script]).ok().to_owned()
}

/// What is in the VM's folder and in that of its snapshots, but for layers of its disk, which a freeze may add.
fn files(world: &World) -> Vec<String> {
    let folder = world.vm_dir(VM);
    let mut all = names(&folder);
    all.retain(|name| !name.starts_with("layer-") && !["chain.json", "snapshots"].contains(&name.as_str()));
    all.extend(names(&folder.join("snapshots")));
    all
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut all: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    all.sort();
    all
}

/// The images at a place of the world's own, only to be read, where something can be mounted that others do not see.
struct Images {
    path: PathBuf,
}

impl Images {
    fn new(world: &World) -> Self {
        let path = world.path("images");
        fs::create_dir(&path).unwrap();
        run(Command::new("mount").arg("--bind").arg(&world.images).arg(&path));
        run(Command::new("mount").arg("--make-private").arg(&path));
        run(Command::new("mount").args(["-o", "remount,bind,ro"]).arg(&path));
        Self { path }
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.path).status();
    }
}
