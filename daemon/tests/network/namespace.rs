//! Network namespaces of the tests' own: nothing a test does is seen by the machine, and all of it goes with the test.

use std::fs::{self, File};
use std::future::Future;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use catalyst_daemon::network::{Lease, Network, NetworkConfig};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace; it exists as long as this is open, or anything runs in it.
pub struct Namespace {
    file: File,
}

impl Namespace {
    /// A new one: its loopback is up, and it does not forward, whatever the machine does of which it has its settings.
    pub fn new() -> Self {
        let file = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        let namespace = Self { file: file.join().unwrap() };
        namespace.run("ip link set lo up && echo 0 > /proc/sys/net/ipv4/ip_forward");
        namespace
    }

    /// A path that names it, for `ip`.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// Runs `work` on a thread inside.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            setns(&self.file, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        };
        let result = std::thread::scope(|scope| scope.spawn(inside).join());
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// A shell command inside, not yet started.
    pub fn command(&self, line: &str) -> Command {
        let file = self.file.try_clone().unwrap();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", line]).stdin(Stdio::null()).env("LC_ALL", "C");
        // SAFETY: setns is a plain system call.
        unsafe {
            command.pre_exec(move || Ok(setns(&file, CloneFlags::CLONE_NEWNET)?));
        }
        command
    }

    /// Runs a shell command inside, whatever it answers.
    pub fn try_run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    /// Runs a shell command inside and returns what it prints; it must succeed.
    pub fn run(&self, line: &str) -> String {
        let output = self.try_run(line);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {said}{}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Processes that live inside, but for this one.
    pub fn processes(&self) -> Vec<i32> {
        let own = self.file.metadata().unwrap();
        let pids = fs::read_dir("/proc").unwrap().flatten();
        pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| *pid != std::process::id().cast_signed())
            .filter(|pid| {
                fs::metadata(format!("/proc/{pid}/ns/net"))
                    .is_ok_and(|ns| (ns.dev(), ns.ino()) == (own.dev(), own.ino()))
            })
            .collect()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The namespace is ours alone, so what still runs in it was started for this test.
        for pid in self.processes() {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
}

/// A machine of the test's: a namespace, and a folder for state and another for what is root's.
pub struct Host {
    pub namespace: Namespace,
    folder: tempfile::TempDir,
}

impl Host {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        // dnsmasq reads its files as a user of its own.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Self { namespace: Namespace::new(), folder }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn run_dir(&self) -> PathBuf {
        self.folder().join("run")
    }

    /// The configuration of a daemon with that state folder.
    pub fn config(&self, state: &str) -> NetworkConfig {
        NetworkConfig { run_dir: self.run_dir(), ..NetworkConfig::new(self.folder().join(state)) }
    }

    /// Runs `work` inside, in a runtime of its own.
    pub fn block_on<T: Send, F: Future<Output = T>>(&self, work: impl FnOnce() -> F + Send) -> T {
        self.namespace.inside(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(work())
        })
    }

    /// Everything of the machine that a network could change, as text.
    pub fn traces(&self) -> String {
        let text = self.namespace.run(
            "ip -j address; ip -j route show table all; ip -j rule; nft list ruleset; ip -j neighbour;
             cd /proc/sys/net/ipv4; grep . ip_forward conf/*/forwarding conf/*/accept_redirects",
        );
        let processes = self.namespace.processes();
        text + &format!("\nprocesses {processes:?}\n{}", tree(&self.run_dir()))
    }

    /// A guest on the bridge, without address; its cable in this namespace is `port`.
    pub fn guest(&self, network: &Network, port: &str, lease: &Lease) -> Namespace {
        let guest = Namespace::new();
        let (path, mac, bridge) = (guest.path(), lease.mac, network.bridge());
        self.namespace.run(&format!(
            "ip link add {port} type veth peer name eth0 address {mac} netns {path} &&
             ip link set {port} master {bridge} up"
        ));
        guest.run("ip link set eth0 up");
        guest
    }

