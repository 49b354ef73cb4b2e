//! What is known of a VM, for everyone who asks; only its own task writes it.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use catalyst_agent_protocol::SetUpReport;
use catalyst_api::{ContainerInfo, EngineName, EventKind, GuestStatus, Vm, VmState};

use super::error::Special;
use super::folders::Folders;
use super::set_up;
use crate::events::Events;
use crate::network::Lease;
use crate::ports::Ports;
use crate::store::container::Container;
use crate::store::{Began, VmConfig, VmDir};
use catalyst_agent_link::AgentLink;

/// The state of one VM.
#[derive(Debug)]
pub struct Shared {
    dir: VmDir,
    events: Events,
    ports: Ports,
    facts: Mutex<Facts>,
    console: Arc<tokio::sync::Semaphore>,
    /// The layers of the disk are others than the process has, if there is one, and hold the same.
    merged: AtomicBool,
    pub(super) folders: Folders,
    /// The VMX that was registered in place.
    source: Option<std::path::PathBuf>,
    container: Option<Container>,
}

/// See [`Shared`].
#[derive(Debug)]
pub(super) struct Facts {
    pub state: VmState,
    pub reason: Option<String>,
    pub config: Option<VmConfig>,
    pub lease: Lease,
    pub engine: EngineName,
    pub pid: Option<u32>,
    pub started: Option<u64>,
    pub began: Option<Began>,
    pub guest: GuestStatus,
    pub agent: Option<AgentLink>,
    /// How far the guest's setting up is; `None` where there is nothing to set up.
    pub set_up: Option<SetUpReport>,
    /// There is a process, and it could not be taken over: only that unblocks the VM.
    pub unadopted: bool,
}

impl Shared {
    pub(super) fn new(dir: VmDir, events: Events, ports: Ports, lease: Lease, engine: EngineName) -> Self {
        let facts = Facts {
            state: VmState::PoweredOff,
            reason: None,
            config: None,
            lease,
            engine,
            pid: None,
            started: None,
            began: None,
            guest: GuestStatus::default(),
            agent: None,
            set_up: dir.set_up_report(),
            unadopted: false,
        };
        let source = dir.registered().ok().flatten().map(|record| record.vmx);
        let console = Arc::new(tokio::sync::Semaphore::new(1));
        let folders = Folders::default();
        let container = dir.container().unwrap_or_else(|error| {
            // Its file alone says so: the VM is no other for that, and goes with its process.
            tracing::error!(vm = %dir.id(), reason = crate::http::error::chain(&error).join(": "), "container");
            Some(Container { info: ContainerInfo::default(), started: 0 })
        });
        // Of a process that is found it is not known.
        let merged = AtomicBool::new(true);
        Self { dir, events, ports, facts: Mutex::new(facts), console, merged, folders, source, container }
    }

    /// The VM's folder.
    pub fn dir(&self) -> &VmDir {
        &self.dir
    }

    /// Power state.
    pub fn state(&self) -> VmState {
        self.facts().state
    }

    /// The link to the agent, once it is there.
    pub fn agent(&self) -> Option<AgentLink> {
        self.facts().agent.clone()
    }

    /// The right to use the console until it is dropped; `None` while another has it.
    pub fn claim_console(&self) -> Option<tokio::sync::OwnedSemaphorePermit> {
        Arc::clone(&self.console).try_acquire_owned().ok()
    }

    /// Notes that layers of the disk were merged on disk alone.
    pub(super) fn note_merged(&self) {
        self.merged.store(true, Ordering::Relaxed);
    }

    /// Notes that the process has the layers that are on disk.
    pub(super) fn note_alike(&self) {
        self.merged.store(false, Ordering::Relaxed);
    }

    /// Whether the process may have other layers.
    pub(super) fn is_merged(&self) -> bool {
        self.merged.load(Ordering::Relaxed)
    }

    /// What the agent says.
    pub fn guest(&self) -> GuestStatus {
        self.facts().guest.clone()
    }

    /// Whether its guest starts by its own loader and has no agent: it was registered in place, or is of an imported image.
    pub fn is_foreign(&self) -> bool {
        self.dir.is_registered()
            || self.facts().config.as_ref().is_some_and(|config| config.hardware.is_some())
    }

    /// The container that it is, if it is one.
    pub fn container(&self) -> Option<&Container> {
        self.container.as_ref()
    }

    /// What it is, if it has not all that a VM of a template has.
    pub fn special(&self) -> Option<Special> {
        let container = self.container.is_some().then_some(Special::Container);
        container.or_else(|| self.is_foreign().then_some(Special::Foreign))
    }

    /// The VM's fixed address.
    pub fn address(&self) -> Ipv4Addr {
        self.facts().lease.address
    }

    /// The VM's lease.
    pub fn lease(&self) -> Lease {
        self.facts().lease.clone()
    }

