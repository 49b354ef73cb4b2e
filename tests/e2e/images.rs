//! Images, and what the CLI tells: doctor, lists, completion, events.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::sync::mpsc;

use catalyst_tests::world::{HANG, engine, image_dir};
use catalyst_tests::{Checks, World, skip};
use serde_json::Value;

use crate::common::{VERSION, create, healthy, power, running, tiny_store, v1_error, vm};

/// The group.
pub fn images(checks: &mut Checks) {
    let world = running();
    whole(checks, &world);
    used(checks, &world);
    damaged(checks, &world);
    told(checks, &world);
    events(checks, &world);
    checks.check("the daemon is well", || healthy(&world));
    checks.check("the image of this machine is whole", real);
}

fn json(world: &World, words: &[&str]) -> Value {
    let words: Vec<&str> = words.iter().copied().chain(["--json"]).collect();
    let ran = world.catalyst(&words);
    serde_json::from_str(ran.ok()).unwrap_or_else(|error| panic!("{error}: {}", ran.stdout))
}

fn whole(checks: &mut Checks, world: &World) {
    checks.check("image list, show and verify of a whole image", || {
        let list = world.catalyst(&["image", "list"]).ok().to_owned();
        assert!(list.contains("lumen") && list.contains(VERSION) && list.contains("OK"), "{list}");
        let list = json(world, &["image", "list"]);
        assert_eq!((&list[0]["state"], &list[0]["current"]), (&"ok".into(), &true.into()));
        let shown = world.catalyst(&["image", "show"]).ok().to_owned();
        assert!(shown.contains(VERSION) && shown.contains("6.1.0-halt"), "{shown}");
        let manifest: Value =
            serde_json::from_str(world.catalyst(&["image", "show", "lumen", "--manifest"]).ok()).unwrap();
        assert_eq!(manifest["packages"][0]["name"], "halt");
        assert!(manifest["files"]["disk.raw"]["sha256"].is_string());
        let verified = world.catalyst(&["image", "verify"]);
        verified.ok();
        assert!(verified.stderr.contains("Verified image 'lumen'"), "{}", verified.stderr);
        let text = world.catalyst(&["image", "show", "nothing"]).error(1).to_owned();
        assert!(text.contains("nothing"), "{text}");
        world.catalyst(&["image", "build", "nothing"]).error(1);
    });
}

fn used(checks: &mut Checks, world: &World) {
    checks.check("an image that VMs stand on is not removed, of another daemon's neither", || {
        create(world, "web1");
        let text = world.catalyst(&["image", "remove"]).error(1).to_owned();
        assert!(text.contains(VERSION), "{text}");
        v1_error(&world.curl("DELETE", "/v1/images/lumen", None), "in_use");
        assert_eq!(json(world, &["image", "list"])[0]["used_by"], 1);
        let mut other = World::empty();
        other.images.clone_from(&world.images);
        other.start_daemon();
        other.catalyst(&["image", "remove"]).error(1);
        power(world, "web1", "on");
        power(world, "web1", "off");
        world.catalyst(&["vm", "delete", "web1"]).ok();
        other.catalyst(&["image", "remove"]).ok();
        assert_eq!(json(world, &["image", "list"]), serde_json::json!([]));
        world.catalyst(&["image", "remove"]).error(1);
        tiny_store(&world.images);
    });
}

fn damaged(checks: &mut Checks, world: &World) {
    let file = world.images.join("lumen").join(VERSION).join("disk.raw");
    checks.check("verify finds one changed byte, and the image is not used any more", || {
        create(world, "web1");
        let before = file.metadata().unwrap();
        let mut bytes = fs::read(&file).unwrap();
        bytes[777_777] ^= 1;
        fs::write(&file, &bytes).unwrap();
        let times = fs::FileTimes::new().set_modified(before.modified().unwrap());
        fs::File::options().write(true).open(&file).unwrap().set_times(times).unwrap();
        // Size and time are as they were: only reading tells.
        let text = world.catalyst(&["image", "verify"]).error(1).to_owned();
        assert!(text.contains("disk.raw") && text.contains("damaged"), "{text}");
        for words in [&["vm", "create", "web2"][..], &["vmpower", "on", "web1"]] {
            let text = world.catalyst(words).error(1).to_owned();
            assert!(text.contains("damaged") && text.contains("image build"), "{text}");
        }
        let list = world.catalyst(&["image", "list"]).ok().to_owned();
        assert!(list.contains("damaged"), "{list}");
        let shown = world.catalyst(&["image", "show"]).ok().to_owned();
        assert!(shown.contains("disk.raw"), "{shown}");
        assert_ne!(check(world, "image")["status"], "ok");
        bytes[777_777] ^= 1;
        fs::write(&file, &bytes).unwrap();
        fs::File::options().write(true).open(&file).unwrap().set_times(times).unwrap();
        world.catalyst(&["image", "verify"]).ok();
        power(world, "web1", "on");
        power(world, "web1", "off");
        world.catalyst(&["vm", "delete", "web1"]).ok();
    });
    checks.check("a manifest of garbage and a link out of the store are no image", || {
        let manifest = file.with_file_name("manifest.json");
        let good = fs::read(&manifest).unwrap();
        for bad in [&b"{"[..], b"", b"\xff\xfe", b"{\"format\":99}", b"[]", b"{\"format\":1}"] {
            fs::write(&manifest, bad).unwrap();
            let text = world.catalyst(&["vm", "create", "web2"]).error(1).to_owned();
            assert!(text.contains("damaged") && text.contains("manifest.json"), "{text}");
            world.catalyst(&["image", "list"]).ok();
        }
        fs::write(&manifest, good).unwrap();
        let current = world.images.join("lumen/current");
        fs::remove_file(&current).unwrap();
        std::os::unix::fs::symlink("../../../etc", &current).unwrap();
        world.catalyst(&["vm", "create", "web2"]).error(1);
        fs::remove_file(&current).unwrap();
        std::os::unix::fs::symlink(VERSION, &current).unwrap();
        create(world, "web2");
        world.catalyst(&["vm", "delete", "web2"]).ok();
    });
}

