//! Containers that are VMs: the real Docker daemon and its client, with the runtime `catalyst-oci`.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::Instant;

use catalyst_tests::Checks;
use catalyst_tests::docker::{Host, LIMIT, SIZE};
use catalyst_tests::world::{long_enough, ran, run};
use serde_json::json;

use crate::common::{lives, vm, wait_until};

pub fn containers(checks: &mut Checks) {
    let host = Host::new();
    runs(checks, &host);
    programs_that_are_not_there(checks, &host);
    others(checks, &host);
    ends(checks, &host);
    files(checks, &host);
    networks(checks, &host);
    limits(checks, &host);
    refusals(checks, &host);
    either_side(checks, &host);
    many(checks, &host);
    checks.check("nothing is left of all of them", || host.check_empty());
}

fn runs(checks: &mut Checks, host: &Host) {
    checks.check("a program's output, exit code and input come through", || {
        assert_eq!(host.docker(&["run", "--rm", "busybox", "echo", "hi"]).ok(), "hi");
        let both = host.docker(&["run", "--rm", "busybox", "sh", "-c", "echo out; echo err >&2; exit 7"]);
        assert_eq!((both.code(), both.stdout.as_str(), both.stderr.as_str()), (7, "out\n", "err\n"));
        let echoed =
            host.docker_with_input(&["run", "--rm", "--interactive", "busybox", "cat"], "one\ntwo\n");
        assert_eq!(echoed.ok(), "one\ntwo");
        let long = host.docker(&["run", "--rm", "busybox", "seq", "200000"]);
        assert_eq!(long.ok().lines().last(), Some("200000"));
        let killed = host.docker(&["run", "--rm", "busybox", "sh", "-c", "sleep 0.1; kill -9 $$"]);
        // The first process of a PID namespace is not killed by itself.
        assert_eq!(killed.code(), 0, "{killed:?}");
    });
    checks.check("a container is a VM of its name, with image, command and labels", || {
        host.docker(&["run", "--detach", "--name", "web1", "--label", "a=b", "busybox", "sleep", "1000"])
            .ok();
        let shown = vm(&host.world, "web1");
        assert_eq!(shown["state"], "powered on", "{shown}");
        assert_eq!(shown["container"]["image"], "busybox", "{shown}");
        assert_eq!(shown["container"]["command"], json!(["sleep", "1000"]), "{shown}");
        assert_eq!(shown["container"]["labels"]["a"], "b", "{shown}");
        let own = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        let its = host.docker(&["exec", "web1", "cat", "/proc/sys/kernel/random/boot_id"]);
        assert_ne!(its.ok(), own.trim());
        host.remove(&["web1"]);
        wait_until("its VM is gone", LIMIT, || host.vms().is_empty());
    });
    checks.check("a terminal has the client's size", || {
        let script = format!("'{SIZE}; exit 5'");
        let shown = host.docker_on_terminal(&["run", "--rm", "-it", "busybox", "sh", "-c", &script]);
        assert!(shown.stdout.contains("33 111"), "{shown:?}");
        assert_eq!(shown.code(), 5, "{shown:?}");
    });
    checks.check("logs are kept and followed", || {
        host.docker(&[
            "run",
            "--detach",
            "--name",
            "log",
            "busybox",
            "sh",
            "-c",
            "echo one; sleep 2; echo two",
        ])
        .ok();
        assert_eq!(host.docker(&["logs", "--follow", "log"]).ok(), "one\ntwo");
        host.remove(&["log"]);
    });
}

fn programs_that_are_not_there(checks: &mut Checks, host: &Host) {
    checks.check("a program that is missing ends with 127, one that cannot be run with 126", || {
        let missing = host.docker(&["run", "--rm", "busybox", "nosuch"]);
        assert_eq!(missing.code(), 127, "{missing:?}");
        assert!(missing.stderr.contains("executable file not found in $PATH"), "{missing:?}");
        let refused = host.docker(&["run", "--rm", "busybox", "/note"]);
        assert_eq!(refused.code(), 126, "{refused:?}");
        assert!(refused.stderr.contains("permission denied"), "{refused:?}");
        wait_until("no VM is left", LIMIT, || host.vms().is_empty());
    });
}