    /// Asks for an address as a guest, by DHCP, and takes what comes. What udhcpc was told, if it was.
    pub fn dhcp(&self, guest: &Namespace, more: &str) -> Option<String> {
        let script = self.folder().join("udhcpc.sh");
        let text = "#!/bin/sh\n[ \"$1\" = bound ] || exit 0\n\
                    ip address replace $ip/$mask dev $interface\nip route replace default via $router\n\
                    echo ip=$ip mask=$mask router=$router dns=$dns domain=$domain search=$search\n";
        if !script.exists() {
            fs::write(&script, text).unwrap();
            fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let line = format!("busybox udhcpc -n -q -f -t 4 -T 1 -i eth0 -s {} {more} 2>&1", script.display());
        let output = guest.try_run(&line);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        output.status.success().then(|| said.lines().find(|line| line.starts_with("ip=")).unwrap().to_owned())
    }
}

/// A file that this thread, and what it starts, does not find or finds replaced, as long as this lives.
pub struct Hidden {
    path: String,
}

impl Hidden {
    pub fn new(path: &str) -> Self {
        Self::behind(path, Path::new("/dev/null"))
    }

    /// `other` in its place.
    pub fn behind(path: &str, other: &Path) -> Self {
        // The thread's own mounts, of which the machine sees nothing.
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        // Where the file is a link, what it leads to.
        let path = fs::canonicalize(path).unwrap().to_str().unwrap().to_owned();
        if path.starts_with("/dev/") {
            let folder = Path::new(&path).parent().unwrap();
            mount(None::<&str>, folder, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
            return Self { path: folder.to_str().unwrap().to_owned() };
        }
        mount(Some(other), path.as_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        Self { path }
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = nix::mount::umount(self.path.as_str());
    }
}

/// Waits until a tap is gone whose last descriptor this process has closed. Where several tests run as threads, a
/// child that another one is about to start has a copy for a moment, between fork and exec; no event tells its end.
pub async fn vanished(host: &Host, tap: &str) {
    let began = std::time::Instant::now();
    while host.namespace.try_run(&format!("ip link show {tap}")).status.success() {
        assert!(began.elapsed().as_secs() < 5, "{tap} is still there");
        tokio::task::yield_now().await;
    }
}

/// What the guest finds for a name, asking `server`.
pub fn resolve(guest: &Namespace, server: impl std::fmt::Display, name: &str) -> Option<String> {
    let output = guest.try_run(&format!("busybox nslookup -type=a {name} {server}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut lines = said.lines().skip_while(|line| !line.starts_with("Name:"));
    lines.nth(1)?.strip_prefix("Address:").map(|address| address.trim().to_owned())
}

/// Waits until the guest finds `expected` for a name, or nothing any more. dnsmasq hears of changes by a signal: a
/// question that lies before it when the signal comes is still answered from what it knew.
pub async fn comes_to(guest: &Namespace, server: impl std::fmt::Display, name: &str, expected: Option<&str>) {
    let began = std::time::Instant::now();
    loop {
        let found = resolve(guest, &server, name);
        if found.as_deref() == expected {
            return;
        }
        assert!(began.elapsed().as_secs() < 3, "{name} is {found:?} and not {expected:?}");
        tokio::task::yield_now().await;
    }
}

/// The files and folders below `folder`, but for the lock and the claims, which stay.
fn tree(folder: &Path) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if ["network.lock", "claims"].contains(&name.as_str()) {
            continue;
        }
        if !name.starts_with("netns-") {
            text += &path.display().to_string();
            text += "\n";
        }
        text += &tree(&path);
    }
    text
}

/// Why network tests cannot run here, if they cannot; said on standard output.
pub fn cannot_run() -> bool {
    let missing = |program: &&str| {
        let folders = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
        !folders.iter().any(|folder| Path::new(folder).join(program).exists())
    };
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: only root can make network namespaces");
        return true;
    }
    if let Some(program) = ["ip", "nft", "dnsmasq", "busybox", "ss"].iter().find(|p| missing(p)) {
        println!("SKIPPED: {program} is not installed");
        return true;
    }
    false
}
