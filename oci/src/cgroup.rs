//! The cgroup of a container, in every hierarchy there is, version 1 and 2 (cgroups(7)): shim, server of trees and VM are in it, so
//! that engines count what the container uses as they do with others.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oci_spec::runtime::LinuxResources;
use serde_json::{Value, json};

use crate::failure::{Outcome, Tried, said};

/// What a VM's process takes besides the guest's memory, in bytes: QEMU about 160 MiB with the code that it translates.
const RESERVE: u64 = 256 << 20;
/// How long the last process may take to end.
const EMPTY_LIMIT: Duration = Duration::from_secs(5);

/// A mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    /// Controllers of version 1, or the name; none in version 2.
    controllers: Vec<String>,
}

/// A cgroup: its folder in each hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    folders: Vec<PathBuf>,
}

/// Where a container's cgroup is to be.
#[derive(Debug)]
pub struct Plan(Vec<(Hierarchy, PathBuf)>);

impl Plan {
    /// As `linux.cgroupsPath` says, or of its own.
    pub fn new(path: Option<&Path>, id: &str, systemd: bool) -> Outcome<Self> {
        let mounts =
            fs::read_to_string("/proc/self/mountinfo").tried(|| "read what is mounted".to_owned())?;
        let own = fs::read_to_string("/proc/self/cgroup").tried(|| "read the own cgroup".to_owned())?;
        let places = hierarchies(&mounts).into_iter().map(|hierarchy| {
            let below = place(path, id, systemd, &own_path(&own, &hierarchy))?;
            Ok((hierarchy, below))
        });
        places.collect::<Outcome<_>>().map(Self)
    }

    /// The cgroup, whether it is there or not.
    pub fn cgroup(&self) -> Cgroup {
        Cgroup { folders: self.0.iter().map(|(hierarchy, below)| hierarchy.mount.join(below)).collect() }
    }

    /// Makes it.
    pub fn make(&self) -> Outcome {
        self.0.iter().try_for_each(|(hierarchy, below)| {
            let made = make_folder(hierarchy, below);
            made.tried(|| format!("make the cgroup {}", hierarchy.mount.join(below).display()))
        })
    }
}

impl Cgroup {
    /// The cgroup with these folders.
    pub fn with(folders: Vec<PathBuf>) -> Self {
        Self { folders }
    }

    /// Its folders.
    pub fn folders(&self) -> &[PathBuf] {
        &self.folders
    }

    /// Puts a process into it.
    pub fn join(&self, pid: u32) -> Outcome {
        self.folders.iter().try_for_each(|folder| {
            let file = folder.join("cgroup.procs");
            fs::write(&file, pid.to_string()).tried(|| format!("put process {pid} into {}", folder.display()))
        })
    }

    /// Puts limits into effect; the one of memory is the VM's, so that the host's is as much more as its monitor takes.
    pub fn apply(&self, resources: &LinuxResources, memory_mib: Option<u64>) -> Outcome {
        if let Some(cpu) = resources.cpu() {
            if let Some(shares) = cpu.shares().filter(|shares| *shares > 0) {
                self.set(&[("cpu.shares", shares.to_string()), ("cpu.weight", weight(shares).to_string())])?;
            }
            let period = cpu.period().filter(|period| *period > 0);
            let quota = cpu.quota().filter(|quota| *quota != 0);
            if period.is_some() || quota.is_some() {
                self.set_quota(quota, period)?;
            }
            let named = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
            for (file, value) in [("cpuset.cpus", named(cpu.cpus())), ("cpuset.mems", named(cpu.mems()))] {
                if let Some(value) = value {
                    self.set(&[(file, value)])?;
                }
            }
        }
        if let Some(mib) = memory_mib {
            let limit = ((mib << 20) + RESERVE).to_string();
            self.set(&[("memory.limit_in_bytes", limit.clone()), ("memory.max", limit)])?;
        }
        Ok(())
    }

    fn set_quota(&self, quota: Option<i64>, period: Option<u64>) -> Outcome {
        let v2 = quota.filter(|quota| *quota > 0).map_or_else(|| "max".to_owned(), |quota| quota.to_string());
        let v2 = period.map_or_else(|| v2.clone(), |period| format!("{v2} {period}"));
        if let Some(period) = period {
            self.set(&[("cpu.cfs_period_us", period.to_string())])?;
        }
        if let Some(quota) = quota {
            self.set(&[("cpu.cfs_quota_us", quota.to_string())])?;
        }
        self.set(&[("cpu.max", v2)])
    }

