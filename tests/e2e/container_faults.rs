//! Containers that are VMs when what runs them is killed: the runtime, its shim, the VM, containerd and its shim, and both daemons.

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use catalyst_tests::docker::{Host, LIMIT, Process};
use catalyst_tests::world::vm_name;
use catalyst_tests::{Checks, Ran};
use nix::sys::signal::Signal::SIGKILL;
use serde_json::json;

use crate::common::{lives, settled, signal, try_signal, wait_until};

pub fn container_faults(checks: &mut Checks) {
    // What runs goes on while Docker's daemon is away.
    let mut host = Host::with(&[("live-restore", json!(true))]);
    catalyst_daemon(checks, &mut host);
    docker_daemon(checks, &mut host);
    containerd(checks, &host);
    containerd_shim(checks, &host);
    during_create(checks, &mut host);
    checks.check("nothing is left of all of them", || host.check_empty());
}

/// A container that ends when it is told to, with 5.
struct Told {
    folder: PathBuf,
    name: &'static str,
}

impl Told {
    fn start(host: &Host, name: &'static str) -> Self {
        let folder = host.root.join(name);
        fs::create_dir(&folder).unwrap();
        let script = "until test -f /told/end; do sleep 0.1; done; echo last words; exit 5";
        let volume = format!("{}:/told", folder.display());
        host.start(name, &["--volume", &volume, "busybox", "sh", "-c", script]);
        Self { folder, name }
    }

    fn end(&self) {
        fs::write(self.folder.join("end"), "").unwrap();
    }

    fn check_ended(&self, host: &Host) {
        assert_eq!(host.end_of(self.name), "5");
        assert_eq!(host.docker(&["logs", self.name]).ok(), "last words");
    }
}

/// How often the container's end was told, from `since` on.
fn ends_told(host: &Host, since: &str, name: &str) -> usize {
    let until = host.docker(&["info", "--format", "{{.SystemTime}}"]).ok().to_owned();
    let container = format!("container={name}");
    let args =
        ["events", "--since", since, "--until", &until, "--filter", &container, "--filter", "event=die"];
    host.docker(&args).ok().lines().count()
}

fn catalyst_daemon(checks: &mut Checks, host: &mut Host) {
    checks.check("a container runs on while the Catalyst daemon is away, and is its VM afterwards", || {
        host.start("stays", &["busybox", "sleep", "1000"]);
        let ends = Told::start(host, "ends");
        host.world.kill_daemon();
        assert_eq!(host.docker(&["exec", "stays", "echo", "here"]).ok(), "here");
        let refused = host.docker(&["run", "--rm", "busybox", "true"]);
        assert!(refused.code() == 125 && refused.stderr.contains("start catalyst-daemon"), "{refused:?}");
        ends.end();
        ends.check_ended(host);
        host.world.start_daemon();
        wait_until("the VM of the one that ended is gone", LIMIT, || host.vms() == ["stays"]);
        assert_eq!(settled(&host.world, "stays"), "powered on");
        assert_eq!(host.docker(&["exec", "stays", "echo", "here"]).ok(), "here");
        host.docker(&["kill", "stays"]).ok();
        assert_eq!(host.end_of("stays"), "137");
        host.check_empty();
    });
    checks.check("a container that is deleted while the Catalyst daemon is away is no VM afterwards", || {
        host.start("deleted", &["busybox", "sleep", "1000"]);
        host.world.kill_daemon();
        host.remove(&["deleted"]);
        host.world.start_daemon();
        host.check_empty();
    });
}

fn docker_daemon(checks: &mut Checks, host: &mut Host) {
    checks.check("containers run on and end while Docker's daemon is away, and it knows how", || {
        let stays = Told::start(host, "stays2");
        let ends = Told::start(host, "ends2");
        let since = host.docker(&["info", "--format", "{{.SystemTime}}"]).ok().to_owned();
        let shim = host.pid("ends2");
        host.kill_docker();
        ends.end();
        wait_until("it has ended", LIMIT, || !lives(shim));
        host.start_docker();
        // Words that are said meanwhile are not in its logs, of runc's containers neither.
        assert_eq!(host.end_of("ends2"), "5");
        assert_eq!(host.inspect("stays2", "{{.State.Running}}"), "true");
        assert_eq!(host.docker(&["exec", "stays2", "echo", "here"]).ok(), "here");
        stays.end();
        stays.check_ended(host);
        assert_eq!(ends_told(host, &since, "stays2"), 1);
        // Of what ended meanwhile it tells nobody, of runc's containers neither.
        assert_eq!(ends_told(host, &since, "ends2"), 0);
        host.check_empty();
    });
}

fn containerd(checks: &mut Checks, host: &Host) {
    checks.check("containers run on while containerd is away, and end afterwards", || {
        let stays = Told::start(host, "stays3");
        let since = host.docker(&["info", "--format", "{{.SystemTime}}"]).ok().to_owned();
        let before = host.containerd();
        signal(before, SIGKILL);
        // Docker's daemon starts another by itself.
        wait_until("there is another", LIMIT, || {
            let now = host.containerd();
            now != before && lives(now)
        });
        let here = || host.docker(&["exec", "stays3", "echo", "here"]);
        wait_until("the other goes on", LIMIT, || here().stdout == "here\n");
        stays.end();
        stays.check_ended(host);
        assert_eq!(ends_told(host, &since, "stays3"), 1);
        host.check_empty();
    });
}

