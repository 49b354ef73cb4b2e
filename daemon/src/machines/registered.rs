//! VMs that are registered in place: looked at, started, and what they cannot do.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use catalyst_api::{CreateVm, GuestStatus, PowerOp, StartMode};

use super::error::{CreateError, PowerError};
use super::shared::Shared;
use super::start::Started;
use super::{Context, Machines, blocking};
use crate::engine::pc::{Efi, PcDisk};
use crate::engine::{PcSpec, vm_user};
use crate::network::Mac;
use crate::privilege::as_root;
use crate::store::foreign::hardware::{Disk, Firmware, Hardware};
use crate::store::foreign::image::{Image, Parts};
use crate::store::foreign::{Opened, Registered};
use crate::store::{Began, StoreError, VmConfig, VmDir, VmId, disk, files};

/// UEFI's code and fresh variables, from Debian's `ovmf`; the first pair that is there.
const EFI: [(&str, &str); 2] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
];
/// A VM's own UEFI variables, in its folder.
const VARIABLES: &str = "variables.fd";
/// How often a guest that was just given its address is asked whether it has it; each takes up to 0.9 s.
const PROBES: u32 = 10;
/// Longest file of variables, in bytes.
const MAX_VARIABLES: usize = 4 << 20;

impl Machines {
    /// Registers the VMX that `request` names, which stays where it is.
    pub(super) async fn register(
        &self,
        id: &VmId,
        source: String,
        request: CreateVm,
    ) -> Result<VmDir, CreateError> {
        let CreateVm {
            name,
            parent,
            template,
            cpus,
            memory_mib,
            disk_gib,
            tags,
            publish,
            user_data,
            proxy,
            ca_certificates,
            ..
        } = request;
        let sized = cpus.is_some() || memory_mib.is_some() || disk_gib.is_some();
        if parent.is_some() || template.is_some() || sized {
            return Err(CreateError::SourceAlone);
        }
        if user_data.is_some() || proxy.is_some() || !ca_certificates.is_empty() {
            return Err(CreateError::UserDataNoAgent);
        }
        // No two ids for one VMX.
        let _one = self.0.registering.lock().await;
        let (context, path) = (Arc::clone(&self.0), source.clone());
        let candidate = blocking(move || Ok(context.store.candidate(&path)?)).await?;
        let lease = self.0.network.lease_with(id.as_str(), candidate.mac().map(Mac), None)?;
        let ports = self.0.ports.publish(id, lease.address, &publish).await?;
        let record = Registered {
            vmx: source.into(),
            name: name.filter(|name| !name.is_empty()),
            tags,
            mac: Some(lease.mac.0),
            address: Some(lease.address),
            ports,
            autostart: false,
            disks: Vec::new(),
        };
        let (context, id) = (Arc::clone(&self.0), id.clone());
        let owner = (self.0.owner.uid, self.0.owner.gid);
        blocking(move || Ok(context.store.register(&id, &candidate, record, owner)?)).await
    }
}

/// Starts a VM that was registered in place: it boots by what its VMX says now.
pub(super) async fn start(
    context: &Arc<Context>,
    shared: &Arc<Shared>,
    config: VmConfig,
    hardware: Hardware,
) -> Result<Started, PowerError> {
    let dir = shared.dir().clone();
    let owner = (context.owner.uid, context.owner.gid);
    let (folder, id) = (dir.clone(), dir.id().clone());
    let (cpus, memory_mib) = (config.cpus, config.memory_mib);
    let opening = Arc::clone(context);
    let has_firmware = context.engines.chosen().has_firmware();
    let open = tokio::task::spawn_blocking(move || {
        let context = opening;
        let efi = match hardware.firmware {
            Firmware::Efi if has_firmware => Some(open_efi(&folder)?),
            Firmware::Efi | Firmware::Bios => None,
        };
        let disks = if folder.is_registered() {
            folder.open_disks(&hardware, owner, !has_firmware)?
        } else {
            vec![open_own(&context, &folder, &config)?]
        };
        Ok::<_, PowerError>((disks, efi, hardware))
    });
    let (opened, efi, hardware) = open.await.map_err(|_| PowerError::Stopping)??;
    let disks = hardware.disks.iter().zip(opened).map(with_place).collect();
    let lease = shared.lease();
    let nic = match hardware.nic {
        None => None,
        Some(nic) => {
            context.network.up().await?;
            Some((nic, context.network.open_tap(&lease).await?.fd))
        }
    };
    let began = Began { mode: StartMode::Cold, cpus, memory_mib };
    dir.note_begins(began)?;
    let spec = PcSpec {
        dir,
        cpus,
        memory_mib,
        efi,
        disks,
        nic,
        slot: hardware.slot,
        mac: lease.mac.0,
        user: vm_user(lease.address),
    };
    let process = context.engines.chosen().start_pc(spec).await;
    let process = process.map_err(|source| PowerError::Engine { id, op: PowerOp::On, source })?;
    Ok(Started { process, began, folders: None })
}

