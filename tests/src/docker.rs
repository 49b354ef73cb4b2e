//! A host whose Docker daemon, Debian's, has the runtime `catalyst-oci`: the world's network namespace, and a mount namespace with
//! the programs of `make firewall-tools`, which are not to be installed.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::world::{HANG, long_enough, programs, ran, run, wait_until};
use crate::{Ran, World, skip};

/// /run of its own, the programs laid over /usr, /sys of this network namespace with the machine's control groups; as long as
/// anything runs in it.
const SYSTEM: &str = r#"
    mkdir "$0/groups"
    mount --rbind /sys/fs/cgroup "$0/groups"
    mount -t sysfs sysfs /sys
    mount --rbind "$0/groups" /sys/fs/cgroup
    mount -t overlay -o "lowerdir=$1/usr:/usr" overlay /usr
    mount -t tmpfs tmpfs /run
    echo 1 > /proc/sys/net/ipv4/ip_forward
    touch "$0/up"
    exec sleep infinity"#;
/// The daemon in it.
const DAEMON: &str = r#"exec dockerd --config-file "$0/docker.json" --data-root "$0/data" --exec-root /run/docker \
    --pidfile /run/docker.pid --host "unix://$0/docker.sock""#;
/// Busybox's programs in the image.
const APPLETS: [&str; 27] = [
    "sh", "cat", "echo", "sleep", "id", "ls", "wget", "httpd", "stty", "env", "hostname", "touch", "mkdir",
    "kill", "seq", "yes", "head", "true", "nslookup", "sysctl", "uname", "tail", "dd", "stat", "date", "nc",
    "test",
];
const CGROUPS: &str = "/sys/fs/cgroup";
/// How long what takes a VM may take: a limit against hanging.
pub const LIMIT: Duration = HANG;
/// Tells the size of the terminal when that is the one of [`Host::terminal`], and what it is in the end. Clients tell it once the
/// program runs.
pub const SIZE: &str =
    r#"for try in $(seq 600); do [ "$(stty size)" = "33 111" ] && break; sleep 0.1; done; stty size"#;

/// A world with both daemons, and an image `busybox`.
#[derive(Debug)]
pub struct Host {
    /// The world.
    pub world: World,
    /// Files of Docker's.
    pub root: PathBuf,
    client: PathBuf,
    system: Child,
    docker: Option<Child>,
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Name of its program's file.
    pub program: String,
    /// Its arguments.
    pub words: Vec<String>,
}

impl Process {
    fn of(pid: u32) -> Option<Self> {
        let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        let program = program.file_name()?.to_str()?.to_owned();
        let words = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let words = words.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
        Some(Self { pid, program, words: words.collect() })
    }

    /// Those of the machine.
    pub fn all() -> impl Iterator<Item = Self> {
        let pids = fs::read_dir("/proc").unwrap().flatten();
        pids.filter_map(|entry| Self::of(entry.file_name().to_str()?.parse().ok()?))
    }

    /// Whether one of its arguments is this, or a path to it.
    pub fn has_word(&self, word: &str) -> bool {
        self.words.iter().any(|each| each.rsplit('/').next() == Some(word))
    }