    /// The version of the template that the disk stands on, as template and version; none of a registered VM.
    pub fn image(&self) -> Option<(String, String)> {
        let facts = self.facts();
        let config = facts.config.as_ref().filter(|config| !config.template.is_empty())?;
        Some((config.template.clone(), config.version.clone()))
    }

    /// The tags, for lists.
    pub fn tags(&self) -> Vec<String> {
        self.facts().config.as_ref().map(|config| config.tags.clone()).unwrap_or_default()
    }

    pub(super) fn facts(&self) -> MutexGuard<'_, Facts> {
        // Nothing panics while it holds the lock; if it did, the facts would still be whole.
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a state and tells the listeners.
    pub(super) fn enter(&self, state: VmState, reason: Option<String>) {
        {
            let mut facts = self.facts();
            facts.state = state;
            facts.reason.clone_from(&reason);
        }
        self.ports.set_open(self.dir.id(), state.has_process());
        if matches!(state, VmState::PoweredOff | VmState::Blocked) {
            self.ports.cut(self.dir.id());
        }
        let id = self.dir.id().to_string();
        tracing::info!(vm = %id, %state, reason = reason.as_deref().unwrap_or_default(), "state");
        self.events.send(EventKind::VmState { id, state, reason });
    }

    /// Tells the listeners that something changed that is no state.
    pub(super) fn tell_changed(&self) {
        self.events.send(EventKind::VmChanged { id: self.dir.id().to_string() });
    }

    /// Notes what the agent says and tells the listeners if it is new.
    pub(super) fn set_guest(&self, guest: GuestStatus) {
        {
            let mut facts = self.facts();
            if facts.guest == guest {
                return;
            }
            facts.guest = guest.clone();
        }
        self.events.send(EventKind::VmGuest { id: self.dir.id().to_string(), guest });
    }

    /// Notes how far the guest's setting up is, and tells the listeners if that is new.
    pub(super) fn set_set_up(&self, report: &SetUpReport) {
        let id = self.dir.id();
        {
            let mut facts = self.facts();
            if facts.set_up.as_ref() == Some(report) {
                return;
            }
            facts.set_up = Some(report.clone());
        }
        tracing::info!(vm = %id, state = ?report.state, said = report.message, "set up");
        if let Err(error) = self.dir.write_set_up_report(report) {
            tracing::warn!(vm = %id, %error, "how far the guest is set up is not kept");
        }
        self.events.send(EventKind::VmSetUp { id: id.to_string(), set_up: set_up::info(report) });
    }

    /// Reads the VMX again, since clients rewrite it at will. A file that cannot be used blocks
    /// the VM until it is mended.
    pub(super) fn refresh(&self) {
        let read = self.dir.read();
        let state = self.state();
        if self.facts().unadopted {
            return;
        }
        match read {
            Ok((_, config)) => {
                self.facts().config = Some(config);
                if state == VmState::Blocked {
                    self.enter(super::suspend::still(&self.dir), None);
                }
            }
            Err(error) => {
                let reason = crate::http::error::chain(&error).join(": ");
                let told = self.facts().reason.as_deref() == Some(&reason);
                let known = state == VmState::Blocked && told;
                if !state.has_process() && !known {
                    self.enter(VmState::Blocked, Some(reason));
                }
            }
        }
    }

    /// The VM as the API tells it.
    pub fn view(&self) -> Vm {
        let facts = self.facts();
        let id = self.dir.id().to_string();
        let config = facts.config.as_ref();
        Vm {
            name: config.map_or_else(|| id.clone(), |config| config.name.clone()),
            state: facts.state,
            reason: facts.reason.clone(),
            tags: config.map(|config| config.tags.clone()).unwrap_or_default(),
            autostart: config.is_some_and(|config| config.autostart),
            cpus: config.map_or(0, |config| config.cpus),
            memory_mib: config.map_or(0, |config| config.memory_mib),
            disk_gib: config.map_or(0, |config| config.disk_gib),
            template: config.map(|config| config.template.clone()).unwrap_or_default(),
            engine: facts.engine,
            mac: facts.lease.mac.to_string(),
            address: match &self.container {
                Some(container) => {
                    container.info.address.map(|address| address.to_string()).unwrap_or_default()
                }
                None => facts.lease.address.to_string(),
            },
            guest: facts.guest.clone(),
            pid: facts.pid,
            started: facts.started,
            start_mode: facts.began.map(|began| began.mode),
            set_up: facts.set_up.as_ref().map(set_up::info),
            ports: self.ports.list(self.dir.id()),
            vmx: self.dir.vmx().display().to_string(),
            foreign: config.is_some_and(|config| config.hardware.is_some()),
            source: self.source.as_ref().map(|path| path.display().to_string()),
            container: self.container.as_ref().map(|container| container.info.clone()),
            id,
        }
    }
}
