//! Snapshots of a VM: made, gone back to, deleted.
//!
//! | a VM that is | is kept with |
//! |---|---|
//! | powered on, paused | its memory, as it is frozen for clones |
//! | suspended | its memory, which lies on disk already |
//! | powered off | its disk |
//!
//! Going back makes the VM *suspended* at that moment, or off; one that ran then goes on from there.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use catalyst_api::{CreateSnapshot, VmState};
use catalyst_images::Image;
use catalyst_vmm::description::Format;

use super::error::SnapshotError;
use super::machine::Command;
use super::shared::Shared;
use super::{Context, Machines, freeze};
use crate::engine::{EngineError, VmProcess};
use crate::privilege::as_root;
use crate::saved::{Machine, SavedDir, SavedError};
use crate::store::layers::Merge;
use crate::store::snapshots::link_saved;
use crate::store::{Began, Chain, Snapshot, StoreError, VmConfig, VmDir, disk};
use crate::warm::WarmStates;

/// Longest name and description, in characters.
const LONGEST_NAME: usize = 80;
const LONGEST_DESCRIPTION: usize = 500;
/// Most snapshots of a VM.
const MOST: usize = 256;

/// What is asked of a VM's task.
#[derive(Debug)]
pub(super) enum Request {
    Create(CreateSnapshot),
    /// Goes back; a VM that ran then goes on if `start`.
    Restore {
        name: String,
        start: bool,
    },
    Delete {
        name: String,
    },
}

/// A VM that has a process, as it is.
pub(super) struct Running<'a> {
    pub process: &'a dyn VmProcess,
    pub began: Began,
}

/// Makes a snapshot; the VM is as before when this returns.
pub(super) async fn create(
    context: &Arc<Context>,
    shared: &Shared,
    running: Option<Running<'_>>,
    asked: CreateSnapshot,
) -> Result<(), SnapshotError> {
    let dir = shared.dir();
    check(&asked)?;
    let all = dir.snapshots()?;
    if all.len() >= MOST {
        return Err(SnapshotError::TooMany { id: dir.id().clone(), most: MOST });
    }
    if all.iter().any(|one| one.name == asked.name) {
        return Err(SnapshotError::Exists { id: dir.id().clone(), name: asked.name });
    }
    let id = uuid::Uuid::new_v4().simple().to_string()[..16].to_owned();
    let chain = dir.chain()?;
    let snapshot = Snapshot {
        id: id.clone(),
        name: asked.name,
        description: asked.description,
        number: all.last().map_or(0, |last| last.number + 1),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        parent: chain.at,
        chain: Chain::default(),
        unnamed: dir.unnamed().exists(),
        ran: shared.state() == VmState::PoweredOn,
    };
    let aside = dir.begin_snapshot(&id)?;
    let built = build(context, shared, running, &aside).await;
    let kept = built.and_then(|chain| {
        let chain = Chain { at: None, ..chain };
        Ok(dir.keep_snapshot(&aside, &Snapshot { chain, ..snapshot })?)
    });
    if let Err(error) = kept {
        let _ = std::fs::remove_dir_all(&aside);
        return Err(error);
    }
    Ok(dir.write_chain(&Chain { at: Some(id), ..dir.chain()? })?)
}

fn check(asked: &CreateSnapshot) -> Result<(), SnapshotError> {
    let count = asked.name.chars().count();
    let plain = |text: &str| !text.chars().any(char::is_control);
    // It is part of a path in REST.
    let path = asked.name.contains('/') || [".", ".."].contains(&asked.name.as_str());
    if !(1..=LONGEST_NAME).contains(&count) || !plain(&asked.name) || path {
        return Err(SnapshotError::Name { most: LONGEST_NAME });
    }
    if asked.description.chars().count() > LONGEST_DESCRIPTION || !plain(&asked.description) {
        return Err(SnapshotError::Description { most: LONGEST_DESCRIPTION });
    }
    Ok(())
}

