//! What a VM has for its containers: the host's trees, cgroups, NICs, and a first process that is made in advance.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::launch::{Shape, Waiting};
use super::network::Nics;
use super::{OWN, cgroup, lock};
use crate::folders::Folders;

/// What a VM has for its container.
#[derive(Debug, Default)]
pub struct Place {
    /// The folder of the trees that the host serves.
    pub(super) trees: PathBuf,
    /// The top of the cgroups.
    pub(super) cgroups: Option<PathBuf>,
    /// The system is the container's, and so is its network.
    pub(super) of_vm: bool,
    pub(super) nics: Option<Nics>,
    /// The host's trees, if they come over a port.
    pub(super) folders: Option<Arc<Folders>>,
    /// The container's first process, until it is made.
    first: Mutex<Option<First>>,
}

/// A container's first process, made before there is a container. In a VM that goes on from another's memory it is there already.
#[derive(Debug)]
struct First {
    waiting: Waiting,
    /// The mount of the host's trees that it sees.
    trees: u64,
}

impl Place {
    /// A folder of trees, in a system that is left as it is: for tests.
    pub fn of_folder(trees: PathBuf) -> Self {
        Self { trees, ..Self::default() }
    }

    /// The VM's own, when it has just booted.
    pub fn of_vm() -> Self {
        let nics = Nics::take();
        if let Err(error) = &nics {
            eprintln!("catalyst-agent: the NICs cannot be made ready: {error}");
        }
        let cgroups = PathBuf::from("/sys/fs/cgroup");
        cgroup::enable(&cgroups);
        // Made now, it is there in what is cloned from this VM, and its making is no part of the container's.
        if let Err(error) = cgroup::make(&cgroup::of_container(&cgroups), cgroup::Limits::default()) {
            eprintln!("catalyst-agent: the container's cgroup cannot be made: {error}");
        }
        let folders = Folders::of_container();
        let first = First::prepare(&folders, &cgroups);
        if let Err(error) = &first {
            eprintln!("catalyst-agent: the container's first process is not made in advance: {error}");
        }
        Self {
            trees: crate::folders::ROOT.into(),
            cgroups: Some(cgroups),
            of_vm: true,
            nics: nics.ok(),
            folders: Some(folders),
            first: Mutex::new(first.ok()),
        }
    }

    /// The process that was made in advance, if it sees what there is now. It is in the cgroup of the container that the VM is.
    pub fn take_first(&self) -> Option<Waiting> {
        let First { waiting, trees } = lock(&self.first).take()?;
        if self.folders.as_ref().is_some_and(|folders| folders.mounted() == Some(trees)) {
            return Some(waiting);
        }
        waiting.give_up();
        None
    }
}

impl First {
    fn prepare(folders: &Arc<Folders>, cgroups: &Path) -> std::io::Result<Self> {
        // It has what is mounted now.
        let trees = folders.mount_all().map_err(|problem| std::io::Error::other(problem.message))?;
        let waiting = Waiting::start(Shape {
            own: OWN,
            among: None,
            init: None,
            shared: &[],
            terminal: false,
            stdin: true,
        })?;
        let joined = fs::write(cgroup::of_container(cgroups).join("cgroup.procs"), waiting.pid().to_string());
        match joined {
            Ok(()) => Ok(Self { waiting, trees }),
            Err(error) => {
                waiting.give_up();
                Err(error)
            }
        }
    }
}
