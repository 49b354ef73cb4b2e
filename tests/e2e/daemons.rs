//! Several daemons on one machine, and daemons that are started by the CLI.

use std::process::Command;
use std::time::Duration;

use catalyst_tests::world::{HANG, Ran, programs, ran, vm_name};
use catalyst_tests::{Checks, World};

use crate::common::{create, lives, power, quiet, vm, wait_until};

/// Where the second daemon listens.
const SECOND: &str = "localhost:8099";
/// Where a third one does.
const THIRD: &str = "localhost:8100";

/// The group.
pub fn daemons(checks: &mut Checks) {
    two(checks);
    by_the_cli(checks);
}

/// What daemons leave in a network namespace.
#[derive(Debug, PartialEq, Eq)]
struct Traces {
    links: String,
    rules: String,
    forward: String,
    processes: Vec<String>,
}

fn traces(world: &World) -> Traces {
    let text = |words: &[&str]| {
        let output = world.command(words[0]).args(&words[1..]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let processes = text(&["ip", "netns", "pids", world.netns()]);
    Traces {
        links: text(&["ip", "-brief", "address"]),
        rules: text(&["nft", "list", "ruleset"]),
        forward: text(&["cat", "/proc/sys/net/ipv4/ip_forward"]),
        processes: processes
            .lines()
            .filter_map(|pid| {
                let name = std::fs::read_to_string(format!("/proc/{}/comm", pid.trim())).ok()?;
                let is_vm = vm_name(pid.trim().parse().ok()?).is_some();
                (name.starts_with("dnsmasq") || is_vm).then_some(name)
            })
            .collect(),
    }
}

fn network(world: &World) -> serde_json::Value {
    world.curl("GET", "/v1/network", None).json()
}

fn two(checks: &mut Checks) {
    let mut first = quiet();
    let before = traces(&first);
    first.start_daemon();
    let state = first.path("second");
    let mut second = Second::start(&first, &state, SECOND);
    let at_second = |words: &[&str]| {
        let all: Vec<&str> = words.iter().copied().chain(["--host", SECOND]).collect();
        first.catalyst(&all)
    };
    checks.check("two daemons have VMs of one id, each on a bridge and subnet of its own", || {
        create(&first, "web1");
        at_second(&["vm", "create", "web1", "--memory", "128"]).ok();
        power(&first, "web1", "on");
        at_second(&["vmpower", "on", "web1"]).ok();
        let other: serde_json::Value =
            serde_json::from_str(at_second(&["network", "show", "--json"]).ok()).unwrap();
        let own = network(&first);
        assert_eq!((&own["up"], &other["up"]), (&true.into(), &true.into()));
        assert_eq!(other["bridge"], "second0");
        assert_ne!(own["bridge"], other["bridge"]);
        assert_ne!(own["subnet"], other["subnet"]);
        let theirs: serde_json::Value =
            serde_json::from_str(at_second(&["vm", "show", "web1", "--json"]).ok()).unwrap();
        let ours = vm(&first, "web1");
        assert_ne!(ours["address"], theirs["address"]);
        assert_ne!(ours["mac"], theirs["mac"]);
        assert_ne!(ours["pid"], theirs["pid"]);
    });
    checks.check("CATALYST_HOST and --host choose the daemon", || {
        at_second(&["vm", "create", "only-here", "--memory", "128"]).ok();
        let mut command = first.catalyst_command(&["vm", "list"]);
        command.env("CATALYST_HOST", format!("http://{SECOND}"));
        assert_eq!(ran(command).ok(), "only-here\nweb1");
        assert_eq!(first.catalyst(&["vm", "list"]).ok(), "web1");
        let text = first.catalyst(&["--host", "localhost:8123", "vm", "list"]).error(1).to_owned();
        assert!(text.contains("localhost:8123"), "{text}");
        at_second(&["vm", "delete", "only-here"]).ok();
    });
    checks.check("another daemon's bridge is refused by name", || {
        let mut third = Second::start(&first, &first.path("third"), THIRD);
        let at_third = |words: &[&str]| {
            let all: Vec<&str> = words.iter().copied().chain(["--host", THIRD]).collect();
            first.catalyst(&all)
        };
        at_third(&["vm", "create", "web1", "--memory", "128"]).ok();
        let refused = at_third(&["vmpower", "on", "web1"]);
        let text = refused.error(1);
        assert!(text.contains("second0") && text.contains("--bridge"), "{text}");
        assert_eq!(network(&first)["up"], true);
        at_third(&["vm", "delete", "web1"]).ok();
        third.stop();
    });
    checks.check("network down is refused while a VM runs, and touches one daemon's alone", || {
        let text = first.catalyst(&["network", "down"]).error(1).to_owned();
        assert!(text.contains("web1"), "{text}");
        power(&first, "web1", "off");
        first.catalyst(&["network", "down"]).ok();
        assert_eq!(network(&first)["up"], false);
        let other: serde_json::Value =
            serde_json::from_str(at_second(&["network", "show", "--json"]).ok()).unwrap();
        assert_eq!(other["up"], true);
        let left = traces(&first);
        assert!(left.links.contains("second0") && left.rules.contains("table"), "{left:?}");
        assert_eq!(left.forward.trim(), "1", "the other daemon's VMs need it");
        assert_eq!(left.processes.iter().filter(|name| name.starts_with("dnsmasq")).count(), 1, "{left:?}");
        // Down twice is fine, and up again at the next power-on, as before.
        first.catalyst(&["network", "down"]).ok();
        power(&first, "web1", "on");
        assert_eq!(network(&first)["up"], true);
        power(&first, "web1", "off");
    });
    checks.check("a foreign table, link and forwarding are left as they are", || {
        let nft =
            ["add table inet theirs", "add chain inet theirs mine", "add rule inet theirs mine counter"];
        for line in nft {
            catalyst_tests::world::run(first.command("nft").arg(line));
        }
        catalyst_tests::world::run(first.command("ip").args(["link", "add", "theirs0", "type", "bridge"]));
        power(&first, "web1", "on");
        power(&first, "web1", "off");
        first.catalyst(&["network", "down"]).ok();
        let left = traces(&first);
        assert!(left.rules.contains("table inet theirs") && left.links.contains("theirs0"), "{left:?}");
        catalyst_tests::world::run(first.command("nft").arg("delete table inet theirs"));
        catalyst_tests::world::run(first.command("ip").args(["link", "delete", "theirs0"]));
    });
    checks.check("after network down of both nothing is left of either", || {
        at_second(&["vmpower", "off", "web1"]).ok();
        at_second(&["network", "down"]).ok();
        first.catalyst(&["network", "down"]).ok();
        assert_eq!(traces(&first), before);
    });
    checks.check("the network is down for good also after a daemon that was killed", || {
        power(&first, "web1", "on");
        let pid = first.vm_pid("web1").unwrap();
        first.kill_daemon();
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap()),
            nix::sys::signal::Signal::SIGKILL,
        )
        .unwrap();
        wait_until("the VM ends", HANG, || !lives(pid));
        first.start_daemon();
        first.catalyst(&["network", "down"]).ok();
        assert_eq!(traces(&first), before);
    });
    second.stop();
}