/// Puts the machine, if there is one, into the folder, and makes the disk so far a layer: what this returns.
async fn build(
    context: &Arc<Context>,
    shared: &Shared,
    running: Option<Running<'_>>,
    aside: &Path,
) -> Result<Chain, SnapshotError> {
    let dir = shared.dir();
    let chain = dir.chain()?;
    if let Some(Running { process, began }) = running {
        let saved = SavedDir::new(aside.join("saved"));
        let fit = context.engines.of(process.engine()).fit().await.map_err(SavedError::from)?;
        let (memory, state) = saved.begin()?;
        let runs = shared.state() == VmState::PoweredOn;
        let (chain, folders) = freeze::copy(context, shared, process, runs, (&memory, &state)).await?;
        let machine = Machine { fit, cpus: began.cpus, memory_mib: began.memory_mib };
        let engine = process.engine();
        let finished = tokio::task::spawn_blocking(move || {
            saved.finish(engine, machine, (&memory, &state), folders.as_deref())
        })
        .await;
        finished.map_err(|error| SavedError::from(EngineError::Died(error.to_string())))??;
        return Ok(chain);
    }
    if dir.suspended().exists() {
        link_saved(&dir.suspended(), aside)?;
    }
    // What was never written needs no layer, and may still go on from a warm state.
    if chain.fresh { Ok(chain) } else { Ok(freeze::lay_over(context, dir).await?) }
}

/// Puts together what the VM is to be, which is not yet decided; whether it ran then.
pub(super) async fn prepare(
    context: &Arc<Context>,
    shared: &Shared,
    name: &str,
) -> Result<bool, SnapshotError> {
    let dir = shared.dir().clone();
    dir.finish_restoring()?;
    let snapshot = find(&dir, name)?;
    let (_, config) = dir.read()?;
    let image = as_root(|| context.images.version(&config.template, &config.version));
    let image = image.map_err(|source| SnapshotError::Template { id: dir.id().clone(), source })?;
    let ran = snapshot.ran;
    let owner = (context.owner.uid, context.owner.gid);
    let fill = move || {
        let disk = |disk: &Path| overlay(disk, &dir, &config, &image, &snapshot.chain, owner);
        dir.prepare_restoring(&snapshot, disk)
    };
    blocking(fill).await.map(|()| ran)
}

/// Makes the VM, which has no process any more, what was put together.
pub(super) async fn go_back(shared: &Shared) -> Result<(), SnapshotError> {
    let dir = shared.dir().clone();
    blocking(move || {
        dir.decide_restoring()?;
        dir.collect_layers()
    })
    .await
}

/// Makes an empty overlay on what the chain says.
fn overlay(
    path: &Path,
    dir: &VmDir,
    config: &VmConfig,
    image: &Image,
    chain: &Chain,
    owner: (u32, u32),
) -> Result<(), StoreError> {
    let (below, format) = match (chain.own.first(), &chain.warm) {
        (Some(layer), _) => (dir.path().join(layer), Format::Qcow2),
        (None, Some(warm)) => (WarmStates::of(image).disk(warm), Format::Qcow2),
        (None, None) => (image.disk.clone(), Format::Raw),
    };
    Ok(disk::create_overlay(path, (&below, format), config.disk_gib, owner)?)
}

/// Deletes a snapshot, and merges what nothing else stands on.
pub(super) async fn delete(
    context: &Arc<Context>,
    shared: &Shared,
    name: &str,
    still: bool,
) -> Result<(), SnapshotError> {
    let dir = shared.dir().clone();
    dir.finish_restoring()?;
    let snapshot = find(&dir, name)?;
    let owner = (context.owner.uid, context.owner.gid);
    let (done, merged) = std::sync::mpsc::channel();
    blocking(move || {
        dir.forget_snapshot(&snapshot)?;
        // Whoever listens does so until this has ended.
        let _ = done.send(dir.shorten(Merge { still, shared: false, owner })?);
        Ok(())
    })
    .await?;
    if merged.try_recv() == Ok(true) {
        shared.note_merged();
    }
    Ok(())
}

