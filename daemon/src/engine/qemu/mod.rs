//! Engine `qemu`: QEMU's software CPU, for machines where KVM is absent or too slow.

mod accelerator;
pub mod blocks;
mod command;
pub mod frozen;
pub mod pc;
pub mod qmp;
pub mod tsc;

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use catalyst_api::EngineName;
use catalyst_vmm::description::{DescriptionError, Format, MAX_NICS};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::OnceCell;

use super::capture::Extent;
use super::process::{Exit, Launch, Process, Program};
use super::{Engine, EngineError, Fit, Layer, PcSpec, StartSpec, VmProcess, folder, sockets};
use crate::privilege::as_root;
use crate::store::VmDir;
use frozen::Frozen;
use qmp::{Qmp, QmpError};

/// The program, from Debian's `qemu-system-x86`.
pub const PROGRAM: &str = "qemu-system-x86_64";
const QMP_SOCKET: &str = "qmp.sock";

/// The generation of the machine's make-up: another number where a saved machine would not fit any more.
const MACHINE: u32 = 3;

/// See the module.
#[derive(Debug, Default)]
pub struct QemuEngine {
    frozen: Frozen,
    version: OnceCell<String>,
}

impl QemuEngine {
    /// What the program says it is.
    async fn program(&self) -> Result<String, EngineError> {
        Ok(self.version.get_or_try_init(version).await?.clone())
    }
}

/// A running QEMU.
#[derive(Debug)]
struct QemuVm {
    process: Process,
    /// Or why there is none: a process that was found again and does not answer can still be ended.
    qmp: Result<Qmp, String>,
    /// Memory that it has in common with others is kept as long as one of them lives.
    _memory: Option<Arc<OwnedFd>>,
}

impl QemuVm {
    fn qmp(&self) -> Result<&Qmp, QmpError> {
        self.qmp.as_ref().map_err(|why| QmpError::Refused(why.clone()))
    }
}

impl Engine for QemuEngine {
    fn name(&self) -> EngineName {
        EngineName::Qemu
    }

    fn fit(&self) -> BoxFuture<'_, Result<Fit, EngineError>> {
        async {
            let program = self.program().await?;
            // Software emulates the processor, but takes the counter's rate from the host's.
            let tsc_khz = tokio::task::spawn_blocking(tsc::khz).await;
            let tsc_khz = tsc_khz.map_err(|error| EngineError::Died(error.to_string()))?;
            Ok(Fit { program, machine: MACHINE, processor: String::new(), tsc_khz })
        }
        .boxed()
    }

    fn start(&self, spec: StartSpec) -> BoxFuture<'_, Result<Arc<dyn VmProcess>, EngineError>> {
        async move {
            let dir = spec.dir.clone();
            let frozen = self.frozen.clone();
            let program = self.program().await?;
            let launched = tokio::task::spawn_blocking(move || launch(spec, &frozen, &program))
                .await
                .map_err(|error| EngineError::Died(error.to_string()))??;
            launched.begin(&dir).await
        }
        .boxed()
    }

    fn has_firmware(&self) -> bool {
        true
    }

    fn start_pc(&self, spec: PcSpec) -> BoxFuture<'_, Result<Arc<dyn VmProcess>, EngineError>> {
        async move {
            let dir = spec.dir.clone();
            let program = self.program().await?;
            let launched = tokio::task::spawn_blocking(move || launch_pc(spec, &program))
                .await
                .map_err(|error| EngineError::Died(error.to_string()))??;
            launched.begin(&dir).await
        }
        .boxed()
    }

    fn adopt(&self, dir: VmDir, user: u32) -> BoxFuture<'_, Result<Option<Arc<dyn VmProcess>>, EngineError>> {
        async move {
            let Some(process) = folder::find(dir.run(), user).await? else { return Ok(None) };
            let qmp = match connect(&process, &dir).await {
                Ok(qmp) => Ok(qmp),
                // It was ending when it was found.
                Err(EngineError::Died(_)) => return Ok(None),
                Err(error) => Err(error.to_string()),
            };
            Ok(Some(Arc::new(QemuVm { process, qmp, _memory: None }) as Arc<dyn VmProcess>))
        }
        .boxed()
    }
}

/// What `qemu-system-x86_64 --version` says first.
async fn version() -> Result<String, EngineError> {
    let output = tokio::process::Command::new(PROGRAM)
        .arg("--version")
        .output()
        .await
        .map_err(|source| EngineError::Program { program: PROGRAM.to_owned(), remedy: REMEDY, source })?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().chars().take(200).collect())
}

