//! User-data: users, keys, files, commands and a host name for a new guest, once.

use std::fs;
use std::time::Duration;

use catalyst_tests::world::patience;
use catalyst_tests::{Checks, World};

use super::common::{guest, vm, wait_until};

const LIMIT: Duration = Duration::from_mins(4);
/// A key that belongs to nobody.
const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl";

pub fn user_data(checks: &mut Checks) {
    let mut world = World::new();
    refused(checks, &world);
    world.warm();
    applied(checks, &mut world);
    not_again(checks, &world);
    cold(checks, &world);
    of_the_host(checks, &world);
}

fn write(world: &World, name: &str, text: &str) -> String {
    let path = world.path(name);
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

fn stage(world: &World, id: &str) -> String {
    vm(world, id)["set_up"]["state"].as_str().unwrap_or_default().to_owned()
}

fn refused(checks: &mut Checks, world: &World) {
    checks.check("a key that is not known is named with its line, and no VM is made", || {
        let file = write(world, "bad.yaml", "#cloud-config\nhostname: db\npackages: [nginx]\n");
        let error = world.catalyst(&["vm", "create", "bad", "--user-data", &file]).error(1).to_owned();
        assert!(
            error.contains("line 3") && error.contains("'packages'") && error.contains("runcmd"),
            "{error}"
        );
        for (text, word) in [
            ("#cloud-config\nusers:\n  - name: ann\n    shell: [x]\n", "'shell'"),
            ("#cloud-config\nwrite_files:\n  - path: motd\n", "absolute"),
            ("users: []\n", "'#cloud-config'"),
        ] {
            let file = write(world, "bad.yaml", text);
            let error = world.catalyst(&["vm", "create", "bad", "--user-data", &file]).error(1).to_owned();
            assert!(error.contains(word), "{error}");
        }
        let file = write(world, "bad.yaml", &"#".repeat(300_000));
        let error = world.catalyst(&["vm", "create", "bad", "--user-data", &file]).error(1).to_owned();
        assert!(error.contains("262144 bytes"), "{error}");
        world.catalyst(&["vm", "create", "bad", "--user-data", "/nowhere"]).error(1);
        let both = ["vm", "create", "bad", "--user-data", &file, "--from", "/x.vmx"];
        world.catalyst(&both).error(2);
        assert_eq!(world.curl("GET", "/api/vms", None).body, "[]");
    });
}

fn applied(checks: &mut Checks, world: &mut World) {
    checks.check("a fresh VM that goes on from a warm state has users, keys, files and name when it is reached", || {
        let key = world.path("ann");
        let make = ["-q", "-t", "ed25519", "-N", "", "-f"];
        catalyst_tests::world::run(std::process::Command::new("ssh-keygen").args(make).arg(&key));
        let public = fs::read_to_string(key.with_extension("pub")).unwrap();
        let text = format!(
            "#cloud-config\nhostname: db\nusers:\n  - default\n  - name: ann\n    groups: adm, builders\n    \
             sudo: ALL=(ALL) NOPASSWD:ALL\n    ssh_authorized_keys: [{}]\nssh_authorized_keys: [{KEY} me]\n\
             write_files:\n  - path: /srv/new/hello\n    content: aGVsbG8=\n    encoding: b64\n    owner: ann:adm\n    \
             permissions: 0640\n  - path: /etc/environment\n    content: \"X=1\\n\"\n    append: true\n\
             runcmd:\n  - cd /srv; V=5\n  - echo $V $(pwd) >ran\n  - until [ -e /root/go ]; do sleep 0.2; done\n  \
             - [ls, no where]\n",
            public.trim()
        );
        let file = write(world, "full.yaml", &text);
        world.catalyst(&["vm", "create", "web1", "--user-data", &file]).ok();
        assert_eq!(stage(world, "web1"), "pending");
        world.catalyst(&["vmpower", "on", "web1"]).ok();
        let address = world.catalyst(&["guest", "getip", "web1", "--wait"]).ok().to_owned();
        assert_eq!(vm(world, "web1")["start_mode"], "warm");
        assert_eq!(guest(world, "web1", "hostname; cat /srv/new/hello; stat -c %U:%G:%a /srv/new/hello"), "db\nhelloann:adm:640");
        assert_eq!(guest(world, "web1", "id -nG ann; sudo -u ann sudo id -u; tail -1 /etc/environment"), "ann adm builders\n0\nX=1");
        assert!(guest(world, "web1", "cat /home/catalyst/.ssh/authorized_keys2").contains(KEY));
        // The commands of `ssh` wait for its server; plain ssh does not.
        world.catalyst(&["ssh", "web1", "--", "true"]).ok();
        let mut ssh = world.command("ssh");
        ssh.args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]);
        ssh.arg("-i").arg(&key).arg(format!("ann@{address}")).arg("id -un");
        assert_eq!(catalyst_tests::world::ran(ssh).ok(), "ann");
        // DNS and lists know the VM by its id.
        assert_eq!(guest(world, "web1", "getent hosts web1.catalyst").split_whitespace().next(), Some(address.as_str()));
    });
    checks.check(
        "nobody waits for its commands, and a daemon that is started meanwhile hears how they end",
        || {
            assert_eq!(stage(world, "web1"), "running");
            world.kill_daemon();
            world.start_daemon();
            wait_until("the daemon knows", LIMIT, || stage(world, "web1") == "running");
            guest(world, "web1", "touch /root/go");
            wait_until("they have ended", LIMIT, || stage(world, "web1") == "failed");
            assert_eq!(guest(world, "web1", "cat /srv/ran"), "5 /srv");
            let shown = world.catalyst(&["vm", "show", "web1"]).ok().to_owned();
            assert!(shown.contains("command 4 of 4 failed: ls 'no where'"), "{shown}");
            assert!(shown.contains("cannot access 'no where'"), "{shown}");
            assert!(guest(world, "web1", "cat /var/log/catalyst-user-data.log").contains("cannot access"));
        },
    );
}