fn find(dir: &VmDir, name: &str) -> Result<Snapshot, SnapshotError> {
    let found = dir.snapshots()?.into_iter().find(|snapshot| snapshot.name == name);
    found.ok_or_else(|| {
        // It comes from a client and goes into one line for people.
        let name = name.chars().take(LONGEST_NAME).collect::<String>().escape_debug().to_string();
        SnapshotError::Unknown { id: dir.id().clone(), name }
    })
}

async fn blocking(
    work: impl FnOnce() -> Result<(), StoreError> + Send + 'static,
) -> Result<(), SnapshotError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(SnapshotError::Stopping),
    }
}

/// All snapshots of a VM as the API tells them.
fn told(dir: &VmDir) -> Result<Vec<catalyst_api::Snapshot>, StoreError> {
    let all = dir.snapshots()?;
    let chain = dir.chain()?;
    let names: HashMap<&str, &str> = all.iter().map(|one| (one.id.as_str(), one.name.as_str())).collect();
    let mut users: HashMap<&str, usize> = HashMap::new();
    for name in all.iter().flat_map(|one| &one.chain.own).chain(&chain.own) {
        *users.entry(name).or_default() += 1;
    }
    let alone = |snapshot: &Snapshot| -> u64 {
        let own = snapshot.chain.own.iter().filter(|name| users.get(name.as_str()) == Some(&1));
        own.map(|name| allocated(&dir.path().join(name))).sum()
    };
    let one = |snapshot: &Snapshot| {
        let saved = dir.snapshot_saved(&snapshot.id);
        catalyst_api::Snapshot {
            name: snapshot.name.clone(),
            description: snapshot.description.clone(),
            created: snapshot.created,
            parent: snapshot.parent.as_deref().and_then(|id| names.get(id)).map(|name| (*name).to_owned()),
            current: chain.at.as_ref() == Some(&snapshot.id),
            memory: saved.exists(),
            memory_bytes: allocated(&saved.join("memory")),
            disk_bytes: alone(snapshot),
        }
    };
    Ok(all.iter().map(one).collect())
}

fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).map_or(0, |about| about.blocks() * 512)
}

impl Machines {
    /// The snapshots of a VM, the oldest first.
    pub fn snapshots(&self, id: &str) -> Result<Vec<catalyst_api::Snapshot>, SnapshotError> {
        Ok(told(self.get(id)?.dir())?)
    }

    /// Makes a snapshot.
    pub async fn create_snapshot(
        &self,
        id: &str,
        asked: CreateSnapshot,
    ) -> Result<catalyst_api::Snapshot, SnapshotError> {
        let name = asked.name.clone();
        let shared = self.snapshot(id, Request::Create(asked)).await?;
        let made = told(shared.dir())?.into_iter().find(|one| one.name == name);
        made.ok_or_else(|| SnapshotError::Unknown { id: shared.dir().id().clone(), name })
    }

    /// Makes a VM what it was; what it is now is lost. One that ran then goes on if `start`, else it is suspended there.
    pub async fn restore_snapshot(
        &self,
        id: &str,
        name: String,
        start: bool,
    ) -> Result<Arc<Shared>, SnapshotError> {
        self.snapshot(id, Request::Restore { name, start }).await
    }

    /// Deletes a snapshot.
    pub async fn delete_snapshot(&self, id: &str, name: String) -> Result<(), SnapshotError> {
        self.snapshot(id, Request::Delete { name }).await.map(drop)
    }

    async fn snapshot(&self, id: &str, request: Request) -> Result<Arc<Shared>, SnapshotError> {
        let snapshot = |reply| Command::Snapshot { request, reply };
        let (shared, done) = self.ask(id, SnapshotError::Stopping, snapshot).await?;
        done.map(|()| shared)
    }
}
