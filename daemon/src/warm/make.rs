//! Making a warm state: boot the template once, use what a user will use, bring it to rest, save it, stop it for good.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use catalyst_api::EngineName;
use catalyst_images::{Image, ImageError};
use catalyst_vmm::description::Format;
use thiserror::Error;

use super::{DISK, NEW, Warm, WarmStates};
use crate::engine::capture::Memory;
use crate::engine::{
    EngineError, Layer, MAX_NICS, Nic, Saved, StartSpec, VmProcess, sockets, vm_cid, vm_user,
};
use crate::images::{disk_gib, is_diskless};
use crate::machines::Context;
use crate::machines::container;
use crate::machines::error::PowerError;
use crate::network::{Lease, NetworkError};
use crate::privilege::as_root;
use crate::saved::{self, Machine, SavedDir, SavedError};
use crate::store::config::DEFAULT_DISK_GIB;
use crate::store::identity::{self, IdentityError};
use crate::store::{StoreError, VmDir, disk, sparse};
use catalyst_agent_link::{
    AgentError, AgentLink, AgentStatus, ExecEvent, ExecExit, ExecSpec, Identity, ShutdownKind,
};

/// How long a guest may take until Docker answers, on a software CPU too.
const BOOT_LIMIT: Duration = Duration::from_mins(5);
/// How long one of the commands may take.
const COMMAND_LIMIT: Duration = Duration::from_mins(2);
/// What the guest does by itself after the last command has a moment to end; no event tells of it. The longest is udevd's,
/// which sends its idle workers home after three seconds.
const SETTLE: Duration = Duration::from_secs(4);

/// What is run once, as which user, so that its pages are shared by all that go on from here: a login, a container.
const USED: &[(&str, &str)] = &[
    (
        "catalyst",
        "d=$(mktemp -d) && ssh-keygen -q -t ed25519 -N '' -f $d/key && cat $d/key.pub >>~/.ssh/authorized_keys && \
         ssh -i $d/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR \
         catalyst@127.0.0.1 true; e=$?; rm -rf $d; exit $e",
    ),
    ("catalyst", "docker run --rm busybox true"),
    ("root", "true"),
];

