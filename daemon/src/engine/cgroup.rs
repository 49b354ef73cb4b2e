//! Cgroups (cgroups(7)): a process that begins where another one is, in every hierarchy of version 1 and in that of version 2.
//!
//! Where another one is says `/proc/PID/cgroup`, and where the hierarchies are mounted says `/proc/self/mountinfo`. The files to
//! join by are opened before the fork, as root; the child only writes to them, and so nothing of it is ever elsewhere.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, PathBuf};

use rustix::event::{EventfdFlags, eventfd};

use crate::privilege::as_root;

/// Cgroups that a child is about to join.
#[derive(Debug)]
pub struct Cgroups {
    /// Their `cgroup.procs`, for writing.
    files: Vec<File>,
    /// Counts the children that have joined all.
    joined: File,
}

/// A hierarchy as a process's line in `/proc/PID/cgroup` has it, and where the process is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    /// Controllers, or `name=…`; none for version 2.
    controllers: Vec<String>,
    path: PathBuf,
}

/// A part of a hierarchy that is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    /// What of the hierarchy is mounted.
    root: PathBuf,
    point: PathBuf,
    /// Options of the hierarchy, controllers and its name among them; `None` for version 2.
    options: Option<Vec<String>>,
}

impl Cgroups {
    /// Those that the process `pid` is in, opened. What is not mounted here is left out.
    pub fn of_process(pid: u32) -> io::Result<Self> {
        let places = places(&fs::read_to_string(format!("/proc/{pid}/cgroup"))?);
        let mounts = mounts(&fs::read_to_string("/proc/self/mountinfo")?);
        let mut files = Vec::new();
        for place in &places {
            let file = as_root(|| open(place, &mounts));
            if file.is_none() {
                tracing::debug!(pid, ?place, "a cgroup is mounted nowhere here");
            }
            files.extend(file);
        }
        if files.is_empty() && !places.is_empty() {
            tracing::warn!(
                pid,
                "no cgroups are mounted where this daemon runs: a VM stays in its own, without its container's limits"
            );
        }
        let joined = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { files, joined: joined.into() })
    }

    /// Joins them. For a child between fork and exec: makes system calls only.
    pub fn join(&self) -> io::Result<()> {
        // SAFETY: no memory is involved. Kernels before 5.16 ask who writes, not who opened; the change of user follows.
        unsafe {
            libc::setfsuid(0);
            libc::setfsgid(0);
        }
        for mut file in &self.files {
            // The process that writes, whatever its number here is.
            file.write_all(b"0")?;
        }
        (&self.joined).write_all(&1_u64.to_ne_bytes())
    }

    /// Whether a child has joined all of them.
    pub fn were_joined(&self) -> bool {
        (&self.joined).read(&mut [0; 8]).is_ok()
    }
}

/// The lines of `/proc/PID/cgroup`: `number:controllers:path`.
fn places(text: &str) -> Vec<Place> {
    let place = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1);
        let controllers = fields.next()?.split(',').filter(|name| !name.is_empty());
        Some(Place {
            controllers: controllers.map(str::to_owned).collect(),
            path: PathBuf::from(fields.next()?),
        })
    };
    text.lines().filter_map(place).collect()
}

/// Where hierarchies are mounted here.
pub(crate) fn hierarchies() -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts(&text).into_iter().map(|mount| mount.point).collect()
}

/// The mounts of cgroups among the lines of `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
fn mounts(text: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let (mount, system) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (root, point) = (unescaped(mount.next()?), unescaped(mount.next()?));
        let mut system = system.split(' ');
        let options = match system.next()? {
            "cgroup2" => None,
            "cgroup" => Some(system.nth(1)?.split(',').map(str::to_owned).collect()),
            _ => return None,
        };
        Some(Mount { root, point, options })
    };
    text.lines().filter_map(mount).collect()
}

/// A path of mountinfo, where blanks and the like are three octal digits after a backslash.
fn unescaped(text: &str) -> PathBuf {
    let mut parts = text.split('\\');
    let mut path = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code.filter(u8::is_ascii) {
            Some(code) => {
                path.push(char::from(code));
                path.push_str(&part[3..]);
            }
            None => path.push_str(part),
        }
    }
    path.into()
}

fn open(place: &Place, mounts: &[Mount]) -> Option<File> {
    let open = |folder: PathBuf| {
        let path = folder.join("cgroup.procs");
        OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(path).ok()
    };
    mounts.iter().filter_map(|mount| mount.folder_of(place)).find_map(open)
}

impl Mount {
    /// Where a place of a hierarchy is, if it is below what is mounted here.
    fn folder_of(&self, place: &Place) -> Option<PathBuf> {
        let is_its = match &self.options {
            None => place.controllers.is_empty(),
            Some(options) => {
                !place.controllers.is_empty() && place.controllers.iter().all(|name| options.contains(name))
            }
        };
        let below = place.path.strip_prefix(&self.root).ok().filter(|_| is_its)?;
        // Outside of this process's cgroup namespace paths begin with `/..`.
        below.components().all(|part| matches!(part, Component::Normal(_))).then(|| self.point.join(below))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::path::Path;

    use super::*;

    const MOUNTS: &str = "\
        31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
        32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
        35 31 0:32 /box /mnt/a\\040b rw,relatime - cgroup cgroup rw,memory\n\
        40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
        41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n";

    fn folders(line: &str) -> Vec<PathBuf> {
        let place = &places(line)[0];
        mounts(MOUNTS).iter().filter_map(|mount| mount.folder_of(place)).collect()
    }

    #[test]
    fn each_line_of_a_process_leads_to_one_folder() {
        assert_eq!(folders("2:cpu,cpuacct:/d/1:2"), [Path::new("/sys/fs/cgroup/cpu,cpuacct/d/1:2")]);
        assert_eq!(folders("3:memory:/box/1"), [Path::new("/mnt/a b/1")]);
        assert_eq!(folders("1:name=systemd:/d"), [Path::new("/sys/fs/cgroup/systemd/d")]);
        assert_eq!(folders("0::/d"), [Path::new("/sys/fs/cgroup/unified/d")]);
    }

    #[test]
    fn what_is_not_mounted_or_beyond_what_is_leads_nowhere() {
        for line in ["4:pids:/d", "3:memory:/elsewhere", "3:memory:/boxes", "0::/../d", "1:name=other:/"] {
            assert!(folders(line).is_empty(), "{line}");
        }
        assert!(places("nonsense\n5\n").is_empty());
    }

    #[test]
    fn the_cgroups_of_this_process_are_those_it_is_in() {
        let cgroups = Cgroups::of_process(std::process::id()).unwrap();
        for file in &cgroups.files {
            let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
            let members = fs::read_to_string(&path).unwrap();
            let own = std::process::id().to_string();
            assert!(members.lines().any(|line| line == own), "{}", path.display());
        }
        assert!(!cgroups.were_joined());
    }
}
