//! Several containers in one VM: those that join another's network, and those of a pod.

use std::fs;
use std::process::Command;

use catalyst_tests::Checks;
use catalyst_tests::docker::{Host, LIMIT, SIZE};
use catalyst_tests::world::{Ran, programs, ran, run};

use crate::common::{lives, wait_until};

const IMAGE: &str = "docker.io/library/busybox:latest";
/// A network namespace as CNI's plugins leave it.
const NETWORK: &str = "ip netns add pod
    ip link add pod0 type veth peer name eth0 netns pod
    ip address add 10.99.0.1/24 dev pod0
    ip link set pod0 up
    ip -n pod address add 10.99.0.2/24 dev eth0
    ip -n pod link set eth0 up";
/// Says what it was given to whoever asks on loopback.
const SERVE: &str = "mkdir /www; echo $0 >/www/index.html; exec httpd -f -h /www -p 127.0.0.1:";

/// The group.
pub fn pods(checks: &mut Checks) {
    let host = Host::new();
    joins(checks, &host);
    ends(checks, &host);
    come_and_go(checks, &host);
    pod(checks, &host);
    checks.check("nothing is left of all of them", || host.check_empty());
}

fn serve(word: &str, port: u16) -> [String; 4] {
    ["sh".into(), "-c".into(), format!("{SERVE}{port}"), word.into()]
}

fn fetch(port: u16) -> String {
    format!("http://127.0.0.1:{port}/")
}

fn joins(checks: &mut Checks, host: &Host) {
    checks.check(
        "a container in the network of another is in its VM, with files and processes of its own",
        || {
            let served = serve("owner's", 80);
            let words: Vec<&str> = ["--memory", "512m", "busybox"]
                .into_iter()
                .chain(served.iter().map(String::as_str))
                .collect();
            host.start("owner", &words);
            wait_until("it serves", LIMIT, || {
                host.docker(&["exec", "owner", "wget", "-qO-", &fetch(80)]).stdout == "owner's\n"
            });
            let joined = ["run", "--rm", "--network", "container:owner"];
            let with = |options: &[&str], words: &[&str]| {
                host.docker(&[&joined[..], options, &["busybox"], words].concat())
            };
            assert_eq!(with(&[], &["wget", "-qO-", &fetch(80)]).ok(), "owner's");
            let names = with(&[], &["sh", "-c", "hostname; ls /sys/class/net; echo /proc/[0-9]*; ls /www"]);
            let owner = host.docker(&["exec", "owner", "hostname"]);
            assert_eq!(names.stdout, format!("{}\neth0\nlo\n/proc/1\n", owner.ok()), "{names:?}");
            let kernel = ["cat", "/proc/sys/kernel/random/boot_id"];
            let owners = host.docker(&[&["exec", "owner"][..], &kernel].concat());
            assert_eq!(with(&[], &kernel).ok(), owners.ok());
            assert_eq!(with(&[], &["sh", "-c", "exit 7"]).code(), 7);
            assert_eq!(with(&["--user", "5:6"], &["id", "-u"]).ok(), "5");
            assert_eq!(with(&[], &["nosuch"]).code(), 127);
            let input = [&joined[..], &["--interactive", "busybox", "cat"]].concat();
            assert_eq!(host.docker_with_input(&input, "one\ntwo\n").ok(), "one\ntwo");
            let script = format!("'{SIZE}; exit 5'");
            let terminal = [&joined[..], &["-it", "busybox", "sh", "-c", &script]].concat();
            let terminal = host.docker_on_terminal(&terminal);
            assert!(terminal.stdout.contains("33 111") && terminal.code() == 5, "{terminal:?}");
            assert_eq!(host.vms(), ["owner"]);
        },
    );
    checks.check("its volumes, programs beside, logs and copies are its own", || {
        let volume = host.root.join("volume");
        fs::create_dir(&volume).unwrap();
        let option = format!("--volume={}:/v", volume.display());
        let script = "echo begun; echo made >/v/file; exec sleep 1000";
        let args = ["--network", "container:owner", &option, "busybox", "sh", "-c", script];
        host.start("joined", &args);
        wait_until("it has begun", LIMIT, || volume.join("file").exists());
        // By another way than the file.
        wait_until("its words are in its logs", LIMIT, || !host.docker(&["logs", "joined"]).ok().is_empty());
        assert_eq!(host.docker(&["logs", "joined"]).ok(), "begun");
        assert_eq!(host.docker(&["exec", "joined", "sh", "-c", "cat /v/file; exit 9"]).code(), 9);
        assert_eq!(host.docker(&["exec", "joined", "wget", "-qO-", &fetch(80)]).ok(), "owner's");
        assert_eq!(host.docker(&["exec", "owner", "ls", "/v"]).code(), 1, "it is not the owner's");
        host.docker(&["exec", "joined", "touch", "/new"]).ok();
        assert!(host.docker(&["diff", "joined"]).ok().contains("A /new"));
        let processes = host.docker(&["exec", "joined", "ls", "/proc"]);
        assert!(!processes.ok().lines().any(|name| name == "2"), "the owner's are not seen");
        let paused = host.docker(&["pause", "joined"]);
        assert!(paused.stderr.contains("cannot be paused alone"), "{paused:?}");
        host.remove(&["joined"]);
        assert_eq!(host.docker(&["exec", "owner", "wget", "-qO-", &fetch(80)]).ok(), "owner's");
    });
    checks.check("its memory has its own limit, and its end by that is told", || {
        let hog = "head -c 60000000 /dev/zero | tail";
        let args = [
            "run",
            "--name",
            "hog",
            "--network",
            "container:owner",
            "--memory",
            "24m",
            "busybox",
            "sh",
            "-c",
            hog,
        ];
        // Docker's daemon forgets it when containerd happens to tell the container's end first, of runc's too (2 of 55 at load 10).
        let is_told = || {
            let ended = host.docker(&args);
            assert_eq!(ended.code(), 137, "{ended:?}");
            let told = host.inspect("hog", "{{.State.OOMKilled}}");
            host.remove(&["hog"]);
            told == "true"
        };
        assert!((0..5).any(|_| is_told()), "nothing says that its memory was short");
        assert_eq!(host.docker(&["exec", "owner", "wget", "-qO-", &fetch(80)]).ok(), "owner's");
    });
}