/// Why there is no new warm state.
#[derive(Debug, Error)]
pub enum WarmError {
    /// Another daemon, or another task, makes one.
    #[error("A warm state of this image is being made already; wait for it")]
    Busy,
    /// A file.
    #[error("Cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The folder or disk of the VM that becomes one.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Its identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Its process.
    #[error("The template does not run")]
    Engine(#[from] EngineError),
    /// Its guest did not come up.
    #[error("The template's guest did not come up within {} s: Docker did not answer", BOOT_LIMIT.as_secs())]
    Slow,
    /// It starts by a loader of its own.
    #[error("The template '{0}' was imported and starts by its own loader: it has no warm states")]
    Foreign(String),
    /// The template cannot be written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Its agent.
    #[error("The template's guest cannot be brought to rest")]
    Agent(#[from] AgentError),
    /// A command failed.
    #[error("In the template's guest '{command}' failed: {output}")]
    Command {
        /// The command.
        command: &'static str,
        /// What it said last.
        output: String,
    },
    /// The VM's disk found no room.
    #[error("The file system of {} is full: make room, then try again", .0.display())]
    NoRoom(PathBuf),
    /// What its disk stands on.
    #[error(transparent)]
    Layers(Box<PowerError>),
    /// It could not be saved.
    #[error(transparent)]
    Saved(#[from] SavedError),
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> WarmError {
    move |source| WarmError::Io { what, source }
}

/// The size of the VMs that are to go on from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Size {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// Makes a warm state of `image`; `tell` hears how far it is, in percent and words.
pub async fn make(
    context: &Context,
    image: &Image,
    size: Size,
    tell: impl Fn(u8, &str),
) -> Result<Warm, WarmError> {
    if image.manifest.machine.is_some() {
        return Err(WarmError::Foreign(image.name.clone()));
    }
    let states = WarmStates::of(image);
    let lock = states.lock().map_err(failed("make the folder of warm states"))?.ok_or(WarmError::Busy)?;
    states.sweep(None).map_err(failed("sweep the folder of warm states"))?;
    tell(5, "booting the template");
    let template = Template::boot(context, image, size).await?;
    let made = tokio::select! {
        made = template.become_warm(context, image, &states, size, tell) => made,
        () = template.process.no_room() => Err(WarmError::NoRoom(template.dir.path().to_owned())),
    };
    template.end(context).await;
    // What was written of one that did not come about takes room.
    let swept = states.sweep(made.as_ref().ok()).map_err(failed("sweep the folder of warm states"));
    drop(lock);
    made.and_then(|warm| swept.map(|()| warm))
}

/// The VM that becomes a warm state, or a template. It is on no network.
pub struct Template {
    /// Its folder.
    pub dir: VmDir,
    lease: Lease,
    /// Its process.
    pub process: Arc<dyn VmProcess>,
}

impl std::fmt::Debug for Template {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Template").field("dir", &self.dir).finish_non_exhaustive()
    }
}

/// What such a VM begins with.
#[derive(Debug)]
pub struct Begins {
    /// Its disk's files, the uppermost first.
    pub layers: Vec<Layer>,
    /// The machine that it goes on from, if it does not boot.
    pub from: Option<Saved>,
}

impl Template {
    /// Boots the image.
    async fn boot(context: &Context, image: &Image, size: Size) -> Result<Self, WarmError> {
        let owner = (context.owner.uid, context.owner.gid);
        Self::start(context, image, size, |dir| {
            if is_diskless(image) {
                return Ok(Begins { layers: Vec::new(), from: None });
            }
            let gib = DEFAULT_DISK_GIB.max(disk_gib(image));
            let made = disk::create_overlay(&dir.disk(), (&image.disk, Format::Raw), gib, owner);
            made.map_err(StoreError::from)?;
            let overlay = disk::open_overlay(&dir.disk()).map_err(StoreError::from)?;
            let base = as_root(|| File::open(&image.disk)).map_err(failed("open the image"))?;
            let layers = vec![
                Layer { file: overlay.into(), format: Format::Qcow2 },
                Layer { file: base.into(), format: Format::Raw },
            ];
            Ok(Begins { layers, from: None })
        })
        .await
    }

    /// Starts a VM in a folder that `prepare` fills.
    pub async fn start(
        context: &Context,
        image: &Image,
        size: Size,
        prepare: impl FnOnce(&VmDir) -> Result<Begins, WarmError>,
    ) -> Result<Self, WarmError> {
        let dir = context.store.make_warming()?;
        let name = dir.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        let started = async {
            let begins = prepare(&dir)?;
            let lease = context.network.lease_for(&name, None)?;
            let process = Self::launch(context, image, size, &dir, &lease, begins).await?;
            Ok((lease, process))
        };
        match started.await {
            Ok((lease, process)) => Ok(Self { dir, lease, process }),
            Err(error) => {
                context.network.release(&name);
                let _ = fs::remove_dir_all(dir.path());
                Err(error)
            }
        }
    }

    async fn launch(
        context: &Context,
        image: &Image,
        size: Size,
        dir: &VmDir,
        lease: &Lease,
        begins: Begins,
    ) -> Result<Arc<dyn VmProcess>, WarmError> {
        let open =
            |path: &Path| as_root(|| File::open(path)).map(OwnedFd::from).map_err(failed("open the image"));
        let macs =
            if is_diskless(image) { (0..MAX_NICS).map(container::mac).collect() } else { vec![lease.mac.0] };
        let nic = |mac| Ok::<_, WarmError>(Nic { tap: context.network.loose_tap(lease)?.fd, mac });
        let nics = macs.into_iter().map(nic).collect::<Result<_, _>>()?;
        let spec = StartSpec {
            cpus: size.cpus,
            memory_mib: size.memory_mib,
            kernel: open(&image.vmlinux)?,
            initrd: open(&image.initrd)?,
            command_line: image.kernel_command_line(&[]),
            command_line_software_cpu: image.manifest.command_line_software_cpu.clone(),
            kernel_hz: image.manifest.kernel_hz,
            layers: begins.layers,
            nics,
            container: is_diskless(image),
            user: vm_user(lease.address),
            cid: vm_cid(lease.address),
            from: begins.from,
            cgroup_of: None,
            dir: dir.clone(),
        };
        let process = context.engines.chosen().start(spec).await?;
        process.resume().await?;
        Ok(process)
    }

    async fn become_warm(
        &self,
        context: &Context,
        image: &Image,
        states: &WarmStates,
        size: Size,
        tell: impl Fn(u8, &str),
    ) -> Result<Warm, WarmError> {
        let has_disk = !is_diskless(image);
        if has_disk {
            self.bring_to_rest(&tell).await?;
        } else {
            let link = self.greet().await?;
            // That it came up is no news to runtimes of what goes on from here, who would greet it twice.
            drop(self.greet_by(sockets::CONTAINER).await?);
            tell(50, "coming to rest");
            rest(link).await?;
        }
        tell(80, "saving memory and devices");
        let engine = context.engines.chosen();
        let name = warm_name(engine.name(), size);
        let aside = states.0.join(format!("{NEW}{name}"));
        let (saved, files, machine) = self.save(context, size, &aside).await?;
        if has_disk {
            tell(95, "keeping its disk");
            copy_disk(&self.dir.disk(), &aside.join(DISK)).map_err(failed("keep the template's disk"))?;
        }
        let path = states.0.join(&name);
        let manifest = as_root(|| {
            let manifest = saved.finish(engine.name(), machine, (&files.0, &files.1), None)?;
            fs::set_permissions(&aside, std::os::unix::fs::PermissionsExt::from_mode(0o755))
                .and_then(|()| fs::rename(&aside, &path))
                .and_then(|()| crate::store::files::sync_folder(&states.0))
                .map_err(failed("put the warm state into place"))?;
            Ok::<_, WarmError>(manifest)
        })?;
        Ok(Warm { name, manifest, path })
    }

    /// Saves the machine into the new folder `to`, which is root's, and ends its process for good: its disk is what it left.
    pub async fn save(
        &self,
        context: &Context,
        size: Size,
        to: &Path,
    ) -> Result<(SavedDir, (File, File), Machine), WarmError> {
        self.process.pause().await?;
        let fit = context.engines.chosen().fit().await?;
        let machine = Machine { fit, cpus: size.cpus, memory_mib: size.memory_mib };
        let saved = SavedDir::new(to);
        let files = as_root(|| saved.begin())?;
        let memory = Memory::new(self.process.pid(), self.process.ram().await?);
        let memory = saved::copy_files(memory, &files.0).await?;
        saved::save(self.process.as_ref(), memory, (&files.0, &files.1)).await?;
        self.process.kill()?;
        self.process.exited().await;
        Ok((saved, files, machine))
    }

    /// A link to its agent, which has said hello.
    pub async fn greet(&self) -> Result<AgentLink, WarmError> {
        self.greet_by(sockets::AGENT).await
    }

    async fn greet_by(&self, port: &str) -> Result<AgentLink, WarmError> {
        let stream = sockets::connect(&self.dir.run(), port).await.map_err(AgentError::from)?;
        let link = AgentLink::connect(stream).await?;
        let up = reaches(&link, |status| status.hello.is_some());
        tokio::time::timeout(BOOT_LIMIT, up).await.map_err(|_| WarmError::Slow)??;
        Ok(link)
    }

    /// Has the guest forget what is of it alone, and come to rest as somebody else. The link is closed at the end.
    pub async fn forget_and_rest(&self, link: AgentLink) -> Result<(), WarmError> {
        link.forget().await?;
        link.identify(&self.identity(true)?).await?;
        let up = reaches(&link, |status| status.ssh);
        tokio::time::timeout(BOOT_LIMIT, up).await.map_err(|_| WarmError::Slow)??;
        rest(link).await
    }

    /// Has a guest that boots forget what is of it alone, and shut down.
    pub async fn forget_and_end(&self, link: AgentLink) -> Result<(), WarmError> {
        link.identify(&self.identity(false)?).await?;
        // Its services have started: what they keep of themselves is there to be forgotten.
        let up = reaches(&link, |status| status.ssh && status.docker);
        tokio::time::timeout(BOOT_LIMIT, up).await.map_err(|_| WarmError::Slow)??;
        link.forget().await?;
        link.shutdown(ShutdownKind::PowerOff).await?;
        let ended = tokio::time::timeout(BOOT_LIMIT, self.process.exited()).await;
        ended.map(drop).map_err(|_| WarmError::Slow)
    }

    /// Waits until everything is up, uses it once, and lets it come to rest. The link is closed at the end.
    async fn bring_to_rest(&self, tell: &impl Fn(u8, &str)) -> Result<(), WarmError> {
        let stream = sockets::connect(&self.dir.run(), sockets::AGENT).await.map_err(AgentError::from)?;
        let link = AgentLink::connect(stream).await?;
        let up = async {
            reaches(&link, |status| status.hello.is_some()).await?;
            tell(30, "the guest is up; waiting for Docker");
            link.identify(&self.identity(false)?).await?;
            reaches(&link, |status| status.ssh && status.docker).await
        };
        tokio::time::timeout(BOOT_LIMIT, up).await.map_err(|_| WarmError::Slow)??;
        tell(50, "using what users use");
        for (user, command) in USED {
            run(&link, user, command).await?;
        }
        // As a clone's is, so that what is read and made for that is there.
        link.identify(&self.identity(true)?).await?;
        tell(65, "coming to rest");
        rest(link).await
    }

    /// Of nobody; as a `clone` it has another name and MAC address.
    fn identity(&self, clone: bool) -> Result<Identity, WarmError> {
        let mut mac = self.lease.mac;
        mac.0[5] ^= u8::from(clone);
        let keys = identity::Identity::generate()?;
        Ok(Identity {
            hostname: if clone { "clone" } else { "template" }.to_owned(),
            domain: self.lease.domain.clone(),
            mac: mac.to_string(),
            address: self.lease.address,
            prefix: self.lease.prefix,
            gateway: self.lease.gateway,
            gateway_mac: self.lease.gateway_mac.to_string(),
            dns: self.lease.dns,
            machine_id: keys.machine_id,
            host_keys: keys.host_keys,
            authorized_keys: Vec::new(),
            unix_ns: 0,
            seed: String::new(),
            clone,
        })
    }

    /// Ends it, and takes away what it had.
    pub async fn end(self, context: &Context) {
        if let Err(error) = self.process.kill() {
            tracing::warn!(%error, "the template's process may live on");
        }
        self.process.exited().await;
        context.network.release(&self.lease.id);
        if let Err(error) = fs::remove_dir_all(self.dir.path()) {
            tracing::warn!(path = %self.dir.path().display(), %error, "a template's folder stays");
        }
    }
}

/// What a warm state is called.
pub fn warm_name(engine: EngineName, size: Size) -> String {
    let number = uuid::Uuid::new_v4().simple().to_string();
    format!("{engine}-{}x{}-{}", size.cpus, size.memory_mib, &number[..8])
}

/// Lets the guest come to rest, and closes the link.
async fn rest(link: AgentLink) -> Result<(), WarmError> {
    tokio::time::sleep(SETTLE).await;
    link.rest().await?;
    drop(link);
    tokio::time::sleep(SETTLE).await;
    Ok(())
}

async fn reaches(link: &AgentLink, wanted: impl Fn(&AgentStatus) -> bool) -> Result<(), WarmError> {
    let mut status = link.status();
    let gone = || AgentError::Gone("the guest ended".to_owned());
    let reached = status.wait_for(|status| wanted(status) || !status.connected).await.map_err(|_| gone())?;
    if reached.connected { Ok(()) } else { Err(gone().into()) }
}

async fn run(link: &AgentLink, user: &str, command: &'static str) -> Result<(), WarmError> {
    let spec = ExecSpec {
        argv: ["sh", "-c", command].map(str::to_owned).to_vec(),
        user: Some(user.to_owned()),
        timeout_ms: u64::try_from(COMMAND_LIMIT.as_millis()).ok(),
        ..ExecSpec::default()
    };
    let (_stdin, _control, mut events) = link.exec(spec).await?.split();
    let mut last = String::new();
    loop {
        match events.next().await {
            Some(ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes)) => {
                last =
                    String::from_utf8_lossy(&bytes).chars().filter(|c| !c.is_control()).take(500).collect();
            }
            Some(ExecEvent::Exit(ExecExit::Code(0))) => return Ok(()),
            Some(ExecEvent::Exit(exit)) => {
                let output = if last.is_empty() { format!("{exit:?}") } else { last };
                return Err(WarmError::Command { command, output });
            }
            Some(ExecEvent::Lost(why)) => return Err(AgentError::Gone(why).into()),
            None => return Err(AgentError::Gone("the command was lost".to_owned()).into()),
        }
    }
}

/// Copies the disk of the VM, which is off, to where root alone writes and VMs read.
fn copy_disk(from: &Path, to: &Path) -> io::Result<()> {
    let source = disk::open_qcow2(from, false).map_err(io::Error::other)?;
    as_root(|| {
        let mut options = OpenOptions::new();
        let target = options.write(true).create_new(true).mode(0o644).open(to)?;
        sparse::copy(&source, &target)?;
        target.sync_all()
    })
}
