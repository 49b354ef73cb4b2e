//! A running VM, frozen at one moment for others to go on from. The VM itself goes on as well.
//!
//! ```text
//! while it runs     what its memory has in common with a file is copied; an empty overlay is made
//! while it stands   devices are saved, its own pages copied; its disk so far becomes a layer that nobody writes
//! ```
//! The copy of its memory is made once, however many go on from it, and lives as long as they do. The VM keeps the memory
//! that it has: nothing of its process is replaced, so that consoles, commands and connections live on.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use catalyst_api::EngineName;
use catalyst_vmm::description::Format;

use super::Context;
use super::error::FreezeError;
use super::shared::Shared;
use crate::engine::capture::Memory;
use crate::engine::{EngineError, Layer, Saved, VmProcess};
use crate::saved::{self, SavedError};
use crate::store::layers::{self, Merge};
use crate::store::{Began, Chain, StoreError, VmConfig, VmDir, disk, files};

/// From so many layers on, those that can be are merged before there is one more; from twice as many, also those that
/// clones have in common.
const MANY_LAYERS: usize = 8;
/// More layers than this are not laid on each other.
const MOST_LAYERS: usize = 32;
/// The overlay that is to take the disk's place.
const NEXT: &str = "disk.next.qcow2";

/// What others go on from.
#[derive(Debug)]
pub(super) struct Frozen {
    /// The engine that it was on.
    pub engine: EngineName,
    /// CPUs and memory.
    pub began: Began,
    /// The VM's configuration.
    pub config: VmConfig,
    /// The VM's folder, where the layers are.
    pub dir: VmDir,
    /// What the disks of the others stand on.
    pub chain: Chain,
    memory: File,
    state: Vec<u8>,
    /// What the server of its folders knew of the guest.
    pub folders: Option<Vec<u8>>,
}

impl Frozen {
    /// What one of the others goes on from.
    pub fn saved(&self) -> Result<Saved, SavedError> {
        let memory = self.memory.try_clone().map_err(EngineError::io("copy a descriptor"))?;
        let state = saved::in_memory(&self.state).map_err(EngineError::io("copy the VM's state"))?;
        Ok(Saved { memory, frozen: true, state })
    }

    /// Puts a disk that stands on the frozen one into the folder of another VM.
    pub fn fill(&self, to: &VmDir, owner: (u32, u32)) -> Result<(), StoreError> {
        for name in &self.chain.own {
            let (from, to) = (self.dir.path().join(name), to.path().join(name));
            fs::hard_link(from, &to).map_err(StoreError::write(to))?;
        }
        to.write_chain(&self.chain)?;
        to.copy_folders(&self.dir)?;
        files::write_atomically(&to.unnamed(), b"", 0o600).map_err(StoreError::write(to.unnamed()))?;
        // A freeze always leaves a layer.
        let below = to.path().join(self.chain.own.first().map_or("", String::as_str));
        Ok(disk::create_overlay(&to.disk(), (&below, Format::Qcow2), self.config.disk_gib, owner)?)
    }
}

/// Freezes a VM. It runs when this returns, if it did before, whether or not this succeeds.
pub(super) async fn freeze(
    context: &Arc<Context>,
    shared: &Shared,
    process: &dyn VmProcess,
    began: Began,
    running: bool,
) -> Result<Frozen, FreezeError> {
    let dir = shared.dir();
    let (_, config) = dir.read()?;
    let memory = saved::new_memory().map_err(EngineError::io("make room for a copy of the VM's memory"))?;
    let state = saved::new_memory().map_err(EngineError::io("make room for the VM's state"))?;
    let (mut chain, folders) = copy(context, shared, process, running, (&memory, &state)).await?;
    chain.at = None;
    saved::seal(&memory).map_err(EngineError::io("seal the copy of the VM's memory"))?;
    let state = saved::read_state(&state, Path::new("of the frozen VM"))?;
    Ok(Frozen { engine: process.engine(), began, config, dir: dir.clone(), chain, memory, state, folders })
}

/// Copies the VM's memory and devices to files, and makes its disk so far a layer: it stands on what this returns, beside what
/// the server of its folders knew. It runs when this returns, if it did before, whether or not this
/// succeeds.
pub(super) async fn copy(
    context: &Arc<Context>,
    shared: &Shared,
    process: &dyn VmProcess,
    running: bool,
    (memory, state): (&File, &File),
) -> Result<(Chain, Option<Vec<u8>>), FreezeError> {
    let dir = shared.dir();
    let (chain, merged) = prepare(context, dir).await?;
    if merged {
        shared.note_merged();
    }
    let below = if shared.is_merged() { below(context, dir, &chain)? } else { Vec::new() };
    let mut source = Memory::new(process.pid(), process.ram().await?);
    let common = source.is_shared().map_err(EngineError::io("look at the VM's memory"))?;
    if !common {
        source = saved::copy_files(source, memory).await?;
    }
    if running {
        dir.note_standing()?;
    }
    // Before it stands: what is on its way to the guest comes there first.
    let (kept, held) = shared.folders.kept(dir).await;
    process.pause().await.inspect_err(|_| dir.forget_standing())?;
    let stood = tokio::time::Instant::now();
    let done = async {
        if common {
            source = saved::copy_files(source, memory).await?;
        }
        saved::save(process, source, (memory, state)).await?;
        switch(dir, process, &chain, below).await?;
        shared.note_alike();
        Ok(())
    };
    let done: Result<(), FreezeError> = done.await;
    if running {
        process.resume().await?;
        dir.forget_standing();
    }
    drop(held);
    tracing::info!(vm = %dir.id(), ms = stood.elapsed().as_millis(), "frozen; it stood for that long");
    done.map(|()| (chain, kept))
}

