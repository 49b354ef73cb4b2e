//! The life of one VM, from nothing to nothing, through CLI and REST.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use catalyst_tests::world::HANG;
use catalyst_tests::{Checks, World};

use super::common::within;

const VM: &str = "web1";

/// Two, unless the environment says otherwise: the lab is not to be relied on for more than one (tests/lab/README.md).
fn life_cpus() -> String {
    std::env::var("CATALYST_TEST_CPUS").unwrap_or_else(|_| "2".to_owned())
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

pub fn life(checks: &mut Checks) {
    let mut world = World::new();
    created(checks, &world);
    booted(checks, &world);
    inside(checks, &world);
    exec(checks, &world);
    by_rest(checks, &world);
    power(checks, &mut world);
    ended(checks, &world);
}

fn created(checks: &mut Checks, world: &World) {
    checks.check("create prints the original's line, on stderr", || {
        let ran = world.catalyst(&["vm", "create", VM, "--cpus", &life_cpus(), "--tag", "demo"]);
        assert_eq!(ran.ok(), "");
        let vmx = world.vm_dir(VM).join("web1.vmx");
        let end = format!("to '{}'\n", vmx.display());
        assert!(
            ran.stderr.starts_with("Info: Cloned VM from '") && ran.stderr.ends_with(&end),
            "{}",
            ran.stderr
        );
        assert!(vmx.exists());
    });
    checks.check(
        "a VM that is off has no address, no login and no commands, and says how to start it",
        || {
            for command in [&["guest", "getip", VM][..], &["ssh", VM], &["guest", "exec", VM, "--", "true"]] {
                let error = world.catalyst(command).error(1).to_owned();
                assert!(error.contains(&format!("vmpower on {VM}")), "{error}");
            }
        },
    );
}

fn booted(checks: &mut Checks, world: &World) {
    checks.check("power on, wait for SSH and Docker", || {
        let ran = world.catalyst(&["vmpower", "on", VM]);
        ran.ok();
        let line = format!(
            "Info: Completed power op 'on' for VM at '{}'\n",
            world.vm_dir(VM).join("web1.vmx").display()
        );
        assert_eq!(ran.stderr, line);
        let early = world.catalyst(&["guest", "getip", VM]);
        assert!(!early.status.success() && early.stdout.is_empty(), "an address before the guest holds it");
        world.catalyst(&["vmpower", "on", VM, "--wait", "--timeout", "280"]).ok();
        let vm = world.curl("GET", "/v1/vms/web1", None).json();
        assert_eq!(vm["guest"]["ssh"], true);
        assert_eq!(vm["guest"]["docker"], true);
    });
    checks.check("getip prints the bare address, which is the lease", || {
        let address = world.catalyst(&["guest", "getip", VM]).ok().to_owned();
        let vm = world.curl("GET", "/v1/vms/web1", None).json();
        assert_eq!(vm["address"], address.as_str());
        assert_eq!(world.catalyst(&["vm", "getip", VM]).ok(), address);
        let mut ping = world.command("ping");
        ping.args(["-c", "1", "-w", "60", &address]);
        catalyst_tests::world::ran(ping).ok();
    });
}

fn inside(checks: &mut Checks, world: &World) {
    checks.check("ssh passes arguments and the exit code through", || {
        let ran = world.catalyst(&["ssh", VM, "--", "echo", "one  two", "&&", "exit", "7"]);
        assert_eq!(ran.code(), 7, "{}", ran.stderr);
        assert_eq!(ran.stdout, "one two\n");
    });
    checks.check("ssh knows the host key: nothing is asked and nothing learned", || {
        let address = world.catalyst(&["guest", "getip", VM]).ok().to_owned();
        let ssh = world.curl("GET", "/v1/vms/web1/ssh", None).json();
        let known = world.path("known_hosts");
        let lines: Vec<&str> =
            ssh["known_hosts"].as_array().unwrap().iter().map(|l| l.as_str().unwrap()).collect();
        std::fs::write(&known, lines.join("\n") + "\n").unwrap();
        let mut command = world.command("ssh");
        command.args(["-F", "none", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes"]);
        command.arg("-o").arg(format!("UserKnownHostsFile={}", known.display()));
        command.args([
            "-i",
            ssh["key_file"].as_str().unwrap(),
            &format!("catalyst@{address}"),
            "id -un; sudo id -u",
        ]);
        assert_eq!(catalyst_tests::world::ran(command).ok(), "catalyst\n0");
    });
    checks.check("a container runs from the preloaded image, with no registry", || {
        let ran = world.catalyst(&["ssh", VM, "--", "docker run --rm busybox echo hello from a container"]);
        assert_eq!(ran.ok(), "hello from a container");
    });
    checks.check("the guest has its name, its machine-id and the daemon's clock", || {
        let before = now();
        let text = world.catalyst(&[
            "guest",
            "exec",
            VM,
            "--",
            "sh",
            "-c",
            "hostname; cat /etc/machine-id; date +%s",
        ]);
        let lines: Vec<&str> = text.ok().lines().collect();
        assert_eq!(lines[0], VM);
        let identity = std::fs::read_to_string(world.vm_dir(VM).join("identity.json")).unwrap();
        let identity: serde_json::Value = serde_json::from_str(&identity).unwrap();
        assert_eq!(identity["machine_id"], lines[1]);
        let (told, after) = (lines[2].parse::<u64>().unwrap(), now());
        assert!((before - 3..=after + 3).contains(&told), "{before} {told} {after}");
    });
    checks.check("guests resolve each other's names, and reach their gateway", || {
        let script = "getent hosts web1.catalyst && getent hosts web1 && ping -c 1 -w 60 $(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p') >/dev/null && echo reached";
        let ran = world.catalyst(&["guest", "exec", VM, "--", "sh", "-c", script]);
        let text = ran.ok();
        let address = world.catalyst(&["guest", "getip", VM]).ok().to_owned();
        // The name is in the guest's own hosts file too; asked of the name server it is the lease.
        assert!(text.ends_with("reached"), "{text}");
        let gateway = world.curl("GET", "/v1/network", None).json()["gateway"].as_str().unwrap().to_owned();
        let mut lookup = world.command("busybox");
        lookup.args(["nslookup", "web1.catalyst", &gateway]);
        assert!(catalyst_tests::world::ran(lookup).ok().contains(&address));
    });
    checks.check("apt-get update without a network ends within 5 s", || {
        let script =
            "s=$(date +%s%N); apt-get update >/dev/null 2>&1; e=$(date +%s%N); echo $(((e-s)/1000000))";
        within(Duration::from_secs(5), || {
            let ran = world.catalyst(&["guest", "exec", VM, "--", "sh", "-c", script]);
            Duration::from_millis(ran.ok().parse().unwrap())
        });
    });
    checks.check("the disk is larger than the base and dockerd is where docker-machine looks", || {
        let script =
            "df -BG --output=size / | tail -1; test -x /usr/bin/dockerd && readlink -f /usr/bin/dockerd";
        let ran = world.catalyst(&["guest", "exec", VM, "--", "sh", "-c", script]);
        let lines: Vec<&str> = ran.ok().lines().map(str::trim).collect();
        let size: u64 = lines[0].trim_end_matches('G').parse().unwrap();
        assert!((60..=64).contains(&size), "{lines:?}");
        assert_eq!(lines[1], "/usr/sbin/dockerd");
    });
}

fn exec(checks: &mut Checks, world: &World) {
    checks.check("guest exec keeps stdout, stderr and exit code apart", || {
        let ran = world.catalyst(&["guest", "exec", VM, "--", "sh", "-c", "echo out; echo err >&2; exit 3"]);
        assert_eq!((ran.code(), ran.stdout.as_str(), ran.stderr.as_str()), (3, "out\n", "err\n"));
        let ran = world.catalyst(&["guest", "exec", VM, "--", "sh", "-c", "kill -9 $$"]);
        assert_eq!(ran.code(), 137);
        world.catalyst(&["guest", "exec", VM, "--", "/no/such/program"]).error(1);
    });
    checks.check("five megabytes go in and come out unchanged", || {
        let data: Vec<u8> = (0..5_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let path = world.path("data");
        std::fs::write(&path, &data).unwrap();
        let ran = world.catalyst_with_input(&["guest", "exec", VM, "--", "sha256sum"], &data);
        let mut local = world.command("sha256sum");
        local.arg(&path);
        let local = catalyst_tests::world::ran(local);
        assert_eq!(ran.ok().split_whitespace().next(), local.ok().split_whitespace().next());
    });
    checks.check("a terminal has the size that was asked for", || {
        // script(1) gives the CLI a terminal, whose size the guest's must follow.
        let command = format!(
            "stty rows 33 cols 77; '{}' guest exec -t {VM} -- stty size",
            catalyst_tests::world::programs().join("catalyst").display()
        );
        let mut script = world.command("script");
        script.args(["-qec", &command, "/dev/null"]);
        let ran = catalyst_tests::world::ran(script);
        assert!(ran.stdout.contains("33 77"), "{}{}", ran.stdout, ran.stderr);
    });
    checks.check("a command whose client is gone is ended in the guest", || {
        let mut command = world.catalyst_command(&["guest", "exec", VM, "--", "sleep", "4242"]);
        let mut child = command.stdin(std::process::Stdio::null()).spawn().unwrap();
        let running =
            || world.catalyst(&["guest", "exec", VM, "--", "pgrep", "-xf", "sleep 4242"]).code() == 0;
        eventually("the command runs", running);
        child.kill().unwrap();
        child.wait().unwrap();
        eventually("the command is gone", || !running());
    });
}

fn by_rest(checks: &mut Checks, world: &World) {
    checks.check("the AppCatalyst paths tell state and address as old clients read them", || {
        let power = world.curl("GET", "/api/vms/power/web1", None);
        assert_eq!(power.json(), serde_json::json!({"code": 200, "message": "powered on"}));
        let address = world.catalyst(&["guest", "getip", VM]).ok().to_owned();
        let ip = world.curl("GET", "/api/vms/web1/ipaddress", None);
        assert_eq!(ip.json(), serde_json::json!({"code": 200, "message": address}));
    });
    checks.check("exec by POST answers with output and exit code, bounded in time", || {
        let body = r#"{"argv":["sh","-c","cat; exit 5"],"stdin":"hello"}"#;
        let answer = world.curl("POST", "/v1/vms/web1/exec", Some(body)).json();
        assert_eq!((answer["exit_code"].as_i64(), answer["stdout"].as_str()), (Some(5), Some("hello")));
        let slow = world.curl("POST", "/v1/vms/web1/exec", Some(r#"{"argv":["sleep","60"],"timeout_s":1}"#));
        assert!(slow.status == 504 || slow.json()["exit_code"] == 143, "{}", slow.body);
    });
    checks.check(
        "a file goes into the guest and comes back, and takes its place only when it is whole",
        || {
            let data = "line\n".repeat(100_000);
            let path = "/v1/vms/web1/files?path=/root/sent";
            let put = world.curl_with(&["-X", "PUT"], &format!("{path}&mode=0600"), Some(data.as_bytes()));
            assert_eq!(put.status, 204, "{}", put.body);
            assert_eq!(
                world.catalyst(&["guest", "exec", VM, "--", "stat", "-c", "%a %s", "/root/sent"]).ok(),
                "600 500000"
            );
            let got = world.curl("GET", path, None);
            assert!(got.status == 200 && got.body == data);
            assert_eq!(world.curl("GET", "/v1/vms/web1/files?path=/no/such", None).status, 404);
            assert_eq!(world.curl("GET", "/v1/vms/web1/files?path=relative", None).status, 400);
            assert_eq!(
                world.curl("GET", "/v1/vms/web1/files?path=/proc", None).json()["code"],
                "invalid_request"
            );
        },
    );
    checks.check("the console's log holds what the guest wrote", || {
        let log = world.catalyst(&["logs", VM]);
        assert!(!log.ok().is_empty());
        let script = "echo marker-of-the-console > /dev/ttyS0";
        world.catalyst(&["guest", "exec", VM, "--", "sh", "-c", script]).ok();
        eventually("the marker is in the log", || {
            world.catalyst(&["logs", VM]).stdout.contains("marker-of-the-console")
        });
    });
}

fn power(checks: &mut Checks, world: &mut World) {
    checks.check("the clock of a guest that runs is the host's, whatever is done to it", || {
        world.catalyst(&["guest", "exec", VM, "--", "date", "-s", "+1 hour"]).ok();
        eventually("the clock is right", || {
            let before = now();
            let told =
                world.catalyst(&["guest", "exec", VM, "--", "date", "+%s"]).ok().parse::<u64>().unwrap();
            (before - 1..=now() + 1).contains(&told)
        });
    });
    checks.check("a paused guest stands still and goes on", || {
        let before = world.catalyst(&["guest", "exec", VM, "--", "cat", "/proc/uptime"]);
        let before: f64 = before.ok().split(' ').next().unwrap().parse().unwrap();
        world.catalyst(&["vmpower", "pause", VM]).ok();
        assert_eq!(world.curl("GET", "/api/vms/power/web1", None).json()["message"], "paused");
        world.catalyst(&["guest", "getip", VM]).error(1);
        std::thread::sleep(Duration::from_secs(2));
        world.catalyst(&["vmpower", "unpause", VM]).ok();
        let after = world.catalyst(&["guest", "exec", VM, "--", "cat", "/proc/uptime"]);
        let after: f64 = after.ok().split(' ').next().unwrap().parse().unwrap();
        assert!(after > before, "{before} {after}");
    });
    checks.check("the daemon is killed and started again: the guest and its login do not notice", || {
        let script = "echo here; until [ -e /tmp/go ]; do sleep 0.2; done; echo still here";
        let mut session = world.catalyst_command(&["ssh", VM, "--", script]);
        let mut session = session.stdout(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(session.stdout.take().unwrap());
        let mut text = String::new();
        said.read_line(&mut text).unwrap();
        assert_eq!(text, "here\n");
        let pid = world.vm_pid(VM);
        world.kill_daemon();
        world.start_daemon();
        world.wait_for_state(VM, "powered on", HANG);
        assert_eq!(world.vm_pid(VM), pid);
        let ran = world.catalyst(&["guest", "exec", VM, "--", "sh", "-c", "touch /tmp/go; echo spoken with"]);
        assert_eq!(ran.ok(), "spoken with");
        said.read_to_string(&mut text).unwrap();
        assert!(session.wait().unwrap().success());
        assert_eq!(text, "here\nstill here\n");
        assert!(world.catalyst(&["guest", "getip", VM]).status.success());
    });
    checks.check("a file outlives shutdown and power on; the guest's reboot keeps name and address", || {
        let address = world.catalyst(&["guest", "getip", VM]).ok().to_owned();
        world.catalyst(&["guest", "exec", VM, "--", "sh", "-c", "echo kept > /root/kept"]).ok();
        let started = Instant::now();
        world.catalyst(&["vmpower", "shutdown", VM]).ok();
        println!("    shutdown took {:.1} s", started.elapsed().as_secs_f32());
        assert_eq!(world.curl("GET", "/api/vms/power/web1", None).json()["message"], "powered off");
        assert!(world.vm_pid(VM).is_none());
        world.catalyst(&["vmpower", "on", VM, "--wait", "--timeout", "280"]).ok();
        assert_eq!(world.catalyst(&["guest", "exec", VM, "--", "cat", "/root/kept"]).ok(), "kept");
        let boot = |world: &World| {
            world.catalyst(&[
                "guest",
                "exec",
                VM,
                "--timeout",
                "280",
                "--",
                "cat",
                "/proc/sys/kernel/random/boot_id",
            ])
        };
        let first = boot(world).ok().to_owned();
        world.catalyst(&["ssh", VM, "--", "sudo systemctl reboot"]);
        eventually("the guest has another boot_id", || boot(world).stdout.trim_end() != first);
        assert_eq!(world.catalyst(&["guest", "getip", VM, "--wait", "--timeout", "280"]).ok(), address);
        assert_eq!(world.catalyst(&["guest", "exec", VM, "--", "hostname"]).ok(), VM);
    });
}

fn ended(checks: &mut Checks, world: &World) {
    checks.check("a VM process that is killed leaves a VM that is off, and why, within a second", || {
        within(Duration::from_secs(1), || {
            world.catalyst(&["vmpower", "on", VM]).ok();
            let pid = world.vm_pid(VM).unwrap();
            let killed = Instant::now();
            super::common::signal(pid, nix::sys::signal::Signal::SIGKILL);
            world.wait_for_state(VM, "powered off", HANG);
            killed.elapsed()
        });
        assert!(world.catalyst(&["vm", "show", VM]).ok().contains("signal 9"));
    });
    checks.check("delete leaves nothing", || {
        assert!(world.catalyst(&["vm", "delete", VM]).status.success());
        assert_eq!(std::fs::read_dir(world.state_dir().join("vms")).unwrap().count(), 0);
        assert_eq!(world.curl("GET", "/api/vms", None).body, "[]");
        assert_eq!(world.curl("GET", "/api/vms/web1", None).status, 404);
    });
}

/// Waits for something that no event tells a client of.
#[track_caller]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < catalyst_tests::world::HANG, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(200));
    }
}