fn ends(checks: &mut Checks, host: &Host) {
    let join = |name: &str| {
        let served = serve("joined", 81);
        let words = served.iter().map(String::as_str);
        let words: Vec<&str> = ["--network", "container:owner", "busybox"].into_iter().chain(words).collect();
        host.start(name, &words);
        wait_until("it serves", LIMIT, || {
            host.docker(&["exec", "owner", "wget", "-qO-", &fetch(81)]).stdout == "joined\n"
        });
        host.pid(name)
    };
    checks.check("one that is stopped or whose shim is killed leaves nothing in the VM", || {
        join("one");
        host.docker(&["kill", "one"]).ok();
        assert_eq!(host.end_of("one"), "137");
        let shim = join("two");
        run(Command::new("kill").args(["-9", &shim.to_string()]));
        assert_eq!(host.end_of("two"), "137");
        // What is left of it in the guest ends when its shim is missed there.
        wait_until("its port is free", LIMIT, || {
            host.docker(&["exec", "owner", "wget", "-qO-", &fetch(81)]).code() == 1
        });
        join("three");
        host.remove(&["one", "two", "three"]);
        let reached = host.docker(&["exec", "owner", "nc", "-w1", "127.0.0.1", "81"]);
        assert_ne!(reached.code(), 0, "{reached:?}");
    });
    checks.check("when the one that has the VM ends, so do those that have joined it", || {
        let shim = join("one");
        host.docker(&["kill", "owner"]).ok();
        assert_eq!(host.end_of("owner"), "137");
        assert_eq!(host.end_of("one"), "137");
        assert!(!lives(shim));
        assert!(host.docker(&["logs", "one"]).stderr.contains("ended with the one whose VM"));
        let late = host.docker(&["run", "--rm", "--network", "container:owner", "busybox", "true"]);
        assert_eq!(late.code(), 125, "{late:?}");
        host.remove(&["one", "owner"]);
        wait_until("its VM is gone", LIMIT, || host.vms().is_empty());
    });
}

fn come_and_go(checks: &mut Checks, host: &Host) {
    checks.check("a hundred join one after the other, and leave nothing behind", || {
        host.start("owner", &["busybox", "sleep", "1000"]);
        let shim = host.pid("owner");
        let served = || {
            let children = fs::read_to_string(format!("/proc/{shim}/task/{shim}/children")).unwrap();
            let server = children.split_whitespace().next().unwrap();
            fs::read_dir(format!("/proc/{server}/fd")).unwrap().count()
        };
        let counts =
            || ["fd", "task"].map(|kind| fs::read_dir(format!("/proc/{shim}/{kind}")).unwrap().count());
        let round = || {
            let joined = ["run", "--rm", "--network", "container:owner", "busybox", "true"];
            host.docker(&joined).ok();
        };
        (0..3).for_each(|_| round());
        let (before, files) = (counts(), served());
        (0..100).for_each(|_| round());
        let after = counts();
        println!("    {before:?} {after:?}, and {files} {} files for the guest", served());
        // What belongs to the last one may still be on its way to be closed, and threads that wait for work end later.
        wait_until("no more is open than before", LIMIT, || {
            let now = counts();
            now[0] <= before[0] && now[1] <= before[1]
        });
        wait_until("no more files are open for the guest", LIMIT, || served() < files + 20);
        host.remove(&["owner"]);
        wait_until("its VM is gone", LIMIT, || host.vms().is_empty());
    });
}

