//! Engine `kvm`: our own monitor `catalyst-vmm` on `/dev/kvm`.

mod boot_files;
pub mod control;
pub mod description;
mod pc;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use catalyst_api::EngineName;
use catalyst_images::digest::hex;
use catalyst_vmm::control::protocol::{Cause, Command, RunState};
use catalyst_vmm::description::Description;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use sha2::{Digest, Sha256};

use super::capture::Extent;
use super::process::{Exit, Launch, Process, Program};
use super::qemu::tsc;
use super::{Engine, EngineError, Fit, Layer, PcSpec, StartSpec, VmProcess, folder, sockets};
use crate::privilege::as_root;
use crate::saved::in_memory;
use crate::settings::sibling;
use crate::store::VmDir;
use control::{Control, ControlError};
use description::Descriptors;

/// The program, beside the daemon's own or in `../lib/catalyst`.
pub const PROGRAM: &str = "catalyst-vmm";
const CONTROL_SOCKET: &str = "control.sock";
const VSOCK_SOCKET: &str = "vsock.sock";
/// The generation of the machine's make-up: another number where a saved machine would not fit any more.
const MACHINE: u32 = 3;
/// How long the monitor may take from its start to its first answer, which is when it has loaded the kernel.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long one that was found again may take.
const ADOPT_LIMIT: Duration = Duration::from_secs(10);
/// How long the end of the control connection may come after that of the process.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug)]
pub struct KvmEngine {
    program: PathBuf,
}

impl KvmEngine {
    /// With the monitor at `program`.
    pub fn new(program: PathBuf) -> Self {
        Self { program }
    }
}

impl Default for KvmEngine {
    fn default() -> Self {
        Self::new(sibling(PROGRAM))
    }
}

/// A running monitor.
#[derive(Debug)]
struct KvmVm {
    dir: VmDir,
    process: Process,
    /// Or why there is none: a process that was found again and does not answer can still be ended.
    control: Result<Control, String>,
}

impl KvmVm {
    fn control(&self, what: &'static str) -> Result<&Control, EngineError> {
        self.control.as_ref().map_err(|why| EngineError::Refused { what, why: why.clone() })
    }

    /// Asks for something that has no answer but that it is done.
    async fn tell(&self, what: &'static str, command: Command) -> Result<(), EngineError> {
        self.control(what)?.tell(command).await.map_err(refused(what))
    }
}

fn refused(what: &'static str) -> impl FnOnce(ControlError) -> EngineError {
    move |error| EngineError::Refused { what, why: error.to_string() }
}

impl Engine for KvmEngine {
    fn name(&self) -> EngineName {
        EngineName::Kvm
    }

    fn fit(&self) -> BoxFuture<'_, Result<Fit, EngineError>> {
        async {
            let read = tokio::task::spawn_blocking(|| Ok((processor()?, tsc::khz()))).await;
            let read = read.map_err(io::Error::other).and_then(|read: io::Result<_>| read);
            let (processor, tsc_khz) = read.map_err(EngineError::io("look at the processor"))?;
            let program =
                format!("{PROGRAM} {} state {}", env!("CARGO_PKG_VERSION"), catalyst_vmm::snapshot::VERSION);
            Ok(Fit { program, machine: MACHINE, processor, tsc_khz })
        }
        .boxed()
    }

    fn start(&self, spec: StartSpec) -> BoxFuture<'_, Result<Arc<dyn VmProcess>, EngineError>> {
        async move {
            let (dir, program) = (spec.dir.clone(), self.program.clone());
            begun(dir, joined(tokio::task::spawn_blocking(move || launch(spec, program)).await)?).await
        }
        .boxed()
    }

    fn has_firmware(&self) -> bool {
        false
    }

    fn start_pc(&self, spec: PcSpec) -> BoxFuture<'_, Result<Arc<dyn VmProcess>, EngineError>> {
        async move {
            let (dir, program) = (spec.dir.clone(), self.program.clone());
            boot_files::end_former(&spec).await?;
            let searched = tokio::task::spawn_blocking(move || {
                let search = boot_files::Search::begin(&spec, &program)?;
                Ok::<_, EngineError>((search, spec, program))
            });
            let (search, spec, program) = joined(searched.await)?;
            let found = search.found().await?;
            begun(dir, joined(tokio::task::spawn_blocking(move || pc::launch(spec, found, program)).await)?)
                .await
        }
        .boxed()
    }

    fn adopt(&self, dir: VmDir, user: u32) -> BoxFuture<'_, Result<Option<Arc<dyn VmProcess>>, EngineError>> {
        async move {
            let Some(process) = folder::find(dir.run(), user).await? else { return Ok(None) };
            let control = match connect(&process, &dir, ADOPT_LIMIT).await {
                Ok((control, _)) => Ok(control),
                // It was ending when it was found.
                Err(EngineError::Died(_)) => return Ok(None),
                Err(error) => Err(error.to_string()),
            };
            Ok(Some(Arc::new(KvmVm { dir, process, control }) as Arc<dyn VmProcess>))
        }
        .boxed()
    }
}

