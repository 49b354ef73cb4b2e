//! Containers that are VMs, by the clients that people have: docker-compose, Docker's Python SDK, builds, a registry, `ctr`; and runc
//! beside, in the same daemon, where it is the measure.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use catalyst_tests::docker::{Host, LIMIT};
use catalyst_tests::world::{long_enough, programs, ran, run};
use catalyst_tests::{Checks, Ran, skip};

use crate::common::wait_until;

const COMPOSE: &str = r#"
version: "3"
services:
  db:
    image: busybox
    volumes: ["rows:/rows"]
    command: sh -c 'test -f /rows/first || echo row one >/rows/first; exec httpd -f -p 5432 -h /rows'
  web:
    image: busybox
    depends_on: [db]
    ports: ["8098:80"]
    command: sh -c 'mkdir /www; until wget -qO /www/index.html http://db:5432/first; do sleep 0.2; done; exec httpd -f -h /www'
volumes:
  rows:
"#;
const SDK: &str = r#"
import docker
client = docker.from_env(timeout=280)
print(client.containers.run("busybox", "echo hi", remove=True))
one = client.containers.run("busybox", ["sh", "-c", "echo one; sleep 1000"], name="sdk", detach=True, environment={"A": "b"})
print(next(one.logs(stream=True, follow=True)))
print(tuple(one.exec_run(["sh", "-c", "echo $A; exit 3"])))
print([each[-1] for each in one.top()["Processes"]])
one.kill()
print(one.wait()["StatusCode"])
one.remove()
"#;
const DOCKERFILE: &str = "FROM busybox\n\
    RUN mkdir /made && echo layer >/made/one && touch /made/two\n\
    COPY given /given\n\
    RUN rm /made/two && cat /given /made/one >/both\n\
    USER 5:6\n\
    CMD cat /both; ls /made; id -u\n";
const REGISTRY: &str = "version: 0.1\nlog: {accesslog: {disabled: false}}\nstorage: {filesystem: {rootdirectory: ROOT}}\n\
    http: {addr: '127.0.0.1:5000'}\n";
const REGISTRY_IMAGE: &str = "127.0.0.1:5000/pulled";

pub fn container_clients(checks: &mut Checks) {
    let host = Host::new();
    composed(checks, &host);
    by_sdk(checks, &host);
    built(checks, &host);
    healthy(checks, &host);
    started_again(checks, &host);
    attached(checks, &host);
    told(checks, &host);
    beside_runc(checks, &host);
    updated(checks, &host);
    pulled(checks, &host);
    by_ctr(checks, &host);
    checks.check("nothing is left of all of them", || host.check_empty());
}

/// Something that runs until the check ends.
struct Service(Child);

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A program of the machine's that finds Docker by the environment.
fn client(host: &Host, program: &str, args: &[&str]) -> Ran {
    let mut command = Command::new("timeout");
    command.args([&long_enough(), program]).args(args).env("DOCKER_HOST", host.docker_host());
    command.env("COMPOSE_HTTP_TIMEOUT", long_enough());
    command.env("HOME", &host.root).env("DOCKER_BUILDKIT", "0");
    for name in ["DOCKER_CONTEXT", "DOCKER_TLS_VERIFY", "COMPOSE_FILE", "COMPOSE_PROJECT_NAME"] {
        command.env_remove(name);
    }
    ran(command)
}

fn get(host: &Host, url: &str) -> String {
    let mut curl = host.world.command("curl");
    curl.args(["-s", "--max-time", "5", url]);
    ran(curl).stdout
}

fn composed(checks: &mut Checks, host: &Host) {
    checks.check("docker-compose 1.29 starts a web service and its database, and takes them down", || {
        if !Path::new("/usr/bin/docker-compose").exists() {
            skip("there is no docker-compose: make setup-tests");
        }
        let folder = host.root.join("site");
        fs::create_dir(&folder).unwrap();
        let file = folder.join("docker-compose.yml");
        fs::write(&file, COMPOSE).unwrap();
        let compose = |args: &[&str]| {
            let all = [&["--no-ansi", "--file", file.to_str().unwrap()], args].concat();
            client(host, "/usr/bin/docker-compose", &all)
        };
        compose(&["up", "--detach"]).ok();
        wait_until("the site answers", LIMIT, || get(host, "http://localhost:8098/") == "row one\n");
        assert_eq!(compose(&["exec", "-T", "db", "cat", "/rows/first"]).ok(), "row one");
        let mut vms = host.vms();
        vms.sort();
        assert_eq!(vms, ["site_db_1", "site_web_1"]);
        compose(&["stop", "--timeout", "1", "web"]).ok();
        compose(&["up", "--detach"]).ok();
        wait_until("the site answers again", LIMIT, || get(host, "http://localhost:8098/") == "row one\n");
        compose(&["down", "--volumes", "--timeout", "1"]).ok();
        assert_eq!(host.docker(&["ps", "--all", "--quiet"]).ok(), "");
        assert!(!host.docker(&["network", "ls"]).ok().contains("site_default"));
        wait_until("their VMs are gone", LIMIT, || host.vms().is_empty());
    });
}

