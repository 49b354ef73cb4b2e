//! Folders of the host in guests.
//!
//! A VM that has any gets a process that serves them over a port of the VM ([`serving`]), whatever the engine. A task per running VM
//! keeps it there and tells it what there is; in the guest the agent mounts. Nothing is unmounted when a VM is saved: what the
//! process knows of the guest is saved beside the guest's memory, and another process goes on from it.

mod api;
mod serving;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use catalyst_agent_link::{self as agent, AgentLink};
use tokio::sync::{Notify, watch};

use super::Context;
use super::shared::Shared;
use crate::http::error::chain;
use crate::store::VmDir;
use crate::store::folders::Folder;
pub(super) use api::{Change, change};
pub(super) use serving::{Held, Serving, ServingError};

/// A process that ends again and again costs no more than this.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// How long a guest is waited for.
const MOUNTS_WITHIN: Duration = Duration::from_mins(1);

/// What is known of a VM's folders.
#[derive(Debug)]
pub(super) struct Folders {
    /// Told when what the VM's file of folders says has changed.
    changed: Notify,
    /// The process, and which version of what is wanted it serves.
    serving: watch::Sender<(Option<Arc<Serving>>, u64)>,
    facts: Mutex<Facts>,
}

#[derive(Debug, Default)]
struct Facts {
    /// What a process that begins now goes on from; kept until it does.
    state: Option<Vec<u8>>,
    /// What the guest has mounted, or why not.
    mounted: BTreeMap<String, Result<(), String>>,
    /// Whether the VM's process is one that this daemon has started: nobody serves it yet.
    begun: bool,
    /// Counts changes of what is wanted.
    version: u64,
}

impl Default for Folders {
    fn default() -> Self {
        Self { changed: Notify::new(), serving: watch::Sender::new((None, 0)), facts: Mutex::default() }
    }
}

impl Folders {
    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next process of the VM goes on from what was saved with it, or begins.
    pub(super) fn begin_with(&self, state: Option<Vec<u8>>) {
        let mut facts = self.facts();
        facts.state = state;
        facts.begun = true;
        facts.mounted.clear();
    }

    /// What another process needs to go on from here, for a VM that is being saved: without it the guest's files are closed when
    /// it goes on, and nothing else is lost. Folders are left alone while what comes with it lives.
    pub(super) async fn kept(&self, dir: &VmDir) -> (Option<Vec<u8>>, Option<Held>) {
        // One that was to go on, and has not come to it, leaves what it was to go on from.
        let Some(serving) = self.serving.borrow().0.clone() else {
            return (self.facts().state.clone(), None);
        };
        match serving.save().await {
            Ok((state, held)) => (Some(state), Some(held)),
            Err(error) => {
                let reason = chain(&error).join(": ");
                tracing::warn!(vm = %dir.id(), reason, "what its guest has open of folders is not saved");
                (None, None)
            }
        }
    }
}

/// Has the folders of a running VM served until the task is aborted, which is when the VM's process ends.
pub(super) async fn attend(context: Arc<Context>, shared: Arc<Shared>) {
    let _gone = Gone(Arc::clone(&shared));
    let mut pause = FIRST_PAUSE;
    loop {
        let served = serve(&context, &shared).await;
        shared.folders.serving.send_replace((None, 0));
        // With the VM's own process it ends as well, and then so does this task.
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
        match served {
            Ok(()) => {
                tracing::warn!(vm = %shared.dir().id(), "what serves folders has ended; another begins");
            }
            Err(error) => {
                let reason = chain(&error).join(": ");
                tracing::warn!(vm = %shared.dir().id(), reason, "folders are not served");
            }
        }
    }
}

/// When the VM's process has ended nothing is served.
struct Gone(Arc<Shared>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.folders.facts().mounted.clear();
        if let Some(serving) = self.0.folders.serving.send_replace((None, 0)).0 {
            // It ends by itself, and is reaped.
            tokio::spawn(async move { serving.exited().await });
        }
    }
}

/// Waits until there is something to serve; what a process goes on from.
async fn needed(shared: &Shared) -> Option<Vec<u8>> {
    loop {
        let state = shared.folders.facts().state.clone();
        if state.is_some() || !wanted(shared).is_empty() {
            return state;
        }
        shared.folders.changed.notified().await;
    }
}

/// Until the process ends.
async fn serve(context: &Context, shared: &Shared) -> Result<(), ServingError> {
    let folders = &shared.folders;
    let begun = std::mem::replace(&mut folders.facts().begun, true);
    let found = if begun { None } else { Serving::adopt(context, shared.dir()).await? };
    let serving = match found {
        Some(serving) => serving,
        None => Serving::begin(context, shared.dir(), needed(shared).await).await?,
    };
    let serving = Arc::new(serving);
    loop {
        let version = folders.facts().version;
        let failed = match serving.settle(&wanted(shared)).await {
            Ok(failed) => failed,
            Err(error) => {
                serving.end().await;
                return Err(error);
            }
        };
        {
            let mut facts = folders.facts();
            facts.state = None;
            facts.mounted.retain(|_, mounted| mounted.is_ok());
            for (name, error) in failed {
                let why = chain(&error).join(": ");
                tracing::warn!(vm = %shared.dir().id(), name, why, "a folder is not shared");
                facts.mounted.insert(name, Err(why));
            }
        }
        folders.serving.send_replace((Some(Arc::clone(&serving)), version));
        tokio::select! {
            () = serving.exited() => return Ok(()),
            () = folders.changed.notified() => {}
        }
    }
}

fn wanted(shared: &Shared) -> Vec<Folder> {
    shared.dir().folders().unwrap_or_else(|error| {
        let reason = chain(&error).join(": ");
        tracing::warn!(vm = %shared.dir().id(), reason, "folders are not shared");
        Vec::new()
    })
}

/// Has the guest mount all folders that it has not; nobody waits for it.
pub(super) fn mount_all(shared: &Arc<Shared>, link: &AgentLink) {
    let folders = wanted(shared);
    if folders.is_empty() {
        return;
    }
    let (shared, link) = (Arc::clone(shared), link.clone());
    tokio::spawn(async move {
        for folder in folders {
            if let Err(why) = mount(&shared, &link, &folder).await {
                tracing::warn!(vm = %shared.dir().id(), name = folder.name, why, "a folder is not mounted");
            }
        }
    });
}

/// Has the guest mount a folder once it is served.
async fn mount(shared: &Shared, link: &AgentLink, folder: &Folder) -> Result<(), String> {
    let version = shared.folders.facts().version;
    let mut serving = shared.folders.serving.subscribe();
    let mounted = async {
        // The sender lives as long as the VM.
        let _ = serving.wait_for(|(serving, served)| serving.is_some() && *served >= version).await;
        if let Some(Err(why)) = shared.folders.facts().mounted.get(&folder.name) {
            return Err(why.clone());
        }
        let place = agent::Folder {
            name: folder.name.clone(),
            path: folder.guest_path.clone(),
            read_only: folder.read_only,
        };
        link.mount_folder(place).await.map_err(|error| chain(&error).join(": "))
    };
    let limit = MOUNTS_WITHIN;
    let mounted = tokio::time::timeout(limit, mounted).await;
    let mounted = mounted.unwrap_or_else(|_| Err(format!("it was not served within {} s", limit.as_secs())));
    shared.folders.facts().mounted.insert(folder.name.clone(), mounted.clone());
    shared.tell_changed();
    mounted
}
