//! What the agent tells the first process of a program in a container, and what that tells it.
//!
//! The process is the agent's own program, begun anew in the container's namespaces ([`super::stage`]). It gets its plan by a pipe and
//! says how far it is over a socket, whose end without a word is that the program runs.

use std::path::{Path, PathBuf};

use catalyst_agent_protocol::container::{Capabilities, Container, JOINED_TREES, MAX_NAME, Process};
use catalyst_agent_protocol::{ExecSpec, Problem, ProblemKind};
use serde::{Deserialize, Serialize};

use super::{Step, problem};

/// The argument with which the program is such a process.
pub const STAGE: &str = "--container-stage";
/// The argument with which it is the first of the processes that containers have together.
pub const REAPER: &str = "--container-reaper";
/// The process's end of the socket.
pub const SOCKET: i32 = 3;
/// Its plan.
pub const PLAN: i32 = 4;
/// The first process of the container that it goes into, if there is one.
pub const INIT: i32 = 5;
/// The IPC namespace that a new container has together with others, if it has, and after it that of names.
pub const SHARED: i32 = 5;
/// What the agent says when the program is to begin.
pub const START: &[u8] = b"start";
/// Longest word over the socket, in bytes.
pub const MAX_TOLD: usize = 16 * 1024;

/// What is to be done.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// The cgroup of the container, as a folder of the agent's.
    pub cgroup: Option<PathBuf>,
    /// What in it.
    pub task: Task,
}

/// What is to be done in a container.
#[derive(Debug, Serialize, Deserialize)]
pub enum Task {
    /// Make it, and be its first process.
    Create {
        /// Its document.
        document: String,
        /// The folder of its trees.
        trees: PathBuf,
        /// IPC and names are others' too ([`SHARED`]).
        shares: bool,
    },
    /// Be another process of it.
    Join(Process),
    /// Be a command of whoever has the VM.
    Guest {
        /// The command.
        spec: ExecSpec,
        /// What the container's own program may do.
        capabilities: Capabilities,
    },
}

/// What the process says.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Told {
    /// The near end of its terminal comes with this.
    Terminal,
    /// All is ready for the program to begin.
    Ready,
    /// It will not be.
    Failed(Problem),
}

/// The container of a document.
pub fn container(document: &str) -> Step<Container> {
    serde_json::from_str(document)
        .map_err(|error| problem(ProblemKind::Invalid, format!("the container's document is none: {error}")))
}

/// The folder of a container's trees, in that of all.
pub fn trees_of(name: &str, all: &Path) -> Step<PathBuf> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if name.len() > MAX_NAME || !name.bytes().all(plain) {
        return Err(problem(ProblemKind::Invalid, "a container's name is up to 64 letters, digits and '-'"));
    }
    Ok(if name.is_empty() { all.to_owned() } else { all.join(JOINED_TREES).join(name) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_containers_trees_lie_below_all() {
        let of = |name: &str| trees_of(name, Path::new("/all"));
        assert_eq!(of("").unwrap(), Path::new("/all"));
        assert_eq!(of("c1").unwrap(), Path::new("/all/joined/c1"));
        for name in ["a/b", "..", ".", "a b", &"x".repeat(65)] {
            assert!(of(name).is_err(), "{name:?}");
        }
    }
}
