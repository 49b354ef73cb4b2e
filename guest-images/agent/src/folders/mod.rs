//! Folders of the host in the guest.
//!
//! One FUSE file system has all of them, at [`ROOT`]; what its kernel asks goes to the host over a port of its own (`relay`), and the
//! folders are bound to where they are wanted (`mounts`). Nothing of it is in the way of a guest that is saved: what was asked and
//! not answered is asked again where the guest goes on.

mod mounts;
mod relay;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use catalyst_agent_protocol::{FOLDERS_PORT_NAME, Folder, Problem, ProblemKind};

use crate::port;
use relay::Relay;

/// Where all folders are, each by its name.
pub const ROOT: &str = "/run/catalyst/folders";
/// Where VMware's tools have them.
const AS_VMWARE: &str = "/mnt/hgfs";
/// How long the host's side may take until it has greeted.
const READY_WITHIN: Duration = Duration::from_secs(20);

/// The guest's folders.
#[derive(Debug, Default)]
pub struct Folders {
    /// They are a container's own trees: its programs and devices are what they are on the host.
    of_container: bool,
    relay: Mutex<Option<Arc<Relay>>>,
    wanted: Mutex<Vec<Folder>>,
}

fn problem(message: String) -> Problem {
    Problem { kind: ProblemKind::Failed, message }
}

impl Folders {
    /// The trees of a VM that is a container.
    pub fn of_container() -> Arc<Self> {
        Arc::new(Self { of_container: true, ..Self::default() })
    }

    /// Mounts the file system of all folders before the host serves it, who then goes on with that; its number.
    pub fn mount_all(self: &Arc<Self>) -> Result<u64, Problem> {
        let mounted = self.relay()?.mount();
        mounted.map_err(|error| problem(format!("the file system of folders cannot be mounted: {error}")))
    }

    /// The number of the file system that is mounted, another each time.
    pub fn mounted(&self) -> Option<u64> {
        let relay = self.relay.lock().unwrap_or_else(PoisonError::into_inner).clone();
        relay?.mounted()
    }

    /// Waits until the host serves the trees of the container.
    pub fn wait_for_trees(self: &Arc<Self>) -> Result<(), Problem> {
        if self.relay()?.wait(READY_WITHIN) {
            Ok(())
        } else {
            Err(problem("the host does not serve the container's trees".into()))
        }
    }

    /// Mounts a folder that the host has made ready. One that is mounted so already is left as it is.
    pub fn mount(self: &Arc<Self>, folder: &Folder) -> Result<(), Problem> {
        check(folder)?;
        let relay = self.relay()?;
        if !relay.wait(READY_WITHIN) {
            return Err(problem("the host does not serve folders".into()));
        }
        mounts::bind(folder)
            .map_err(|error| problem(format!("folder {:?} cannot be mounted: {error}", folder.name)))?;
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        wanted.retain(|one| one.name != folder.name);
        wanted.push(folder.clone());
        Ok(())
    }

    /// Takes a folder away, wherever it is mounted. If a program uses it, all stays as it is.
    pub fn unmount(&self, name: &str) -> Result<(), Problem> {
        mounts::unbind(name).map_err(|busy| match busy {
            mounts::Unbind::Busy(holders) => Problem {
                kind: ProblemKind::Busy,
                message: format!("folder {name:?} is in use by {holders}"),
            },
            mounts::Unbind::Failed(error) => problem(format!("folder {name:?} cannot be unmounted: {error}")),
        })?;
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).retain(|one| one.name != name);
        Ok(())
    }

    /// The relay, which begins with the first folder.
    fn relay(self: &Arc<Self>) -> Result<Arc<Relay>, Problem> {
        let mut relay = self.relay.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(relay) = &*relay {
            return Ok(Arc::clone(relay));
        }
        let path = port::find(FOLDERS_PORT_NAME)
            .map_err(|error| problem(format!("the port for folders cannot be looked for: {error}")))?;
        let path = path.ok_or_else(|| problem("this machine has no port for folders".into()))?;
        let folders = Arc::downgrade(self);
        let again = move || {
            // A container whose trees are gone has nothing that others could be bound to.
            if let Some(folders) = folders.upgrade().filter(|folders| !folders.of_container) {
                thread::spawn(move || folders.bind_again());
            }
        };
        let begun = Relay::begin(&path, self.of_container, again)
            .map_err(|error| problem(format!("the port for folders cannot be opened: {error}")))?;
        Ok(Arc::clone(relay.insert(begun)))
    }

    /// After the host's side was lost and another has begun, everything is mounted anew.
    fn bind_again(&self) {
        if let Err(error) = mounts::bind_all(Path::new(AS_VMWARE)) {
            eprintln!("catalyst-agent: {AS_VMWARE} cannot be mounted: {error}");
        }
        let wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for folder in wanted {
            if let Err(error) = mounts::bind(&folder) {
                eprintln!("catalyst-agent: folder {:?} cannot be mounted again: {error}", folder.name);
            }
        }
    }
}

fn check(folder: &Folder) -> Result<(), Problem> {
    let invalid = |message: &str| Err(Problem { kind: ProblemKind::Invalid, message: message.into() });
    if folder.name.is_empty() || folder.name.contains(['/', '\0']) || [".", ".."].contains(&&*folder.name) {
        return invalid("a folder's name is one part of a path");
    }
    match &folder.path {
        Some(path) if !path.starts_with('/') || path.contains('\0') || path.trim_matches('/').is_empty() => {
            invalid("a folder's place in the guest is an absolute path")
        }
        _ => Ok(()),
    }
}
