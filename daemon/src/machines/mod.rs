//! The VMs: the one place that knows the state machine of a VM.
//!
//! Each VM has a task of its own ([`machine`]) that takes commands in order; [`Machines`] finds
//! the task by id. REST handlers call [`Machines`] and never an engine.

mod attendant;
mod boot;
mod clones;
pub(crate) mod container;
mod disks;
pub mod error;
mod folders;
mod freeze;
pub mod guest;
mod machine;
mod own_templates;
mod ports;
mod registered;
mod resets;
mod set_up;
pub mod shared;
mod snapshots;
mod start;
mod suspend;
mod templates;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use catalyst_api::{CreateVm, EventKind, MemoryInfo, PowerOp, UpdateVm, Vm, VmState};
use catalyst_images::{ImageStore, Machine as ImageMachine};
use catalyst_vmm::description::Format;
use tokio::sync::{mpsc, oneshot};
use tracing::Instrument;

use crate::access::owner::Owner;
use crate::access_keys::AccessKeys;
use crate::engine::{Engines, process};
use crate::events::Events;
use crate::images::{disk_gib, is_diskless};
use crate::network::{Lease, Mac, Network, NetworkError};
use crate::ports::Ports;
use crate::privilege::as_root;
use crate::store::config::{DEFAULT_CPUS, DEFAULT_DISK_GIB, DEFAULT_MEMORY_MIB, DEFAULT_TEMPLATE, MICRO, pc};
use crate::store::foreign::hardware::Firmware;
use crate::store::{Chain, Store, StoreError, VmConfig, VmDir, VmId, disk, files};
use crate::tasks::Tasks;
use error::{ChangeError, CreateError, PowerError, UnknownVm};
use machine::{Asked, Command, Machine};
use shared::Shared;
use templates::Missed;

/// How long the start of the daemon waits for VM processes to answer. One that hangs must not keep it from the others.
const ADOPTION: std::time::Duration = std::time::Duration::from_secs(3);
/// Commands a VM can have waiting.
const QUEUE: usize = 64;

/// What all VMs share.
pub struct Context {
    /// The VMs on disk.
    pub store: Store,
    /// The images.
    pub images: ImageStore,
    /// The VM network.
    pub network: Network,
    /// Ports of guests on the host.
    pub ports: Ports,
    /// What VMs are started with, and may run on.
    pub engines: Engines,
    /// The event bus.
    pub events: Events,
    /// Who the VMs belong to.
    pub owner: Owner,
    /// Who may log in to guests.
    pub access_keys: AccessKeys,
    /// What takes long.
    pub tasks: Tasks,
    /// Whether sizes of VMs that are asked for again get a warm state.
    pub warms_by_itself: bool,
    /// The VM that is cloned where nothing else is named: its id, or the path of its VMX.
    pub parent: Option<String>,
    missed: Missed,
    /// Held while a VMX is registered.
    registering: tokio::sync::Mutex<()>,
    vms: RwLock<BTreeMap<VmId, Entry>>,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("store", &self.store).finish_non_exhaustive()
    }
}

/// A VM that is there, or an id that a create under way has taken.
#[derive(Clone, Debug)]
enum Entry {
    Reserved,
    Vm { shared: Arc<Shared>, commands: mpsc::Sender<Asked> },
}

/// All VMs.
#[derive(Clone, Debug)]
pub struct Machines(Arc<Context>);

impl Context {
    /// Brings together what VMs are made of. Events are told where those of the tasks are.
    pub fn new(
        store: Store,
        images: ImageStore,
        network: Network,
        engines: Engines,
        tasks: Tasks,
        owner: Owner,
        access_keys: AccessKeys,
    ) -> Self {
        let events = tasks.events().clone();
        let (missed, vms) = (Missed::default(), RwLock::default());
        let ports = Ports::new(network.bridge(), owner.uid, crate::settings::descriptors());
        Self {
            store,
            images,
            network,
            ports,
            engines,
            events,
            owner,
            access_keys,
            tasks,
            warms_by_itself: true,
            parent: None,
            missed,
            registering: tokio::sync::Mutex::default(),
            vms,
        }
    }

    fn entries(&self) -> RwLockReadGuard<'_, BTreeMap<VmId, Entry>> {
        // Nothing panics while it holds the lock; if it did, the map would still be whole.
        self.vms.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn entries_mut(&self) -> RwLockWriteGuard<'_, BTreeMap<VmId, Entry>> {
        self.vms.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets a VM whose folder is gone, and frees its address and ports.
    async fn forget(&self, id: &VmId) {
        self.ports.forget(id).await;
        self.entries_mut().remove(id);
        self.network.release(id.as_str());
    }
}

