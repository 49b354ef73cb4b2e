//! What VMs take, told to whoever listens: samples are taken while somebody does.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use catalyst_api::{Event, EventKind, VmState};
use tokio::sync::broadcast;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use crate::events::now_ms;
use crate::machines::Machines;

/// How often a VM is looked at.
const EVERY: Duration = Duration::from_secs(2);
/// Samples that a slow listener may be behind before it loses some.
const BACKLOG: usize = 1024;

/// See the module.
#[derive(Debug)]
pub struct Usage {
    machines: Machines,
    samples: broadcast::Sender<Event>,
    sampling: Mutex<bool>,
}

impl Usage {
    /// Nobody listens yet.
    pub fn new(machines: Machines) -> Self {
        Self { machines, samples: broadcast::channel(BACKLOG).0, sampling: Mutex::new(false) }
    }

    /// Samples from now on.
    pub fn listen(self: &Arc<Self>) -> broadcast::Receiver<Event> {
        let mut sampling = self.sampling();
        let receiver = self.samples.subscribe();
        if !std::mem::replace(&mut *sampling, true) {
            tokio::spawn(Arc::clone(self).sample());
        }
        receiver
    }

    fn sampling(&self) -> MutexGuard<'_, bool> {
        // Nothing panics while it holds the lock.
        self.sampling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until nobody listens any more.
    async fn sample(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // A VM that is busy answers late: it holds up no other, and is not asked again until it has.
        let (mut looks, mut asked) = (JoinSet::new(), HashSet::new());
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    if self.nobody_listens() {
                        return;
                    }
                    for id in self.on() {
                        if asked.insert(id.clone()) {
                            looks.spawn(look(self.machines.clone(), id));
                        }
                    }
                }
                Some(looked) = looks.join_next() => {
                    let Ok((id, kind)) = looked else { continue };
                    asked.remove(&id);
                    if let Some(kind) = kind {
                        // An error only says that nobody listens.
                        let _ = self.samples.send(Event { at_ms: now_ms(), kind });
                    }
                }
            }
        }
    }

    fn nobody_listens(&self) -> bool {
        let mut sampling = self.sampling();
        *sampling = self.samples.receiver_count() > 0;
        !*sampling
    }

    fn on(&self) -> impl Iterator<Item = String> {
        let on = |state| matches!(state, VmState::PoweredOn | VmState::Paused | VmState::PoweringOff);
        let vms = self.machines.running().into_iter();
        vms.filter(move |vm| on(vm.state())).map(|vm| vm.dir().id().to_string())
    }
}

/// A VM that has ended meanwhile takes nothing.
async fn look(machines: Machines, id: String) -> (String, Option<EventKind>) {
    let usage = machines.usage(&id).await.ok();
    let kind = usage.map(|(memory, cpu_ms)| EventKind::VmUsage { id: id.clone(), cpu_ms, memory });
    (id, kind)
}