fn not_again(checks: &mut Checks, world: &World) {
    checks.check(
        "a clone has what was set up, as itself, and is not set up again; nor is a VM that boots",
        || {
            guest(world, "web1", "rm /srv/ran; sync");
            world.catalyst(&["vm", "clone", "web1", "copy"]).ok();
            assert_eq!(guest(world, "copy", "hostname; id -un ann; ls /srv"), "copy\nann\nnew");
            assert!(vm(world, "copy")["set_up"].is_null());
            world.catalyst(&["vm", "delete", "--force", "copy"]).ok();
            world.catalyst(&["vmpower", "off", "web1"]).ok();
            world.catalyst(&["vmpower", "on", "web1"]).ok();
            assert_eq!(guest(world, "web1", "hostname; id -un ann; ls /srv"), "db\nann\nnew");
            assert_eq!(stage(world, "web1"), "failed");
            world.catalyst(&["vm", "delete", "--force", "web1"]).ok();
        },
    );
}

fn cold(checks: &mut Checks, world: &World) {
    checks.check(
        "a VM that boots runs a script; a clone of one that never was on runs it too, and a snapshot of that",
        || {
            let script = b"#!/bin/sh\ncat /proc/self/oom_score_adj >/srv/script\nid -un >>/srv/script\n";
            world.catalyst_with_input(&["vm", "create", "first", "--user-data", "-"], script).ok();
            world.catalyst(&["vm", "clone", "first", "web2"]).ok();
            world.catalyst(&["vm", "snapshot", "create", "web2", "new"]).ok();
            world.catalyst(&["vmpower", "on", "--cold", "web2"]).ok();
            wait_until("it was run", LIMIT, || stage(world, "web2") == "done");
            assert_eq!(guest(world, "web2", "cat /srv/script"), "0\nroot");
            world.catalyst(&["vm", "snapshot", "restore", "web2", "new"]).ok();
            world.catalyst(&["vmpower", "on", "web2"]).ok();
            // What is known is of the disk that was; the guest says what is true of this one.
            wait_until("it was run", LIMIT, || guest(world, "web2", "cat /srv/script || true") == "0\nroot");
            assert_eq!(stage(world, "first"), "pending");
        },
    );
}