/// The disk of a VM of an imported image.
fn open_own(context: &Context, dir: &VmDir, config: &VmConfig) -> Result<Opened, PowerError> {
    let image = super::start::image(context, dir, config)?;
    let file = as_root(|| File::open(&image.disk));
    let file = file.map_err(|source| PowerError::Open { path: image.disk.display().to_string(), source })?;
    let overlay = disk::open_overlay(&dir.disk()).map_err(StoreError::from)?;
    let image = Image { bytes: 0, parts: Parts::Raw(file), files: Vec::new() };
    Ok(Opened { image, overlay })
}

fn with_place((place, opened): (&Disk, Opened)) -> PcDisk {
    let &Disk { bus, controller, unit, .. } = place;
    PcDisk { bus, controller, unit, overlay: opened.overlay.into(), parts: opened.image.parts }
}

/// Tells when the guest holds its address, which nobody in it does: it asks for it by DHCP. Whoever waits hears of it; who
/// asks later has it looked at again.
pub(super) async fn attend(context: Arc<Context>, shared: Arc<Shared>) {
    let lease = shared.lease();
    let acknowledgements = match context.network.acknowledgements() {
        Ok(acknowledgements) => acknowledgements,
        Err(error) => {
            return tracing::warn!(vm = %shared.dir().id(), %error, "it is not heard when the guest has its address");
        }
    };
    // One that was found may have it already.
    while !context.network.answers_arp(lease.address, lease.mac).await {
        if let Err(error) = acknowledgements.next().await {
            return tracing::warn!(vm = %shared.dir().id(), %error, "it is not heard when the guest has its address");
        }
        for _ in 0..PROBES {
            if context.network.answers_arp(lease.address, lease.mac).await {
                break;
            }
        }
    }
    shared.set_guest(GuestStatus { identity: true, ..GuestStatus::default() });
}

/// Opens UEFI's code, and the VM's own variables, which are fresh ones at first.
fn open_efi(dir: &VmDir) -> Result<Efi, PowerError> {
    let missing = || PowerError::Firmware { id: dir.id().clone(), path: EFI[0].0 };
    let (code, fresh) = EFI.into_iter().find(|(code, _)| Path::new(code).exists()).ok_or_else(missing)?;
    let open_failed = |path: &Path| {
        let path = path.display().to_string();
        move |source| PowerError::Open { path, source }
    };
    let own = dir.path().join(VARIABLES);
    if let Err(error) = own.symlink_metadata()
        && error.kind() == io::ErrorKind::NotFound
    {
        let fresh = Path::new(fresh);
        let bytes = files::read_bounded(&fresh.canonicalize().map_err(open_failed(fresh))?, MAX_VARIABLES);
        let bytes = bytes.map_err(open_failed(fresh))?;
        files::write_atomically(&own, &bytes, 0o600).map_err(StoreError::write(own.clone()))?;
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    Ok(Efi {
        code: File::open(code).map_err(open_failed(Path::new(code)))?.into(),
        variables: options.open(&own).map_err(open_failed(&own))?.into(),
    })
}