/// What a task of another thread came to.
fn joined<T>(done: Result<Result<T, EngineError>, tokio::task::JoinError>) -> Result<T, EngineError> {
    done.map_err(|error| EngineError::Died(error.to_string()))?
}

/// Waits until a monitor that was just started has built its machine, which stands.
async fn begun(dir: VmDir, process: Process) -> Result<Arc<dyn VmProcess>, EngineError> {
    match connect(&process, &dir, START_LIMIT).await {
        Ok((control, _)) => Ok(Arc::new(KvmVm { dir, process, control: Ok(control) })),
        Err(error) => {
            // Nobody would know of it any more.
            process.end().await?;
            Err(error)
        }
    }
}

/// Connects to the control socket and asks for the state: the monitor answers once it has one.
async fn connect(
    process: &Process,
    dir: &VmDir,
    limit: Duration,
) -> Result<(Control, RunState), EngineError> {
    folder::first_answer(process, dir, async {
        let stream = sockets::connect(&dir.run(), CONTROL_SOCKET).await.map_err(ControlError::Io)?;
        let control = Control::new(stream);
        let state = control.state_within(limit).await?;
        Ok::<_, ControlError>((control, state))
    })
    .await
}

/// The monitor, open; the process list shows it as `title`, and what it is for.
pub fn program(path: PathBuf, title: &str) -> Result<Program, EngineError> {
    let file = as_root(|| File::open(&path)).map_err(|source| EngineError::Program {
        program: path.display().to_string(),
        remedy: REMEDY,
        source,
    })?;
    Ok(Program::Open { file, path, title: format!("{PROGRAM} [{title}]") })
}

/// A description as the monitor reads it.
fn described(description: &Description) -> Result<OwnedFd, EngineError> {
    description.check()?;
    let text = serde_json::to_vec(description).map_err(io::Error::from);
    text.and_then(|text| in_memory(&text)).map_err(EngineError::io("write the description of the VM"))
}

fn launch(spec: StartSpec, path: PathBuf) -> Result<Process, EngineError> {
    let program = program(path, spec.dir.id().as_str())?;
    let kvm = open_kvm()?;
    let folder::Opened { log, console_log, agent, folders, container, console } =
        folder::open(&spec.dir, spec.container)?;
    let control = folder::listen(&spec.dir, CONTROL_SOCKET)?;
    let vsock = folder::listen(&spec.dir, VSOCK_SOCKET)?;
    let descriptors = Descriptors {
        kvm: kvm.as_raw_fd(),
        control: control.as_raw_fd(),
        agent: agent.as_raw_fd(),
        folders: folders.as_raw_fd(),
        container: container.as_ref().map(AsRawFd::as_raw_fd),
        console: console.as_raw_fd(),
        console_log: console_log.as_raw_fd(),
        vsock: vsock.as_raw_fd(),
    };
    let described = described(&description::describe(&spec, descriptors))?;
    let launch = Launch {
        engine: EngineName::Kvm,
        program,
        remedy: REMEDY,
        args: ["run", "--description-fd", &described.as_raw_fd().to_string()].map(Into::into).to_vec(),
        fds: vec![
            described,
            kvm,
            control,
            agent,
            folders,
            console,
            console_log,
            vsock,
            spec.kernel,
            spec.initrd,
        ]
        .into_iter()
        .chain(container)
        .chain(spec.nics.into_iter().map(|nic| nic.tap))
        .chain(spec.layers.into_iter().map(|layer| layer.file))
        .chain(spec.from.into_iter().flat_map(|saved| [saved.memory.into(), saved.state]))
        .collect(),
        user: (spec.user, spec.user),
        // The folder of shares lies in a mount namespace of the monitor's own.
        may_mount: true,
        open_files: None,
        cgroup_of: spec.cgroup_of,
        large_pages: true,
        log,
    };
    Process::spawn(launch, &spec.dir.run())
}

/// What to do where the program cannot be run.
pub const REMEDY: &str = "it belongs beside catalyst-daemon (make build) or in ../lib/catalyst (make install), \
                      readable and executable for all";

fn open_kvm() -> Result<OwnedFd, EngineError> {
    const PATH: &str = "/dev/kvm";
    let opened = as_root(|| OpenOptions::new().read(true).write(true).open(PATH));
    opened.map(OwnedFd::from).map_err(|source| EngineError::Device {
        path: PATH,
        remedy: "see: catalyst doctor",
        source,
    })
}

/// What a guest sees of the processor: who made it, and what it can do (/proc/cpuinfo, of the first).
fn processor() -> io::Result<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo")?;
    let of = |name: &str| {
        let line = text.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
        line.and_then(|line| line.split_once(':')).map_or("", |(_, value)| value.trim()).to_owned()
    };
    let digest = Sha256::digest(of("flags"));
    let digest = hex(&digest[..8]);
    let [vendor, family, model, stepping] = ["vendor_id", "cpu family", "model", "stepping"].map(of);
    Ok(format!("{vendor} {family}/{model}/{stepping} {digest}"))
}

