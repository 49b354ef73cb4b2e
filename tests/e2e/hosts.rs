//! Hosts that lack something: the daemon or the operation says what and what to do.

use std::ffi::OsString;
use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use catalyst_tests::world::{HANG, Ran, engine, programs, ran};
use catalyst_tests::{Checks, World, skip};

use crate::common::{create, healthy, legacy_error, power, quiet, try_power, v1_error, wait_until};

/// A user without privileges.
const NOBODY: &str = "65534";

/// The group.
pub fn hosts(checks: &mut Checks) {
    checks.check("no QEMU: the VM does not start, says the remedy, and the rest goes on", || {
        if engine() == "kvm" {
            skip("engine kvm does without it");
        }
        without_programs(&["qemu-system-x86_64"], |world| {
            create(world, "web1");
            let text = world.catalyst(&["vmpower", "on", "web1"]).error(1).to_owned();
            assert!(text.contains("qemu-system-x86") && text.contains("apt-get install"), "{text}");
            v1_error(&try_power(world, "web1", "on"), "host_unfit");
            legacy_error(&world.curl("PATCH", "/api/vms/power/web1", Some("on")), &[503]);
            assert_eq!(doctor_status(world, "QEMU"), "missing");
        });
    });
    checks.check("no qemu-img: create says the remedy and leaves nothing", || {
        without_programs(&["qemu-img"], |world| {
            let text = world.catalyst(&["vm", "create", "web1"]).error(1).to_owned();
            assert!(text.contains("qemu-img") && text.contains("apt-get install"), "{text}");
            v1_error(&world.curl("POST", "/v1/vms", Some("{\"id\":\"web1\"}")), "host_unfit");
            assert_eq!(fs::read_dir(world.state_dir().join("vms")).unwrap().count(), 0);
            assert_eq!(doctor_status(world, "qemu-img"), "missing");
        });
    });
    checks.check("no dnsmasq and no nft: power-on says the remedy", || {
        for (program, check) in [("dnsmasq", "dnsmasq"), ("nft", "nftables")] {
            hidden(&format!("/usr/sbin/{program}"), |world| {
                create(world, "web1");
                let text = world.catalyst(&["vmpower", "on", "web1"]).error(1).to_owned();
                assert!(text.contains(program) && text.contains("apt"), "{text}");
                v1_error(&try_power(world, "web1", "on"), "host_unfit");
                assert_eq!(doctor_status(world, check), "missing");
            });
        }
    });
    checks.check("no /dev/net/tun: power-on says the remedy", no_tun);
    checks.check("no usable KVM: engine kvm is refused with the reason, and measured it is qemu", no_kvm);
    checks.check("no catalyst-vmm: engine kvm is refused, and measured it is qemu", no_monitor);
    checks.check("a taken port is named with who holds it", taken_port);
    checks.check("only loopback is listened on", || {
        let world = quiet();
        for listen in
            ["0.0.0.0:8080", "[::]:8080", "192.0.2.1:8080", "8080", "", "nonsense", "localhost:99999"]
        {
            let mut command = world.daemon_command();
            command.args(["--listen", listen, "--state-dir"]).arg(world.state_dir());
            let refused = ran(command);
            refused.error(if refused.code() == 2 { 2 } else { 1 });
        }
    });
    checks.check("without root the daemon names sudo, in one line", || {
        let world = quiet();
        let refused = as_nobody(&world, &programs().join("catalyst-daemon"), &[]);
        let text = refused.error(1);
        assert!(text.contains("sudo ") && text.contains("catalyst-daemon"), "{text}");
    });
    checks.check("a CLI without root that finds no daemon prints the one sudo command", || {
        let world = quiet();
        let refused = as_nobody(&world, &programs().join("catalyst"), &["vm", "list"]);
        let text = refused.error(1);
        assert!(text.contains("sudo ") && text.contains("catalyst-daemon --background --owner"), "{text}");
        let stopped = as_nobody(&world, &programs().join("catalyst"), &["daemon", "status"]);
        stopped.error(1);
    });
    checks.check("wrong flags of the daemon are told", || {
        let world = quiet();
        for words in [
            &["--owner", "no-such-user"][..],
            &["--bridge", "much-too-long-a-name-for-a-bridge"],
            &["--bridge", "a/b"],
            &["--log", "=,=,"],
            &["--state-dir", "/dev/null/x"],
        ] {
            let mut command = world.daemon_command();
            if words[0] != "--state-dir" {
                command.arg("--state-dir").arg(world.state_dir());
            }
            let refused = ran({
                command.arg("--image-dir").arg(&world.images).args(words);
                command
            });
            refused.error(1);
        }
    });
}

