//! A clean Debian, built once and kept, below what a test writes to it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use catalyst_tests::World;
use catalyst_tests::world::{Ran, ran, run};

use crate::common::{debian_built, kept, sources};

/// See the module. It is a folder that programs are run in by chroot(2), in the world's network, which has loopback alone.
pub struct Debian<'a> {
    world: &'a World,
    root: PathBuf,
}

impl<'a> Debian<'a> {
    /// One with what `debs` depend on.
    pub fn new(world: &'a World, debs: &[PathBuf]) -> Self {
        let base = base(debs);
        let [root, upper, work] = ["debian", "upper", "work"].map(|name| world.path(name));
        for folder in [&root, &upper, &work] {
            fs::create_dir(folder).unwrap();
        }
        let layers =
            format!("lowerdir={},upperdir={},workdir={}", base.display(), upper.display(), work.display());
        run(Command::new("mount").args(["-t", "overlay", "-o", &layers, "overlay"]).arg(&root));
        for (kind, name) in [("proc", "proc"), ("tmpfs", "run"), ("tmpfs", "tmp")] {
            run(Command::new("mount").args(["-t", kind, kind]).arg(root.join(name)));
        }
        run(Command::new("mount").args(["--bind", "/dev"]).arg(root.join("dev")));
        // As Debian's installer leaves it.
        fs::write(root.join("etc/hosts"), "127.0.0.1\tlocalhost\n::1\tlocalhost\n").unwrap();
        Self { world, root }
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Runs a line of the shell in it.
    pub fn run(&self, line: &str) -> Ran {
        let mut command = self.world.command("sh");
        // What sysfs shows of networks is that of whoever mounts it.
        let script = "mount -t sysfs none \"$1/sys\" && exec chroot \"$1\" sh -c \"$2\"";
        command.args(["-c", script, "sh"]).arg(&self.root).arg(line);
        for name in ["CATALYST_NO_WARMING", "CATALYST_IMAGE_DIR", "CATALYST_BIN", "TMPDIR"] {
            command.env_remove(name);
        }
        command
            .env("HOME", "/root")
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        ran(command)
    }

    /// The same of one that must succeed, and what it says.
    #[track_caller]
    pub fn ok(&self, line: &str) -> String {
        self.run(line).ok().to_owned()
    }

    /// Installs packages by dpkg.
    #[track_caller]
    pub fn install(&self, debs: &[PathBuf]) {
        for deb in debs {
            fs::copy(deb, self.path("tmp").join(deb.file_name().unwrap())).unwrap();
        }
        self.ok("dpkg -i /tmp/*.deb && rm /tmp/*.deb");
    }

    /// All files in it, without those that are gone with the next boot.
    pub fn files(&self) -> BTreeSet<String> {
        super::files_below(&self.root)
    }

    /// What runs in its network: daemons, VMs, dnsmasq.
    pub fn processes(&self) -> Vec<String> {
        let mut pids = Command::new("ip");
        pids.args(["netns", "pids", self.world.netns()]);
        let pids = ran(pids);
        let names = pids.ok().lines().map(|pid| fs::read_to_string(format!("/proc/{}/comm", pid.trim())));
        names.filter_map(Result::ok).collect()
    }
}

impl Drop for Debian<'_> {
    fn drop(&mut self) {
        // Of a check that failed something may still run.
        let pids = Command::new("ip").args(["netns", "pids", self.world.netns()]).output();
        let pids =
            pids.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        for pid in pids.lines().filter_map(|line| line.trim().parse().ok()) {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        let _ = Command::new("umount").args(["--recursive", "--lazy"]).arg(&self.root).status();
    }
}

/// The Debian below, by what it is made from.
fn base(debs: &[PathBuf]) -> PathBuf {
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/clean-debian");
    let sources = sources();
    let mut packages: BTreeSet<String> = debs.iter().flat_map(|deb| depends(deb)).collect();
    packages.remove("catalyst");
    // For the test itself.
    packages.insert("iproute2".to_owned());
    let packages = packages.into_iter().collect::<Vec<_>>().join(",");
    let key =
        [&fs::read_to_string(recipe).unwrap(), &packages, &sources.join("\n")].map(String::as_str).concat();
    let folder = kept("clean", &key, |folder| {
        let mut build = Command::new(recipe);
        build.arg(folder).arg(&packages).args(&sources);
        debian_built(build);
    });
    folder.join("root")
}

/// Names of the packages that one depends on.
fn depends(deb: &Path) -> Vec<String> {
    let mut field = Command::new("dpkg-deb");
    field.arg("--field").arg(deb).arg("Depends");
    ran(field).ok().split(',').filter_map(|word| Some(word.split_whitespace().next()?.to_owned())).collect()
}