fn of_the_host(checks: &mut Checks, world: &World) {
    let gateway =
        world.curl("GET", "/v1/network", None).json()["gateway"].as_str().unwrap_or_default().to_owned();
    let create = |id: &str, proxy: &str, args: &[&str]| {
        let mut command = world.catalyst_command(&["vm", "create", id]);
        command
            .args(args)
            .env("HTTP_PROXY", proxy)
            .env("no_proxy", "intern.example")
            .env_remove("HTTPS_PROXY");
        catalyst_tests::world::ran(command)
    };
    checks.check(
        "a proxy that guests do not reach, and what is no certificate, are refused in words",
        || {
            let error = create("bad", "http://127.0.0.1:3128", &["--proxy"]).error(1).to_owned();
            assert!(error.contains("loopback alone") && error.contains(":3128"), "{error}");
            assert!(create("bad", "http://$(reboot)", &["--proxy"]).error(1).contains("http://NAME:PORT"));
            assert!(create("bad", "", &["--proxy"]).error(1).contains("no proxy"));
            let file = write(world, "bad.pem", "-----BEGIN PRIVATE KEY-----");
            assert!(create("bad", "", &["--ca", &file]).error(1).contains("private key"));
        },
    );
    checks.check("proxies and authorities of this machine are in a guest that goes on, for shells, services, apt and dockerd", || {
        let (key, pem) = (world.path("ca.key"), world.path("ca.pem"));
        let mut make = std::process::Command::new("openssl");
        make.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=Test authority"]);
        catalyst_tests::world::run(make.arg("-keyout").arg(&key).arg("-out").arg(&pem));
        // It listens on every address, so guests reach it by the bridge's.
        let mut listener = world.command("busybox");
        let mut listener = listener.args(["nc", "-ll", "-p", "3128"]).stdout(std::process::Stdio::null()).spawn().unwrap();
        wait_until("it listens", LIMIT, || {
            let mut cat = world.command("cat");
            cat.arg("/proc/net/tcp").arg("/proc/net/tcp6");
            catalyst_tests::world::ran(cat).stdout.contains(":0C38 ")
        });
        let ran = create("web3", "http://localhost:3128", &["--proxy", "--ca", pem.to_str().unwrap()]);
        let _ = listener.kill();
        let _ = listener.wait();
        ran.ok();
        world.catalyst(&["vmpower", "on", "web3"]).ok();
        wait_until("it is set up", patience(), || ["done", "failed"].contains(&stage(world, "web3").as_str()));
        assert_eq!(stage(world, "web3"), "done", "{}", vm(world, "web3"));
        let wanted = format!("HTTP_PROXY=http://{gateway}:3128");
        let shell = world.catalyst(&["ssh", "web3", "--", "env; sudo env"]).ok().to_owned();
        assert_eq!(shell.matches(&wanted).count(), 2, "{shell}");
        assert!(shell.contains("NO_PROXY=intern.example,localhost"), "{shell}");
        let service = guest(world, "web3", "systemd-run --quiet --pipe --wait env");
        assert!(service.contains(&wanted), "{service}");
        assert!(guest(world, "web3", "docker info").contains(&format!("http://{gateway}:3128")));
        assert!(guest(world, "web3", "apt-config dump").contains(&format!("http://{gateway}:3128")));
        guest(world, "web3", "openssl verify /usr/local/share/ca-certificates/catalyst-1.crt");
        guest(world, "web3", "docker run --rm busybox true");
    });
}
