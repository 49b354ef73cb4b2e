//! Daemons and VMs that end without warning, disks that fill, many things at once.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use catalyst_tests::world::{HANG, ran, vm_name};
use catalyst_tests::{Checks, World};
use nix::sys::signal::Signal;

use crate::common::{
    Room, create, healthy, legacy_error, lives, power, quiet, running, settled, signal, try_power,
    try_signal, v1_error, vm, vm_processes, wait_until, within,
};

/// The group.
pub fn crash(checks: &mut Checks) {
    let mut world = running();
    daemon_killed(checks, &mut world);
    killed_while_powering_on(checks, &mut world);
    killed_while_creating(checks, &mut world);
    checks.check("no daemon panicked", || healthy(&world));
    drop(world);
    let mut world = running();
    vm_killed(checks, &world);
    at_once(checks, &world);
    stopped(checks, &mut world);
    folders(checks, &mut world);
    checks.check("a thousand VMs in the store are listed", thousand);
    checks.check("the daemon is well", || healthy(&world));
}

fn daemon_killed(checks: &mut Checks, world: &mut World) {
    checks.check("kill -9 of the daemon: VMs run on, the next one shows and ends them", || {
        for id in ["web1", "web2", "web3"] {
            create(world, id);
        }
        for id in ["web1", "web2"] {
            power(world, id, "on");
        }
        power(world, "web2", "pause");
        let pids = [world.vm_pid("web1").unwrap(), world.vm_pid("web2").unwrap()];
        let before = vm(world, "web1");
        for _ in 0..2 {
            world.kill_daemon();
            assert!(pids.iter().all(|pid| lives(*pid)));
            world.start_daemon();
            world.wait_for_state("web1", "powered on", HANG);
            world.wait_for_state("web2", "paused", HANG);
        }
        let after = vm(world, "web1");
        for key in ["pid", "started", "mac", "address", "state"] {
            assert_eq!(before[key], after[key], "{key}");
        }
        assert_eq!(vm(world, "web3")["state"], "powered off");
        // One that was on stays one process.
        power(world, "web1", "on");
        power(world, "web2", "unpause");
        assert_eq!(vm_processes(world).len(), 2);
        power(world, "web1", "off");
        world.catalyst(&["vm", "delete", "--force", "web2"]).ok();
        assert!(pids.iter().all(|pid| !lives(*pid)));
        assert!(!world.vm_dir("web2").exists());
    });
    checks.check("a VM process that hangs holds up no start, and can be powered off", || {
        power(world, "web1", "on");
        power(world, "web3", "on");
        let pid = world.vm_pid("web1").unwrap();
        signal(pid, Signal::SIGSTOP);
        world.kill_daemon();
        world.start_daemon();
        world.wait_for_state("web3", "powered on", HANG);
        // Taken in order: after the attempt to speak to it.
        power(world, "web1", "off");
        assert!(!lives(pid));
        power(world, "web1", "on");
        let pid = world.vm_pid("web1").unwrap();
        signal(pid, Signal::SIGSTOP);
        power(world, "web1", "off");
        power(world, "web3", "off");
        assert!(vm_processes(world).is_empty());
    });
    checks.check("a VM that ends while no daemon runs is powered off for the next", || {
        power(world, "web1", "on");
        let pid = world.vm_pid("web1").unwrap();
        world.kill_daemon();
        signal(pid, Signal::SIGKILL);
        wait_until("it ends", HANG, || !lives(pid));
        world.start_daemon();
        world.wait_for_state("web1", "powered off", HANG);
        assert_eq!(world.vm_pid("web1"), None);
        power(world, "web1", "on");
        power(world, "web1", "off");
    });
}