/// Another daemon, on the bridge second0.
struct Second(std::process::Child);

impl Second {
    fn start(world: &World, state: &std::path::Path, listen: &str) -> Self {
        let mut command = world.daemon_command();
        // The word that AppCatalyst's daemon was started with is tolerated.
        command.args(["start", "--listen", listen, "--bridge", "second0", "--state-dir"]).arg(state);
        command.arg("--image-dir").arg(&world.images).stderr(std::process::Stdio::null());
        let child = command.stdout(std::process::Stdio::null()).spawn().unwrap();
        wait_until("the daemon listens", HANG, || {
            world.catalyst(&["--host", listen, "daemon", "status"]).status.success()
        });
        Self(child)
    }

    fn stop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        self.stop();
    }
}

fn by_the_cli(checks: &mut Checks) {
    checks.check("daemon start, status and stop; a daemon in the background", || {
        let world = quiet();
        let state = world.state_dir().display().to_string();
        let images = world.images.display().to_string();
        let start = ["daemon", "start", "--state-dir", &state, "--", "--image-dir", &images];
        let started = Background(world.catalyst(&start), &world);
        started.0.ok();
        assert!(started.0.stderr.contains(&state), "{}", started.0.stderr);
        let status: serde_json::Value =
            serde_json::from_str(world.catalyst(&["daemon", "status", "--json"]).ok()).unwrap();
        assert_eq!(status["state_dir"], state);
        assert!(world.catalyst(&["daemon", "status"]).ok().contains("localhost:8080"));
        assert!(world.catalyst(&["version"]).ok().contains(status["version"].as_str().unwrap()));
        // Again is no error.
        let again = world.catalyst(&start);
        again.ok();
        assert!(again.stderr.contains("already"), "{}", again.stderr);
        let pid = u32::try_from(status["pid"].as_u64().unwrap()).unwrap();
        world.catalyst(&["daemon", "stop"]).ok();
        assert!(!lives(pid));
        let mut command = world.catalyst_command(&["daemon", "status"]);
        command.env("CATALYST_HOST", "localhost:8080");
        ran(command).error(1);
    });
    checks.check("--background returns when the daemon listens, or says why it does not", || {
        let world = quiet();
        let background = |words: &[&str]| {
            let mut command: Command = world.daemon_command();
            command.args(["start", "--background", "--state-dir"]).arg(world.state_dir());
            command.arg("--image-dir").arg(&world.images).args(words);
            ran(command)
        };
        let started = Background(background(&[]), &world);
        started.0.ok();
        assert_eq!(world.curl("GET", "/v1/version", None).status, 200);
        let text = background(&[]).error(1).to_owned();
        assert!(text.contains("Another daemon"), "{text}");
        let text = background(&["--listen", "192.0.2.1:80"]).error(1).to_owned();
        assert!(text.contains("192.0.2.1") || text.contains("Another daemon"), "{text}");
        drop(started);
    });
    checks.check("where nothing listens the CLI starts a daemon and says so", || {
        let world = quiet();
        let mut command = world.catalyst_command(&["vm", "list"]);
        command.env("CATALYST_STATE_DIR", world.state_dir()).env("CATALYST_IMAGE_DIR", &world.images);
        let listed = Background(ran(command), &world);
        assert_eq!(listed.0.ok(), "");
        let state = world.state_dir().display().to_string();
        assert!(listed.0.stderr.contains("Started the daemon") && listed.0.stderr.contains(&state));
        // From now on it is there.
        let again = world.catalyst(&["vm", "list"]);
        assert!(again.status.success() && !again.stderr.contains("Started"), "{again:?}");
        drop(listed);
        // Not where another daemon was named.
        let started = std::time::Instant::now();
        world.catalyst(&["--host", "localhost:8080", "vm", "list"]).error(1);
        assert!(started.elapsed() < Duration::from_secs(20));
    });
    checks.check("without the daemon's program the CLI says so", || {
        let world = quiet();
        let alone = world.path("catalyst");
        std::fs::copy(programs().join("catalyst"), &alone).unwrap();
        let mut command = world.command("env");
        command.arg("PATH=/usr/bin:/bin").arg(&alone).args(["vm", "list"]);
        let text = ran(command).error(1).to_owned();
        assert!(text.contains("catalyst-daemon") && text.contains("localhost:8080"), "{text}");
    });
}

/// A daemon in the background, stopped when this is dropped. One that does not stop ends with its world.
struct Background<'a>(Ran, &'a World);

impl Drop for Background<'_> {
    fn drop(&mut self) {
        let mut command = self.1.catalyst_command(&["daemon", "stop"]);
        command.env("CATALYST_HOST", "localhost:8080");
        let _ = ran(command);
    }
}
