//! The docker-machine driver: the real rancher-machine makes machines with it, and a real Docker client uses them over TLS.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use catalyst_tests::world::{HANG, long_enough, programs, ran};
use catalyst_tests::{Checks, Ran, World};
use serde_json::{Value, json};

use crate::common::{power, vm, wait_until};

const MACHINES: [&str; 2] = ["m1", "m2"];
/// What `ls` is asked to print of a machine.
const LINE: &str = "{{.Name}}|{{.State}}|{{.URL}}|{{.DockerVersion}}|{{.Error}}";

pub fn machine(checks: &mut Checks) {
    for name in ["docker-machine-driver-catalyst", "machine/rancher-machine"] {
        if !programs().join(name).exists() {
            catalyst_tests::skip(format!("{name} is not built: make machine-driver machine-tools"));
        }
    }
    let mut world = World::new();
    refused(checks, &world);
    failed(checks, &world);
    interrupted(checks, &world);
    created(checks, &world);
    used(checks, &world);
    powered(checks, &world);
    provisioned(checks, &world);
    gone(checks, &world);
    removed(checks, &mut world);
}

/// A command in the world that finds the driver, rancher-machine and Docker's client; machines are kept in the world's home.
fn command(world: &World, program: &str) -> Command {
    let own = programs();
    let mut path = vec![own.clone(), own.join("machine")];
    path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let mut command = world.command(program);
    command.env("PATH", std::env::join_paths(path).unwrap());
    // The user's own settings for these programs are not the tests'.
    for (name, _) in std::env::vars() {
        let foreign = ["DOCKER_", "MACHINE_", "CATALYST_"].iter().any(|prefix| name.starts_with(prefix));
        if foreign || name.to_lowercase().ends_with("_proxy") {
            command.env_remove(name);
        }
    }
    command
}

fn machine_command(world: &World, args: &[&str]) -> Ran {
    let mut command = command(world, "rancher-machine");
    command.args(args);
    ran(command)
}

fn create(world: &World, name: &str, options: &[&str]) -> Ran {
    machine_command(world, &[&["create", "-d", "catalyst"], options, &[name]].concat())
}

/// What `ls` says of a machine, as in [`LINE`].
fn listed(world: &World, name: &str) -> Vec<String> {
    let ran = machine_command(
        world,
        &["ls", "--timeout", &long_enough(), "--format", LINE, "--filter", &format!("name=^{name}$")],
    );
    ran.ok().split('|').map(str::to_owned).collect()
}

/// The words of a failed command, which must be one line without Go or HTML in it.
#[track_caller]
fn complaint(ran: &Ran, code: i32) -> String {
    assert_eq!(ran.code(), code, "{}{}", ran.stdout, ran.stderr);
    let text = ran.stderr.trim_end();
    for bad in ["\n", "panic", "goroutine", "<html", "%!"] {
        assert!(!text.contains(bad), "{text}");
    }
    text.to_owned()
}

fn ids(world: &World) -> Value {
    world.curl("GET", "/api/vms", None).json()
}

fn known(world: &World) -> String {
    machine_command(world, &["ls", "-q"]).ok().to_owned()
}

