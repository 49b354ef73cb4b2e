//! A VM's machine on disk: saved when it is suspended, given up when it goes on or is not wanted any more.

use std::fs;

use catalyst_api::{PowerOp, VmState};

use super::Context;
use super::error::PowerError;
use super::folders::{Folders, Held};
use crate::engine::capture::Memory;
use crate::engine::{EngineError, VmProcess};
use crate::saved::{self, Machine, SavedDir, SavedError};
use crate::store::{Began, VmDir, files};

/// What a VM without a process is: off, or suspended.
pub(super) fn still(dir: &VmDir) -> VmState {
    if dir.suspended().exists() { VmState::Suspended } else { VmState::PoweredOff }
}

/// Stops the VM and saves its machine. Its process is for the caller to end, or to let go on if this fails; until then what serves its
/// folders is to leave it alone.
pub(super) async fn suspend(
    context: &Context,
    dir: &VmDir,
    process: &dyn VmProcess,
    began: Began,
    folders: &Folders,
) -> Result<Option<Held>, PowerError> {
    let aside = dir.path().join(".suspending");
    let saved = SavedDir::new(&aside);
    let done = async {
        remove(&aside)?;
        // Before it stands: what is on its way to the guest comes there first.
        let (kept, held) = folders.kept(dir).await;
        process.pause().await?;
        let fit = context.engines.of(process.engine()).fit().await?;
        let machine = Machine { fit, cpus: began.cpus, memory_mib: began.memory_mib };
        let (memory, state) = saved.begin()?;
        let source = Memory::new(process.pid(), process.ram().await?);
        let source = saved::copy_files(source, &memory).await?;
        saved::save(process, source, (&memory, &state)).await?;
        let engine = process.engine();
        let done = tokio::task::spawn_blocking(move || {
            saved.finish(engine, machine, (&memory, &state), kept.as_deref())
        })
        .await;
        done.map_err(|error| EngineError::Died(error.to_string()))??;
        let failed = |what, source| SavedError::Io { what, path: dir.suspended(), source };
        fs::rename(&aside, dir.suspended()).map_err(|error| failed("make the folder", error))?;
        files::sync_folder(dir.path()).map_err(|error| failed("sync", error))?;
        Ok(held)
    };
    let done: Result<Option<Held>, SavedError> = done.await;
    done.map_err(|source| {
        let _ = remove(&aside);
        match source {
            SavedError::Engine(source) => {
                PowerError::Engine { id: dir.id().clone(), op: PowerOp::Suspend, source }
            }
            source => PowerError::Saved { id: dir.id().clone(), source },
        }
    })
}

fn remove(aside: &std::path::Path) -> Result<(), SavedError> {
    let failed = |source| SavedError::Io { what: "remove", path: aside.to_owned(), source };
    files::remove_folder(aside).map_err(failed)
}