impl Machines {
    /// Finds all VMs in the store, and the processes of those that run: none of these is told to
    /// be off, or left out when it is counted who uses the network.
    pub async fn load(context: Context) -> Result<Self, StoreError> {
        let machines = Self(Arc::new(context));
        let mut found = Vec::new();
        machines.end_warming().await?;
        for dir in machines.0.store.scan()? {
            let id = dir.id().clone();
            let (sender, receiver) = oneshot::channel();
            found.push(receiver);
            if let Err(error) = machines.add(dir, Some(sender)).await {
                let reason = crate::http::error::chain(&error).join(": ");
                tracing::error!(vm = %id, reason, "left out");
            }
        }
        let all = futures_util::future::join_all(found);
        if tokio::time::timeout(ADOPTION, all).await.is_err() {
            tracing::warn!("a VM process does not answer; its VM is told to be powering on until it does");
        }
        Ok(machines)
    }

    /// Ends what an earlier daemon was making warm states of.
    async fn end_warming(&self) -> Result<(), StoreError> {
        for dir in self.0.store.warming()? {
            let path = dir.path().to_owned();
            let run = dir.run();
            let ended = tokio::task::spawn_blocking(move || process::end_holder(&run)).await;
            if let Ok(Err(error)) = ended {
                let reason = crate::http::error::chain(&error).join(": ");
                tracing::warn!(path = %path.display(), reason, "a template's process lives on");
                continue;
            }
            std::fs::remove_dir_all(&path).map_err(StoreError::write(path))?;
        }
        Ok(())
    }

    /// What all VMs share.
    pub fn context(&self) -> &Context {
        &self.0
    }

    /// Gives a VM that lies on disk its lease, its ports and its task.
    async fn add(&self, dir: VmDir, adopt: Option<oneshot::Sender<()>>) -> Result<Arc<Shared>, NetworkError> {
        let id = dir.id().clone();
        let (vmx, config) = dir.read().ok().unzip();
        let published = config.as_ref().map(|config| config.ports.clone()).unwrap_or_default();
        let wanted = config.as_ref().and_then(|config| Some((Mac(config.mac?), config.address?)));
        let lease = self.0.network.lease_for(id.as_str(), wanted)?;
        if let Some(why) = &lease.changed {
            tracing::warn!(vm = %id, why, "the VM has another address now");
        }
        if let (Some(vmx), Some(config)) = (vmx, config)
            && wanted != Some((lease.mac, lease.address))
        {
            let fixed = with_lease(config, &lease);
            if let Err(error) = dir.write(vmx, &fixed) {
                tracing::warn!(vm = %id, %error, "cannot keep the address of the VM");
            }
        }
        let ports = self.0.ports.clone();
        ports.open(&id, lease.address, &published).await;
        let shared = Arc::new(Shared::new(dir, self.0.events.clone(), ports, lease, self.0.engines.name()));
        shared.refresh();
        let (commands, queue) = mpsc::channel(QUEUE);
        // A container's that has ended meanwhile deletes itself at once: it must be known before its task begins.
        self.0.entries_mut().insert(id, Entry::Vm { shared: Arc::clone(&shared), commands });
        Machine::spawn(Arc::clone(&self.0), Arc::clone(&shared), queue, adopt);
        Ok(shared)
    }

    /// All VMs, those with `tag` if one is given, ordered by id.
    pub fn list(&self, tags: &[String]) -> Vec<Arc<Shared>> {
        let entries = self.0.entries();
        let vms = entries.values().filter_map(|entry| match entry {
            Entry::Vm { shared, .. } => Some(shared),
            Entry::Reserved => None,
        });
        vms.filter(|vm| tags.is_empty() || vm.tags().iter().any(|tag| tags.contains(tag))).cloned().collect()
    }

    /// The VM `id`.
    pub fn get(&self, id: &str) -> Result<Arc<Shared>, UnknownVm> {
        self.find(id).map(|(shared, _)| shared)
    }

    /// The VM `id` with its file read anew.
    pub fn show(&self, id: &str) -> Result<Vm, UnknownVm> {
        let shared = self.get(id)?;
        shared.refresh();
        Ok(shared.view())
    }

