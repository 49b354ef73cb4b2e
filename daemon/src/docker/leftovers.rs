//! What belongs to Docker's daemon: found again after a restart of ours, and ended when it has left something behind.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::files::Files;
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
    let is_roots = fs::metadata(format!("/proc/{pid}")).is_ok_and(|process| process.uid() == 0);
    is_roots
        && fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.split(|byte| *byte == 0).any(|word| word == option.as_encoded_bytes()))
}

/// Ends all that has `mark` mounted: containerd, shims, proxies. As root; waits.
pub(super) fn end_all(mark: &Path) {
    for _ in 0..LOOKS {
        let left: Vec<Process> = processes().into_iter().filter_map(|pid| belonging(pid, mark)).collect();
        if left.is_empty() {
            return;
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
}

/// Held fast before it is looked at: what is ended is what was looked at.
fn belonging(pid: i32, mark: &Path) -> Option<Process> {
    if !has_mounted(pid, mark) {
        return None;
    }
    let process = Process::open(pid).ok()?;
    has_mounted(pid, mark).then_some(process)
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

/// Removes the cgroup `name` of each hierarchy, with what is below it. As root.
pub(super) fn remove_cgroup(name: &str) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in mounts.lines().filter(|line| line.contains(" - cgroup")) {
        if let Some(point) = line.split(' ').nth(4) {
            remove_folders(&Path::new(point).join(name.trim_start_matches('/')));
        }
    }
}

/// Files in a cgroup cannot be removed and do not have to be.
fn remove_folders(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_folders(&entry.path());
        }
    }
    let _ = fs::remove_dir(folder);
}