fn check(world: &World, name: &str) -> Value {
    let report: Value = serde_json::from_str(&world.catalyst(&["doctor", "--json"]).stdout).unwrap();
    report["checks"].as_array().unwrap().iter().find(|check| check["name"] == name).unwrap().clone()
}

fn told(checks: &mut Checks, world: &World) {
    checks.check("doctor: each line with its status and figure, each lack with its remedy", || {
        let text = world.catalyst(&["doctor"]);
        let report: Value = serde_json::from_str(&world.catalyst(&["doctor", "--json"]).stdout).unwrap();
        let checks = report["checks"].as_array().unwrap();
        for name in
            ["KVM", "QEMU", "qemu-img", "TUN", "nftables", "dnsmasq", "network", "port", "image", "memory"]
        {
            assert!(checks.iter().any(|check| check["name"] == name), "{name}");
            assert!(text.stdout.contains(name), "{}", text.stdout);
        }
        for check in checks {
            assert!(["ok", "degraded", "missing"].contains(&check["status"].as_str().unwrap()), "{check}");
            assert!(!check["found"].as_str().unwrap().is_empty(), "{check}");
            assert!(check["status"] != "missing" || check["remedy"].is_string(), "{check}");
        }
        assert_eq!(report["engine"], engine());
        let reason = report["engine_reason"].as_str().unwrap();
        assert!(reason.to_lowercase().contains(&engine()), "{reason}");
        assert!(text.stdout.contains("OK"), "{}", text.stdout);
    });
    checks.check("vm set, tags and lists", || {
        for (id, tag) in [("web1", "red"), ("web2", "blue")] {
            world.catalyst(&["vm", "create", id, "--memory", "256M", "--tag", tag, "--tag", "all"]).ok();
        }
        assert_eq!(world.catalyst(&["vm", "list"]).ok(), "web1\nweb2");
        assert_eq!(world.catalyst(&["vm", "list", "--tag", "red"]).ok(), "web1");
        assert_eq!(world.catalyst(&["vm", "list", "--tag", "all"]).ok(), "web1\nweb2");
        assert_eq!(world.catalyst(&["vm", "list", "--tag", "none"]).ok(), "");
        let long = world.catalyst(&["vm", "list", "--long"]).ok().to_owned();
        assert!(long.starts_with("ID") && long.contains("powered off") && long.contains("256 MiB"), "{long}");
        world
            .catalyst(&["vm", "set", "web1", "--cpus", "2", "--memory", "1.5G", "--name", "Web", "--no-tags"])
            .ok();
        let set = vm(world, "web1");
        assert_eq!((&set["cpus"], &set["memory_mib"]), (&2.into(), &1536.into()));
        assert_eq!((&set["name"], &set["tags"]), (&"Web".into(), &serde_json::json!([])));
        let list = json(world, &["vm", "list"]);
        let ids: Vec<&str> = list.as_array().unwrap().iter().map(|vm| vm["id"].as_str().unwrap()).collect();
        assert_eq!(ids, ["web1", "web2"]);
        for key in ["state", "cpus", "memory_mib", "disk_gib", "address", "mac", "vmx", "template", "tags"] {
            assert!(!list[0][key].is_null(), "{key}");
        }
        assert_eq!(world.catalyst(&["vmpower", "list"]).ok(), "");
        power(world, "web2", "on");
        assert_eq!(world.catalyst(&["vmpower", "list"]).ok(), "web2");
        let text = world.catalyst(&["vm", "delete", "web2"]).error(1).to_owned();
        assert!(text.contains("--force"), "{text}");
        world.catalyst(&["vm", "delete", "-f", "web1", "web2"]).ok();
    });
    checks.check("several VMs in one command: one that fails does not stop the others", || {
        create(world, "web1");
        let ran = world.catalyst(&["vmpower", "on", "nobody", "web1"]);
        assert!(ran.error(1).contains("nobody"));
        assert_eq!(vm(world, "web1")["state"], "powered on");
        world.catalyst(&["vm", "rm", "-f", "web1"]).ok();
    });
    checks.check("completion scripts of each shell are written, and bash takes its own", || {
        for shell in ["bash", "zsh", "fish"] {
            let script = world.catalyst(&["completion", shell]);
            assert!(script.ok().contains("vmpower"), "{shell}");
        }
        let script = world.path("completion");
        fs::write(&script, world.catalyst(&["completion", "bash"]).ok()).unwrap();
        catalyst_tests::world::run(world.command("bash").arg("-n").arg(&script));
    });
    checks.check("lines for people go to stderr, ids alone to stdout", || {
        let made = world.catalyst(&["vm", "create", "web1"]);
        let vmx = world.vm_dir("web1").join("web1.vmx");
        assert_eq!(made.ok(), "");
        let (parent, path) = (world.images.join("lumen"), vmx.display());
        assert_eq!(made.stderr.trim(), format!("Info: Cloned VM from '{}' to '{path}'", parent.display()));
        let on = world.catalyst(&["vmpower", "on", "web1"]);
        assert_eq!(on.stderr.trim(), format!("Info: Completed power op 'on' for VM at '{path}'"));
        world.catalyst(&["vm", "delete", "-f", "web1"]).ok();
    });
}

