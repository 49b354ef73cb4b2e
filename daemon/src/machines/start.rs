//! What a power-on needs, gathered: files, network, identity.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use catalyst_api::{EngineName, PowerOp, StartMode};
use catalyst_images::Image;
use catalyst_vmm::description::Format;

use super::Context;
use super::error::PowerError;
use super::freeze::Frozen;
use super::shared::Shared;
use crate::engine::{EngineError, Layer, Nic, Saved, StartSpec, VmProcess, vm_cid, vm_user};
use crate::images::is_diskless;
use crate::network::{Lease, Tap};
use crate::privilege::as_root;
use crate::saved::SavedDir;
use crate::store::identity::{Identity, IdentityError};
use crate::store::{Began, Chain, StoreError, VmConfig, VmDir, disk, files};
use crate::warm::{Warm, WarmStates};
use catalyst_agent_link as agent;

/// A VM process that stands, and how it came to be.
pub(super) struct Started {
    pub process: Arc<dyn VmProcess>,
    pub began: Began,
    /// What the server of its folders goes on from.
    pub folders: Option<Vec<u8>>,
}

/// Starts the VM: from a warm state of its template if it was never on and one fits, unless `cold`; else by booting.
pub(super) async fn start(
    context: &Arc<Context>,
    shared: &Arc<Shared>,
    cold: bool,
) -> Result<Started, PowerError> {
    let dir = shared.dir();
    dir.finish_restoring()?;
    let (_, config) = dir.read()?;
    if let Some(hardware) = config.hardware.clone() {
        return super::registered::start(context, shared, config, hardware).await;
    }
    let image = image(context, dir, &config)?;
    let chain = dir.chain()?;
    if dir.suspended().exists() {
        if !cold {
            return resume(context, shared, &config, &image, &chain).await;
        }
        dir.forget_suspended()?;
    }
    if chain.fresh
        && !cold
        && let Some(started) = try_warm(context, shared, &config, &image).await
    {
        return Ok(started);
    }
    let chain = settle(context, dir, &config, chain, &image)?;
    launch(context, shared, &config, &image, &chain, (sized(StartMode::Cold, &config), None)).await
}

/// Goes on from another VM's memory. Its cable is out until it knows who it is.
pub(super) async fn go_on(
    context: &Arc<Context>,
    shared: &Arc<Shared>,
    frozen: &Frozen,
) -> Result<Started, PowerError> {
    let dir = shared.dir();
    let (_, config) = dir.read()?;
    let image = image(context, dir, &config)?;
    same_engine(context, dir, frozen.engine)?;
    let from = frozen.saved().map_err(|source| PowerError::Saved { id: dir.id().clone(), source })?;
    let began = Began { mode: StartMode::Clone, ..frozen.began };
    let started = launch(context, shared, &config, &image, &dir.chain()?, (began, Some(from))).await?;
    Ok(Started { folders: frozen.folders.clone(), ..started })
}

/// What a process begins with that is as large as the VM's file says.
fn sized(mode: StartMode, config: &VmConfig) -> Began {
    Began { mode, cpus: config.cpus, memory_mib: config.memory_mib }
}

/// A machine goes on only on the engine that it was on.
pub(super) fn same_engine(context: &Context, dir: &VmDir, was: EngineName) -> Result<(), PowerError> {
    let here = context.engines.name();
    if was == here {
        return Ok(());
    }
    let why = format!("it was on engine {was}, VMs are started on {here} here");
    Err(PowerError::Misfit { id: dir.id().clone(), why })
}

/// What the engine said when the VM was to be on.
fn not_started(dir: &VmDir) -> impl FnOnce(EngineError) -> PowerError {
    let id = dir.id().clone();
    |source| PowerError::Engine { id, op: PowerOp::On, source }
}

pub(super) fn image(context: &Context, dir: &VmDir, config: &VmConfig) -> Result<Image, PowerError> {
    let image = as_root(|| context.images.version(&config.template, &config.version));
    image.map_err(|source| PowerError::Template { id: dir.id().clone(), source })
}