const REMEDY: &str = "install it: sudo apt-get install qemu-system-x86 qemu-utils";

/// A QEMU that was just started.
struct Launched {
    process: Process,
    memory: Option<Arc<OwnedFd>>,
    /// The number that it knows the file with its state by.
    state: Option<RawFd>,
}

impl Launched {
    /// Waits until it answers and has loaded its state.
    async fn begin(self, dir: &VmDir) -> Result<Arc<dyn VmProcess>, EngineError> {
        let Self { process, memory, state } = self;
        let begun = async {
            let qmp = connect(&process, dir).await?;
            if let Some(state) = state {
                folder::first_answer(&process, dir, qmp.load(state)).await?;
            }
            Ok(qmp)
        };
        match begun.await {
            Ok(qmp) => Ok(Arc::new(QemuVm { process, qmp: Ok(qmp), _memory: memory })),
            Err(error) => {
                // Nobody would know of it any more.
                process.end().await?;
                Err(error)
            }
        }
    }
}

fn launch_pc(spec: PcSpec, program: &str) -> Result<Launched, EngineError> {
    let folder::Opened { log, console_log, console, .. } = folder::open(&spec.dir, false)?;
    let qmp = folder::listen(&spec.dir, QMP_SOCKET)?;
    let (run, user) = (spec.dir.run(), (spec.user, spec.user));
    let descriptors = pc::Descriptors {
        console: console.as_raw_fd(),
        console_log: console_log.as_raw_fd(),
        qmp: qmp.as_raw_fd(),
    };
    let pc::Line { args, kept } =
        pc::line(spec, descriptors, program).map_err(EngineError::io("describe its disks"))?;
    let fds = kept.into_iter().chain([console, console_log, qmp]).collect();
    let launch = Launch {
        engine: EngineName::Qemu,
        program: Program::InPath(PROGRAM.to_owned()),
        remedy: REMEDY,
        args,
        fds,
        user,
        may_mount: false,
        open_files: None,
        cgroup_of: None,
        large_pages: true,
        log,
    };
    Ok(Launched { process: Process::spawn(launch, &run)?, memory: None, state: None })
}

fn launch(spec: StartSpec, frozen: &Frozen, program: &str) -> Result<Launched, EngineError> {
    if spec.nics.len() > MAX_NICS {
        let (field, why) = ("nics".to_owned(), format!("at most {MAX_NICS}"));
        return Err(DescriptionError::Value { field, why }.into());
    }
    let (mut memory, mut shared, mut kept) = (command::Memory::New, None, Vec::new());
    let mut state = None;
    if let Some(saved) = spec.from {
        let own = |error| EngineError::io("put the saved memory into place")(error);
        if saved.frozen {
            let file = frozen.of(&saved.memory).map_err(own)?;
            let copy = file.try_clone().map_err(own)?;
            memory = command::Memory::Private(copy.as_raw_fd());
            kept.push(copy);
            shared = Some(file);
        } else {
            let file = frozen::thawed(&saved.memory).map_err(own)?;
            memory = command::Memory::Own(file.as_raw_fd());
            kept.push(file);
        }
        state = Some(saved.state.as_raw_fd());
        kept.push(saved.state);
    }
    let layers: Vec<(RawFd, Format)> =
        spec.layers.iter().map(|layer| (layer.file.as_raw_fd(), layer.format)).collect();
    let nics: Vec<(RawFd, [u8; 6])> = spec.nics.iter().map(|nic| (nic.tap.as_raw_fd(), nic.mac)).collect();
    let folder::Opened { log, console_log, agent, folders, container, console } =
        folder::open(&spec.dir, spec.container)?;
    let qmp = folder::listen(&spec.dir, QMP_SOCKET)?;
    let descriptors = command::Descriptors {
        kernel: spec.kernel.as_raw_fd(),
        initrd: spec.initrd.as_raw_fd(),
        agent: agent.as_raw_fd(),
        folders: folders.as_raw_fd(),
        container: container.as_ref().map(AsRawFd::as_raw_fd),
        console: console.as_raw_fd(),
        console_log: console_log.as_raw_fd(),
        qmp: qmp.as_raw_fd(),
    };
    let machine = command::Machine {
        program,
        name: spec.dir.id().as_str(),
        cpus: spec.cpus,
        memory_mib: spec.memory_mib,
        command_line: &format!(
            "{} {} {}",
            spec.command_line,
            spec.command_line_software_cpu,
            tsc::arguments(tsc::khz(), spec.kernel_hz)
        ),
        nics: &nics,
        layers: &layers,
        memory,
    };
    let args = command::arguments(&machine, descriptors);
    kept.extend([spec.kernel, spec.initrd, agent, folders, console, console_log, qmp]);
    kept.extend(spec.nics.into_iter().map(|nic| nic.tap).chain(container));
    kept.extend(spec.layers.into_iter().map(|layer| layer.file));
    let launch = Launch {
        engine: EngineName::Qemu,
        program: Program::InPath(PROGRAM.to_owned()),
        remedy: REMEDY,
        args,
        fds: kept,
        user: (spec.user, spec.user),
        may_mount: false,
        open_files: None,
        cgroup_of: spec.cgroup_of,
        // A clone is to cost little: most of what is QEMU's own is room for translated code, used here and there.
        large_pages: memory == command::Memory::New,
        log,
    };
    let process = Process::spawn(launch, &spec.dir.run())?;
    Ok(Launched { process, memory: shared, state })
}