fn others(checks: &mut Checks, host: &Host) {
    host.docker(&["run", "--detach", "--name", "base", "--env", "A=b", "busybox", "sleep", "1000"]).ok();
    checks.check("other programs run beside, with input, code, user and folder of their own", || {
        assert_eq!(host.docker(&["exec", "base", "sh", "-c", "echo $A; exit 9"]).code(), 9);
        assert_eq!(host.docker_with_input(&["exec", "-i", "base", "cat"], "in").ok(), "in");
        let args = ["exec", "--user", "5:6", "--workdir", "/tmp", "--env", "C=d", "base", "sh", "-c"];
        let shown = host.docker(&[&args[..], &["id -u; id -g; pwd; echo $A$C"]].concat());
        assert_eq!(shown.ok(), "5\n6\n/tmp\nbd");
        let script = format!("'{SIZE}; exit 3'");
        let on_terminal = host.docker_on_terminal(&["exec", "-it", "base", "sh", "-c", &script]);
        assert!(on_terminal.stdout.contains("33 111") && on_terminal.code() == 3, "{on_terminal:?}");
        assert!(matches!(host.docker(&["exec", "base", "nosuch"]).code(), 126 | 127));
    });
    checks.check("top shows the container's program, stats what it uses", || {
        let top = host.docker(&["top", "base"]);
        assert!(top.ok().contains("sleep 1000"), "{top:?}");
        let stats = host.docker(&["stats", "--no-stream", "--format", "{{.MemUsage}}", "base"]);
        let usage = stats.ok().to_owned();
        assert!(usage.contains("MiB / ") || usage.contains("GiB / "), "{usage}");
    });
    checks.check("a container that is paused stands still", || {
        host.docker(&["pause", "base"]).ok();
        assert_eq!(host.inspect("base", "{{.State.Status}}"), "paused");
        assert_eq!(vm(&host.world, "base")["state"], "paused");
        assert!(!host.docker(&["exec", "base", "true"]).status.success());
        host.docker(&["unpause", "base"]).ok();
        host.docker(&["exec", "base", "true"]).ok();
    });
    host.remove(&["base"]);
}

fn ends(checks: &mut Checks, host: &Host) {
    checks.check("stop lets a program end by itself, and kill does not", || {
        let trap = "trap 'echo bye; exit 4' TERM; echo begun; while true; do sleep 0.1; done";
        host.docker(&["run", "--detach", "--name", "stop", "busybox", "sh", "-c", trap]).ok();
        wait_until("it has begun", LIMIT, || host.docker(&["logs", "stop"]).ok() == "begun");
        host.docker(&["stop", "--time", "120", "stop"]).ok();
        assert_eq!(host.inspect("stop", "{{.State.ExitCode}}"), "4");
        assert_eq!(host.docker(&["logs", "stop"]).ok(), "begun\nbye");
        host.docker(&["start", "stop"]).ok();
        host.docker(&["kill", "stop"]).ok();
        wait_until("it has ended", LIMIT, || host.inspect("stop", "{{.State.Status}}") == "exited");
        assert_eq!(host.inspect("stop", "{{.State.ExitCode}}"), "137");
        host.remove(&["stop"]);
    });
    checks.check("a policy starts a container again", || {
        host.docker(&[
            "run",
            "--detach",
            "--name",
            "again",
            "--restart",
            "on-failure:2",
            "busybox",
            "sh",
            "-c",
            "exit 1",
        ])
        .ok();
        wait_until("it was started twice more", LIMIT, || {
            host.inspect("again", "{{.RestartCount}} {{.State.Status}}") == "2 exited"
        });
        host.remove(&["again"]);
    });
}