/// Goes on from where the VM was suspended.
async fn resume(
    context: &Arc<Context>,
    shared: &Arc<Shared>,
    config: &VmConfig,
    image: &Image,
    chain: &Chain,
) -> Result<Started, PowerError> {
    let dir = shared.dir();
    let unusable = |source| PowerError::Saved { id: dir.id().clone(), source };
    let saved = SavedDir::new(dir.suspended());
    let manifest = saved.read().map_err(unusable)?;
    let engine = context.engines.chosen();
    same_engine(context, dir, manifest.engine)?;
    let fit = engine.fit().await.map_err(not_started(dir))?;
    if let Some(why) = fit.refuses(&manifest.fit) {
        return Err(PowerError::Misfit { id: dir.id().clone(), why: why.to_string() });
    }
    let from = saved.open(&manifest, false).map_err(unusable)?;
    let folders = saved.open_folders(&manifest).map_err(unusable)?;
    let began = Began { mode: StartMode::Resume, cpus: manifest.cpus, memory_mib: manifest.memory_mib };
    let sized = VmConfig { cpus: began.cpus, memory_mib: began.memory_mib, ..config.clone() };
    let started = launch(context, shared, &sized, image, chain, (began, Some(from))).await?;
    // Before it can run: what it does to its disk from now on, the saved memory knows nothing of.
    if let Err(error) = dir.forget_suspended() {
        end(started.process.as_ref()).await;
        return Err(error.into());
    }
    Ok(Started { folders, ..started })
}

/// Ends a process that nobody would know of any more.
pub(super) async fn end(process: &dyn VmProcess) {
    if process.kill().is_ok() {
        process.exited().await;
    }
}

/// Goes on from the warm state for a VM of that kind, if there is one that serves.
async fn try_warm(
    context: &Arc<Context>,
    shared: &Arc<Shared>,
    config: &VmConfig,
    image: &Image,
) -> Option<Started> {
    let id = shared.dir().id();
    let engine = context.engines.chosen();
    let fit = match engine.fit().await {
        Ok(fit) => fit,
        Err(error) => {
            tracing::warn!(vm = %id, %error, "warm states are passed over");
            return None;
        }
    };
    let warm = WarmStates::of(image).find(engine.name(), &fit, config.cpus, config.memory_mib);
    let Some(warm) = warm else {
        context.missed(image, config);
        return None;
    };
    match start_warm(context, shared, config, image, &warm).await {
        Ok(started) => Some(started),
        Err(error) => {
            let reason = crate::http::error::chain(&error).join(": ");
            tracing::warn!(vm = %id, warm = warm.name, reason, "it does not go on from there; it boots");
            None
        }
    }
}

async fn start_warm(
    context: &Arc<Context>,
    shared: &Arc<Shared>,
    config: &VmConfig,
    image: &Image,
    warm: &Warm,
) -> Result<Started, PowerError> {
    let dir = shared.dir();
    let saved = warm.open().map_err(|source| PowerError::Saved { id: dir.id().clone(), source })?;
    // An overlay that was never written: another one is as good.
    if !is_diskless(image) {
        overlay(context, dir, config, (&WarmStates::of(image).disk(&warm.name), Format::Qcow2))?;
    }
    let chain = Chain { warm: Some(warm.name.clone()), at: dir.chain()?.at, ..Chain::default() };
    // Before it can run, so that no later start takes what it wrote for empty.
    dir.write_chain(&chain)?;
    // A container is told who it is by its engine.
    if shared.container().is_none() {
        files::write_atomically(&dir.unnamed(), b"", 0o600).map_err(StoreError::write(dir.unnamed()))?;
    }
    let began = sized(StartMode::Warm, config);
    let started = launch(context, shared, config, image, &chain, (began, Some(saved))).await;
    if started.is_err() {
        let _ = std::fs::remove_file(dir.unnamed());
        dir.write_chain(&Chain { fresh: true, ..chain })?;
    }
    started
}

/// Puts a VM that was never on onto its image, as far as it is not there already.
fn settle(
    context: &Context,
    dir: &VmDir,
    config: &VmConfig,
    chain: Chain,
    image: &Image,
) -> Result<Chain, PowerError> {
    if !chain.fresh {
        return Ok(chain);
    }
    if chain.warm.is_some() && !is_diskless(image) {
        overlay(context, dir, config, (&image.disk, Format::Raw))?;
    }
    let chain = Chain { at: chain.at, ..Chain::default() };
    dir.write_chain(&chain)?;
    Ok(chain)
}

fn overlay(
    context: &Context,
    dir: &VmDir,
    config: &VmConfig,
    base: (&Path, Format),
) -> Result<(), PowerError> {
    let owner = (context.owner.uid, context.owner.gid);
    Ok(disk::create_overlay(&dir.disk(), base, config.disk_gib, owner).map_err(StoreError::from)?)
}