fn by_sdk(checks: &mut Checks, host: &Host) {
    checks.check("Docker's Python SDK runs, execs, reads logs, shows processes and waits", || {
        if !client(host, "/usr/bin/python3", &["-c", "import docker"]).status.success() {
            skip("there is no python3-docker: make setup-tests");
        }
        let told = client(host, "/usr/bin/python3", &["-c", SDK]);
        assert_eq!(
            told.ok(),
            "b'hi\\n'\nb'one\\n'\n(3, b'b\\n')\n['sh -c echo one; sleep 1000']\n137",
            "{told:?}"
        );
    });
}

fn built(checks: &mut Checks, host: &Host) {
    checks.check("a build runs its commands in VMs, and takes what is built already", || {
        let folder = host.root.join("build");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("Dockerfile"), DOCKERFILE).unwrap();
        fs::write(folder.join("given"), "given\n").unwrap();
        let docker = programs().join("firewall-tools/usr/bin/docker");
        let build = |file: &str| {
            let file = folder.join(file);
            let args = [
                "build",
                "--force-rm",
                "--tag",
                "built",
                "--file",
                file.to_str().unwrap(),
                folder.to_str().unwrap(),
            ];
            client(host, docker.to_str().unwrap(), &args)
        };
        build("Dockerfile").ok();
        assert_eq!(host.docker(&["run", "--rm", "built"]).ok(), "given\nlayer\none\n5");
        assert_eq!(build("Dockerfile").ok().matches("Using cache").count(), 5);
        fs::write(folder.join("Broken"), "FROM busybox\nRUN exit 3\n").unwrap();
        let broken = build("Broken");
        assert!(broken.code() != 0 && broken.stderr.contains("returned a non-zero code: 3"), "{broken:?}");
        host.docker(&["rmi", "built"]).ok();
    });
}

fn healthy(checks: &mut Checks, host: &Host) {
    checks.check("health checks tell who is well and who is not", || {
        let health =
            ["--health-cmd", "test -f /tmp/well", "--health-interval", "1s", "--health-retries", "2"];
        host.start("sick", &[&health[..], &["busybox", "sleep", "1000"]].concat());
        let status = || host.inspect("sick", "{{.State.Health.Status}}");
        wait_until("it is not well", LIMIT, || status() == "unhealthy");
        host.docker(&["exec", "sick", "touch", "/tmp/well"]).ok();
        wait_until("it is well", LIMIT, || status() == "healthy");
        host.remove(&["sick"]);
    });
}

fn started_again(checks: &mut Checks, host: &Host) {
    checks.check("a policy starts a container whose VM was killed again, until it is stopped", || {
        host.start("always", &["--restart", "always", "busybox", "sleep", "1000"]);
        let before = host.world.vm_pid("always").unwrap();
        run(Command::new("kill").args(["-9", &before.to_string()]));
        wait_until("it runs again", LIMIT, || {
            host.inspect("always", "{{.RestartCount}} {{.State.Status}}") == "1 running"
        });
        assert_eq!(host.docker(&["exec", "always", "echo", "again"]).ok(), "again");
        assert_ne!(host.world.vm_pid("always").unwrap(), before);
        host.docker(&["update", "--restart", "no", "always"]).ok();
        assert_eq!(host.inspect("always", "{{.HostConfig.RestartPolicy.Name}}"), "no");
        host.docker(&["kill", "always"]).ok();
        assert_eq!(host.end_of("always"), "137");
        host.remove(&["always"]);
    });
}

fn attached(checks: &mut Checks, host: &Host) {
    checks.check("a client attaches to a terminal, leaves it, and comes back to its end", || {
        host.start("shell", &["--interactive", "--tty", "busybox", "sh"]);
        let attach = |typed: &mut dyn FnMut(&mut dyn Write)| {
            let mut command = host.terminal(&["attach", "shell"]);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = command.spawn().unwrap();
            let mut keyboard = child.stdin.take().unwrap();
            typed(&mut keyboard);
            let code = child.wait().unwrap().code();
            drop(keyboard);
            code
        };
        attach(&mut |keyboard| {
            keyboard.write_all(b"echo $((6 * 7))\n").unwrap();
            wait_until("it is answered", LIMIT, || host.docker(&["logs", "shell"]).stdout.contains("\n42"));
            keyboard.write_all(b"\x10\x11").unwrap();
        });
        assert_eq!(host.inspect("shell", "{{.State.Running}}"), "true");
        assert_eq!(attach(&mut |keyboard| keyboard.write_all(b"exit 4\n").unwrap()), Some(4));
        assert_eq!(host.end_of("shell"), "4");
        host.remove(&["shell"]);
    });
}

