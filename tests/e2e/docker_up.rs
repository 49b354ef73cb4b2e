//! `catalyst docker up`: a real Docker daemon of our own, whose containers are VMs.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use catalyst_tests::world::{HANG, long_enough, programs, ran, run};
use catalyst_tests::{Checks, Ran, World, skip};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::common::{lives, signal, vm, wait_until};

/// Debian's `news`, who is in no group of Docker's.
const OWNER: u32 = 9;
/// How long what takes a VM may take here: a limit against hanging.
const LIMIT: Duration = HANG;
/// Sends datagrams back. Perl is essential in Debian, and its busybox has nothing for UDP.
const ECHO: &str = "$s = IO::Socket::INET->new(LocalPort => 53, Proto => 'udp') or die; \
                    while ($s->recv($d, 99)) { $s->send($d) }";
/// Busybox's programs in the image.
const APPLETS: [&str; 5] = ["sh", "echo", "sleep", "httpd", "mkdir"];

/// The group.
pub fn docker_up(checks: &mut Checks) {
    let tools = programs().join("firewall-tools");
    if !tools.join("usr/sbin/dockerd").exists() {
        skip("Docker's daemon is not in target/release/firewall-tools (make firewall-tools)");
    }
    if !World::empty().images.join("micro/current").exists() {
        skip("the image micro is not built (make image)");
    }
    checks.check("an owner who is not root's equal is refused, and told how", refused);
    let mut host = Host::new(&tools);
    checks.check("it comes up once, and tells where it is", || comes_up(&host));
    checks.check("a container of it is a VM, and prints", || runs(&host));
    checks.check("it is apart from what else the host has", || apart(&host));
    checks.check("its published ports are the host's", || published(&host));
    checks.check("it and its containers outlive a killed daemon of ours", || outlives(&mut host));
    checks.check("its end is noticed, and leaves nothing", || ends(&host));
    checks.check("down ends it with its containers, and what they wrote stays", || goes_down(&host));
}

fn refused() {
    let world = World::owned_by(OWNER);
    let error = world.catalyst(&["docker", "up"]);
    assert!(error.error(1).contains("sudo catalyst docker up"), "{error:?}");
    assert_eq!(world.curl("GET", "/v1/docker", None).json()["up"], false);
    let error = world.catalyst(&["docker", "env"]);
    assert!(error.error(1).contains("catalyst docker up"), "{error:?}");
    if Path::new("/usr/sbin/dockerd").exists() || Path::new("/usr/bin/dockerd").exists() {
        return;
    }
    // Root may, were there one.
    let error = crate::common::v1_error(&world.curl("POST", "/v1/docker", None), "host_unfit");
    assert!(error.contains("sudo apt install docker.io"), "{error}");
}

/// A world whose daemon finds Docker's programs in `/usr`.
struct Host {
    world: World,
    root: PathBuf,
    client: PathBuf,
}

impl Host {
    fn new(tools: &Path) -> Self {
        let mut world = World::empty();
        let lay = format!("mount -t overlay -o lowerdir={}/usr:/usr overlay /usr", tools.display());
        let script = format!("{lay} && exec \"$@\"");
        // In the machine's mounts, not those of `ip netns exec`, where /sys has no control groups.
        let own = format!("--mount=/proc/{}/ns/mnt", std::process::id());
        let words = ["nsenter", &own, "unshare", "--mount", "sh", "-c", &script, "sh"];
        world.wrapper = words.map(Into::into).to_vec();
        world.start_daemon();
        let root = world.path("docker");
        fs::create_dir(&root).unwrap();
        Self { world, root, client: tools.join("usr/bin/docker") }
    }

    fn status(&self) -> Value {
        serde_json::from_str(self.world.catalyst(&["docker", "status", "--json"]).ok()).unwrap()
    }