fn killed_while_powering_on(checks: &mut Checks, world: &mut World) {
    checks.check("kill -9 at any moment of a power-on: on with its process, or off with none", || {
        let started = Instant::now();
        power(world, "web1", "on");
        let took = started.elapsed();
        power(world, "web1", "off");
        let (mut on, mut off) = (0, 0);
        for moment in 0..16 {
            let asked = ask(world, "POST", "/v1/vms/web1/power", "{\"op\":\"on\"}");
            // From before it begins to after its end.
            std::thread::sleep(took * moment / 12);
            world.kill_daemon();
            drop(asked);
            world.start_daemon();
            let state = settled(world, "web1");
            let pids: Vec<u32> = vm_processes(world).iter().map(|(pid, _)| *pid).collect();
            assert!(state == "powered on" || state == "powered off", "moment {moment}: {state}");
            if state == "powered on" {
                on += 1;
                assert_eq!(pids, [world.vm_pid("web1").unwrap()], "moment {moment}");
            } else {
                off += 1;
                assert!(pids.is_empty(), "moment {moment}: {pids:?}");
            }
            power(world, "web1", "on");
            power(world, "web1", "off");
            assert!(vm_processes(world).is_empty(), "moment {moment}");
        }
        println!("  killed 16 times while powering on: {on} were on after that, {off} off");
    });
}

fn killed_while_creating(checks: &mut Checks, world: &mut World) {
    checks.check("kill -9 at any moment of a create: the VM is whole or is not there", || {
        let mut whole = 0;
        for moment in 0..24 {
            let id = format!("made{moment}");
            let asked = ask(world, "POST", "/v1/vms", &format!("{{\"id\":\"{id}\",\"memory_mib\":128}}"));
            std::thread::sleep(Duration::from_millis(2 * moment));
            world.kill_daemon();
            drop(asked);
            world.start_daemon();
            assert_eq!(asides(world), [""; 0], "moment {moment}");
            if world.curl("GET", &format!("/v1/vms/{id}"), None).status == 200 {
                whole += 1;
                power(world, &id, "on");
                power(world, &id, "off");
                world.catalyst(&["vm", "delete", &id]).ok();
            }
            assert!(!world.vm_dir(&id).exists(), "moment {moment}");
            // What the interrupted create held is free.
            create(world, &id);
            world.catalyst(&["vm", "delete", &id]).ok();
        }
        println!("  killed 24 times while creating: {whole} were whole after that, {} absent", 24 - whole);
    });
    checks.check("kill -9 at any moment of a delete: the VM is whole or is gone", || {
        for moment in 0..8 {
            let id = format!("gone{moment}");
            create(world, &id);
            let asked = ask(world, "DELETE", &format!("/v1/vms/{id}"), "");
            std::thread::sleep(Duration::from_millis(moment));
            world.kill_daemon();
            drop(asked);
            world.start_daemon();
            assert_eq!(asides(world), [""; 0], "moment {moment}");
            if world.curl("GET", &format!("/v1/vms/{id}"), None).status == 200 {
                power(world, &id, "on");
                world.catalyst(&["vm", "delete", "--force", &id]).ok();
            }
            assert!(!world.vm_dir(&id).exists(), "moment {moment}");
        }
    });
}

/// Sends a request without waiting for its answer. By the Unix socket: no program needs to start
/// first, so the moment is known.
fn ask(world: &World, method: &str, path: &str, body: &str) -> UnixStream {
    let mut stream = UnixStream::connect(world.state_dir().join("catalyst.sock")).unwrap();
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all((head + body).as_bytes()).unwrap();
    stream
}

/// Folders that are being made or removed.
fn asides(world: &World) -> Vec<String> {
    let entries = fs::read_dir(world.state_dir().join("vms")).unwrap().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with('.'))
        .collect()
}