fn told(checks: &mut Checks, host: &Host) {
    checks.check("each container's start and end are told once", || {
        let now = || host.docker(&["info", "--format", "{{.SystemTime}}"]).ok().to_owned();
        let since = now();
        host.docker(&["run", "--name", "end0", "busybox", "true"]).ok();
        assert_eq!(host.docker(&["run", "--name", "end3", "busybox", "sh", "-c", "exit 3"]).code(), 3);
        host.start("end137", &["busybox", "sleep", "1000"]);
        host.docker(&["exec", "end137", "true"]).ok();
        host.docker(&["kill", "end137"]).ok();
        host.end_of("end137");
        let (filter, format) = ("type=container", "{{.Action}} {{.Actor.Attributes.name}}");
        let until = now();
        let args = ["events", "--since", &since, "--until", &until, "--filter", filter, "--format", format];
        let events = host.docker(&args);
        for name in ["end0", "end3", "end137"] {
            for action in ["create", "start", "die"] {
                let line = format!("{action} {name}");
                let count = events.ok().lines().filter(|event| **event == line).count();
                assert_eq!(count, 1, "{line}: {events:?}");
            }
        }
        host.remove(&["end0", "end3", "end137"]);
    });
}

fn beside_runc(checks: &mut Checks, host: &Host) {
    checks.check("codes of programs that cannot be run are those of runc", || {
        if !host.docker(&["run", "--rm", "--runtime", "runc", "busybox", "true"]).status.success() {
            skip("runc runs no container here");
        }
        for runtime in ["runc", "catalyst"] {
            host.start(runtime, &["--runtime", runtime, "busybox", "sleep", "1000"]);
        }
        let codes = |runtime: &str, program: &[&str]| {
            let exec = host.docker(&[&["exec", runtime], program].concat()).code();
            let run =
                host.docker(&[&["run", "--rm", "--runtime", runtime, "busybox"], program].concat()).code();
            (exec, run)
        };
        for program in [
            &["nosuch"][..],
            &["/no/such"],
            &["/note"],
            &["/tmp"],
            &["sh", "-c", "nosuch"],
            &["sh", "-c", "kill -9 $$; exit 2"],
            &["sh", "-c", "exit 255"],
        ] {
            assert_eq!(codes("catalyst", program), codes("runc", program), "{program:?}");
        }
        host.remove(&["runc", "catalyst"]);
    });
}

fn updated(checks: &mut Checks, host: &Host) {
    checks.check("processor time is limited while a container runs, memory is not changed", || {
        host.start("busy", &["--memory", "160m", "busybox", "sh", "-c", "while true; do true; done"]);
        let process = host.world.vm_pid("busy").unwrap();
        // Others may be busy as well.
        let takes_more = || share_of(process) > 0.15;
        wait_until("it takes what there is", LIMIT, takes_more);
        host.docker(&["update", "--cpus", "0.1", "busy"]).ok();
        let share = share_of(process);
        assert!(share < 0.15, "{share}");
        assert_eq!(host.docker(&["exec", "busy", "echo", "slow"]).ok(), "slow");
        let refused = host.docker(&["update", "--memory", "320m", "--memory-swap", "640m", "busy"]);
        assert!(refused.code() == 1 && refused.stderr.contains("160 MiB"), "{refused:?}");
        let refused = host.docker(&["update", "--pids-limit", "5", "busy"]);
        assert!(refused.code() == 1 && refused.stderr.contains("processes"), "{refused:?}");
        assert_eq!(host.inspect("busy", "{{.HostConfig.Memory}}"), (160 << 20).to_string());
        host.docker(&["update", "--cpus", "0.9", "busy"]).ok();
        wait_until("it has more again", LIMIT, takes_more);
        host.remove(&["busy"]);
    });
}

/// The part of a processor that a process takes, over two seconds.
fn share_of(pid: u32) -> f32 {
    let ticks = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        fields[11].parse::<f32>().unwrap() + fields[12].parse::<f32>().unwrap()
    };
    let (before, begun) = (ticks(), Instant::now());
    std::thread::sleep(Duration::from_secs(2));
    // On a busy machine it was longer.
    (ticks() - before) / 100.0 / begun.elapsed().as_secs_f32()
}