fn containerd_shim(checks: &mut Checks, host: &Host) {
    checks.check("a container whose containerd-shim is killed has ended, and its VM is gone", || {
        host.start("shim", &["busybox", "sleep", "1000"]);
        let since = host.docker(&["info", "--format", "{{.SystemTime}}"]).ok().to_owned();
        let id = host.inspect("shim", "{{.Id}}");
        let of_container = ["containerd-shim-runc-v2", &id];
        let shim = Process::all().find(|process| of_container.iter().all(|word| process.has_word(word)));
        signal(shim.expect("there is one").pid, SIGKILL);
        assert_eq!(host.end_of("shim"), "137");
        wait_until("its VM is gone", LIMIT, || host.vms().is_empty());
        assert_eq!(ends_told(host, &since, "shim"), 1);
        host.docker(&["start", "shim"]).ok();
        assert_eq!(host.docker(&["exec", "shim", "echo", "again"]).ok(), "again");
        host.check_empty();
    });
}

/// What is killed while a container is created, and what the container ends with if it was there by then.
const VICTIMS: [(&str, &str); 4] =
    [("the command", "0"), ("the shim", "137"), ("the VM", "139"), ("the server of trees", "139")];

fn during_create(checks: &mut Checks, host: &mut Host) {
    for (victim, ended) in VICTIMS {
        checks.check(
            &format!("{victim} is killed while a container is created: it fails or ends, and nothing stays"),
            || {
                let ran = creation(host, || {
                    let found = find(host, victim);
                    found.into_iter().filter(|pid| try_signal(*pid, SIGKILL)).count() > 0
                });
                // It may have been made just before; a VM that does not go on is started once more.
                if ran.code() == 0 && !host.docker(&["exec", ran.ok(), "true"]).status.success() {
                    assert_eq!(host.end_of(ran.ok()), ended, "{}", host.docker(&["logs", ran.ok()]).stderr);
                }
                host.check_empty();
                assert_eq!(host.docker(&["run", "--rm", "busybox", "echo", "hi"]).ok(), "hi");
            },
        );
    }
    checks.check(
        "the Catalyst daemon is killed while a container is created: it fails, and nothing stays",
        || {
            let begun = Instant::now();
            loop {
                let pid = host.world.daemon_pid();
                let ran = creation(host, || {
                    let begun = !find(host, "the shim").is_empty();
                    if begun {
                        signal(pid, SIGKILL);
                    }
                    begun
                });
                host.world.kill_daemon();
                let failed = ran.code() != 0;
                assert!(!failed || ran.stderr.contains("Catalyst daemon"), "{ran:?}");
                host.world.start_daemon();
                host.check_empty();
                if failed {
                    break;
                }
                // On a busy machine the shim may have needed it no more by then.
                assert!(begun.elapsed() < LIMIT, "it does not fail: {ran:?}");
            }
        },
    );
    // Now and then containerd 1.6 forgets what it was making, as dockerd 20.10 does (docs/CONTAINERS.md): that fails here.
    if std::env::var_os("CATALYST_TEST_FULL").is_none() {
        return;
    }
    checks.check("containerd is killed while a container is created: nothing stays", || {
        let before = host.containerd();
        creation(host, || {
            let begun = !find(host, "the VM").is_empty();
            if begun {
                signal(before, SIGKILL);
            }
            begun
        });
        wait_until("there is another, which runs containers", LIMIT, || {
            let now = host.containerd();
            let says = || host.docker(&["run", "--rm", "busybox", "echo", "hi"]).stdout;
            now != before && lives(now) && says() == "hi\n"
        });
        host.check_empty();
    });
}

/// Creates and starts a container, and meanwhile tries `kill` until it has killed; what the client said. Where all was over before there
/// was anything to kill, which a busy machine may not have seen, another is created.
fn creation(host: &Host, kill: impl Fn() -> bool) -> Ran {
    let begun = Instant::now();
    loop {
        let (ran, killed) = std::thread::scope(|scope| {
            let client = scope.spawn(|| host.docker(&["run", "--detach", "busybox", "sleep", "1000"]));
            let mut killed = false;
            while !killed && !client.is_finished() {
                killed = kill();
            }
            (client.join().unwrap(), killed)
        });
        if killed {
            return ran;
        }
        assert!(begun.elapsed() < LIMIT, "there was nothing to kill: {ran:?}");
        host.remove(&[ran.ok()]);
    }
}

/// Processes that there are for a container.
fn find(host: &Host, what: &str) -> Vec<u32> {
    let is_it = |process: &Process| match what {
        "the command" => process.program == "catalyst-oci" && process.has_word("create"),
        "the shim" => process.has_variable("CATALYST_OCI_ROLE=shim"),
        "the server of trees" => process.has_word("folders"),
        _ => vm_name(process.pid).is_some(),
    };
    host.processes().iter().filter(|process| is_it(process)).map(|process| process.pid).collect()
}