/// What is refused before anything is made.
fn refused(checks: &mut Checks, world: &World) {
    checks.check("where no daemon answers, one sentence says so, and nothing is left", || {
        let text = complaint(&create(world, "m1", &["--catalyst-url", "http://localhost:9"]), 3);
        assert!(text.contains("no Catalyst daemon answers at http://localhost:9"), "{text}");
        // A flag's variable counts as the flag.
        let mut by_variable = command(world, "rancher-machine");
        by_variable.args(["create", "-d", "catalyst", "m1"]).env("CATALYST_URL", "http://localhost:7");
        let text = complaint(&ran(by_variable), 3);
        assert!(text.contains("no Catalyst daemon answers at http://localhost:7"), "{text}");
        assert_eq!(known(world), "");
    });
    checks.check("wrong flags are refused by name", || {
        for (flag, value) in [
            ("--catalyst-url", "localhost:8080"),
            ("--catalyst-cpu-count", "0"),
            ("--catalyst-memory-size", "-5"),
            ("--catalyst-disk-size", "0"),
            ("--catalyst-ssh-user", ""),
        ] {
            let text = complaint(&create(world, "m1", &[flag, value]), 1);
            assert!(text.contains(flag), "{text}");
        }
        assert_eq!((known(world).as_str(), ids(world)), ("", json!([])));
    });
    checks.check("a name that a VM has is refused, and the VM stays", || {
        world.catalyst(&["vm", "create", "taken"]).ok();
        let text = complaint(&create(world, "taken", &[]), 3);
        assert!(text.contains("a VM 'taken' already"), "{text}");
        assert_eq!((known(world).as_str(), ids(world)), ("", json!(["taken"])));
    });
    checks.check("create --help tells every flag with its variable", || {
        let text = machine_command(world, &["create", "-d", "catalyst", "--help"]).stdout;
        for flag in ["url", "cpu-count", "memory-size", "disk-size", "template", "ssh-user", "tag"] {
            let variable = format!("$CATALYST_{}", flag.replace('-', "_").to_uppercase());
            assert!(
                text.contains(&format!("--catalyst-{flag}")) && text.contains(&variable),
                "{flag}: {text}"
            );
        }
    });
}

/// What fails while it is made.
fn failed(checks: &mut Checks, world: &World) {
    checks.check("what the daemon refuses is told in its words; no VM is left, and rm works", || {
        for (options, wanted) in [
            (&["--catalyst-cpu-count", "33"][..], "33"),
            (&["--catalyst-memory-size", "1"], "1"),
            (&["--catalyst-disk-size", "20000"], "20000"),
            (&["--catalyst-template", "nosuch"], "nosuch"),
            (&["--catalyst-tag", "a,b"], "a,b"),
        ] {
            let text = complaint(&create(world, "m1", options), 1);
            assert!(text.contains(wanted), "{text}");
            assert_eq!(ids(world), json!(["taken"]));
            machine_command(world, &["rm", "-y", "m1"]).ok();
        }
        assert_eq!(known(world), "");
    });
    checks.check("a VM that was made and cannot be used is deleted", || {
        let text = complaint(&create(world, "m1", &["--catalyst-ssh-user", "nosuch"]), 1);
        assert!(text.contains("no user \"nosuch\""), "{text}");
        assert_eq!(ids(world), json!(["taken"]));
        machine_command(world, &["rm", "-y", "m1"]).ok();
    });
}

fn interrupted(checks: &mut Checks, world: &World) {
    checks.check("rm deletes the VM of a create that was killed, and no other", || {
        let mut killed = command(world, "rancher-machine");
        killed
            .args(["create", "-d", "catalyst", "m3"])
            .process_group(0)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = killed.spawn().unwrap();
        wait_until("the VM is made", HANG, || ids(world) == json!(["m3", "taken"]));
        let group = nix::unistd::Pid::from_raw(-i32::try_from(child.id()).unwrap());
        nix::sys::signal::kill(group, nix::sys::signal::Signal::SIGKILL).unwrap();
        child.wait().unwrap();
        let saved: Value = serde_json::from_str(machine_command(world, &["inspect", "m3"]).ok()).unwrap();
        assert_eq!(saved["Driver"]["MAC"], "", "it was killed before it knew its VM");
        machine_command(world, &["rm", "-y", "m3"]).ok();
        assert_eq!((known(world).as_str(), ids(world)), ("", json!(["taken"])));
        world.catalyst(&["vm", "delete", "taken"]).ok();
    });
}