/// Containers of a pod as containerd's part for Kubernetes makes them, which says by annotations what they are.
struct Pod<'a> {
    host: &'a Host,
    runtime: String,
}

impl Pod<'_> {
    fn run(&self, part: &str, options: &[&str], words: &[&str]) -> Ran {
        let annotation = format!("io.kubernetes.cri.container-type={part}");
        let first = ["run", "--runc-binary", &self.runtime, "--annotation", &annotation];
        let network = ["--with-ns", "network:/run/netns/pod"];
        let named = ["--annotation", "io.kubernetes.cri.sandbox-name=web"];
        self.host.ctr(&[&first[..], &named, &network, options, &[IMAGE], words].concat())
    }

    fn start(&self, name: &str, sandbox: u32, words: &[String]) {
        self.start_with(name, sandbox, &["ipc", "uts"], words);
    }

    /// With these namespaces of the pod's.
    fn start_with(&self, name: &str, sandbox: u32, kinds: &[&str], words: &[String]) {
        let spaces: Vec<_> = kinds.iter().map(|kind| format!("{kind}:/proc/{sandbox}/ns/{kind}")).collect();
        let named = spaces.iter().flat_map(|space| ["--with-ns", space]);
        let options: Vec<&str> = ["--detach"].into_iter().chain(named).collect();
        let words: Vec<&str> = [name].into_iter().chain(words.iter().map(String::as_str)).collect();
        self.run("container", &options, &words).ok();
    }

    /// What a program prints beside the container's own.
    #[track_caller]
    fn told(&self, name: &str, words: &[&str]) -> String {
        self.host.told_by_ctr(&Self::beside(name, words))
    }

    /// Whether a program's words are these.
    fn tells(&self, name: &str, words: &[&str], told: &str) -> bool {
        self.host.ctr(&Self::beside(name, words)).stdout == told
    }

    fn beside<'a>(name: &'a str, words: &[&'a str]) -> Vec<&'a str> {
        [&["tasks", "exec", "--exec-id", "e", name][..], words].concat()
    }

    /// How a container is, in ctr's words, if there is one.
    fn state(&self, name: &str) -> String {
        let list = self.host.ctr(&["tasks", "list"]);
        let line = list.ok().lines().find(|line| line.split_whitespace().next() == Some(name));
        line.and_then(|line| line.split_whitespace().last()).unwrap_or_default().to_owned()
    }

    fn pid(&self, name: &str) -> u32 {
        let list = self.host.ctr(&["tasks", "list"]);
        let line = list.ok().lines().find(|line| line.split_whitespace().next() == Some(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    fn delete(&self, name: &str) {
        self.host.ctr(&["tasks", "delete", "--force", name]);
        self.host.ctr(&["containers", "delete", name]).ok();
    }
}

fn pod(checks: &mut Checks, host: &Host) {
    let runtime = programs().join("catalyst-oci").to_str().unwrap().to_owned();
    let pod = Pod { host, runtime };
    let script = |script: &str| {
        let mut command = host.inside("sh");
        command.args(["-ec", script]);
        ran(command).ok().to_owned()
    };
    let mut sandbox = 0;
    checks.check("a pod's containers have one VM, with network, IPC and names together", || {
        host.import_for_ctr();
        script(NETWORK);
        pod.run("sandbox", &["--detach"], &["pause", "sleep", "1000"]).ok();
        assert!(host.vms().is_empty(), "it needs none yet");
        sandbox = pod.pid("pause");
        pod.start("one", sandbox, &serve("of one", 80));
        pod.start("two", sandbox, &serve("of two", 81));
        assert_eq!(host.vms(), ["web"]);
        wait_until("each is reached from the other", LIMIT, || {
            pod.tells("one", &["wget", "-qO-", &fetch(81)], "of two\n")
                && pod.tells("two", &["wget", "-qO-", &fetch(80)], "of one\n")
        });
        for space in ["net", "ipc", "uts"] {
            let link = ["busybox".to_owned(), "readlink".to_owned(), format!("/proc/self/ns/{space}")];
            let link: Vec<&str> = link.iter().map(String::as_str).collect();
            assert_eq!(pod.told("one", &link), pod.told("two", &link), "{space}");
        }
        for space in ["pid", "mnt", "cgroup"] {
            let link = ["busybox".to_owned(), "readlink".to_owned(), format!("/proc/self/ns/{space}")];
            let link: Vec<&str> = link.iter().map(String::as_str).collect();
            assert_ne!(pod.told("one", &link), pod.told("two", &link), "{space}");
        }
        assert_eq!(script("ping -c1 -w60 10.99.0.2 >/dev/null && echo reached"), "reached");
    });
    checks.check("one that ends and starts anew leaves the others alone, also the pod's first", || {
        let before = pod.told("two", &["cat", "/proc/sys/kernel/random/boot_id"]);
        host.ctr(&["tasks", "kill", "--signal", "SIGKILL", "one"]).ok();
        wait_until("it has ended", LIMIT, || pod.state("one") == "STOPPED");
        pod.delete("one");
        pod.start("one", sandbox, &serve("of one anew", 80));
        wait_until("it serves", LIMIT, || pod.tells("two", &["wget", "-qO-", &fetch(80)], "of one anew\n"));
        assert_eq!(pod.told("one", &["cat", "/proc/sys/kernel/random/boot_id"]), before);
    });
    checks.check("containers that have the pod's processes see each other's, and leave none", || {
        let kinds = ["ipc", "uts", "pid"];
        let words = |script: &str| ["sh", "-c", script].map(str::to_owned);
        pod.start_with("three", sandbox, &kinds, &words("sleep 777 & exec sleep 888"));
        pod.start_with("four", sandbox, &kinds, &words("exec sleep 999"));
        let seen = || pod.told("four", &["busybox", "ps"]);
        let all = seen();
        assert!(["sleep 777", "sleep 888", "sleep 999"].iter().all(|one| all.contains(one)), "{all}");
        assert!(!pod.told("one", &["busybox", "ps"]).contains("sleep"), "one is by itself");
        host.ctr(&["tasks", "kill", "--signal", "SIGKILL", "three"]).ok();
        wait_until("it has ended", LIMIT, || pod.state("three") == "STOPPED");
        pod.delete("three");
        let left = seen();
        assert!(!left.contains("sleep 777") && left.contains("sleep 999"), "{left}");
        pod.delete("four");
    });
    checks.check("a VM that ends takes its containers along; the next has another", || {
        let process = host.world.vm_pid("web").unwrap();
        run(Command::new("kill").args(["-9", &process.to_string()]));
        for name in ["one", "two"] {
            wait_until("it has ended", LIMIT, || pod.state(name) == "STOPPED");
            pod.delete(name);
        }
        wait_until("its VM is gone", LIMIT, || host.vms().is_empty());
        assert_eq!(pod.state("pause"), "RUNNING");
        pod.start("one", sandbox, &serve("of another VM", 80));
        wait_until("it serves", LIMIT, || pod.tells("one", &["wget", "-qO-", &fetch(80)], "of another VM\n"));
        assert_eq!(host.vms(), ["web"]);
    });
    checks.check(
        "a pod whose files are served no more ends its containers and its VM; the next has another",
        || {
            let children = fs::read_to_string(format!("/proc/{sandbox}/task/{sandbox}/children")).unwrap();
            run(Command::new("kill").args(["-9", children.split_whitespace().next().unwrap()]));
            wait_until("it has ended", LIMIT, || pod.state("one") == "STOPPED");
            pod.delete("one");
            wait_until("its VM is gone", LIMIT, || host.vms().is_empty());
            pod.start("one", sandbox, &serve("of a third VM", 80));
            wait_until("it serves", LIMIT, || {
                pod.tells("one", &["wget", "-qO-", &fetch(80)], "of a third VM\n")
            });
        },
    );
    checks.check("a pod that ends has its containers end, and its VM go", || {
        host.ctr(&["tasks", "kill", "--signal", "SIGKILL", "pause"]).ok();
        for name in ["pause", "one"] {
            wait_until("it has ended", LIMIT, || pod.state(name) == "STOPPED");
            pod.delete(name);
        }
        wait_until("its VM is gone", LIMIT, || host.vms().is_empty());
        script("ip netns del pod");
    });
}
