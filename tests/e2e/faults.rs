//! The daemon killed at every step of suspend, resume, clone, snapshot and going back; VM processes killed; saved machines
//! that are damaged. A step is a call by which the daemon changes the file system: `kill_at.c` ends it right before one.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use catalyst_tests::world::{HANG, run};
use catalyst_tests::{Checks, World};

use crate::common::{self, healthy, vm};

const VM: &str = "web1";
/// Without `CATALYST_TEST_FULL` only every so many steps are tried; which ones differs from operation to operation.
const STRIDE: usize = 4;
/// No operation has so many.
const MOST_STEPS: usize = 400;

/// The group.
pub fn faults(checks: &mut Checks) {
    let mut world = World::empty();
    let armed = world.path("kill-at");
    world.wrapper = preloaded(&world, &armed);
    world.start_daemon();
    let killer = Killer { armed };
    world.catalyst(&["vm", "create", VM]).ok();
    power_on(&world);
    let nonce = guest(&world, "head -c16 /dev/urandom | od -An -tx1 | tr -d ' ' | tee /dev/shm/nonce; sync");

    checks.check("killed while a VM is suspended: it runs on, or it is suspended", || {
        killer.at_each_step(
            &mut world,
            0,
            |world| power(world, "suspend"),
            |world, _| {
                let state = settled(world);
                assert!(["powered on", "suspended"].contains(&state.as_str()), "{state}");
                goes_on(world, &nonce);
            },
        );
    });
    checks.check("killed while it goes on: it does, or it is suspended", || {
        killer.at_each_step(
            &mut world,
            1,
            |world| {
                killer.disarm();
                power(world, "suspend");
                killer.rearm();
                power(world, "on")
            },
            |world, _| goes_on(world, &nonce),
        );
    });
    checks.check("killed while it is cloned: it runs on, and the clone is whole or not there", || {
        killer.at_each_step(
            &mut world,
            2,
            |world| post(world, "clones", r#"{"ids":["copy"]}"#) == 201,
            |world, _| {
                goes_on(world, &nonce);
                if world.curl("GET", "/v1/vms/copy", None).status == 200 {
                    let state = common::settled(world, "copy");
                    assert!(["powered on", "powered off"].contains(&state.as_str()), "{state}");
                    if state == "powered on" {
                        let told = world.catalyst(&[
                            "guest",
                            "exec",
                            "copy",
                            "--",
                            "cat",
                            "/dev/shm/nonce",
                            "/etc/hostname",
                        ]);
                        assert_eq!(told.ok(), format!("{nonce}\ncopy"));
                    }
                    world.catalyst(&["vm", "delete", "--force", "copy"]).ok();
                }
            },
        );
    });
    snapshots(checks, &mut world, &killer, &nonce);
    checks.check(
        "a VM process that is killed while it is suspended or frozen ends as one that was killed",
        || {
            process_killed(&world);
        },
    );
    checks.check("nothing is left of all that", || {
        world.catalyst(&["vm", "delete", "--force", VM]).ok();
        let left: Vec<_> = fs::read_dir(world.state_dir().join("vms")).unwrap().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
        healthy(&world);
    });
}

fn snapshots(checks: &mut Checks, world: &mut World, killer: &Killer, nonce: &str) {
    checks.check("killed while a snapshot is made: it is whole or not there", || {
        killer.at_each_step(
            world,
            3,
            |world| post(world, "snapshots", r#"{"name":"one"}"#) == 201,
            |world, _| {
                goes_on(world, nonce);
                if names(world) == ["one"] {
                    restore(world, "one");
                    goes_on(world, nonce);
                    assert_eq!(
                        world.curl("DELETE", &format!("/v1/vms/{VM}/snapshots/one"), None).status,
                        204
                    );
                }
                assert!(names(world).is_empty());
                tidy(world);
            },
        );
    });
    checks.check("killed while a VM goes back: it is as it was then, or as it was before", || {
        killer.disarm();
        guest(world, "echo then >/dev/shm/at; echo then >/root/at; sync");
        assert_eq!(post(world, "snapshots", r#"{"name":"then"}"#), 201);
        killer.at_each_step(
            world,
            0,
            |world| {
                killer.disarm();
                guest(world, "echo now >/dev/shm/at; echo now >/root/at; sync");
                killer.rearm();
                restore(world, "then")
            },
            |world, _| {
                // Its process is ended before it goes back: one that was killed between has lost its memory, not its disk.
                if settled(world) == "powered off" {
                    power_on(world);
                    assert_eq!(guest(world, "cat /root/at"), "now");
                    assert!(restore(world, "then"));
                }
                goes_on(world, nonce);
                let told = guest(world, "cat /dev/shm/at /root/at");
                assert!(["then\nthen", "now\nnow"].contains(&told.as_str()), "{told}");
                tidy(world);
            },
        );
    });
    checks.check("killed while a snapshot is deleted: the VM runs on, and it is there or not", || {
        killer.at_each_step(
            world,
            1,
            |world| {
                killer.disarm();
                post(world, "snapshots", r#"{"name":"more"}"#);
                killer.rearm();
                world.curl("DELETE", &format!("/v1/vms/{VM}/snapshots/more"), None).status == 204
            },
            |world, _| {
                goes_on(world, nonce);
                assert!(names(world).starts_with(&["then".to_owned()]));
                world.curl("DELETE", &format!("/v1/vms/{VM}/snapshots/more"), None);
            },
        );
        assert!(restore(world, "then"));
        goes_on(world, nonce);
        assert_eq!(guest(world, "cat /dev/shm/at /root/at"), "then\nthen");
    });
}

/// The daemon's environment that loads `kill_at.c`.
fn preloaded(world: &World, armed: &std::path::Path) -> Vec<std::ffi::OsString> {
    let library = world.path("kill_at.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/e2e/kill_at.c");
    run(Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).args([source, "-ldl"]));
    run(Command::new("chmod").arg("644").arg(&library));
    let preload = format!("LD_PRELOAD={}", library.display());
    vec!["env".into(), preload.into(), format!("KILL_AT={}", armed.display()).into()]
}

/// Ends the daemon at a step.
struct Killer {
    /// The file that says which.
    armed: PathBuf,
}

impl Killer {
    fn arm(&self, step: usize) {
        fs::write(self.armed.with_extension("at"), step.to_string()).unwrap();
        self.rearm();
    }

    fn rearm(&self) {
        let _ = fs::copy(self.armed.with_extension("at"), &self.armed);
    }

    fn disarm(&self) {
        let _ = fs::remove_file(&self.armed);
    }

    /// Does `act`, which is true if it was done, with the daemon killed at one step after the other, until it is done
    /// without; after each, another daemon is there and `look` looks.
    fn at_each_step(
        &self,
        world: &mut World,
        first: usize,
        act: impl Fn(&World) -> bool,
        look: impl Fn(&World, usize),
    ) {
        let stride = if std::env::var_os("CATALYST_TEST_FULL").is_some() { 1 } else { STRIDE };
        let steps = (1 + first % stride..MOST_STEPS).step_by(stride);
        for (tried, step) in steps.enumerate() {
            // Steps are counted from the daemon's start.
            world.kill_daemon();
            world.start_daemon();
            settled(world);
            self.arm(step);
            let _step = Step(step, world.path("daemon.log"));
            let done = act(world);
            self.disarm();
            let alive = world.curl("GET", "/v1/version", None).status == 200;
            if !alive {
                world.kill_daemon();
                world.start_daemon();
            }
            assert!(alive || !done, "a daemon that was killed at step {step} has answered before");
            look(world, step);
            if alive {
                assert!(done, "step {step}: it failed without having been killed");
                assert!(tried > 2, "only {tried} steps were there");
                println!("    {tried} steps");
                return;
            }
        }
        panic!("it has no end");
    }
}

/// Names the step where a check fails, with what the last daemons logged.
struct Step(usize, PathBuf);

impl Drop for Step {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs::read_to_string(&self.1).unwrap_or_default();
            let last: Vec<&str> = log.lines().rev().take(40).collect();
            println!("    at step {}; the daemons' log ends with:", self.0);
            last.iter().rev().for_each(|line| println!("      {line}"));
        }
    }
}

fn power(world: &World, op: &str) -> bool {
    let body = format!(r#"{{"op":"{op}"}}"#);
    world.curl("POST", &format!("/v1/vms/{VM}/power"), Some(&body)).status == 200
}

fn power_on(world: &World) {
    world.catalyst(&["vmpower", "on", VM, "--wait", "--timeout", "280"]).ok();
}

fn post(world: &World, what: &str, body: &str) -> u16 {
    let options = ["-X", "POST", "-H", "Content-Type: application/json"];
    let answer = world.curl_with(&options, &format!("/v1/vms/{VM}/{what}"), Some(body.as_bytes()));
    if answer.status >= 400 {
        println!("    {what}: {}", answer.body);
    }
    answer.status
}

fn restore(world: &World, name: &str) -> bool {
    post(world, &format!("snapshots/{name}/restore"), "{}") == 200
}

fn names(world: &World) -> Vec<String> {
    let all = world.curl("GET", &format!("/v1/vms/{VM}/snapshots"), None).json();
    all.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
}

fn guest(world: &World, script: &str) -> String {
    world.catalyst(&["guest", "exec", VM, "--", "sh", "-c", script]).ok().to_owned()
}

/// The VM's state, when it is in none that it only passes through.
fn settled(world: &World) -> String {
    common::settled(world, VM)
}

/// It runs on with the memory that it has always had.
fn goes_on(world: &World, nonce: &str) {
    if settled(world) == "suspended" {
        assert!(power(world, "on"));
    }
    let state = settled(world);
    assert_eq!(state, "powered on", "{}", vm(world, VM));
    assert_eq!(guest(world, "cat /dev/shm/nonce"), nonce);
}

/// In the VM's folder is what it is made of, and nothing that an operation left.
fn tidy(world: &World) {
    let names = fs::read_dir(world.vm_dir(VM)).unwrap().flatten();
    let odd: Vec<String> = names
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(".merging") || name.starts_with(".restoring") || name == "restoring")
        .collect();
    assert!(odd.is_empty(), "{odd:?}");
}

fn process_killed(world: &World) {
    for what in ["suspend", "clone", "snapshot"] {
        if settled(world) == "powered off" {
            power_on(world);
        }
        let pid = i32::try_from(world.vm_pid(VM).unwrap()).unwrap();
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| match what {
                "suspend" => power(world, "suspend"),
                "clone" => post(world, "clones", r#"{"ids":["copy"]}"#) == 201,
                _ => post(world, "snapshots", r#"{"name":"late"}"#) == 201,
            });
            std::thread::sleep(Duration::from_millis(150));
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
            let done = asked.join().unwrap();
            // It may have been done before.
            if what == "suspend" && done {
                assert_eq!(settled(world), "suspended");
                assert!(power(world, "on"));
            } else {
                world.wait_for_state(VM, "powered off", HANG);
            }
            let copy = world.curl("GET", "/v1/vms/copy", None).status == 200;
            assert_eq!(copy, what == "clone" && done);
            if copy {
                world.catalyst(&["vm", "delete", "--force", "copy"]).ok();
            }
        });
    }
    if settled(world) == "powered off" {
        power_on(world);
    }
}