/// Connects to QEMU's control socket.
async fn connect(process: &Process, dir: &VmDir) -> Result<Qmp, EngineError> {
    folder::first_answer(process, dir, async {
        let stream = sockets::connect(&dir.run(), QMP_SOCKET).await?;
        Qmp::connect(stream).await
    })
    .await
}

fn refused(what: &'static str) -> impl FnOnce(QmpError) -> EngineError {
    move |error| EngineError::Refused { what, why: error.to_string() }
}

impl QemuVm {
    /// Does something with the control connection that has no answer but that it is done.
    async fn tell<'a, F>(
        &'a self,
        what: &'static str,
        act: impl FnOnce(&'a Qmp) -> F,
    ) -> Result<(), EngineError>
    where
        F: Future<Output = Result<(), QmpError>>,
    {
        act(self.qmp().map_err(refused(what))?).await.map_err(refused(what))
    }
}

impl VmProcess for QemuVm {
    fn engine(&self) -> EngineName {
        EngineName::Qemu
    }

    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn started(&self) -> u64 {
        self.process.started()
    }

    fn is_running(&self) -> BoxFuture<'_, Result<bool, EngineError>> {
        async {
            self.qmp()
                .map_err(refused("tell its state"))?
                .is_running()
                .await
                .map_err(refused("tell its state"))
        }
        .boxed()
    }

    fn ram(&self) -> BoxFuture<'_, Result<Vec<Extent>, EngineError>> {
        async {
            let what = "tell where its memory is";
            let qmp = self.qmp().map_err(refused(what))?;
            // One piece, whatever the guest's holes.
            let start = qmp.host_address(0).await.map_err(refused(what))?;
            Ok(vec![Extent { start, length: qmp.memory_size().await.map_err(refused(what))? }])
        }
        .boxed()
    }

    fn save(&self, state: File) -> BoxFuture<'_, Result<(), EngineError>> {
        async move {
            // Of a set QEMU takes the descriptor that has the very access it wants.
            let path = format!("/proc/self/fd/{}", state.as_raw_fd());
            let state = as_root(|| OpenOptions::new().write(true).open(path));
            let state = state.map_err(EngineError::io("open the file for the VM's state"))?;
            self.tell("save its state", |qmp| qmp.save_devices(state.into(), command::STATE_SET)).await
        }
        .boxed()
    }

    fn switch_disk(&self, overlay: Layer, below: Vec<Layer>) -> BoxFuture<'_, Result<(), EngineError>> {
        self.tell("go on on another disk", |qmp| qmp.switch_disk(command::DISK, overlay, below)).boxed()
    }

    fn pause(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        self.tell("pause", Qmp::stop).boxed()
    }

    fn resume(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        self.tell("go on", Qmp::cont).boxed()
    }

    fn power_button(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        self.tell("press the power button", Qmp::system_powerdown).boxed()
    }

    fn kill(&self) -> Result<(), EngineError> {
        self.process.kill()
    }

    fn no_room(&self) -> BoxFuture<'_, ()> {
        async {
            match &self.qmp {
                Ok(qmp) => qmp.no_room().await,
                Err(_) => std::future::pending().await,
            }
        }
        .boxed()
    }

    fn exited(&self) -> BoxFuture<'_, Exit> {
        async {
            let exit = self.process.exited().await;
            let Ok(qmp) = &self.qmp else { return exit };
            qmp.drained().await;
            match qmp.shutdown() {
                Some(cause) if cause.guest && cause.reason == "guest-shutdown" => Exit::PoweredOff,
                Some(cause) if cause.guest && cause.reason == "guest-reset" => Exit::Reset,
                _ => exit,
            }
        }
        .boxed()
    }
}
