//! What a power-on needs, gathered: files, network, identity.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use catalyst_images::Image;

use super::Context;
use super::error::PowerError;
use super::shared::Shared;
use crate::agent;
use crate::engine::{StartSpec, VmProcess, vm_cid, vm_user};
use crate::store::disk;
use crate::store::identity::{Identity, IdentityError};

/// Starts the VM cold.
pub(super) async fn start(
    context: &Arc<Context>,
    shared: &Arc<Shared>,
) -> Result<Box<dyn VmProcess>, PowerError> {
    let dir = shared.dir().clone();
    let id = dir.id().clone();
    let (_, config) = dir.read()?;
    let image = context
        .images
        .version(&config.template, &config.version)
        .map_err(|source| PowerError::Template { id: id.clone(), source })?;
    let identity = Identity::load_or_generate(&dir.identity())?;
    let lease = shared.lease();
    context.network.up().await?;
    let tap = context.network.open_tap(&lease).await?;
    tracing::debug!(vm = %id, tap = tap.name, "tap");
    let overlay = disk::open_overlay(&dir.disk()).map_err(crate::store::StoreError::from)?;
    let spec = StartSpec {
        cpus: config.cpus,
        memory_mib: config.memory_mib,
        kernel: open(&image.vmlinux)?,
        initrd: open(&image.initrd)?,
        command_line: command_line(&image, &identity),
        command_line_software_cpu: image.manifest.command_line_software_cpu.clone(),
        kernel_hz: image.manifest.kernel_hz,
        base: open(&image.disk)?,
        overlay: overlay.into(),
        tap: tap.fd,
        mac: lease.mac.0,
        user: vm_user(lease.address),
        cid: vm_cid(lease.address),
        dir,
    };
    context.engines.chosen().start(spec).await.map_err(|source| PowerError::Engine {
        id,
        op: catalyst_api::PowerOp::On,
        source,
    })
}

fn command_line(image: &Image, identity: &Identity) -> String {
    // systemd wants it before the agent can write it.
    image.kernel_command_line(&[&format!("systemd.machine_id={}", identity.machine_id)])
}

fn open(path: &Path) -> Result<OwnedFd, PowerError> {
    File::open(path)
        .map(OwnedFd::from)
        .map_err(|source| PowerError::Open { path: path.display().to_string(), source })
}

/// What the agent is told: who the guest is, where it is, who may log in.
pub(super) fn guest_identity(context: &Context, shared: &Shared) -> Result<agent::Identity, IdentityError> {
    let identity = Identity::load_or_generate(&shared.dir().identity())?;
    let lease = shared.lease();
    Ok(agent::Identity {
        // DNS has names with '_', hosts (RFC 952) have not.
        hostname: lease.name.replace('_', "-"),
        domain: lease.domain.clone(),
        mac: lease.mac.to_string(),
        address: lease.address,
        prefix: lease.prefix,
        gateway: lease.gateway,
        dns: lease.dns,
        machine_id: identity.machine_id,
        host_keys: identity.host_keys,
        authorized_keys: context.access_keys.authorized(),
        unix_ns: 0,
        seed: String::new(),
        clone: false,
    })
}