fn files(checks: &mut Checks, host: &Host) {
    let shared = host.root.join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("in"), "of the host\n").unwrap();
    let bound = format!("{}:/shared", shared.display());
    checks.check("folders and volumes of the host are the container's", || {
        let script = "cat /shared/in; echo of the guest >/shared/out; touch /shared/by";
        let shown =
            host.docker(&["run", "--rm", "--user", "7:8", "--volume", &bound, "busybox", "sh", "-c", script]);
        // The folder is root's.
        assert!(shown.stderr.contains("ermission denied"), "{shown:?}");
        let shown = host.docker(&["run", "--rm", "--volume", &bound, "busybox", "sh", "-c", script]);
        assert_eq!(shown.ok(), "of the host");
        assert_eq!(fs::read_to_string(shared.join("out")).unwrap(), "of the guest\n");
        assert_eq!(fs::metadata(shared.join("by")).unwrap().uid(), 0);
        let only_read = format!("{bound}:ro");
        let refused = host.docker(&["run", "--rm", "--volume", &only_read, "busybox", "touch", "/shared/x"]);
        assert!(refused.stderr.contains("ead-only"), "{refused:?}");
        host.docker(&["run", "--rm", "--volume", "kept:/v", "busybox", "sh", "-c", "echo kept >/v/file"])
            .ok();
        assert_eq!(
            host.docker(&["run", "--rm", "--volume", "kept:/v", "busybox", "cat", "/v/file"]).ok(),
            "kept"
        );
        host.docker(&["volume", "rm", "kept"]).ok();
    });
    checks.check("a root that is only read is, and what is mounted over it is not", || {
        let args = ["run", "--rm", "--read-only", "--tmpfs", "/tmp", "busybox", "sh", "-c"];
        let shown = host.docker(&[&args[..], &["echo x >/tmp/x && cat /tmp/x; touch /x"]].concat());
        assert!(shown.stdout == "x\n" && shown.stderr.contains("ead-only"), "{shown:?}");
    });
    checks.check("cp, diff and commit see what a container wrote", || {
        host.docker(&[
            "run",
            "--detach",
            "--name",
            "files",
            "busybox",
            "sh",
            "-c",
            "echo made >/made; echo done; sleep 1000",
        ])
        .ok();
        wait_until("it is written", LIMIT, || host.docker(&["logs", "files"]).ok() == "done");
        assert!(host.docker(&["diff", "files"]).ok().contains("A /made"));
        let taken = host.root.join("taken");
        host.docker(&["cp", "files:/made", taken.to_str().unwrap()]).ok();
        assert_eq!(fs::read_to_string(&taken).unwrap(), "made\n");
        host.docker(&["cp", taken.to_str().unwrap(), "files:/given"]).ok();
        assert_eq!(host.docker(&["exec", "files", "cat", "/given"]).ok(), "made");
        host.docker(&["commit", "files", "committed"]).ok();
        host.remove(&["files"]);
        assert_eq!(host.docker(&["run", "--rm", "committed", "cat", "/made"]).ok(), "made");
    });
}

fn networks(checks: &mut Checks, host: &Host) {
    checks.check("containers of a network find one another by name", || {
        host.docker(&["network", "create", "net1"]).ok();
        let serve = "mkdir /www; echo page >/www/index.html; exec httpd -f -h /www";
        host.docker(&[
            "run",
            "--detach",
            "--name",
            "site",
            "--network",
            "net1",
            "busybox",
            "sh",
            "-c",
            serve,
        ])
        .ok();
        let ask = [
            "run",
            "--rm",
            "--network",
            "net1",
            "busybox",
            "sh",
            "-c",
            "until wget -qO- http://site/; do sleep 1; done",
        ];
        assert_eq!(host.docker(&ask).ok(), "page");
        let ask = ["run", "--rm", "--network", "net1", "busybox", "nslookup", "nobody"];
        assert!(!host.docker(&ask).status.success());
    });
    checks.check("a network that is connected later is there", || {
        host.docker(&["network", "create", "net2"]).ok();
        host.docker(&["network", "connect", "net2", "site"]).ok();
        let ask = [
            "run",
            "--rm",
            "--network",
            "net2",
            "busybox",
            "sh",
            "-c",
            "until wget -qO- http://site/; do sleep 1; done",
        ];
        assert_eq!(host.docker(&ask).ok(), "page");
        host.docker(&["network", "disconnect", "net2", "site"]).ok();
        wait_until("it has one address less", LIMIT, || {
            host.docker(&["exec", "site", "cat", "/proc/net/dev"]).stdout.matches("eth").count() == 1
        });
        host.remove(&["site"]);
        host.docker(&["network", "rm", "net1", "net2"]).ok();
    });
    checks.check("a published port is reached from the host", || {
        let serve = "mkdir /www; echo published >/www/index.html; exec httpd -f -h /www";
        host.docker(&[
            "run",
            "--detach",
            "--name",
            "port",
            "--publish",
            "8099:80",
            "busybox",
            "sh",
            "-c",
            serve,
        ])
        .ok();
        let ask = || {
            let mut curl = host.world.command("curl");
            curl.args(["-s", "--max-time", "5", "http://localhost:8099/"]);
            ran(curl).stdout
        };
        wait_until("the port answers", LIMIT, || ask() == "published\n");
        let big = ["exec", "port", "dd", "if=/dev/zero", "of=/www/big", "bs=1M", "count=16"];
        host.docker(&big).ok();
        let mut curl = host.world.command("curl");
        curl.args([
            "-s",
            "--max-time",
            &long_enough(),
            "-o",
            "/dev/null",
            "-w",
            "%{size_download}",
            "http://localhost:8099/big",
        ]);
        assert_eq!(ran(curl).ok(), (16 << 20).to_string());
        host.remove(&["port"]);
    });
    checks.check("without a network there is but loopback", || {
        let shown = host.docker(&["run", "--rm", "--network", "none", "busybox", "ls", "/sys/class/net"]);
        assert_eq!(shown.ok(), "lo");
    });
}