fn doctor_status(world: &World, name: &str) -> String {
    let report: serde_json::Value =
        serde_json::from_str(&world.catalyst(&["doctor", "--json"]).stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let found = checks.iter().find(|check| check["name"] == name).unwrap();
    assert!(found["status"] != "missing" || found["remedy"].is_string(), "{found}");
    found["status"].as_str().unwrap().to_owned()
}

/// A world whose daemon finds all programs of the system but `missing`.
fn without_programs(missing: &[&str], test: impl FnOnce(&World)) {
    let mut world = quiet();
    let folder = world.path("bin");
    fs::create_dir(&folder).unwrap();
    for place in ["/usr/sbin", "/usr/bin"] {
        for entry in fs::read_dir(place).unwrap().flatten() {
            let name = entry.file_name();
            if !missing.iter().any(|missing| *missing == name) {
                // The first folder of the two wins, as in PATH.
                let _ = std::os::unix::fs::symlink(entry.path(), folder.join(name));
            }
        }
    }
    let mut path = OsString::from("PATH=");
    path.push(&folder);
    world.wrapper = vec!["env".into(), path];
    world.start_daemon();
    test(&world);
    healthy(&world);
}

/// A world whose daemon sees no program at `path`: the network's programs are not looked for in PATH.
fn hidden(path: &str, test: impl FnOnce(&World)) {
    let mut world = quiet();
    let hide = format!("mount --bind /dev/null {path} && exec \"$@\"");
    world.wrapper = ["unshare", "--mount", "sh", "-c", &hide, "sh"].map(OsString::from).to_vec();
    world.start_daemon();
    test(&world);
    healthy(&world);
}

fn no_tun() {
    let mut world = quiet();
    let hide = "mount -t tmpfs none /dev/net && exec \"$@\"";
    world.wrapper = ["unshare", "--mount", "sh", "-c", hide, "sh"].map(OsString::from).to_vec();
    world.start_daemon();
    create(&world, "web1");
    let text = world.catalyst(&["vmpower", "on", "web1"]).error(1).to_owned();
    assert!(text.contains("/dev/net/tun") && text.contains("modprobe tun"), "{text}");
    v1_error(&try_power(&world, "web1", "on"), "host_unfit");
    legacy_error(&world.curl("PATCH", "/api/vms/power/web1", Some("on")), &[503]);
    assert_eq!(doctor_status(&world, "TUN"), "missing");
    healthy(&world);
    // With it, all is well again.
    world.stop_daemon();
    world.wrapper.clear();
    world.start_daemon();
    power(&world, "web1", "on");
    power(&world, "web1", "off");
}

/// Starts a daemon that is refused engine kvm, then one that measures; the refusal, and the second's reason.
fn refused_and_measured(mut world: World) -> (String, String) {
    let mut command = world.daemon_command();
    command.arg("--state-dir").arg(world.state_dir()).arg("--image-dir").arg(&world.images);
    command.args(["--engine", "kvm"]);
    let refused = ran(command).error(1).to_owned();
    assert!(refused.contains("catalyst doctor"), "{refused}");
    world.start_daemon_with(&["--engine", "auto"]);
    let report = world.curl("GET", "/v1/doctor", None).json();
    assert_eq!(report["engine"], "qemu");
    assert_eq!(doctor_status(&world, "KVM"), "degraded");
    create(&world, "web1");
    assert_eq!(world.curl("GET", "/v1/vms/web1", None).json()["engine"], "qemu");
    healthy(&world);
    (refused, report["engine_reason"].as_str().unwrap().to_owned())
}

fn no_kvm() {
    let mut world = quiet();
    let hide = "[ ! -e /dev/kvm ] || mount --bind /dev/null /dev/kvm && exec \"$@\"";
    world.wrapper = ["unshare", "--mount", "sh", "-c", hide, "sh"].map(OsString::from).to_vec();
    let (refused, reason) = refused_and_measured(world);
    assert!(refused.contains("KVM is") || refused.contains("KVM opens"), "{refused}");
    assert!(reason.contains("KVM") && reason.contains("QEMU"), "{reason}");
}

fn no_monitor() {
    let mut world = quiet();
    // A daemon alone in its folder.
    let daemon = world.path("catalyst-daemon");
    fs::copy(programs().join("catalyst-daemon"), &daemon).unwrap();
    let path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";
    world.wrapper = ["env", path, "sh", "-c", "shift; exec \"$0\" \"$@\""].map(OsString::from).to_vec();
    world.wrapper.push(daemon.into());
    let (refused, reason) = refused_and_measured(world);
    assert!(refused.contains("catalyst-vmm"), "{refused}");
    assert!(reason.contains("catalyst-vmm"), "{reason}");
}

fn taken_port() {
    let world = quiet();
    let script = "import socket,sys,time\n\
        s=socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n\
        s.bind(('127.0.0.1',8080)); s.listen(); print(1, flush=True); sys.stdin.read()";
    let mut command = world.command("python3");
    command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let Ok(mut holder) = command.spawn() else { catalyst_tests::skip("python3 is needed to take the port") };
    let pid = holder.id().to_string();
    let mut first = [0_u8; 2];
    std::io::Read::read_exact(&mut holder.stdout.take().unwrap(), &mut first).unwrap();

    let mut command = world.daemon_command();
    command.arg("--state-dir").arg(world.state_dir()).arg("--image-dir").arg(&world.images);
    let refused = ran(command);
    let text = refused.error(1);
    assert!(text.contains("8080") && text.contains("python3") && text.contains(&pid), "{text}");
    assert!(text.contains("--listen"), "{text}");
    // The other program does not answer; the CLI must neither hang nor take it for a daemon.
    let mut command = world.catalyst_command(&["vm", "list"]);
    command.env("CATALYST_HOST", "localhost:8080");
    let waited = std::time::Instant::now();
    drop(holder.stdin.take());
    holder.wait().unwrap();
    let gone = ran(command);
    gone.error(1);
    assert!(waited.elapsed() < Duration::from_secs(30));
    another_program(&world);
}

/// A web server that is no daemon of ours is named, and no daemon is started beside it.
fn another_program(world: &World) {
    let mut server = world.command("python3");
    server
        .args(["-m", "http.server", "--bind", "127.0.0.1", "8080"])
        .current_dir(world.state_dir().parent().unwrap());
    let mut server = server.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until("the server listens", HANG, || world.curl("GET", "/", None).status == 200);
    let refused = world.catalyst(&["vm", "list"]);
    let _ = server.kill();
    server.wait().unwrap();
    let text = refused.error(1);
    assert!(text.contains("8080") && text.contains("python3"), "{text}");
}

/// Runs a program as a user without privileges.
fn as_nobody(world: &World, program: &std::path::Path, words: &[&str]) -> Ran {
    let mut command: Command = world.command("setpriv");
    command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--"]).arg(program).args(words);
    ran(command)
}