fn events(checks: &mut Checks, world: &World) {
    checks.check("events: created, each state, deleted, in order, and those of one VM alone", || {
        let listen = |words: &[&str]| {
            let mut command = world.catalyst_command(words);
            let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
            let (sender, lines) = mpsc::channel();
            let stdout = BufReader::new(child.stdout.take().unwrap());
            std::thread::spawn(move || {
                for line in stdout.lines().map_while(Result::ok) {
                    if sender.send(line).is_err() {
                        return;
                    }
                }
            });
            (Listener(child), lines)
        };
        let (_all, all) = listen(&["events", "--json"]);
        let (_one, one) = listen(&["events", "--json", "--vm", "web2"]);
        // Both listen once they tell of something that was made for it.
        let mut tries = 0..200;
        while all.try_recv().is_err() {
            assert!(tries.next().is_some(), "no events come");
            create(world, "probe");
            world.catalyst(&["vm", "delete", "probe"]).ok();
        }
        let mut tries = 0..200;
        while one.try_recv().is_err() {
            assert!(tries.next().is_some(), "no events come");
            create(world, "web2");
            world.catalyst(&["vm", "delete", "web2"]).ok();
        }
        create(world, "web1");
        power(world, "web1", "on");
        power(world, "web1", "off");
        world.catalyst(&["vm", "delete", "web1"]).ok();
        create(world, "last");
        let mut seen = Vec::new();
        loop {
            let line = all.recv_timeout(HANG).expect("an event");
            let event: Value = serde_json::from_str(&line).unwrap();
            assert!(event["at_ms"].as_u64().unwrap() > 1_600_000_000_000);
            let kind = event["type"].as_str().unwrap();
            match event["id"].as_str() {
                Some("web1") if kind == "vm_state" => seen.push(event["state"].as_str().unwrap().to_owned()),
                Some("web1") if kind != "vm_guest" => seen.push(kind.to_owned()),
                Some("last") => break,
                _ => {}
            }
        }
        assert_eq!(seen, ["vm_created", "powering on", "powered on", "powered off", "vm_deleted"]);
        create(world, "web2");
        world.catalyst(&["vm", "delete", "web2", "last"]).ok();
        let line = one.recv_timeout(HANG).expect("an event");
        assert!(line.contains("web2"), "{line}");
        assert!(one.try_iter().all(|line| line.contains("web2")));
    });
}

struct Listener(std::process::Child);

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn real() {
    if !image_dir().join("lumen/current").exists() {
        skip(format!("no image in {}: make image", image_dir().display()));
    }
    let world = World::new();
    world.catalyst(&["image", "verify"]).ok();
    assert_eq!(check(&world, "image")["status"], "ok");
    let size = json(&world, &["image", "show"])[0]["allocated_bytes"].as_u64().unwrap();
    assert!(size <= 700 << 20, "{size} bytes");
}
