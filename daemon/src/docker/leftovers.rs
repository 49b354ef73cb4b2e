//! What belongs to Docker's daemon: found again after a restart of ours, and ended when it has left something behind.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use rustix::process::Pid;

use super::files::Files;
use crate::engine::cgroup::hierarchies;
use crate::engine::process::status_uid;
use crate::network::process::Process;
use crate::network::state::read_small;

/// How long a process may take to end once it is killed.
const END: Duration = Duration::from_secs(5);
/// Processes start others while they are ended; after so many looks none of them does.
const LOOKS: u32 = 16;

/// The process id of the Docker daemon of these files that runs. As root.
///
/// Its pid file alone proves nothing: pids come again. Nobody but root's process with that option counts.
pub(super) fn running(files: &Files) -> Option<i32> {
    let named = read_small(&files.pid()).ok().flatten().and_then(|text| text.trim().parse().ok());
    if let Some(pid) = named.filter(|pid| is_it(*pid, files)) {
        return Some(pid);
    }
    // It may be just starting.
    processes().into_iter().find(|pid| is_it(*pid, files))
}

fn is_it(pid: i32, files: &Files) -> bool {
    let option = files.pid_option();
    let is_roots = Pid::from_raw(pid).and_then(status_uid) == Some(0);
    is_roots
        && fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.split(|byte| *byte == 0).any(|word| word == option.as_encoded_bytes()))
}

/// Ends all that has `mark` mounted, which are containerd, shims and ports, and all in these cgroups, which are containers' VMs
/// too; then removes the cgroups. As root; waits.
pub(super) fn end_all(mark: &Path, cgroups: &[PathBuf]) {
    for _ in 0..LOOKS {
        let mut left: Vec<Process> =
            belonging(mark, cgroups).into_iter().filter_map(|pid| Process::open(pid).ok()).collect();
        // Held fast now: what is ended is what is looked at.
        let still = belonging(mark, cgroups);
        left.retain(|process| still.contains(&process.pid));
        if left.is_empty() {
            break;
        }
        for process in &left {
            process.signal(Signal::SIGKILL);
        }
        for process in &left {
            if !process.ended_within(END) {
                tracing::warn!(pid = process.pid, "a process of Docker's daemon does not end");
            }
        }
    }
    for cgroup in cgroups {
        remove(cgroup);
    }
}

fn belonging(mark: &Path, cgroups: &[PathBuf]) -> BTreeSet<i32> {
    let mut all: BTreeSet<i32> = processes().into_iter().filter(|pid| has_mounted(*pid, mark)).collect();
    for cgroup in cgroups {
        collect(cgroup, &mut all);
    }
    all
}

fn has_mounted(pid: i32, mark: &Path) -> bool {
    fs::read_to_string(format!("/proc/{pid}/mountinfo")).is_ok_and(|mounts| {
        mounts.lines().any(|line| line.split(' ').nth(4).is_some_and(|point| Path::new(point) == mark))
    })
}

fn processes() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The cgroup of that path in each hierarchy, where it is there. As root.
pub(super) fn cgroups(path: &str) -> Vec<PathBuf> {
    let folders = hierarchies().into_iter().map(|point| point.join(path.trim_start_matches('/')));
    folders.filter(|folder| folder.is_dir()).collect()
}

/// Adds the processes of a cgroup and of those below it.
fn collect(cgroup: &Path, all: &mut BTreeSet<i32>) {
    let members = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    all.extend(members.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0));
    for below in below(cgroup) {
        collect(&below, all);
    }
}

/// Files in a cgroup cannot be removed and do not have to be.
fn remove(cgroup: &Path) {
    for below in below(cgroup) {
        remove(&below);
    }
    if let Err(error) = fs::remove_dir(cgroup) {
        tracing::debug!(%error, cgroup = %cgroup.display(), "a cgroup of Docker's daemon stays");
    }
}

fn below(cgroup: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(cgroup).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    folders.map(|entry| entry.path()).collect()
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    /// A shell in a mount namespace of its own that runs `script` there, with `word` among its arguments.
    fn shell(script: &str, word: &str) -> Child {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-ec", script, "sh", word]).stdin(std::process::Stdio::piped());
        command.stdout(std::process::Stdio::piped()).spawn().unwrap()
    }

    fn says_something(child: &mut Child) {
        let mut said = [0; 1];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut said).unwrap();
    }

    #[test]
    fn it_is_found_by_its_option_and_what_has_its_mark_is_ended_alone() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: only root mounts");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let files = Files::new(folder.path(), folder.path().to_owned());
        assert_eq!(running(&files), None);
        fs::write(files.mark(), "").unwrap();
        let option = files.pid_option().into_string().unwrap();
        let mount = format!("mount --bind /proc/self/ns/net '{0}'; echo; read -r _", files.mark().display());
        let (mut its, mut other) = (shell(&mount, &option), shell("echo; read -r _", "other"));
        says_something(&mut its);
        says_something(&mut other);
        // A number that came again.
        fs::write(files.pid(), other.id().to_string()).unwrap();
        assert_eq!(running(&files), Some(its.id().cast_signed()));
        end_all(&files.mark(), &[]);
        assert!(!its.wait().unwrap().success());
        assert_eq!(running(&files), None);
        drop(other.stdin.take());
        assert_eq!(other.wait().unwrap().code(), Some(1), "it ends by itself");
    }
}