fn vm_killed(checks: &mut Checks, world: &World) {
    checks.check("kill -9 of a VM: powered off within a second, with the reason", || {
        create(world, "web1");
        within(Duration::from_secs(1), || {
            power(world, "web1", "on");
            let pid = world.vm_pid("web1").unwrap();
            let killed = Instant::now();
            signal(pid, Signal::SIGKILL);
            world.wait_for_state("web1", "powered off", HANG);
            killed.elapsed()
        });
        let shown = world.catalyst(&["vm", "show", "web1"]).ok().to_owned();
        assert!(shown.contains("powered off") && shown.contains("signal 9"), "{shown}");
        power(world, "web1", "on");
        assert!(vm(world, "web1")["reason"].is_null());
        power(world, "web1", "off");
    });
    checks.check("a VM that is killed while it powers on is off with the reason", || {
        for delay in [0, 20, 60] {
            std::thread::scope(|scope| {
                let asked = scope.spawn(|| try_power(world, "web1", "on"));
                wait_until("its process is there", HANG, || {
                    !vm_processes(world).is_empty() || asked.is_finished()
                });
                std::thread::sleep(Duration::from_millis(delay));
                for (pid, _) in vm_processes(world) {
                    try_signal(pid, Signal::SIGKILL);
                }
                asked.join().unwrap();
            });
            world.wait_for_state("web1", "powered off", HANG);
            assert!(vm(world, "web1")["reason"].is_string());
            assert!(vm_processes(world).is_empty());
        }
    });
    checks.check("dnsmasq that is killed comes back", || {
        power(world, "web1", "on");
        let pid = || world.curl("GET", "/v1/network", None).json()["dnsmasq_pid"].as_u64();
        let first = pid().expect("it runs");
        signal(u32::try_from(first).unwrap(), Signal::SIGKILL);
        wait_until("another runs", HANG, || {
            pid().is_some_and(|now| now != first && lives(u32::try_from(now).unwrap()))
        });
        power(world, "web1", "off");
    });
}