fn created(checks: &mut Checks, world: &World) {
    checks.check("two machines are made at the same time", || {
        std::thread::scope(|scope| {
            let tags = [&["--catalyst-tag", "demo"][..], &[]];
            let made = [0, 1].map(|at| scope.spawn(move || create(world, MACHINES[at], tags[at])));
            for machine in made {
                machine.join().unwrap().ok();
            }
        });
        assert_eq!(vm(world, "m1")["tags"], json!(["docker-machine", "demo"]));
        assert_eq!(vm(world, "m2")["tags"], json!(["docker-machine"]));
    });
    checks.check("ls, ip, url, status and inspect tell what the daemon tells", || {
        for name in MACHINES {
            let now = vm(world, name);
            let address = now["address"].as_str().unwrap();
            let url = format!("tcp://{address}:2376");
            let line = listed(world, name);
            assert_eq!(line[..3], [name.to_owned(), "Running".to_owned(), url.clone()]);
            assert!(line[3].starts_with('v') && line[4].is_empty(), "{line:?}");
            assert_eq!(machine_command(world, &["ip", name]).ok(), address);
            assert_eq!(machine_command(world, &["url", name]).ok(), url);
            assert_eq!(machine_command(world, &["status", name]).ok(), "Running");
            let saved: Value = serde_json::from_str(machine_command(world, &["inspect", name]).ok()).unwrap();
            assert_eq!(saved["DriverName"], "catalyst");
            let driver = &saved["Driver"];
            assert_eq!((&driver["MAC"], &driver["IPAddress"]), (&now["mac"], &now["address"]));
            assert_eq!((&driver["URL"], &driver["Memory"]), (&json!("http://localhost:8080"), &json!(1024)));
        }
    });
}

/// Runs a script with Docker's settings of a machine, as a user does.
fn with_docker(world: &World, name: &str, script: &str) -> Ran {
    let mut shell = command(world, "sh");
    shell.args(["-ec", &format!("eval \"$(rancher-machine env --shell sh {name})\"; {script}")]);
    ran(shell)
}

#[track_caller]
fn docker_works(world: &World, name: &str) {
    let script = format!("docker run --rm --env FROM={name} busybox sh -c 'echo hello from $FROM'");
    assert_eq!(with_docker(world, name, &script).ok(), format!("hello from {name}"));
}

fn used(checks: &mut Checks, world: &World) {
    checks.check("ssh logs in, passes the command's words and exit code on, and may become root", || {
        for name in MACHINES {
            assert_eq!(
                machine_command(world, &["ssh", name, "hostname; id -un; sudo id -u"]).ok(),
                format!("{name}\ncatalyst\n0")
            );
        }
        assert_ne!(machine_command(world, &["ssh", "m1", "exit 7"]).code(), 0);
    });
    checks.check("env lets a Docker client of the host run containers over TLS", || {
        let versions =
            with_docker(world, "m1", "docker version --format '{{.Client.Version}} {{.Server.Version}}'");
        println!("Docker's client and the guest's: {}", versions.ok());
        for name in MACHINES {
            docker_works(world, name);
            assert_eq!(with_docker(world, name, "docker info --format '{{.Name}}'").ok(), name);
        }
        let all = with_docker(world, "m1", "env").stdout;
        assert!(all.contains("DOCKER_TLS_VERIFY=1") && all.contains("DOCKER_MACHINE_NAME=m1"), "{all}");
    });
    checks.check("Docker serves nobody without a certificate of the machine's authority", || {
        let address = vm(world, "m1")["address"].as_str().unwrap().to_owned();
        let ask = |options: &[&str]| {
            let mut curl = command(world, "curl");
            curl.args(["-s", "-f", "--max-time", &long_enough()])
                .args(options)
                .arg(format!("https://{address}:2376/version"));
            ran(curl).code()
        };
        let folder = world.path(".docker/machine/machines/m1");
        let [ca, cert, key] =
            ["ca.pem", "cert.pem", "key.pem"].map(|name| folder.join(name).display().to_string());
        assert_eq!(ask(&["--cacert", &ca, "--cert", &cert, "--key", &key]), 0);
        assert_ne!(ask(&["--cacert", &ca]), 0);
        assert_ne!(ask(&["--insecure"]), 0);
    });
}