/// How the process ended: what its status says or, where that is not known, what it told before. `words` are the
/// last of its log.
fn outcome(exit: Exit, told: Option<Cause>, words: impl FnOnce(&Exit) -> String) -> Exit {
    let cause = match exit {
        Exit::Code(code) => Cause::from_exit_status(code),
        Exit::Unknown => told,
        _ => None,
    };
    match cause {
        None => exit,
        Some(Cause::PowerOff) => Exit::PoweredOff,
        Some(Cause::Reset) => Exit::Reset,
        Some(Cause::TripleFault) => Exit::Told("the guest crashed (triple fault)".to_owned()),
        Some(Cause::Failure) => Exit::Told(format!("the VM process could not go on: {}", words(&exit))),
        Some(Cause::Quit) => Exit::Told("the VM process was told to end".to_owned()),
    }
}

impl VmProcess for KvmVm {
    fn engine(&self) -> EngineName {
        EngineName::Kvm
    }

    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn started(&self) -> u64 {
        self.process.started()
    }

    fn is_running(&self) -> BoxFuture<'_, Result<bool, EngineError>> {
        async {
            let what = "tell its state";
            let state = self.control(what)?.state().await.map_err(refused(what))?;
            Ok(state == RunState::Running)
        }
        .boxed()
    }

    fn ram(&self) -> BoxFuture<'_, Result<Vec<Extent>, EngineError>> {
        async {
            let what = "tell where its memory is";
            let ranges = self.control(what)?.ram().await.map_err(refused(what))?;
            Ok(ranges.into_iter().map(|range| Extent { start: range.host, length: range.length }).collect())
        }
        .boxed()
    }

    fn save(&self, mut state: File) -> BoxFuture<'_, Result<(), EngineError>> {
        async move {
            let what = "save its state";
            let saved = self.control(what)?.saved().await.map_err(refused(what))?;
            state.write_all(&saved).map_err(EngineError::io("write the VM's state"))
        }
        .boxed()
    }

    fn switch_disk(&self, overlay: Layer, below: Vec<Layer>) -> BoxFuture<'_, Result<(), EngineError>> {
        async move {
            let what = "go on on another disk";
            self.control(what)?.switch_disk(&overlay.file, &below).await.map_err(refused(what))
        }
        .boxed()
    }

    fn pause(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        self.tell("pause", Command::Pause).boxed()
    }

    fn resume(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        self.tell("go on", Command::Resume).boxed()
    }

    fn power_button(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        self.tell("press the power button", Command::PowerButton).boxed()
    }

    fn kill(&self) -> Result<(), EngineError> {
        self.process.kill()
    }

    fn no_room(&self) -> BoxFuture<'_, ()> {
        async {
            match self.control("tell of its disk") {
                Ok(control) => control.no_room().await,
                Err(_) => std::future::pending().await,
            }
        }
        .boxed()
    }

    fn exited(&self) -> BoxFuture<'_, Exit> {
        async {
            let exit = self.process.exited().await;
            let mut told = None;
            if let (Exit::Unknown, Ok(control)) = (&exit, &self.control) {
                // The process is gone; only one that gave its connection away could keep it open.
                let _ = tokio::time::timeout(DRAIN_LIMIT, control.drained()).await;
                told = control.exit();
            }
            outcome(exit, told, |exit| folder::last_words(&self.dir, exit))
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(exit: Exit, told: Option<Cause>) -> Exit {
        outcome(exit, told, |_| "disk0: no space".to_owned())
    }

    #[test]
    fn each_exit_status_is_what_the_guest_or_the_monitor_did() {
        let status = |cause: Cause| Exit::Code(i32::from(cause.exit_status()));
        assert_eq!(of(status(Cause::PowerOff), None), Exit::PoweredOff);
        assert_eq!(of(status(Cause::Reset), None), Exit::Reset);
        assert!(of(status(Cause::TripleFault), None).to_string().contains("crashed"));
        assert!(of(status(Cause::Failure), None).to_string().ends_with("could not go on: disk0: no space"));
        assert!(of(status(Cause::Quit), None).to_string().contains("told to end"));
        assert_eq!(of(Exit::Code(101), Some(Cause::PowerOff)), Exit::Code(101));
    }

    #[test]
    fn without_a_status_the_event_says_how_it_ended_and_against_one_it_does_not_count() {
        assert_eq!(of(Exit::Unknown, Some(Cause::Reset)), Exit::Reset);
        assert_eq!(of(Exit::Unknown, None), Exit::Unknown);
        assert_eq!(of(Exit::Signal(9), Some(Cause::PowerOff)), Exit::Signal(9));
    }
}
