//! What is kept of a VM that is a container: what its engine said of it, and by which process it is known.

use std::fs;
use std::path::PathBuf;

use catalyst_api::ContainerInfo;
use serde::{Deserialize, Serialize};

use super::{StoreError, VmDir, files, io_error, read_json};

const FILE: &str = "container.json";
/// Longest record, in bytes: labels may be many.
const MAX_SIZE: usize = 1 << 20;

/// The container that a VM is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// What its engine says.
    pub info: ContainerInfo,
    /// When its process was started, in clock ticks since the host's start (proc_pid_stat(5)): a later process may have its number.
    pub started: u64,
}

impl Container {
    /// The container whose process runs now; `None` if there is no such process.
    pub fn of_running(info: ContainerInfo) -> Option<Self> {
        let started = started(info.pid)?;
        Some(Self { info, started })
    }

    /// Whether its process is there.
    pub fn is_running(&self) -> bool {
        started(self.info.pid) == Some(self.started)
    }
}

fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    // One that has ended and that nobody has waited for yet is none.
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

impl VmDir {
    fn container_file(&self) -> PathBuf {
        self.path().join(FILE)
    }

    /// The container that the VM is; `None` of any other.
    pub fn container(&self) -> Result<Option<Container>, StoreError> {
        read_json(&self.container_file(), MAX_SIZE)
    }

    /// Notes which container the VM is.
    pub fn write_container(&self, container: &Container) -> Result<(), StoreError> {
        let path = self.container_file();
        files::write_json(&path, container, 0o600).map_err(io_error("write", &path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_number_and_its_start() {
        let info = ContainerInfo { pid: std::process::id(), ..ContainerInfo::default() };
        let own = Container::of_running(info.clone()).unwrap();
        assert!(own.is_running());
        assert!(!Container { started: own.started - 1, ..own }.is_running());
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let ended = ContainerInfo { pid: child.id(), ..info };
        child.wait().unwrap();
        assert_eq!(Container::of_running(ended), None);
    }
}
