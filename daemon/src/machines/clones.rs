//! Clones of a VM that runs: it is frozen once, and each clone goes on from there.

use std::sync::Arc;

use catalyst_api::{EventKind, PublishPort, VmState};
use futures_util::future::join_all;
use tracing::Instrument;

use super::error::{CreateError, FreezeError, PowerError};
use super::freeze::Frozen;
use super::machine::Command;
use super::shared::Shared;
use super::{Machines, Reservation, with_lease};
use crate::network::Lease;
use crate::store::set_up::Kept;
use crate::store::{VmConfig, VmId};

/// A clone as it is asked for.
pub(super) struct Asked {
    pub id: String,
    pub tags: Vec<String>,
    pub publish: Vec<PublishPort>,
    pub set_up: Option<Kept>,
}

/// A clone to be made: its id, which is taken for it.
struct Wanted {
    id: VmId,
    lease: Lease,
    tags: Vec<String>,
    ports: Vec<PublishPort>,
    set_up: Option<Kept>,
    _reservation: Reservation,
}

impl Machines {
    /// Makes clones of `parent`, with its disk, and where it runs with its memory too. All of them are there when this
    /// returns, or none.
    pub async fn clone_all(&self, parent: &str, ids: Vec<String>) -> Result<Vec<Arc<Shared>>, CreateError> {
        let (machines, parent) = (self.clone(), parent.to_owned());
        let made = async move {
            let (shared, _) = machines.find(&parent)?;
            if with_memory(shared.state()) {
                let plain = |id| Asked { id, tags: Vec::new(), publish: Vec::new(), set_up: None };
                let wanted = ids.into_iter().map(plain).collect();
                return machines.clone_running(&parent, wanted).await;
            }
            let mut made = Vec::new();
            for id in ids {
                let request = catalyst_api::CreateVm {
                    id,
                    parent: Some(parent.clone()),
                    ..catalyst_api::CreateVm::default()
                };
                match machines.create_whole(request).await {
                    Ok(shared) => made.push(shared),
                    Err(error) => {
                        machines.unmake(&made).await;
                        return Err(error);
                    }
                }
            }
            Ok(made)
        };
        // It is made whole or not at all, also when whoever asked is gone meanwhile.
        tokio::spawn(made.in_current_span()).await.unwrap_or(Err(CreateError::Stopping))
    }

    /// Clones of a VM that runs; they run as well.
    pub(super) async fn clone_running(
        &self,
        parent: &str,
        asked: Vec<Asked>,
    ) -> Result<Vec<Arc<Shared>>, CreateError> {
        let mut wanted = Vec::new();
        for one in asked {
            match self.want(one).await {
                Ok(one) => wanted.push(one),
                Err(error) => {
                    self.release(&wanted).await;
                    return Err(error);
                }
            }
        }
        let frozen = match self.freeze(parent).await {
            Ok(frozen) => frozen,
            Err(error) => {
                self.release(&wanted).await;
                return Err(error);
            }
        };
        let mut made = Vec::new();
        for one in &wanted {
            match self.make_clone(&frozen, one).await {
                Ok(clone) => made.push(clone),
                Err(error) => {
                    self.release(&wanted[made.len()..]).await;
                    self.unmake(&made).await;
                    return Err(error);
                }
            }
        }
        let begun = join_all(made.iter().map(|clone| self.go_on(clone, &frozen))).await;
        if let Some(error) = begun.into_iter().find_map(Result::err) {
            self.unmake(&made).await;
            return Err(error.into());
        }
        Ok(made)
    }

    /// Takes what a clone needs.
    async fn want(&self, asked: Asked) -> Result<Wanted, CreateError> {
        let id = VmId::parse(&asked.id)?;
        let reservation = self.reserve(&id)?;
        let lease = self.0.network.lease_for(id.as_str(), None)?;
        match self.0.ports.publish(&id, lease.address, &asked.publish).await {
            Ok(ports) => {
                let Asked { tags, set_up, .. } = asked;
                Ok(Wanted { id, lease, tags, ports, set_up, _reservation: reservation })
            }
            Err(error) => Err(self.unmade(&id, error.into()).await),
        }
    }

    /// Freezes a VM that runs, which goes on.
    pub(super) async fn freeze(&self, parent: &str) -> Result<Arc<Frozen>, CreateError> {
        let stopping = CreateError::from(FreezeError::Stopping);
        Ok(self.ask(parent, stopping, |reply| Command::Freeze { reply }).await?.1?)
    }

    async fn make_clone(&self, frozen: &Arc<Frozen>, wanted: &Wanted) -> Result<Arc<Shared>, CreateError> {
        let base = VmConfig {
            name: wanted.id.to_string(),
            cpus: frozen.began.cpus,
            memory_mib: frozen.began.memory_mib,
            tags: wanted.tags.clone(),
            // Its source has those that it had.
            ports: wanted.ports.clone(),
            autostart: false,
            ..frozen.config.clone()
        };
        let config = with_lease(base, &wanted.lease);
        config.check()?;
        let (context, frozen, id) = (Arc::clone(&self.0), Arc::clone(frozen), wanted.id.clone());
        let set_up = wanted.set_up.clone();
        let dir = super::blocking(move || {
            let owner = (context.owner.uid, context.owner.gid);
            Ok(context.store.create(&id, &config, |dir| {
                set_up.iter().try_for_each(|kept| dir.write_set_up(kept))?;
                frozen.fill(dir, owner)
            })?)
        })
        .await?;
        let shared = self.add(dir, None).await?;
        self.0.events.send(EventKind::VmCreated { id: wanted.id.to_string() });
        Ok(shared)
    }

    async fn go_on(&self, clone: &Shared, frozen: &Arc<Frozen>) -> Result<(), PowerError> {
        let go_on = |reply| Command::GoOn { from: Arc::clone(frozen), reply };
        self.ask(clone.dir().id().as_str(), PowerError::Stopping, go_on).await?.1
    }

    /// Gives back the addresses and ports of clones that were not made.
    async fn release(&self, wanted: &[Wanted]) {
        for one in wanted {
            self.0.network.release(one.id.as_str());
            self.0.ports.forget(&one.id).await;
        }
    }

    /// Takes back what was made.
    async fn unmake(&self, made: &[Arc<Shared>]) {
        for shared in made {
            if let Err(error) = self.delete(shared.dir().id().as_str(), true).await {
                tracing::warn!(vm = %shared.dir().id(), %error, "a clone that was to be taken back stays");
            }
        }
    }
}

/// Whether a VM in that state is cloned with its memory.
pub(super) fn with_memory(state: VmState) -> bool {
    matches!(state, VmState::PoweredOn | VmState::Paused)
}
