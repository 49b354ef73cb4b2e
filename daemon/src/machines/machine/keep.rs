//! What is kept of a VM beyond its process: suspended, frozen, as a snapshot; and where its memory is.

use std::sync::Arc;

use catalyst_api::{MemoryInfo, PowerOp, VmState};
use tokio::time::Instant;

use super::super::error::{FreezeError, PowerError, SnapshotError};
use super::super::freeze::{self, Frozen};
use super::super::{snapshots, suspend};
use super::Machine;
use crate::engine::capture::Memory;
use crate::engine::{EngineError, VmProcess};

impl Machine {
    /// Saves the machine to disk and ends its process. If that fails, it is `before` as it was.
    pub(super) async fn suspend(&mut self, before: VmState) -> Result<(), PowerError> {
        let id = self.shared.dir().id().clone();
        if let Some(special) = self.shared.special() {
            return Err(PowerError::Special(id, special));
        }
        let (Some(running), Some(began)) = (&self.process, self.shared.facts().began) else {
            return Err(PowerError::State { id, state: before, op: PowerOp::Suspend });
        };
        if before == VmState::PoweredOn {
            self.shared.dir().note_standing()?;
        }
        self.shared.enter(VmState::Suspending, None);
        let begun = Instant::now();
        let process = Arc::clone(&running.process);
        let saved =
            suspend::suspend(&self.context, self.shared.dir(), process.as_ref(), began, &self.shared.folders);
        let _held = match saved.await {
            Ok(held) => held,
            Err(error) => return Err(self.goes_on(before, process.as_ref(), error).await),
        };
        // What it was lies on disk: the process is of no use any more.
        process.kill().map_err(|source| PowerError::Engine { id, op: PowerOp::Suspend, source })?;
        process.exited().await;
        self.release();
        self.shared.dir().forget_standing();
        self.shared.enter(VmState::Suspended, None);
        tracing::info!(vm = %self.shared.dir().id(), ms = begun.elapsed().as_millis(), "suspended");
        Ok(())
    }

    /// Lets a VM that was not suspended go on, if it ran.
    async fn goes_on(&self, before: VmState, process: &dyn VmProcess, error: PowerError) -> PowerError {
        let reason = crate::http::error::chain(&error).join(": ");
        let went_on = if before == VmState::PoweredOn { process.resume().await } else { Ok(()) };
        let state = if went_on.is_ok() { before } else { VmState::Paused };
        self.shared.dir().forget_standing();
        self.shared.enter(state, Some(format!("it was not suspended: {reason}")));
        error
    }

    pub(super) async fn usage(&self) -> Result<(MemoryInfo, u64), PowerError> {
        let id = self.shared.dir().id().clone();
        let Some(running) = &self.process else {
            return Err(PowerError::Off(id));
        };
        let read = async {
            let memory = Memory::new(running.process.pid(), running.process.ram().await?);
            let read = tokio::task::spawn_blocking(move || {
                Ok((memory.size(), memory.owned()?, memory.anonymous()?, memory.processor_ms()?))
            });
            let read = read.await.map_err(std::io::Error::other).and_then(|read: std::io::Result<_>| read);
            read.map_err(EngineError::io("look at what the VM takes"))
        };
        let (ram, owned, anonymous, processor_ms) =
            read.await.map_err(|source| PowerError::Look { id, source })?;
        let memory = MemoryInfo {
            ram,
            private: owned.private,
            shared: owned.shared,
            untouched: ram.saturating_sub(owned.private + owned.shared),
            overhead: anonymous.saturating_sub(owned.private),
        };
        Ok((memory, processor_ms))
    }

    /// A daemon that was killed may have left it open which file the process writes its disk to. A process that begins now
    /// has what the files say.
    async fn settle_disk(&mut self) -> Result<(), PowerError> {
        if self.shared.state() != VmState::PoweredOn || !self.shared.dir().switching().exists() {
            return Ok(());
        }
        self.suspend(VmState::PoweredOn).await?;
        self.start(false, Some("its disk was being laid over when an earlier daemon ended")).await
    }

    pub(super) async fn freeze(&mut self) -> Result<Frozen, FreezeError> {
        self.adopt_again().await;
        if let Some(special) = self.shared.special() {
            return Err(FreezeError::Special(self.shared.dir().id().clone(), special));
        }
        self.settle_disk().await?;
        let (id, state) = (self.shared.dir().id().clone(), self.shared.state());
        let running = match state {
            VmState::PoweredOn => true,
            VmState::Paused => false,
            _ => return Err(FreezeError::State { id, state }),
        };
        let (Some(process), Some(began)) = (&self.process, self.shared.facts().began) else {
            return Err(FreezeError::State { id, state });
        };
        let process = Arc::clone(&process.process);
        freeze::freeze(&self.context, &self.shared, process.as_ref(), began, running).await
    }

    pub(super) async fn snapshot(&mut self, request: snapshots::Request) -> Result<(), SnapshotError> {
        self.adopt_again().await;
        let (context, shared) = (Arc::clone(&self.context), Arc::clone(&self.shared));
        let (id, state) = (shared.dir().id().clone(), shared.state());
        if let Some(special) = shared.special() {
            return Err(SnapshotError::Special(id, special));
        }
        let settled =
            matches!(state, VmState::PoweredOn | VmState::Paused | VmState::PoweredOff | VmState::Suspended);
        if !settled || shared.facts().unadopted {
            return Err(SnapshotError::State { id, state });
        }
        match request {
            snapshots::Request::Create(asked) => {
                self.settle_disk().await?;
                let process = self.process.as_ref().map(|running| Arc::clone(&running.process));
                let began = shared.facts().began;
                let running = match (&process, began) {
                    (Some(process), Some(began)) => {
                        Some(snapshots::Running { process: process.as_ref(), began })
                    }
                    (None, _) => None,
                    (Some(_), None) => return Err(SnapshotError::State { id, state }),
                };
                snapshots::create(&context, &shared, running, asked).await
            }
            snapshots::Request::Restore { name, start } => {
                let ran = snapshots::prepare(&context, &shared, &name).await?;
                self.kill("it goes back to a snapshot").await?;
                snapshots::go_back(&shared).await?;
                self.shared.enter(suspend::still(shared.dir()), Some(format!("it went back to '{name}'")));
                let goes_on = start && ran && shared.state() == VmState::Suspended;
                if goes_on { Ok(self.start(false, None).await?) } else { Ok(()) }
            }
            snapshots::Request::Delete { name } => {
                snapshots::delete(&context, &shared, &name, self.process.is_none()).await
            }
        }
    }
}
