//! Folders as clients ask for them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use catalyst_api::{CreateFolder, VmState};

use super::super::Machines;
use super::super::error::FolderError;
use super::super::machine::Command;
use super::super::shared::Shared;
use super::serving;
use crate::store::folders::{Folder, MOST, is_name};
use catalyst_agent_link::{AgentError, AgentLink, ProblemKind};

/// The first user of a guest: lumen's `catalyst`.
const USER: u32 = 1000;
/// Longest path, in bytes.
const LONGEST_PATH: usize = 4095;

/// A change of a VM's folders.
#[derive(Debug)]
pub(in super::super) enum Change {
    /// One more, or one that is there already.
    Add(Folder),
    /// One less.
    Remove(String),
}

/// Changes what the VM's file says; the VM's task does it.
pub(in super::super) fn change(shared: &Shared, change: Change) -> Result<(), FolderError> {
    let id = || shared.dir().id().clone();
    let mut all = shared.dir().folders()?;
    match change {
        Change::Add(folder) => match all.iter().find(|one| one.name == folder.name) {
            Some(one) if *one == folder => return Ok(()),
            Some(_) => return Err(FolderError::Exists { id: id(), name: folder.name }),
            None if all.len() >= MOST => return Err(FolderError::TooMany { id: id(), most: MOST }),
            None => all.push(folder),
        },
        Change::Remove(name) => {
            let before = all.len();
            all.retain(|one| one.name != name);
            if all.len() == before {
                return Err(FolderError::Unknown { id: id(), name });
            }
        }
    }
    shared.dir().write_folders(&all)?;
    shared.folders.facts().version += 1;
    shared.folders.changed.notify_one();
    Ok(())
}

fn check(asked: CreateFolder) -> Result<Folder, FolderError> {
    if !is_name(&asked.name) {
        return Err(FolderError::Name);
    }
    let host_path = PathBuf::from(&asked.host_path);
    let sound =
        |path: &str| path.starts_with('/') && path.len() <= LONGEST_PATH && !path.chars().any(|c| c == '\0');
    if !sound(&asked.host_path) {
        return Err(FolderError::HostPath);
    }
    if let Some(path) = &asked.guest_path
        && (!sound(path) || path.chars().any(char::is_control) || Path::new(path).components().count() < 2)
    {
        return Err(FolderError::GuestPath);
    }
    serving::open(&host_path)
        .map_err(|source| FolderError::Host { path: asked.host_path.clone(), source })?;
    Ok(Folder {
        name: asked.name,
        host_path,
        guest_path: asked.guest_path,
        read_only: asked.read_only,
        uid: asked.uid.unwrap_or(USER),
        gid: asked.gid.unwrap_or(USER),
    })
}

/// The agent of a guest that is up.
fn agent(shared: &Shared) -> Option<AgentLink> {
    let up = shared.state() == VmState::PoweredOn && shared.guest().identity;
    shared.agent().filter(|_| up)
}

fn told(shared: &Shared, folder: Folder) -> catalyst_api::Folder {
    let mounted = shared.folders.facts().mounted.get(&folder.name).cloned();
    catalyst_api::Folder {
        name: folder.name,
        host_path: folder.host_path.display().to_string(),
        guest_path: folder.guest_path,
        read_only: folder.read_only,
        uid: folder.uid,
        gid: folder.gid,
        mounted: mounted == Some(Ok(())),
        problem: mounted.and_then(Result::err),
    }
}

impl Machines {
    /// The folders of a VM, in the order in which they were added.
    pub fn folders(&self, id: &str) -> Result<Vec<catalyst_api::Folder>, FolderError> {
        let shared = self.get(id)?;
        Ok(shared.dir().folders()?.into_iter().map(|folder| told(&shared, folder)).collect())
    }

    /// One of them.
    pub fn folder(&self, id: &str, name: &str) -> Result<catalyst_api::Folder, FolderError> {
        let shared = self.get(id)?;
        let found = self.folders(id)?.into_iter().find(|folder| folder.name == name);
        found.ok_or_else(|| FolderError::Unknown { id: shared.dir().id().clone(), name: shown(name) })
    }

    /// Gives a VM a folder. Where its guest is up it is mounted when this returns.
    pub async fn add_folder(
        &self,
        id: &str,
        request: CreateFolder,
    ) -> Result<catalyst_api::Folder, FolderError> {
        let shared = self.get(id)?;
        if let Some(special) = shared.special() {
            return Err(FolderError::Special(shared.dir().id().clone(), special));
        }
        let folder = check(request)?;
        let known = shared.dir().folders()?.contains(&folder);
        self.change_folders(id, Change::Add(folder.clone())).await?;
        if let Some(link) = agent(&shared)
            && let Err(why) = super::mount(&shared, &link, &folder).await
        {
            // All or nothing, unless it was there before.
            if !known {
                self.change_folders(id, Change::Remove(folder.name.clone())).await?;
            }
            return Err(FolderError::Guest { id: shared.dir().id().clone(), name: folder.name, why });
        }
        Ok(told(&shared, folder))
    }

    /// Takes a folder away from a VM. If a program in its guest uses it, all stays as it is.
    pub async fn remove_folder(&self, id: &str, name: &str) -> Result<(), FolderError> {
        self.folder(id, name)?;
        let shared = self.get(id)?;
        if let Some(link) = agent(&shared) {
            match link.unmount_folder(name).await {
                Ok(()) => {}
                Err(AgentError::Refused { kind: ProblemKind::Busy, message }) => {
                    return Err(FolderError::Busy { id: shared.dir().id().clone(), why: message });
                }
                Err(error) => {
                    let (name, why) = (shown(name), error.to_string());
                    return Err(FolderError::Guest { id: shared.dir().id().clone(), name, why });
                }
            }
        }
        shared.folders.facts().mounted.remove(name);
        self.change_folders(id, Change::Remove(name.to_owned())).await.map(drop)
    }

    async fn change_folders(&self, id: &str, change: Change) -> Result<Arc<Shared>, FolderError> {
        let change = |reply| Command::Folders { change, reply };
        let (shared, done) = self.ask(id, FolderError::Stopping, change).await?;
        done.map(|()| shared)
    }
}

/// What a client sent, for one line.
fn shown(name: &str) -> String {
    name.chars().take(80).collect::<String>().escape_debug().to_string()
}