fn powered(checks: &mut Checks, world: &World) {
    checks.check("stop, and start with the same address, key and certificates", || {
        let address = machine_command(world, &["ip", "m1"]).ok().to_owned();
        machine_command(world, &["stop", "m1"]).ok();
        assert_eq!(vm(world, "m1")["state"], "powered off");
        assert_eq!(listed(world, "m1")[1..], ["Stopped", "", "Unknown", ""]);
        assert_ne!(machine_command(world, &["ip", "m1"]).code(), 0);
        machine_command(world, &["start", "m1"]).ok();
        assert_eq!(machine_command(world, &["ip", "m1"]).ok(), address);
        assert_eq!(machine_command(world, &["ssh", "m1", "hostname"]).ok(), "m1");
        docker_works(world, "m1");
    });
    checks.check("restart boots the guest anew", || {
        let boot =
            || machine_command(world, &["ssh", "m1", "cat /proc/sys/kernel/random/boot_id"]).ok().to_owned();
        let before = boot();
        machine_command(world, &["restart", "m1"]).ok();
        assert_ne!(boot(), before);
        docker_works(world, "m1");
    });
    checks.check("a machine that was suspended or paused goes on by start", || {
        for (op, state) in [("suspend", "Saved"), ("pause", "Paused")] {
            power(world, "m1", op);
            assert_eq!(machine_command(world, &["status", "m1"]).ok(), state);
            machine_command(world, &["start", "m1"]).ok();
            assert_eq!(machine_command(world, &["status", "m1"]).ok(), "Running");
        }
        docker_works(world, "m1");
    });
    checks.check("kill pulls the plug, and start mends it", || {
        machine_command(world, &["kill", "m1"]).ok();
        assert_eq!(vm(world, "m1")["state"], "powered off");
        machine_command(world, &["start", "m1"]).ok();
        docker_works(world, "m1");
    });
}

fn provisioned(checks: &mut Checks, world: &World) {
    checks.check("provision can be repeated", || {
        machine_command(world, &["provision", "m1"]).ok();
        docker_works(world, "m1");
    });
}

fn gone(checks: &mut Checks, world: &World) {
    checks.check("of a VM that was deleted behind its machine's back ls and status tell so", || {
        world.catalyst(&["vm", "delete", "--force", "m2"]).ok();
        let line = listed(world, "m2");
        assert_eq!(line[1], "Error");
        assert!(line[4].contains("There is no VM 'm2'"), "{line:?}");
        assert!(complaint(&machine_command(world, &["status", "m2"]), 4).contains("not found"));
        assert!(complaint(&machine_command(world, &["start", "m2"]), 1).contains("There is no VM 'm2'"));
    });
    checks.check("another VM of that name is not taken for it, and rm leaves it alone", || {
        world.catalyst(&["vm", "create", "m2", "--tag", "docker-machine"]).ok();
        assert!(listed(world, "m2")[4].contains("another one of this name"));
        machine_command(world, &["rm", "-y", "m2"]).ok();
        assert_eq!((known(world).as_str(), ids(world)), ("m1", json!(["m1", "m2"])));
        world.catalyst(&["vm", "delete", "m2"]).ok();
    });
}

fn removed(checks: &mut Checks, world: &mut World) {
    checks.check("without a daemon rm keeps the machine, and says why", || {
        world.kill_daemon();
        let text = complaint(&machine_command(world, &["rm", "-y", "m1"]), 1);
        assert!(text.contains("no Catalyst daemon answers at http://localhost:8080"), "{text}");
        assert_eq!(known(world), "m1");
        world.start_daemon();
    });
    checks.check("rm deletes the VM, its files and the machine", || {
        machine_command(world, &["rm", "-y", "m1"]).ok();
        assert_eq!((known(world).as_str(), ids(world)), ("", json!([])));
        assert!(!world.vm_dir("m1").exists() && !world.path(".docker/machine/machines/m1").exists());
    });
}