    fn pid(&self) -> u32 {
        self.status()["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).expect("it is up")
    }

    /// Runs `docker ARGS` as a shell does that has evaluated what `catalyst docker env` prints.
    fn docker(&self, args: &[&str]) -> Ran {
        let env = self.world.catalyst(&["docker", "env", "--shell", "sh"]);
        let script = format!("{}\nexec timeout {} \"$@\"", env.ok(), long_enough());
        let mut command = self.world.command("sh");
        command.args(["-c", &script, "sh"]).arg(&self.client).args(args).env("HOME", &self.root);
        ran(command)
    }

    fn import_image(&self) {
        let image = self.root.join("image");
        fs::create_dir_all(image.join("bin")).unwrap();
        fs::copy("/bin/busybox", image.join("bin/busybox")).unwrap();
        for applet in APPLETS {
            symlink("busybox", image.join("bin").join(applet)).unwrap();
        }
        for folder in ["lib", "lib64"] {
            symlink(format!("usr/{folder}"), image.join(folder)).unwrap();
        }
        let archive = self.root.join("image.tar");
        run(Command::new("tar").arg("-C").arg(&image).arg("-cf").arg(&archive).arg("."));
        self.docker(&["import", archive.to_str().unwrap(), "busybox"]).ok();
    }

    fn vms(&self) -> Vec<String> {
        self.world.catalyst(&["vm", "list", "-q"]).ok().lines().map(str::to_owned).collect()
    }

    /// No process, VM, interface, cgroup and socket of it is there.
    fn check_gone(&self) {
        wait_until("no VM is left", LIMIT, || self.vms().is_empty());
        let state = self.world.state_dir();
        assert!(!state.join("docker.sock").exists(), "its socket is left");
        let mounts = fs::read_dir("/proc").unwrap().flatten().map(|process| process.path().join("mountinfo"));
        let of_world = self.namespace();
        let mounted: Vec<_> = mounts
            .filter(|path| {
                fs::read_to_string(path).is_ok_and(|text| text.contains(&format!("{of_world}/docker/")))
            })
            .collect();
        assert!(mounted.is_empty(), "{mounted:?}");
        let mut links = self.world.command("ip");
        links.args(["-brief", "link"]);
        assert!(!ran(links).ok().contains("cattap"), "an interface is left");
        let mut cgroups = Command::new("find");
        let name = Path::new(&of_world).file_name().unwrap().to_str().unwrap();
        cgroups.args(["/sys/fs/cgroup", "-name", &format!("catalyst-docker-{name}-*")]);
        assert_eq!(ran(cgroups).stdout, "", "a cgroup is left");
    }

    /// The folder of this world's network namespace below /run/catalyst.
    fn namespace(&self) -> String {
        let mut find = Command::new("grep");
        find.args(["-rl", "--", self.world.state_dir().to_str().unwrap(), "/run/catalyst"]);
        let found = ran(find).stdout;
        let claim = found.lines().find(|path| path.contains("/claims/")).expect("the network is up");
        claim.split("/claims/").next().unwrap().to_owned()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.world.catalyst(&["docker", "down"]);
    }
}

fn comes_up(host: &Host) {
    let started = Instant::now();
    let up = host.world.catalyst(&["docker", "up"]);
    up.ok();
    println!("    docker up: {:.1} s", started.elapsed().as_secs_f32());
    let pid = host.pid();
    let again = host.world.catalyst(&["docker", "up"]);
    again.ok();
    assert!(again.stderr.contains("is up already"), "{again:?}");
    assert_eq!(host.pid(), pid);
    let status = host.world.catalyst(&["docker", "status"]);
    let socket = host.world.state_dir().join("docker.sock");
    for word in ["up", socket.to_str().unwrap(), "docker.log"] {
        assert!(status.ok().contains(word), "{status:?}");
    }
    let found = socket.metadata().unwrap();
    assert_eq!((found.mode() & 0o777, found.uid()), (0o600, 0));
    let refused = host.world.curl("DELETE", "/v1/network", None);
    assert!(crate::common::v1_error(&refused, "in_use").contains("catalyst docker down"), "{refused:?}");
}

fn runs(host: &Host) {
    host.import_image();
    let started = Instant::now();
    assert_eq!(host.docker(&["run", "--rm", "busybox", "echo", "hi"]).ok(), "hi");
    println!("    docker run: {:.1} s", started.elapsed().as_secs_f32());
    // It does not heed the request to end, so that `docker down` waits.
    let run = ["run", "--detach", "--name", "web1", "--restart", "always", "--stop-timeout", "1"];
    host.docker(&[&run[..], &["busybox", "sleep", "1000"]].concat()).ok();
    wait_until("it alone is a VM", LIMIT, || host.vms() == ["web1"]);
    assert_eq!(vm(&host.world, "web1")["container"]["image"], "busybox");
}

/// No bridge of Docker's, none of its chains and nothing in `/run` are the host's.
fn apart(host: &Host) {
    let mut links = host.world.command("ip");
    links.args(["-brief", "address"]);
    let links = ran(links);
    assert!(!links.ok().contains("docker0") && !links.ok().contains("172.17."), "{links:?}");
    let mut rules = host.world.command("nft");
    rules.args(["list", "ruleset"]);
    let rules = ran(rules);
    assert!(!rules.ok().contains("DOCKER"), "{rules:?}");
    for folder in ["/run/containerd", "/run/catalyst/docker", "/etc/docker"] {
        let there = format!("/proc/{}/root{folder}", host.pid());
        let device = |path: &str| fs::metadata(path).unwrap().dev();
        assert_ne!(device(folder), device(&there), "{folder}");
    }
}

fn published(host: &Host) {
    let serve = "mkdir /www; echo page >/www/index.html; exec httpd -f -h /www";
    let run = ["run", "--detach", "--publish", "8099:80", "--publish", "127.0.0.1:8098:80"];
    host.docker(&[&run[..], &["--name", "site", "busybox", "sh", "-c", serve]].concat()).ok();
    let run = ["run", "--detach", "--publish", "8097:53/udp", "--volume", "/usr:/usr:ro", "--name", "echo"];
    host.docker(&[&run[..], &["busybox", "/usr/bin/perl", "-MIO::Socket::INET", "-e", ECHO]].concat()).ok();
    let ask = |port: u16| {
        let mut curl = host.world.command("curl");
        curl.args(["-s", "--max-time", "5"]).arg(format!("http://localhost:{port}/"));
        ran(curl).stdout
    };
    wait_until("both ports answer", LIMIT, || ask(8099) == "page\n" && ask(8098) == "page\n");
    // Docker's daemon itself finds it too, as a registry that is a container.
    let mut curl = Command::new("nsenter");
    curl.arg(format!("--net=/proc/{}/ns/net", host.pid())).args(["curl", "-s", "http://localhost:8099/"]);
    assert_eq!(ran(curl).stdout, "page\n");
    wait_until("a datagram comes back", LIMIT, || {
        let mut datagram = host.world.command("timeout");
        let ask = "exec 3<>/dev/udp/127.0.0.1/8097; echo datagram >&3; head -n1 <&3";
        datagram.args(["5", "bash", "-c", ask]);
        ran(datagram).stdout == "datagram\n"
    });
    let taken = host.docker(&["run", "--rm", "--publish", "8099:80", "busybox", "echo", "no"]);
    assert!(taken.code() == 125 && taken.stderr.contains("8099"), "{taken:?}");
    // One that a program of the host has, which Docker's daemon cannot know.
    let taken = host.docker(&["run", "--rm", "--publish", "8080:80", "busybox", "echo", "no"]);
    assert!(taken.stderr.contains("8080") && taken.stderr.contains("in use"), "{taken:?}");
    host.docker(&["rm", "--force", "site", "echo"]).ok();
    assert_eq!(ask(8099), "");
}

fn outlives(host: &mut Host) {
    let (pid, shim) = (host.pid(), host.docker(&["inspect", "--format", "{{.State.Pid}}", "web1"]));
    host.world.kill_daemon();
    host.world.start_daemon();
    assert_eq!(host.pid(), pid);
    assert_eq!(host.docker(&["inspect", "--format", "{{.State.Pid}}", "web1"]).ok(), shim.ok());
    assert_eq!(host.docker(&["exec", "web1", "echo", "there"]).ok(), "there");
    assert_eq!(host.docker(&["run", "--rm", "busybox", "echo", "new"]).ok(), "new");
}

fn ends(host: &Host) {
    let pid = host.pid();
    signal(pid, Signal::SIGKILL);
    wait_until("its end is noticed", LIMIT, || host.status()["up"] == false);
    assert!(host.status()["reason"].as_str().unwrap().contains("ended by itself"));
    let error = host.world.catalyst(&["docker", "env"]);
    assert!(error.error(1).contains("ended by itself"), "{error:?}");
    host.check_gone();
    // What is to run always does again.
    host.world.catalyst(&["docker", "up"]).ok();
    wait_until("its container runs again", LIMIT, || host.vms() == ["web1"]);
}

fn goes_down(host: &Host) {
    host.docker(&["run", "--name", "kept", "busybox", "mkdir", "/made"]).ok();
    let pid = host.pid();
    let started = Instant::now();
    host.world.catalyst(&["docker", "down"]).ok();
    println!("    docker down: {:.1} s", started.elapsed().as_secs_f32());
    assert!(!lives(pid));
    host.check_gone();
    let again = host.world.catalyst(&["docker", "down"]);
    again.ok();
    assert!(again.stderr.contains("is not up"), "{again:?}");
    host.world.catalyst(&["docker", "up"]).ok();
    assert!(host.docker(&["diff", "kept"]).ok().contains("A /made"));
    host.world.catalyst(&["docker", "down"]).ok();
    host.world.catalyst(&["network", "down"]).ok();
}