    /// Whether its environment has the variable, as `NAME=VALUE`.
    pub fn has_variable(&self, variable: &str) -> bool {
        let environment = fs::read(format!("/proc/{}/environ", self.pid)).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|each| each == variable.as_bytes())
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Host {
    /// A host whose Docker daemon has nothing set but the runtime.
    pub fn new() -> Self {
        Self::with(&[])
    }

    /// The same with more settings.
    pub fn with(settings: &[(&str, Value)]) -> Self {
        let tools = programs().join("firewall-tools");
        let client = tools.join("usr/bin/docker");
        if !client.exists() || !tools.join("usr/sbin/dockerd").exists() {
            skip("Docker's daemon is not in target/release/firewall-tools (make firewall-tools)");
        }
        if !programs().join("catalyst-oci").exists() {
            skip("catalyst-oci is not built (make build)");
        }
        let mut world = World::empty();
        if !world.images.join("micro/current").exists() {
            skip("the image micro is not built (make image)");
        }
        let root = world.path("docker");
        fs::create_dir(&root).unwrap();
        let socket = world.state_dir().join("catalyst.sock");
        let runtime = json!({"path": programs().join("catalyst-oci"), "runtimeArgs": ["--socket", socket]});
        let mut config = json!({
            "runtimes": {"catalyst": runtime}, "default-runtime": "catalyst",
            "cgroup-parent": format!("/{}", world.netns()),
        });
        for (name, value) in settings {
            config[*name] = value.clone();
        }
        fs::write(root.join("docker.json"), config.to_string()).unwrap();
        let mut system = Command::new("nsenter");
        system.arg(format!("--net=/run/netns/{}", world.netns()));
        system.args(["unshare", "-m", "sh", "-ec", SYSTEM]).arg(&root).arg(&tools).stdin(Stdio::null());
        let system = system.spawn().unwrap();
        wait_until("the host's system is there", LIMIT, || root.join("up").exists());
        // `ip netns exec` hides the machine's control groups, into which VMs are put.
        world.wrapper =
            ["nsenter", "--target", &system.id().to_string(), "--mount", "--"].map(Into::into).to_vec();
        world.start_daemon();
        let mut host = Self { world, root, client, system, docker: None };
        host.start_docker();
        host.import_image();
        host
    }

    /// A command in the host's namespaces.
    pub fn inside(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.system.id().to_string(), "--mount", "--net", "--", program]);
        // Where `catalyst-oci` is not given it by arguments.
        command.env("CATALYST_SOCKET", self.world.state_dir().join("catalyst.sock"));
        command.env("HOME", &self.root).stdin(Stdio::null());
        command
    }

    /// A path of the host's, whose /run nobody else sees.
    pub fn seen_from_outside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.system.id()))
    }

    /// Starts Docker's daemon, again too.
    pub fn start_docker(&mut self) {
        let log = fs::OpenOptions::new().append(true).create(true).open(self.docker_log()).unwrap();
        let mut docker = self.inside("sh");
        docker.args(["-ec", DAEMON]).arg(&self.root).stdout(log.try_clone().unwrap()).stderr(log);
        let mut docker = docker.spawn().unwrap();
        wait_until("Docker's daemon answers", LIMIT, || {
            let ended = docker.try_wait().unwrap();
            let log = || fs::read_to_string(self.docker_log()).unwrap_or_default();
            assert!(ended.is_none(), "Docker's daemon does not run: {}", log());
            self.docker(&["version"]).status.success()
        });
        self.docker = Some(docker);
    }

    /// Kills Docker's daemon by `kill -9`, and with it its containerd.
    pub fn kill_docker(&mut self) {
        let containerd = PathBuf::from(format!("/proc/{}", self.containerd()));
        if let Some(mut docker) = self.docker.take() {
            docker.kill().unwrap();
            docker.wait().unwrap();
        }
        // The next daemon takes one that has ended and is not reaped yet for one that runs.
        wait_until("containerd has ended", LIMIT, || !containerd.exists());
    }

    /// The log of Docker's daemon.
    pub fn docker_log(&self) -> PathBuf {
        self.root.join("dockerd.log")
    }

    /// The process of Docker's containerd.
    pub fn containerd(&self) -> u32 {
        let file = self.seen_from_outside("/run/docker/containerd/containerd.pid");
        let mut pid = None;
        // There is none, or one that is not written yet, while Docker's daemon starts it.
        wait_until("containerd is there", LIMIT, || {
            pid = fs::read_to_string(&file).ok().and_then(|text| text.trim().parse().ok());
            pid.is_some()
        });
        pid.unwrap()
    }

    fn import_image(&self) {
        let image = self.root.join("image");
        fs::create_dir_all(image.join("bin")).unwrap();
        fs::create_dir_all(image.join("tmp")).unwrap();
        fs::copy("/bin/busybox", image.join("bin/busybox")).unwrap();
        for applet in APPLETS {
            symlink("busybox", image.join("bin").join(applet)).unwrap();
        }
        fs::write(image.join("note"), "no program\n").unwrap();
        let archive = self.root.join("image.tar");
        run(Command::new("tar").arg("-C").arg(&image).arg("-cf").arg(&archive).arg("."));
        self.docker(&["import", archive.to_str().unwrap(), "busybox"]).ok();
    }

    /// Where clients find Docker's daemon.
    pub fn docker_host(&self) -> String {
        format!("unix://{}/docker.sock", self.root.display())
    }

    /// `docker ARGS`, not yet run.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.arg(long_enough()).arg(&self.client).args(["--host", &self.docker_host()]);
        command.args(args).env("HOME", &self.root).stdin(Stdio::null());
        command
    }

    /// Runs `docker ARGS`.
    pub fn docker(&self, args: &[&str]) -> Ran {
        ran(self.command(args))
    }

    /// The same with `input` on its stdin.
    pub fn docker_with_input(&self, args: &[&str], input: &str) -> Ran {
        let mut command = self.command(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // A client that fails does not read all of it, and says why.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        child.wait_with_output().unwrap().into()
    }

    /// The same on a terminal.
    pub fn docker_on_terminal(&self, args: &[&str]) -> Ran {
        ran(self.terminal(args))
    }

    /// The same, not yet run: what it reads is what is typed.
    pub fn terminal(&self, args: &[&str]) -> Command {
        let words = [
            &["stty", "rows", "33", "cols", "111;", "exec"][..],
            &[self.client.to_str().unwrap(), "--host", &self.docker_host()],
            args,
        ];
        let mut command = Command::new("timeout");
        command.args([&long_enough(), "script", "-qec", &words.concat().join(" "), "/dev/null"]);
        command.env("HOME", &self.root).env("SHELL", "/bin/sh").stdin(Stdio::null());
        command
    }

    /// containerd's own client, `ctr`, in a namespace of its own there. The control groups of its containers have that name, too, and
    /// are the machine's.
    pub fn ctr(&self, args: &[&str]) -> Ran {
        let mut command = self.inside("timeout");
        let socket = "/run/docker/containerd/containerd.sock";
        command.args([&long_enough(), "ctr", "--address", socket, "--namespace", self.world.netns()]);
        command.args(args);
        ran(command)
    }

    /// What a program says that `ctr ARGS` runs, which must succeed. Asked again where it says nothing: on a busy machine ctr loses
    /// what a program says that ends at once, whatever the runtime is (runc: 3 of 60 at load 10), since it gives up a FIFO that
    /// is being opened when the end is told.
    #[track_caller]
    pub fn told_by_ctr(&self, args: &[&str]) -> String {
        const TRIES: usize = 20;
        let told = (0..TRIES).map(|_| self.ctr(args).ok().to_owned()).find(|told| !told.is_empty());
        told.unwrap_or_else(|| panic!("ctr {args:?} says nothing"))
    }

    /// Has it know busybox, as `docker.io/library/busybox:latest`.
    pub fn import_for_ctr(&self) {
        let archive = self.root.join("saved.tar");
        self.docker(&["save", "--output", archive.to_str().unwrap(), "busybox"]).ok();
        self.ctr(&["images", "import", archive.to_str().unwrap()]).ok();
    }

    /// Starts a container that stays, of that name.
    pub fn start(&self, name: &str, args: &[&str]) {
        let all = [&["run", "--detach", "--name", name], args].concat();
        self.docker(&all).ok();
    }

    /// A part of what `docker inspect` tells.
    pub fn inspect(&self, name: &str, format: &str) -> String {
        self.docker(&["inspect", "--format", format, name]).ok().to_owned()
    }

    /// The process that is the container to Docker.
    pub fn pid(&self, name: &str) -> u32 {
        self.inspect(name, "{{.State.Pid}}").parse().unwrap()
    }

    /// Waits until a container has ended; its exit code.
    pub fn end_of(&self, name: &str) -> String {
        wait_until("it has ended", LIMIT, || self.inspect(name, "{{.State.Status}}") == "exited");
        self.inspect(name, "{{.State.ExitCode}}")
    }

    /// IDs of the VMs.
    pub fn vms(&self) -> Vec<String> {
        let all = self.world.curl("GET", "/v1/vms", None).json();
        let ids =
            |all: &Vec<Value>| all.iter().filter_map(|vm| Some(vm["id"].as_str()?.to_owned())).collect();
        all.as_array().or_else(|| all["vms"].as_array()).map(ids).unwrap_or_default()
    }

    /// Removes containers.
    pub fn remove(&self, names: &[&str]) {
        self.docker(&[&["rm", "--force", "--volumes"], names].concat()).ok();
    }

    /// Removes all containers; then there is no VM, no process of either, no state of the runtime's, no tree that is mounted, no tap
    /// and no cgroup.
    pub fn check_empty(&self) {
        let ids = self.docker(&["ps", "--all", "--quiet"]);
        for id in ids.ok().lines() {
            self.remove(&[id]);
        }
        wait_until("no VM is left", LIMIT, || self.vms().is_empty());
        let count = |path: &Path| fs::read_dir(path).map_or(0, Iterator::count);
        assert_eq!(count(&self.world.state_dir().join("vms")), 0, "folders of VMs are left");
        // containerd removes what is its own a little later.
        wait_until("no process of a container or VM is left", LIMIT, || self.processes().is_empty());
        wait_until("no cgroup is left", LIMIT, || self.cgroups().is_empty());
        // Docker has that of all runtimes there.
        let state = self.seen_from_outside("/run/docker/runtime-runc/moby");
        assert!(state.exists(), "{}", state.display());
        wait_until("no folder of the runtime's is left", LIMIT, || count(&state) == 0);
        let mounts = fs::read_to_string(format!("/proc/{}/mounts", self.system.id())).unwrap();
        let trees: Vec<&str> = mounts.lines().filter(|line| line.contains("/overlay2/")).collect();
        assert!(trees.is_empty(), "{trees:?}");
        // The kernel takes a network namespace away a little after its last process.
        wait_until("no tap and no cable is left", LIMIT, || {
            let mut links = self.inside("ip");
            links.args(["-brief", "link"]);
            let links = ran(links);
            !links.ok().contains("cattap") && !links.ok().contains("veth")
        });
    }

    /// Processes of containers: what is in their cgroups, and what makes them.
    pub fn processes(&self) -> Vec<Process> {
        let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
        let own = namespace(self.system.id());
        let is_its = |process: &Process| {
            let groups = fs::read_to_string(format!("/proc/{}/cgroup", process.pid)).unwrap_or_default();
            groups.contains(&format!("/{}/", self.world.netns()))
                || (process.program == "catalyst-oci" && namespace(process.pid) == own)
        };
        Process::all().filter(is_its).collect()
    }

    /// Folders of the containers' cgroups.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        let parent = self.world.netns();
        let folders = |path: PathBuf| {
            let entries = fs::read_dir(path).into_iter().flatten().flatten();
            entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect::<Vec<_>>()
        };
        let mut mounts = folders(CGROUPS.into());
        mounts.push(CGROUPS.into());
        mounts.into_iter().flat_map(|mount| folders(mount.join(parent))).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("--- dockerd's log ---\n{}", fs::read_to_string(self.docker_log()).unwrap_or_default());
        }
        for id in self.docker(&["ps", "--all", "--quiet"]).stdout.lines() {
            self.docker(&["rm", "--force", id]);
        }
        if let Some(docker) = &mut self.docker {
            let pid = nix::unistd::Pid::from_raw(docker.id().cast_signed());
            let _ = nix::sys::signal::kill(pid, Signal::SIGTERM);
            let _ = docker.wait();
        }
        let _ = self.system.kill();
        let _ = self.system.wait();
        let mounts = fs::read_dir(CGROUPS).into_iter().flatten().flatten().map(|entry| entry.path());
        for mount in mounts.chain([CGROUPS.into()]) {
            let _ = fs::remove_dir(mount.join(self.world.netns()));
        }
    }
}