    fn find(&self, id: &str) -> Result<(Arc<Shared>, mpsc::Sender<Asked>), UnknownVm> {
        // It comes from a client and goes into one line for people.
        let unknown = || UnknownVm(id.chars().take(80).collect::<String>().escape_debug().to_string());
        let id = VmId::parse(id).map_err(|_| unknown())?;
        match self.0.entries().get(&id) {
            Some(Entry::Vm { shared, commands }) => Ok((Arc::clone(shared), commands.clone())),
            _ => Err(unknown()),
        }
    }

    /// Has a VM's task do what a command asks for; its answer. A VM that is deleted meanwhile is not there any more: `stopping` is
    /// the answer where the daemon ends.
    async fn ask<T, E: From<UnknownVm>>(
        &self,
        id: &str,
        stopping: E,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<(Arc<Shared>, T), E> {
        let (shared, commands) = self.find(id)?;
        let (reply, answer) = oneshot::channel();
        // Where nobody takes it, its reply is dropped as well.
        let _ = commands.send(asked(command(reply))).await;
        match answer.await {
            Ok(answer) => Ok((shared, answer)),
            Err(_) => Err(self.find(id).err().map_or(stopping, E::from)),
        }
    }

    /// Makes a VM: from a template, or with the disk of a parent that lies still. It is made
    /// whole or not at all, also when whoever asked is gone meanwhile.
    pub async fn create(&self, request: CreateVm) -> Result<Arc<Shared>, CreateError> {
        let machines = self.clone();
        let made = tokio::spawn(async move { machines.create_whole(request).await }.in_current_span());
        made.await.unwrap_or(Err(CreateError::Stopping))
    }

    async fn create_whole(&self, mut request: CreateVm) -> Result<Arc<Shared>, CreateError> {
        if request.parent.is_none() && request.template.is_none() && request.source.is_none() {
            request.parent = self.usual_parent();
        }
        if let Some(parent) = &request.parent
            && request.source.is_none()
            && clones::with_memory(self.find(parent)?.0.state())
        {
            if request.template.is_some() || request.disk_gib.is_some() {
                return Err(CreateError::ParentDisk);
            }
            if request.cpus.is_some() || request.memory_mib.is_some() {
                return Err(CreateError::ParentSize);
            }
            let set_up = set_up::asked(&self.0, &request)?;
            let clone =
                clones::Asked { id: request.id, tags: request.tags, publish: request.publish, set_up };
            let made = self.clone_running(parent, vec![clone]).await?;
            return made.into_iter().next().ok_or(CreateError::Stopping);
        }
        let id = VmId::parse(&request.id)?;
        let _reservation = self.reserve(&id)?;
        let dir = match self.make(&id, request).await {
            Ok(dir) => dir,
            Err(error) => return Err(self.unmade(&id, error).await),
        };
        let shared = self.add(dir, None).await?;
        self.0.events.send(EventKind::VmCreated { id: id.to_string() });
        Ok(shared)
    }

    /// Gives back what was taken for a VM that was not made.
    async fn unmade(&self, id: &VmId, error: CreateError) -> CreateError {
        self.0.network.release(id.as_str());
        self.0.ports.forget(id).await;
        error
    }

    /// The VM that the owner wants cloned where nothing else is named, if it is there.
    fn usual_parent(&self) -> Option<String> {
        let wanted = self.0.parent.as_deref()?;
        let is_it = |vm: &&Arc<Shared>| {
            let dir = vm.dir();
            if wanted.contains('/') {
                files::are_same(&dir.vmx(), wanted.as_ref())
            } else {
                dir.id().as_str() == wanted
            }
        };
        let found = self.list(&[]).iter().find(is_it).map(|vm| vm.dir().id().to_string());
        if found.is_none() {
            tracing::warn!(
                parent = wanted,
                "the VM that is set as the usual parent is not there; the template is cloned"
            );
        }
        found
    }

    async fn make(&self, id: &VmId, mut request: CreateVm) -> Result<VmDir, CreateError> {
        if let Some(source) = request.source.clone() {
            return self.register(id, source, request).await;
        }
        let lease = self.0.network.lease_for(id.as_str(), None)?;
        let ports = &self.0.ports;
        request.publish = ports.publish(id, lease.address, &request.publish).await?;
        match request.parent.clone() {
            Some(parent) => self.clone_vm(id, &parent, request, &lease).await,
            None => self.create_from_template(id, request, &lease).await,
        }
    }

    async fn create_from_template(
        &self,
        id: &VmId,
        request: CreateVm,
        lease: &Lease,
    ) -> Result<VmDir, CreateError> {
        let container = match request.container.clone() {
            Some(info) => Some(container::check(&request, info)?),
            None => None,
        };
        let usual = if container.is_some() { MICRO } else { DEFAULT_TEMPLATE };
        let template = request.template.clone().unwrap_or_else(|| usual.to_owned());
        let set_up = set_up::asked(&self.0, &request)?;
        let (context, id, lease) = (Arc::clone(&self.0), id.clone(), lease.clone());
        blocking(move || {
            let image = as_root(|| context.images.current(&template))
                .map_err(|source| CreateError::Template { name: template.clone(), source })?;
            if is_diskless(&image) != container.is_some() {
                return Err(CreateError::Container);
            }
            let hardware = image.manifest.machine.map(|machine| pc(firmware(machine))).transpose()?;
            if hardware.is_some() && set_up.is_some() {
                return Err(CreateError::UserDataNoAgent);
            }
            let least = disk_gib(&image);
            let as_is = hardware.is_some() || container.is_some();
            let usual = if as_is { least } else { DEFAULT_DISK_GIB.max(least) };
            let base = VmConfig {
                name: id.to_string(),
                cpus: u32::try_from(DEFAULT_CPUS).unwrap_or(1),
                memory_mib: DEFAULT_MEMORY_MIB,
                disk_gib: request.disk_gib.unwrap_or(usual),
                template,
                version: image.version,
                mac: None,
                address: None,
                tags: Vec::new(),
                ports: Vec::new(),
                autostart: false,
                hardware,
            };
            let config = with_lease(with_request(base, request), &lease);
            config.check()?;
            if config.disk_gib < least || (config.disk_gib == 0 && container.is_none()) {
                return Err(CreateError::DiskTooSmall {
                    asked: config.disk_gib,
                    name: config.template,
                    least,
                });
            }
            let owner = (context.owner.uid, context.owner.gid);
            let made = context.store.create(&id, &config, |dir| {
                dir.write_chain(&Chain { fresh: true, ..Chain::default() })?;
                set_up.iter().try_for_each(|kept| dir.write_set_up(kept))?;
                if let Some(container) = &container {
                    return dir.write_container(container);
                }
                Ok(disk::create_overlay(&dir.disk(), (&image.disk, Format::Raw), config.disk_gib, owner)?)
            });
            Ok(made?)
        })
        .await
    }

    async fn clone_vm(
        &self,
        id: &VmId,
        parent: &str,
        request: CreateVm,
        lease: &Lease,
    ) -> Result<VmDir, CreateError> {
        if request.template.is_some() || request.disk_gib.is_some() {
            return Err(CreateError::ParentDisk);
        }
        let (parent, commands) = self.find(parent)?;
        let (_, inherited) = parent.dir().read()?;
        if let Some(special) = parent.special() {
            return Err(CreateError::Special(parent.dir().id().clone(), special));
        }
        let set_up = set_up::asked(&self.0, &request)?;
        let base = VmConfig { name: id.to_string(), autostart: false, ..inherited };
        let config = with_lease(with_request(base, request), lease);
        config.check()?;
        let context = Arc::clone(&self.0);
        let id = id.clone();
        let handle = tokio::runtime::Handle::current();
        blocking(move || {
            let copy = |dir: &VmDir| {
                let chain = parent.dir().chain()?;
                for name in &chain.own {
                    let (from, to) = (parent.dir().path().join(name), dir.path().join(name));
                    std::fs::hard_link(from, &to).map_err(StoreError::write(to))?;
                }
                match &set_up {
                    Some(kept) => dir.write_set_up(kept)?,
                    None if chain.fresh => dir.copy_set_up(parent.dir())?,
                    None => {}
                }
                dir.write_chain(&Chain { at: None, ..chain })?;
                dir.copy_folders(parent.dir())?;
                Ok(copy_disk(&handle, &commands, dir)?)
            };
            match context.store.create(&id, &config, copy) {
                Err(StoreError::Disk(disk::DiskError::Unusable { why, .. })) if why == PARENT_BUSY => {
                    Err(CreateError::ParentState { id: parent.dir().id().clone(), state: parent.state() })
                }
                made => Ok(made?),
            }
        })
        .await
    }

    /// Takes the id until the reservation is dropped or a VM has taken its place.
    fn reserve(&self, id: &VmId) -> Result<Reservation, CreateError> {
        let mut entries = self.0.entries_mut();
        if entries.contains_key(id) {
            return Err(StoreError::Exists(id.clone()).into());
        }
        entries.insert(id.clone(), Entry::Reserved);
        Ok(Reservation { context: Arc::clone(&self.0), id: id.clone() })
    }

    /// Does `op` and returns when the VM is in the state that it leads to. A VM that is to be on boots if `cold`.
    pub async fn power(&self, id: &str, op: PowerOp, cold: bool) -> Result<Arc<Shared>, PowerError> {
        let power = |reply| Command::Power { op, cold, reply };
        let (shared, done) = self.ask(id, PowerError::Stopping, power).await?;
        done.map(|()| shared)
    }

    /// Where the memory of a VM that has a process is, and what processor time the process took, in milliseconds.
    pub async fn usage(&self, id: &str) -> Result<(MemoryInfo, u64), PowerError> {
        self.ask(id, PowerError::Stopping, |reply| Command::Usage { reply }).await?.1
    }

    /// Changes what the VMX says.
    pub async fn update(&self, id: &str, update: UpdateVm) -> Result<Arc<Shared>, ChangeError> {
        let change = |reply| Command::Update { update, reply };
        let (shared, done) = self.ask(id, ChangeError::Stopping, change).await?;
        done.map(|()| shared)
    }

    /// Removes a VM and its files; one that runs only if `force`.
    pub async fn delete(&self, id: &str, force: bool) -> Result<(), ChangeError> {
        self.ask(id, ChangeError::Stopping, |reply| Command::Delete { force, reply }).await?.1
    }

    /// VMs that have a process.
    pub fn running(&self) -> Vec<Arc<Shared>> {
        self.list(&[]).into_iter().filter(|vm| vm.state().has_process()).collect()
    }

    /// The VM that has `address`.
    pub fn by_address(&self, address: Ipv4Addr) -> Option<Arc<Shared>> {
        self.list(&[]).into_iter().find(|vm| vm.address() == address)
    }

    /// The versions of the template `name` that VMs stand on, one entry for each VM.
    pub fn template_versions(&self, name: &str) -> Vec<String> {
        let images = self.list(&[]).into_iter().filter_map(|vm| vm.image());
        images.filter(|(template, _)| template == name).map(|(_, version)| version).collect()
    }
}

/// The command as part of the request that is being handled.
fn asked(command: Command) -> Asked {
    (command, tracing::Span::current())
}

/// Frees a reserved id that has not become a VM.
struct Reservation {
    context: Arc<Context>,
    id: VmId,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut entries = self.context.entries_mut();
        if let Some(Entry::Reserved) = entries.get(&self.id) {
            entries.remove(&self.id);
        }
    }
}