/// Makes the disk of a VM that has no process a layer: it stands on what this returns.
pub(super) async fn lay_over(context: &Arc<Context>, dir: &VmDir) -> Result<Chain, FreezeError> {
    let (chain, _) = prepare(context, dir).await?;
    lay(dir, &chain)?;
    Ok(chain)
}

/// What the disk so far lies on, which becomes the first layer of `chain`.
fn below(context: &Context, dir: &VmDir, chain: &Chain) -> Result<Vec<Layer>, FreezeError> {
    let (_, config) = dir.read()?;
    let layers = || {
        let image = super::start::image(context, dir, &config)?;
        let lower = Chain { own: chain.own.iter().skip(1).cloned().collect(), ..chain.clone() };
        super::start::layers(dir, &image, &lower)
    };
    let all = layers().map_err(|error| FreezeError::Below(Box::new(error)))?;
    Ok(all.into_iter().skip(1).collect())
}

/// Makes an overlay for the disk to go on in; it is on the returned chain, and not yet in use. Beside it whether layers were merged.
async fn prepare(context: &Arc<Context>, dir: &VmDir) -> Result<(Chain, bool), FreezeError> {
    let (_, config) = dir.read()?;
    if dir.switching().exists() {
        return Err(FreezeError::Unsettled(dir.id().clone()));
    }
    let owner = (context.owner.uid, context.owner.gid);
    let layers = dir.chain()?.own.len();
    let mut has_merged = false;
    if layers >= MANY_LAYERS {
        let merge = Merge { still: false, shared: layers >= 2 * MANY_LAYERS, owner };
        let own = dir.clone();
        let merged = tokio::task::spawn_blocking(move || own.shorten(merge)).await;
        match merged {
            Ok(Ok(merged)) => has_merged = merged,
            Ok(Err(error)) => {
                // Some may have been.
                has_merged = true;
                tracing::warn!(vm = %dir.id(), %error, "the layers of its disk stay many");
            }
            Err(_) => {}
        }
    }
    let mut chain = dir.chain()?;
    if chain.own.len() >= MOST_LAYERS {
        return Err(FreezeError::Layers { id: dir.id().clone(), most: MOST_LAYERS });
    }
    let layer = layers::new_name();
    let below = dir.path().join(&layer);
    let next = dir.path().join(NEXT);
    disk::create_overlay(&next, (&below, Format::Qcow2), config.disk_gib, owner).map_err(StoreError::from)?;
    chain.fresh = false;
    chain.own.insert(0, layer);
    Ok((chain, has_merged))
}

/// Makes the disk so far a layer below the overlay that lies ready, for the next start and for the process, which stands.
///
/// Whatever moment the daemon is killed at, the files are right for the next start: the layer is another name of the disk;
/// from the chain's being written until the overlay takes the disk's name, the disk lies on itself, which changes nothing; an
/// overlay that the process was not switched to stays empty above a disk that goes on being written. Only such a VM must
/// not be frozen once more: the note `switching` says so until the next start.
async fn switch(
    dir: &VmDir,
    process: &dyn VmProcess,
    chain: &Chain,
    below: Vec<Layer>,
) -> Result<(), FreezeError> {
    let file = disk::open_overlay(&dir.path().join(NEXT)).map_err(StoreError::from)?;
    files::write_atomically(&dir.switching(), b"", 0o600).map_err(StoreError::write(dir.switching()))?;
    lay(dir, chain)?;
    process.switch_disk(Layer { file: file.into(), format: Format::Qcow2 }, below).await?;
    fs::remove_file(dir.switching()).map_err(StoreError::write(dir.switching()))?;
    Ok(())
}

/// Gives the disk the name of the first layer of `chain`, and its own to the overlay that lies ready.
fn lay(dir: &VmDir, chain: &Chain) -> Result<(), StoreError> {
    let layer = dir.path().join(chain.own.first().map_or("", String::as_str));
    fs::hard_link(dir.disk(), &layer).map_err(StoreError::write(layer))?;
    dir.write_chain(chain)?;
    fs::rename(dir.path().join(NEXT), dir.disk()).map_err(StoreError::write(dir.disk()))?;
    files::sync_folder(dir.path()).map_err(StoreError::write(dir.disk()))
}
