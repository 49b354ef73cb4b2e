//! Whose turn it is in a guest that has just woken up.
//!
//! Services share a CPU by the weights of their cgroups, whatever the priorities of their processes (the kernel's cgroup-v2.rst,
//! "CPU Interface Files"). A template is saved with the agent far before all others, so that a clone answers a command while its
//! sshd, and whatever else woke up with it, are still at work. Commands share the agent's cgroup, and may compute for hours: so
//! the agent is one among others again as soon as sshd is through.

use std::fs;
use std::io;

/// The heaviest weight that there is, and the usual one.
const FIRST: &str = "10000";
const USUAL: &str = "100";

/// Lets the agent and its commands go before all others.
pub fn go_first() {
    weigh(FIRST);
}

/// Makes them one service among others.
pub fn take_turns() {
    weigh(USUAL);
}

/// Without cgroups all goes on as before, more slowly.
fn weigh(weight: &str) {
    let written = fs::read_to_string("/proc/self/cgroup").and_then(|text| {
        let cgroup = own_cgroup(&text).ok_or(io::ErrorKind::Unsupported)?;
        fs::write(format!("/sys/fs/cgroup{cgroup}/cpu.weight"), weight)
    });
    if let Err(error) = written {
        eprintln!("catalyst-agent: the weight of its cgroup cannot be set: {error}");
    }
}

/// The path of the cgroup of version 2 (cgroups(7), "/proc/pid/cgroup"), unless it is the root, which has no weight.
fn own_cgroup(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::")).filter(|path| *path != "/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_is_that_of_version_2() {
        let text = "12:cpu,cpuacct:/a\n0::/system.slice/catalyst-agent.service\n";
        assert_eq!(own_cgroup(text), Some("/system.slice/catalyst-agent.service"));
        assert_eq!(own_cgroup("0::/\n"), None);
        assert_eq!(own_cgroup("12:cpu,cpuacct:/a\n"), None);
    }
}