/// Opens everything that the VM is made of, and starts its process.
async fn launch(
    context: &Arc<Context>,
    shared: &Arc<Shared>,
    config: &VmConfig,
    image: &Image,
    chain: &Chain,
    (began, from): (Began, Option<Saved>),
) -> Result<Started, PowerError> {
    let dir = shared.dir().clone();
    let lease = shared.lease();
    let container = shared.container();
    let (nics, command_line) = match container {
        Some(container) => {
            let ended = |source| PowerError::ContainerEnded { id: dir.id().clone(), source };
            (super::container::nics(container).map_err(ended)?, image.kernel_command_line(&[]))
        }
        None => (
            vec![Nic { tap: cable(context, &dir, &lease).await?.fd, mac: lease.mac.0 }],
            command_line(image, &Identity::load_or_generate(&dir.identity())?),
        ),
    };
    let spec = StartSpec {
        cpus: config.cpus,
        memory_mib: config.memory_mib,
        kernel: open(&image.vmlinux)?,
        initrd: open(&image.initrd)?,
        command_line,
        command_line_software_cpu: image.manifest.command_line_software_cpu.clone(),
        kernel_hz: image.manifest.kernel_hz,
        layers: layers(&dir, image, chain)?,
        nics,
        container: container.is_some(),
        user: vm_user(lease.address),
        cid: vm_cid(lease.address),
        from,
        cgroup_of: container.map(|container| container.info.pid),
        dir,
    };
    // A process that begins now has what the files say.
    let _ = std::fs::remove_file(spec.dir.switching());
    spec.dir.forget_standing();
    spec.dir.note_begins(began)?;
    let process = context.engines.chosen().start(spec).await.map_err(not_started(shared.dir()))?;
    Ok(Started { process, began, folders: None })
}

/// The VM's tap: on the bridge, or loose as long as its guest does not know who it is.
async fn cable(context: &Context, dir: &VmDir, lease: &Lease) -> Result<Tap, PowerError> {
    context.network.up().await?;
    let tap = if dir.unnamed().exists() {
        context.network.forget_neighbour(lease).await;
        context.network.loose_tap(lease)?
    } else {
        context.network.open_tap(lease).await?
    };
    tracing::debug!(vm = %dir.id(), tap = tap.name, "tap");
    Ok(tap)
}

/// The files that the VM's disk consists of.
pub(super) fn layers(dir: &VmDir, image: &Image, chain: &Chain) -> Result<Vec<Layer>, PowerError> {
    if is_diskless(image) {
        return Ok(Vec::new());
    }
    let qcow2 = |file: File| Layer { file: file.into(), format: Format::Qcow2 };
    let mut layers = vec![qcow2(disk::open_overlay(&dir.disk()).map_err(StoreError::from)?)];
    for name in &chain.own {
        let path = dir.path().join(name);
        // A daemon that was killed while it froze the VM may have left the disk as its own layer.
        if !files::are_same(&path, &dir.disk()) {
            layers.push(qcow2(disk::open_qcow2(&path, false).map_err(StoreError::from)?));
        }
    }
    if let Some(warm) = &chain.warm {
        let path = WarmStates::of(image).disk(warm);
        layers.push(qcow2(as_root(|| disk::open_qcow2(&path, false)).map_err(StoreError::from)?));
    }
    layers.push(Layer { file: open(&image.disk)?, format: Format::Raw });
    Ok(layers)
}

fn command_line(image: &Image, identity: &Identity) -> String {
    // systemd wants it before the agent can write it.
    image.kernel_command_line(&[&format!("systemd.machine_id={}", identity.machine_id)])
}

/// Opens a file of an image, which is root's.
fn open(path: &Path) -> Result<OwnedFd, PowerError> {
    as_root(|| File::open(path))
        .map(OwnedFd::from)
        .map_err(|source| PowerError::Open { path: path.display().to_string(), source })
}

/// What the agent is told: who the guest is, where it is, who may log in.
pub(super) fn guest_identity(
    context: &Context,
    shared: &Shared,
    copy: bool,
) -> Result<agent::Identity, IdentityError> {
    let identity = Identity::load_or_generate(&shared.dir().identity())?;
    let lease = shared.lease();
    // A name that cannot be read is told when the guest is set up.
    let own_name = shared.dir().set_up().ok().flatten().and_then(|kept| kept.hostname);
    Ok(agent::Identity {
        // DNS has names with '_', hosts (RFC 952) have not.
        hostname: own_name.unwrap_or_else(|| lease.name.replace('_', "-")),
        domain: lease.domain.clone(),
        mac: lease.mac.to_string(),
        address: lease.address,
        prefix: lease.prefix,
        gateway: lease.gateway,
        gateway_mac: lease.gateway_mac.to_string(),
        dns: lease.dns,
        machine_id: identity.machine_id,
        host_keys: identity.host_keys,
        authorized_keys: context.access_keys.authorized(),
        unix_ns: 0,
        seed: String::new(),
        clone: copy,
    })
}