fn limits(checks: &mut Checks, host: &Host) {
    checks.check("a program that takes more memory than it may ends with 137", || {
        // It keeps what it reads until a line ends.
        let ended =
            host.docker(&["run", "--name", "hungry", "--memory", "96m", "busybox", "tail", "/dev/zero"]);
        assert_eq!(ended.code(), 137, "{ended:?}");
        host.remove(&["hungry"]);
    });
    checks.check("users, names, variables and limits are as they are asked for", || {
        let args = [
            "run",
            "--rm",
            "--user",
            "5:6",
            "--hostname",
            "named",
            "--env",
            "A=b",
            "--workdir",
            "/tmp",
            "--ulimit",
            "nofile=77",
        ];
        let shown = host.docker(
            &[&args[..], &["busybox", "sh", "-c", "id -u; id -g; hostname; echo $A; pwd; ulimit -n"]]
                .concat(),
        );
        assert_eq!(shown.ok(), "5\n6\nnamed\nb\n/tmp\n77");
    });
    checks.check("a setting of one kernel is not another's", || {
        let args = [
            "run",
            "--rm",
            "--sysctl",
            "net.ipv4.ip_default_ttl=77",
            "busybox",
            "cat",
            "/proc/sys/net/ipv4/ip_default_ttl",
        ];
        assert_eq!(host.docker(&args).ok(), "77");
        let args = ["run", "--rm", "busybox", "cat", "/proc/sys/net/ipv4/ip_default_ttl"];
        assert_eq!(host.docker(&args).ok(), "64");
    });
}

fn refusals(checks: &mut Checks, host: &Host) {
    checks.check("what a VM cannot have is refused in one sentence, and nothing stays", || {
        for (option, word) in [
            ("--network=host", "--network host"),
            ("--pid=host", "--pid host"),
            ("--ipc=host", "--ipc host"),
            ("--uts=host", "--uts host"),
            ("--privileged", "--privileged"),
            ("--device=/dev/fuse", "/dev/fuse"),
        ] {
            let refused = host.docker(&["run", "--rm", option, "busybox", "true"]);
            assert_eq!(refused.code(), 125, "{option}: {refused:?}");
            assert!(refused.stderr.contains(word), "{option}: {refused:?}");
        }
        wait_until("no VM is left", LIMIT, || host.vms().is_empty());
    });
}

fn either_side(checks: &mut Checks, host: &Host) {
    let start = |name: &str| {
        host.docker(&["run", "--detach", "--name", name, "busybox", "sleep", "1000"]).ok();
        host.pid(name)
    };
    let exited = |name: &str| {
        wait_until("it has ended", LIMIT, || host.inspect(name, "{{.State.Status}}") == "exited");
    };
    checks.check("a VM that is deleted ends its container", || {
        let shim = start("side1");
        assert_eq!(host.world.curl("DELETE", "/v1/vms/side1?force=true", None).status / 100, 2);
        exited("side1");
        assert_eq!(host.inspect("side1", "{{.State.ExitCode}}"), "137");
        assert!(!lives(shim));
        host.remove(&["side1"]);
    });
    checks.check("a VM whose process ends has its container end with 139 and a word", || {
        start("side2");
        let process = host.world.vm_pid("side2").unwrap();
        run(Command::new("kill").args(["-9", &process.to_string()]));
        exited("side2");
        assert_eq!(host.inspect("side2", "{{.State.ExitCode}}"), "139");
        assert!(host.docker(&["logs", "side2"]).stderr.contains("ended by itself"));
        host.remove(&["side2"]);
    });
    checks.check("a shim that is killed takes its VM along", || {
        let shim = start("side3");
        run(Command::new("kill").args(["-9", &shim.to_string()]));
        exited("side3");
        assert_eq!(host.inspect("side3", "{{.State.ExitCode}}"), "137");
        wait_until("its VM is gone", LIMIT, || host.vms().is_empty());
        host.remove(&["side3"]);
    });
}

fn many(checks: &mut Checks, host: &Host) {
    checks.check("ten are started at once", || {
        let started = Instant::now();
        let names: Vec<String> = (0..10).map(|number| format!("ten{number}")).collect();
        std::thread::scope(|scope| {
            for name in &names {
                scope.spawn(|| {
                    host.docker(&["run", "--detach", "--name", name, "busybox", "sleep", "1000"])
                        .ok()
                        .to_owned()
                });
            }
        });
        println!("ten containers at once: {:.1} s", started.elapsed().as_secs_f32());
        let mut vms = host.vms();
        vms.sort();
        assert_eq!(vms, names);
        let all: Vec<&str> = names.iter().map(String::as_str).collect();
        host.remove(&all);
    });
}