const PARENT_BUSY: &str = "its VM does not lie still";

/// Has the parent's task copy its disk, so that nothing powers it on meanwhile.
fn copy_disk(
    handle: &tokio::runtime::Handle,
    commands: &mpsc::Sender<Asked>,
    to: &VmDir,
) -> Result<(), disk::DiskError> {
    let busy = || disk::DiskError::Unusable { path: to.disk().display().to_string(), why: PARENT_BUSY };
    let copied = handle.block_on(disks::still(commands, {
        let to = to.disk();
        move |dir| disk::copy(&dir.disk(), &to)
    }));
    match copied {
        Ok(result) => result,
        Err(state) => {
            tracing::debug!(?state, "the parent does not lie still");
            Err(busy())
        }
    }
}

fn with_request(mut config: VmConfig, request: CreateVm) -> VmConfig {
    config.name = request.name.filter(|name| !name.is_empty()).unwrap_or(config.name);
    config.cpus = request.cpus.unwrap_or(config.cpus);
    config.memory_mib = request.memory_mib.unwrap_or(config.memory_mib);
    config.tags = request.tags;
    config.ports = request.publish;
    config
}

const fn firmware(machine: ImageMachine) -> Firmware {
    match machine {
        ImageMachine::Bios => Firmware::Bios,
        ImageMachine::Efi => Firmware::Efi,
    }
}

fn with_lease(mut config: VmConfig, lease: &Lease) -> VmConfig {
    config.mac = Some(lease.mac.0);
    config.address = Some(lease.address);
    config
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CreateError> + Send + 'static,
) -> Result<T, CreateError> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(CreateError::Stopping))
}

/// Whether a VM in `state` has a guest to speak with.
pub(crate) const fn has_guest(state: VmState) -> bool {
    matches!(state, VmState::PoweringOn | VmState::PoweredOn | VmState::PoweringOff)
}