fn pulled(checks: &mut Checks, host: &Host) {
    checks.check("what was pulled from a registry is not fetched again", || {
        if !programs().join("firewall-tools/usr/bin/docker-registry").exists() {
            skip("Docker's registry is not in target/release/firewall-tools (make firewall-tools)");
        }
        let log = host.root.join("registry.log");
        let config = host.root.join("registry.yml");
        fs::write(&config, REGISTRY.replace("ROOT", host.root.join("registry").to_str().unwrap())).unwrap();
        let mut registry = host.inside("docker-registry");
        registry.arg("serve").arg(&config);
        let file = fs::File::create(&log).unwrap();
        registry.stdout(file.try_clone().unwrap()).stderr(file);
        let _registry = Service(registry.spawn().unwrap());
        wait_until("the registry answers", LIMIT, || get(host, "http://127.0.0.1:5000/v2/") == "{}");
        host.docker(&["tag", "busybox", REGISTRY_IMAGE]).ok();
        host.docker(&["push", REGISTRY_IMAGE]).ok();
        host.docker(&["rmi", REGISTRY_IMAGE]).ok();
        let fetched = || {
            let text = fs::read_to_string(&log).unwrap();
            text.lines().filter(|line| line.contains("\"GET /v2/pulled/blobs/")).count()
        };
        let before = fetched();
        host.docker(&["pull", REGISTRY_IMAGE]).ok();
        // Its layer is here already, as that of `busybox`; what tells of it is not.
        assert!(fetched() <= before + 1, "{}", fs::read_to_string(&log).unwrap());
        for name in [REGISTRY_IMAGE, "busybox"] {
            host.docker(&["rmi", name]).ok();
        }
        let before = fetched();
        host.docker(&["pull", REGISTRY_IMAGE]).ok();
        // The registry writes its line after it has answered.
        wait_until("its layer was fetched", LIMIT, || fetched() >= before + 2);
        let before = fetched();
        assert!(host.docker(&["pull", REGISTRY_IMAGE]).ok().contains("up to date"));
        for _ in 0..2 {
            assert_eq!(host.docker(&["run", "--rm", REGISTRY_IMAGE, "cat", "/note"]).ok(), "no program");
        }
        assert_eq!(fetched(), before);
        host.docker(&["tag", REGISTRY_IMAGE, "busybox"]).ok();
    });
}

fn by_ctr(checks: &mut Checks, host: &Host) {
    let ctr = |args: &[&str]| host.ctr(args);
    let runtime = programs().join("catalyst-oci");
    let image = "docker.io/library/busybox:latest";
    let by_us = ["run", "--runc-binary", runtime.to_str().unwrap()];
    let run = |options: &[&str], words: &[&str]| ctr(&[&by_us[..], options, &[image], words].concat());
    checks.check("containerd's ctr runs a container, and others beside in it", || {
        host.import_for_ctr();
        let words = [&by_us[..], &["--rm", image, "one", "echo", "hi"]].concat();
        assert_eq!(host.told_by_ctr(&words), "hi");
        assert_eq!(run(&["--rm"], &["one", "sh", "-c", "exit 7"]).code(), 7);
        run(&["--detach"], &["two", "sleep", "1000"]).ok();
        assert_eq!(host.told_by_ctr(&["tasks", "exec", "--exec-id", "e1", "two", "uname"]), "Linux");
        assert_eq!(ctr(&["tasks", "exec", "--exec-id", "e2", "two", "sh", "-c", "exit 9"]).code(), 9);
        assert!(ctr(&["tasks", "list"]).ok().contains("RUNNING"));
        ctr(&["tasks", "pause", "two"]).ok();
        assert!(ctr(&["tasks", "list"]).ok().contains("PAUSED"));
        ctr(&["tasks", "resume", "two"]).ok();
        assert!(ctr(&["tasks", "metrics", "two"]).ok().contains("memory"));
    });
    checks.check("ctr kills and deletes it, and its VM is gone", || {
        ctr(&["tasks", "kill", "--signal", "SIGKILL", "two"]).ok();
        wait_until("it has ended", LIMIT, || ctr(&["tasks", "list"]).ok().contains("STOPPED"));
        ctr(&["tasks", "delete", "two"]);
        ctr(&["containers", "delete", "two"]).ok();
        wait_until("its VM is gone", LIMIT, || host.vms().is_empty());
        assert!(!ctr(&["containers", "list"]).ok().contains("two"));
    });
}