fn at_once(checks: &mut Checks, world: &World) {
    checks.check("eight creates of one id at once: one wins, the others get the conflict", || {
        for round in 0..3 {
            let body = format!("{{\"id\":\"same{round}\",\"memory_mib\":128}}");
            let answers: Vec<_> = std::thread::scope(|scope| {
                let asked: Vec<_> =
                    (0..8).map(|_| scope.spawn(|| world.curl("POST", "/v1/vms", Some(&body)))).collect();
                asked.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(answers.iter().filter(|answer| answer.status == 201).count(), 1, "{answers:?}");
            for answer in answers.iter().filter(|answer| answer.status != 201) {
                v1_error(answer, "vm_exists");
            }
            world.catalyst(&["vm", "delete", &format!("same{round}")]).ok();
        }
    });
    checks.check("of eight who delete one VM at once one does, and to the others it is not there", || {
        for on in [false, true] {
            create(world, "same");
            if on {
                power(world, "same", "on");
            }
            let delete = || world.curl("DELETE", "/v1/vms/same?force=true", None);
            let answers: Vec<_> = std::thread::scope(|scope| {
                let asked: Vec<_> = (0..8).map(|_| scope.spawn(delete)).collect();
                asked.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(answers.iter().filter(|answer| answer.status == 204).count(), 1, "{answers:?}");
            for answer in answers.iter().filter(|answer| answer.status != 204) {
                v1_error(answer, "vm_not_found");
            }
        }
    });
    checks.check("ten creates and power-ons at once: addresses and MACs of their own", || {
        let ids: Vec<String> = (0..10).map(|number| format!("ten{number}")).collect();
        std::thread::scope(|scope| {
            for id in &ids {
                scope.spawn(|| {
                    create(world, id);
                    power(world, id, "on");
                });
            }
        });
        let vms: Vec<_> = ids.iter().map(|id| vm(world, id)).collect();
        for key in ["mac", "address", "pid"] {
            let values: BTreeSet<String> = vms.iter().map(|vm| vm[key].to_string()).collect();
            assert_eq!(values.len(), 10, "{key}: {values:?}");
        }
        assert!(vms.iter().all(|vm| vm["state"] == "powered on"));
        let words: Vec<&str> = ["vmpower", "off"].into_iter().chain(ids.iter().map(String::as_str)).collect();
        world.catalyst(&words).ok();
        let words: Vec<&str> = ["vm", "delete"].into_iter().chain(ids.iter().map(String::as_str)).collect();
        world.catalyst(&words).ok();
        assert!(vm_processes(world).is_empty());
    });
    checks.check("on, off, delete and create of one VM in a tangle leave it whole or absent", || {
        std::thread::scope(|scope| {
            for word in ["on", "off", "pause", "unpause"] {
                scope.spawn(move || (0..6).for_each(|_| drop(try_power(world, "tangle", word))));
            }
            scope.spawn(|| {
                for _ in 0..4 {
                    world.curl("POST", "/v1/vms", Some("{\"id\":\"tangle\",\"memory_mib\":128}"));
                    world.curl("DELETE", "/v1/vms/tangle?force=true", None);
                }
            });
        });
        world.curl("DELETE", "/v1/vms/tangle?force=true", None);
        assert!(!world.vm_dir("tangle").exists());
        assert!(vm_processes(world).iter().all(|(_, name)| name != "tangle"));
        healthy(world);
    });
    checks.check("a create whose client leaves makes the whole VM or none", || {
        for (number, limit) in ["0.001", "0.005", "0.01", "0.02", "0.04"].iter().enumerate() {
            let body = format!("{{\"id\":\"left{number}\",\"memory_mib\":128}}");
            world.curl_with(&["-X", "POST", "-m", limit], "/v1/vms", Some(body.as_bytes()));
        }
        wait_until("nothing is being made", HANG, || asides(world).is_empty());
        for number in 0..5 {
            let id = format!("left{number}");
            if world.curl("GET", &format!("/v1/vms/{id}"), None).status == 200 {
                power(world, &id, "on");
                world.catalyst(&["vm", "delete", "-f", &id]).ok();
            }
            wait_until("it is whole or absent", HANG, || {
                world.curl("DELETE", &format!("/v1/vms/{id}"), None);
                !world.vm_dir(&id).exists()
            });
        }
    });
}

fn stopped(checks: &mut Checks, world: &mut World) {
    checks.check("SIGTERM ends the daemon with 0 within 5 s, an open event stream too; VMs run on", || {
        power(world, "web1", "on");
        let pid = world.vm_pid("web1").unwrap();
        within(Duration::from_secs(5), || {
            let mut listener = world.command("curl");
            listener.args(["-sN", "http://localhost:8080/v1/events"]).stdout(Stdio::piped());
            let mut listener = listener.spawn().unwrap();
            let mut first = [0_u8; 5];
            listener.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
            let started = Instant::now();
            let status = world.stop_daemon();
            let took = started.elapsed();
            listener.wait().unwrap();
            assert_eq!(status.code(), Some(0));
            assert!(lives(pid));
            world.start_daemon();
            world.wait_for_state("web1", "powered on", HANG);
            assert_eq!(world.vm_pid("web1"), Some(pid));
            took
        });
    });
    checks.check("catalyst daemon stop ends it too, and VMs run on", || {
        let pid = world.vm_pid("web1").unwrap();
        world.host = Some("localhost:8080".into());
        // Without clients there is nothing to wait for: the grace for them is 3 s.
        within(Duration::from_millis(2500), || {
            world.kill_daemon();
            world.start_daemon();
            world.wait_for_state("web1", "powered on", HANG);
            let daemon = world.daemon_pid();
            let started = Instant::now();
            world.catalyst(&["daemon", "stop"]).ok();
            let took = started.elapsed();
            assert!(!lives(daemon) && lives(pid));
            took
        });
        let text = world.catalyst(&["daemon", "status"]).error(1).to_owned();
        assert!(text.contains("localhost:8080"), "{text}");
        world.catalyst(&["daemon", "stop"]).error(1);
        world.host = None;
        world.kill_daemon();
        world.start_daemon();
        world.wait_for_state("web1", "powered on", HANG);
        power(world, "web1", "off");
    });
}

fn folders(checks: &mut Checks, world: &mut World) {
    checks.check("a second daemon on one state folder is refused by name", || {
        let mut command = world.daemon_command();
        command.args(["--listen", "localhost:8099", "--state-dir"]).arg(world.state_dir());
        command.arg("--image-dir").arg(&world.images);
        let refused = ran(command);
        let text = refused.error(1);
        let state = world.state_dir().display().to_string();
        assert!(text.contains(&state) && text.contains(&world.daemon_pid().to_string()), "{text}");
    });
    checks.check("a VM's folder that was moved in is there at the next start, one moved out is not", || {
        create(world, "mover");
        world.stop_daemon();
        let (from, aside) = (world.vm_dir("mover"), world.path("mover"));
        fs::rename(&from, &aside).unwrap();
        world.start_daemon();
        assert_eq!(world.curl("GET", "/v1/vms/mover", None).status, 404);
        world.stop_daemon();
        let to = world.vm_dir("moved");
        fs::rename(&aside, &to).unwrap();
        fs::rename(to.join("mover.vmx"), to.join("moved.vmx")).unwrap();
        fs::create_dir(world.state_dir().join("vms/foreign")).unwrap();
        fs::write(world.state_dir().join("vms/stray"), "file").unwrap();
        world.start_daemon();
        power(world, "moved", "on");
        assert_eq!(vm_name(world.vm_pid("moved").unwrap()).unwrap(), "moved");
        world.catalyst(&["vm", "delete", "-f", "moved"]).ok();
        assert!(
            world.state_dir().join("vms/foreign").exists() && world.state_dir().join("vms/stray").exists()
        );
    });
    checks.check("state that is not what it was: garbage is told or left aside, never fatal", || {
        let socket = world.state_dir().join("catalyst.sock");
        assert!(socket.exists());
        world.kill_daemon();
        fs::write(world.vm_dir("web1").join("run/lock"), "99999999999\ngarbage").unwrap();
        fs::write(world.vm_dir("web1").join("reason"), [0xff, 0, 0xfe]).unwrap();
        fs::write(world.vm_dir("web1").join("identity.json"), "{").unwrap();
        world.start_daemon();
        assert_eq!(vm(world, "web1")["state"], "powered off");
        let text = world.catalyst(&["vmpower", "on", "web1"]).error(1).to_owned();
        assert!(text.contains("identity.json"), "{text}");
        fs::remove_file(world.vm_dir("web1").join("identity.json")).unwrap();
        power(world, "web1", "on");
        power(world, "web1", "off");
    });
}

fn thousand() {
    let mut world = quiet();
    let vms = world.state_dir().join("vms");
    for number in 0..1000 {
        let folder = vms.join(format!("vm{number:04}"));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("vm{number:04}.vmx")), "memsize = \"256\"\nnumvcpus = \"1\"\n")
            .unwrap();
    }
    world.start_daemon();
    within(Duration::from_secs(5), || {
        let started = Instant::now();
        let answer = world.curl("GET", "/api/vms", None);
        let took = started.elapsed();
        assert_eq!(answer.json().as_array().unwrap().len(), 1000);
        took
    });
    let vms = world.curl("GET", "/v1/vms", None).json();
    let addresses: BTreeSet<String> =
        vms.as_array().unwrap().iter().map(|vm| vm["address"].to_string()).collect();
    assert_eq!(addresses.len(), 1000);
    healthy(&world);
}

/// The group: a state folder on a file system that is full.
pub fn disk_full(checks: &mut Checks) {
    checks.check("a full disk: create and set name the path and lose nothing; with room all goes on", || {
        let mut world = quiet();
        let state = world.state_dir();
        fs::create_dir(&state).unwrap();
        let _mounted = Room::in_memory(&state, "4m");
        world.start_daemon();
        create(&world, "web1");
        let before = vm(&world, "web1");
        let ballast = state.join("ballast");
        let _ = fs::write(&ballast, vec![1_u8; 64 << 20]);
        let text = world.catalyst(&["vm", "create", "web2"]).error(1).to_owned();
        assert!(text.contains(&state.display().to_string()) && text.contains("space"), "{text}");
        v1_error(&world.curl("POST", "/v1/vms", Some("{\"id\":\"web2\"}")), "disk_full");
        legacy_error(&world.curl("POST", "/api/vms", Some("{\"id\":\"web2\"}")), &[500]);
        legacy_error(
            &world.curl("POST", "/api/vms", Some("{\"id\":\"web2\",\"parentId\":\"web1\"}")),
            &[500],
        );
        assert_eq!(asides(&world), [""; 0]);
        let text = world.catalyst(&["vm", "set", "web1", "--cpus", "2"]).error(1).to_owned();
        assert!(text.contains("web1.vmx"), "{text}");
        assert_eq!(vm(&world, "web1"), before);
        // A power-on may fail, but only with a word.
        let on = try_power(&world, "web1", "on");
        if on.status != 200 {
            assert!(!on.json()["message"].as_str().unwrap().is_empty());
        }
        world.kill_daemon();
        world.start_daemon();
        assert_eq!(vm(&world, "web1")["address"], before["address"]);
        fs::remove_file(&ballast).unwrap();
        create(&world, "web2");
        power(&world, "web1", "on");
        power(&world, "web2", "on");
        world.catalyst(&["vmpower", "off", "web1", "web2"]).ok();
        healthy(&world);
    });
}