    /// Writes to those of the files that are there; where none is, the host lacks the controller.
    fn set(&self, files: &[(&str, String)]) -> Outcome {
        for (name, value) in files {
            for path in self.folders.iter().map(|folder| folder.join(name)).filter(|path| path.exists()) {
                fs::write(&path, value).tried(|| format!("write {value} to {}", path.display()))?;
            }
        }
        Ok(())
    }

    fn read(&self, name: &str) -> Option<String> {
        self.folders.iter().find_map(|folder| fs::read_to_string(folder.join(name)).ok())
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.read(name)?.trim().parse().ok()
    }

    /// Its processes.
    pub fn processes(&self) -> BTreeSet<i32> {
        let texts =
            self.folders.iter().filter_map(|folder| fs::read_to_string(folder.join("cgroup.procs")).ok());
        texts.flat_map(|text| text.lines().filter_map(|line| line.parse().ok()).collect::<Vec<_>>()).collect()
    }

    /// Removes it; what is still in it by then is ended.
    pub fn remove(&self) -> Outcome {
        let started = Instant::now();
        let mut left = self.folders.clone();
        loop {
            left.retain(|folder| {
                remove_all(folder).is_err_and(|error| error.kind() != io::ErrorKind::NotFound)
            });
            if left.is_empty() {
                return Ok(());
            }
            if started.elapsed() > EMPTY_LIMIT {
                let names: Vec<_> = left.iter().map(|folder| folder.display().to_string()).collect();
                return said(format!("The cgroup {} has processes that do not end", names.join(", ")));
            }
            if started.elapsed() > EMPTY_LIMIT / 2 {
                for pid in self.processes().into_iter().filter(|pid| *pid > 1) {
                    // It may have ended by now.
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                }
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What it uses, in the form of runc's command `events`.
    pub fn stats(&self) -> Value {
        let v2 = |file: &str, key: &str| -> Option<u64> {
            let text = self.read(file)?;
            text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
        };
        let micro = |key: &str| v2("cpu.stat", key).map(|value| value * 1000);
        let total = self.number("cpuacct.usage").or_else(|| micro("usage_usec"));
        let kernel = self.number("cpuacct.usage_sys").or_else(|| micro("system_usec"));
        let user = self.number("cpuacct.usage_user").or_else(|| micro("user_usec"));
        let usage = self.number("memory.usage_in_bytes").or_else(|| self.number("memory.current"));
        let limit = self.number("memory.limit_in_bytes").or_else(|| self.number("memory.max"));
        let most = self.number("memory.max_usage_in_bytes").or_else(|| self.number("memory.peak"));
        json!({
            "cpu": {
                "usage": {"total": total.unwrap_or(0), "kernel": kernel.unwrap_or(0), "user": user.unwrap_or(0)},
                "throttling": {
                    "periods": v2("cpu.stat", "nr_periods").unwrap_or(0),
                    "throttledPeriods": v2("cpu.stat", "nr_throttled").unwrap_or(0),
                },
            },
            "memory": {"usage": {
                "usage": usage.unwrap_or(0), "limit": limit.unwrap_or(u64::MAX), "max": most.unwrap_or(0),
                "failcnt": self.number("memory.failcnt").unwrap_or(0),
            }},
            "pids": {"current": self.number("pids.current").unwrap_or(0)},
            "blkio": {},
        })
    }
}

/// Weight of version 2 that says what shares of version 1 say, as other runtimes have it: 2 to 262144 becomes 1 to 10000.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// Hierarchies of `/proc/self/mountinfo` (proc(5)), each once.
fn hierarchies(mounts: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mounts.lines() {
        let Some((fields, rest)) = line.split_once(" - ") else { continue };
        let (Some(mount), mut rest) = (fields.split(' ').nth(4), rest.split(' ')) else { continue };
        let kind = rest.next().unwrap_or_default();
        let options = rest.nth(1).unwrap_or_default();
        let controllers: Vec<String> = match kind {
            "cgroup2" => Vec::new(),
            "cgroup" => options
                .split(',')
                .filter(|word| !["rw", "ro", "xattr"].contains(word))
                .map(str::to_owned)
                .collect(),
            _ => continue,
        };
        if !found.iter().any(|known| known.controllers == controllers) {
            found.push(Hierarchy { mount: PathBuf::from(mount), controllers });
        }
    }
    found
}

/// The own cgroup's path in a hierarchy, by `/proc/self/cgroup`.
fn own_path(own: &str, hierarchy: &Hierarchy) -> PathBuf {
    let found = own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let same = match hierarchy.controllers.first() {
            None => controllers.is_empty(),
            Some(first) => controllers.split(',').any(|controller| controller == first),
        };
        same.then(|| path.trim_start_matches('/').to_owned())
    });
    PathBuf::from(found.unwrap_or_default())
}

/// Where a container's cgroup is, below a hierarchy's mount.
fn place(path: Option<&Path>, id: &str, systemd: bool, own: &Path) -> Outcome<PathBuf> {
    let text = path.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
    let parts: Vec<&str> = text.split(':').collect();
    let place = match parts.as_slice() {
        [slice, prefix, name] if systemd || !text.contains('/') => {
            let unit = if prefix.is_empty() { (*name).to_owned() } else { format!("{prefix}-{name}") };
            let is_slice = Path::new(name).extension().is_some_and(|kind| kind == "slice");
            let unit = if is_slice { unit } else { format!("{unit}.scope") };
            slice_path(if slice.is_empty() { "system.slice" } else { slice }).join(unit)
        }
        [""] => own.join(id),
        _ if text.starts_with('/') => PathBuf::from(text.trim_start_matches('/')),
        _ => own.join(&text),
    };
    let inside = place.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if !inside || place.as_os_str().is_empty() {
        return said(format!("{text:?} is no path of a cgroup"));
    }
    Ok(place)
}

/// Where systemd has a slice: `a-b.slice` lies in `a.slice` (systemd.slice(5)).
fn slice_path(slice: &str) -> PathBuf {
    let name = slice.strip_suffix(".slice").unwrap_or(slice);
    let mut path = PathBuf::new();
    if name == "-" {
        return path;
    }
    for (at, _) in name.match_indices('-') {
        path.push(format!("{}.slice", &name[..at]));
    }
    path.join(format!("{name}.slice"))
}

/// Makes the folder and those above it, so that processes can be put into it.
fn make_folder(hierarchy: &Hierarchy, below: &Path) -> io::Result<()> {
    let mut folder = hierarchy.mount.clone();
    for part in below.components() {
        let parent = folder.clone();
        if hierarchy.controllers.is_empty() {
            delegate(&parent);
        }
        folder.push(part);
        match fs::create_dir(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        if hierarchy.controllers.iter().any(|controller| controller == "cpuset") {
            inherit_cpus(&parent, &folder)?;
        }
    }
    Ok(())
}

/// Version 2: has the folder's children be controlled; a controller that cannot be is not there for them.
fn delegate(folder: &Path) {
    let available = fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
    for controller in available.split_whitespace() {
        let _ = fs::write(folder.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

/// Version 1: no process can be put where there are no CPUs.
fn inherit_cpus(parent: &Path, folder: &Path) -> io::Result<()> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        if fs::read_to_string(folder.join(name))?.trim().is_empty() {
            fs::write(folder.join(name), fs::read_to_string(parent.join(name))?.trim())?;
        }
    }
    Ok(())
}

/// Removes a folder with those below it.
fn remove_all(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_all(&entry.path())?;
        }
    }
    fs::remove_dir(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
22 1 0:20 / /sys rw - sysfs sysfs rw
30 22 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
31 22 0:27 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset
32 22 0:27 / /mnt/again rw - cgroup cgroup rw,cpuset
33 22 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
34 22 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
";

    #[test]
    fn hierarchies_are_found_once_each_with_the_own_place_in_them() {
        let found = hierarchies(MOUNTS);
        let shown: Vec<_> =
            found.iter().map(|h| (h.mount.to_str().unwrap(), h.controllers.join(","))).collect();
        let expected = [
            ("/sys/fs/cgroup/cpu,cpuacct", "cpu,cpuacct".to_owned()),
            ("/sys/fs/cgroup/cpuset", "cpuset".to_owned()),
            ("/sys/fs/cgroup/systemd", "name=systemd".to_owned()),
            ("/sys/fs/cgroup/unified", String::new()),
        ];
        assert_eq!(shown, expected);
        let own = "3:cpu,cpuacct:/a\n2:cpuset:/\n1:name=systemd:/s:x\n0::/u\n";
        let places: Vec<_> = found.iter().map(|hierarchy| own_path(own, hierarchy)).collect();
        assert_eq!(places, ["a", "", "s:x", "u"].map(PathBuf::from));
    }

    #[test]
    fn paths_are_as_the_engine_s_driver_means_them() {
        let own = Path::new("own");
        let at = |path: Option<&str>, systemd| place(path.map(Path::new), "id", systemd, own);
        for (path, systemd, expected) in [
            (Some("/docker/abc"), false, "docker/abc"),
            (Some("docker/abc"), false, "own/docker/abc"),
            (None, false, "own/id"),
            (Some("system.slice:docker:abc"), true, "system.slice/docker-abc.scope"),
            (Some("user-1000.slice::abc"), true, "user.slice/user-1000.slice/abc.scope"),
            (Some(":cri:abc"), false, "system.slice/cri-abc.scope"),
            (Some("/a:b/c:d"), false, "a:b/c:d"),
        ] {
            assert_eq!(at(path, systemd).unwrap(), Path::new(expected), "{path:?}");
        }
        for path in ["/../x", "../x", "/"] {
            assert!(at(Some(path), false).is_err(), "{path}");
        }
    }

    #[test]
    fn shares_become_a_weight_over_the_whole_range() {
        assert_eq!([2, 1024, 262_144, 1, u64::MAX].map(weight), [1, 39, 10_000, 1, 10_000]);
    }

    #[test]
    fn limits_are_written_to_the_files_that_are_there() {
        let (old, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["cpu.shares", "cpu.cfs_quota_us", "cpu.cfs_period_us", "memory.limit_in_bytes"] {
            fs::write(old.path().join(name), "").unwrap();
        }
        for name in ["cpu.weight", "cpu.max", "memory.max", "cpuset.cpus"] {
            fs::write(new.path().join(name), "").unwrap();
        }
        let cgroup = Cgroup::with(vec![old.path().to_owned(), new.path().to_owned()]);
        let resources = json!({"cpu": {"shares": 1024, "quota": 50_000, "period": 100_000, "cpus": "0-1"}});
        cgroup.apply(&serde_json::from_value(resources).unwrap(), Some(128)).unwrap();
        let limit = ((128 << 20) + RESERVE).to_string();
        for (name, value) in [
            ("cpu.shares", "1024"),
            ("cpu.cfs_quota_us", "50000"),
            ("cpu.cfs_period_us", "100000"),
            ("memory.limit_in_bytes", &limit),
            ("cpu.weight", "39"),
            ("cpu.max", "50000 100000"),
            ("memory.max", &limit),
            ("cpuset.cpus", "0-1"),
        ] {
            assert_eq!(cgroup.read(name).as_deref(), Some(value), "{name}");
        }
    }

    #[test]
    fn folders_of_version_2_are_made_with_their_controllers_and_removed_with_what_is_below() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cgroup.controllers"), "memory\n").unwrap();
        let plan = Plan(vec![(
            Hierarchy { mount: root.path().to_owned(), controllers: Vec::new() },
            PathBuf::from("docker/c1"),
        )]);
        let cgroup = plan.cgroup();
        assert_eq!(cgroup.folders(), [root.path().join("docker/c1")]);
        cgroup.remove().unwrap();
        plan.make().unwrap();
        plan.make().unwrap();
        assert_eq!(fs::read_to_string(root.path().join("cgroup.subtree_control")).unwrap(), "+memory");
        fs::create_dir(root.path().join("docker/c1/of-the-container")).unwrap();
        cgroup.remove().unwrap();
        assert!(root.path().join("docker").exists() && !root.path().join("docker/c1").exists());
    }

    #[test]
    fn processor_time_of_version_2_is_given_back_in_one_line() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("cpu.max"), "max 100000").unwrap();
        let cgroup = Cgroup::with(vec![folder.path().to_owned()]);
        for (cpu, expected) in [
            (json!({"quota": 20_000, "period": 100_000}), "20000 100000"),
            (json!({"quota": -1}), "max"),
            (json!({"quota": 0, "period": 0}), "max"),
            (json!({"quota": 5_000}), "5000"),
        ] {
            cgroup.apply(&serde_json::from_value(json!({"cpu": cpu})).unwrap(), None).unwrap();
            assert_eq!(cgroup.read("cpu.max").as_deref(), Some(expected), "{cpu}");
        }
    }

    #[test]
    fn use_is_told_of_either_version() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("cpu.stat"), "usage_usec 7\nuser_usec 4\nsystem_usec 3\nnr_periods 2\n")
            .unwrap();
        fs::write(folder.path().join("memory.current"), "4096\n").unwrap();
        fs::write(folder.path().join("memory.max"), "max\n").unwrap();
        let stats = Cgroup::with(vec![folder.path().to_owned()]).stats();
        assert_eq!(stats["cpu"]["usage"]["total"], 7000);
        assert_eq!(stats["cpu"]["throttling"]["periods"], 2);
        assert_eq!(stats["memory"]["usage"]["usage"], 4096);
        assert_eq!(stats["memory"]["usage"]["limit"], u64::MAX);
    }
}
