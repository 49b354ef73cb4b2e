//! Engine `qemu`: QEMU's software CPU, for machines where KVM is absent or too slow.

pub mod command;
pub mod qmp;
pub mod tsc;

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use catalyst_api::EngineName;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::process::{Exit, Launch, Process};
use super::{Engine, EngineError, StartSpec, VmProcess, sockets};
use crate::store::VmDir;
use crate::store::files::read_bounded;
use qmp::{Qmp, QmpError};

/// The program, from Debian's `qemu-system-x86`.
pub const PROGRAM: &str = "qemu-system-x86_64";
const QMP_SOCKET: &str = "qmp.sock";

/// See the module.
#[derive(Debug, Default)]
pub struct QemuEngine;

/// A running QEMU.
#[derive(Debug)]
struct QemuVm {
    process: Process,
    /// Or why there is none: a process that was found again and does not answer can still be ended.
    qmp: Result<Qmp, String>,
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

    fn start(&self, spec: StartSpec) -> BoxFuture<'_, Result<Box<dyn VmProcess>, EngineError>> {
        async move {
            let dir = spec.dir.clone();
            let process = tokio::task::spawn_blocking(move || launch(spec))
                .await
                .map_err(|error| EngineError::Died(error.to_string()))??;
            let qmp = match connect(&process, &dir).await {
                Ok(qmp) => qmp,
                Err(error) => {
                    // Nobody would know of it any more.
                    process.kill()?;
                    process.exited().await;
                    return Err(error);
                }
            };
            Ok(Box::new(QemuVm { process, qmp: Ok(qmp) }) as Box<dyn VmProcess>)
        }
        .boxed()
    }

    fn adopt(&self, dir: VmDir, user: u32) -> BoxFuture<'_, Result<Option<Box<dyn VmProcess>>, EngineError>> {
        async move {
            let run = dir.run();
            if !run.join("lock").exists() {
                return Ok(None);
            }
            let process = tokio::task::spawn_blocking(move || Process::adopt(&run, user))
                .await
                .map_err(|error| EngineError::Died(error.to_string()))??;
            let Some(process) = process else { return Ok(None) };
            let qmp = match connect(&process, &dir).await {
                Ok(qmp) => Ok(qmp),
                // It was ending when it was found.
                Err(EngineError::Died(_)) => return Ok(None),
                Err(error) => Err(error.to_string()),
            };
            Ok(Some(Box::new(QemuVm { process, qmp }) as Box<dyn VmProcess>))
        }
        .boxed()
    }
}

fn launch(spec: StartSpec) -> Result<Process, EngineError> {
    let run = spec.dir.run();
    let listen = |name: &str| {
        sockets::listen(&run, name)
            .map_err(EngineError::io(format!("listen on {}", run.join(name).display())))
    };
    let append = |path: std::path::PathBuf| {
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .map_err(EngineError::io(format!("open the log {}", path.display())))
    };
    sockets::make_folder(&run).map_err(EngineError::io(format!("make the folder {}", run.display())))?;
    let log = append(spec.dir.engine_log())?;
    let console_log: OwnedFd = append(spec.dir.console_log())?.into();
    let (agent, console, qmp) = (listen(sockets::AGENT)?, listen(sockets::CONSOLE)?, listen(QMP_SOCKET)?);
    let descriptors = command::Descriptors {
        kernel: spec.kernel.as_raw_fd(),
        initrd: spec.initrd.as_raw_fd(),
        base: spec.base.as_raw_fd(),
        overlay: spec.overlay.as_raw_fd(),
        tap: spec.tap.as_raw_fd(),
        agent: agent.as_raw_fd(),
        console: console.as_raw_fd(),
        console_log: console_log.as_raw_fd(),
        qmp: qmp.as_raw_fd(),
    };
    let machine = command::Machine {
        name: spec.dir.id().as_str(),
        cpus: spec.cpus,
        memory_mib: spec.memory_mib,
        command_line: &format!(
            "{} {} {}",
            spec.command_line,
            spec.command_line_software_cpu,
            tsc::arguments(tsc::khz(), spec.kernel_hz)
        ),
        mac: spec.mac,
    };
    let launch = Launch {
        program: PROGRAM.to_owned(),
        args: command::arguments(&machine, descriptors),
        fds: vec![
            spec.kernel,
            spec.initrd,
            spec.base,
            spec.overlay,
            spec.tap,
            agent,
            console,
            console_log,
            qmp,
        ],
        user: spec.user,
        log,
    };
    Process::spawn(launch, &run)
}

/// Connects to QEMU's control socket; a QEMU that dies meanwhile tells why in its log.
async fn connect(process: &Process, dir: &VmDir) -> Result<Qmp, EngineError> {
    let handshake = async {
        let stream = sockets::connect(&dir.run(), QMP_SOCKET).await?;
        Qmp::connect(stream).await
    };
    let outcome = tokio::select! {
        exit = process.exited() => return Err(EngineError::Died(last_words(dir, &exit))),
        outcome = handshake => outcome,
    };
    match outcome {
        Ok(qmp) => Ok(qmp),
        Err(error) => {
            // A closed connection is most often a QEMU that is ending with a message.
            let patience = std::time::Duration::from_secs(2);
            if let Ok(exit) = tokio::time::timeout(patience, process.exited()).await {
                return Err(EngineError::Died(last_words(dir, &exit)));
            }
            Err(EngineError::Refused { what: "answer on its control socket", why: error.to_string() })
        }
    }
}

/// The last line of QEMU's log, or how it ended.
fn last_words(dir: &VmDir, exit: &Exit) -> String {
    let log = read_bounded(&dir.engine_log(), 1 << 20).unwrap_or_default();
    let text = String::from_utf8_lossy(&log);
    match text.lines().rev().find(|line| !line.trim().is_empty()) {
        Some(line) => line.chars().filter(|c| !c.is_control()).take(500).collect(),
        None => exit.to_string(),
    }
}

fn refused(what: &'static str) -> impl FnOnce(QmpError) -> EngineError {
    move |error| EngineError::Refused { what, why: error.to_string() }
}

impl VmProcess for QemuVm {
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

    fn pause(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        async { self.qmp().map_err(refused("pause"))?.stop().await.map_err(refused("pause")) }.boxed()
    }

    fn resume(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        async { self.qmp().map_err(refused("go on"))?.cont().await.map_err(refused("go on")) }.boxed()
    }

    fn power_button(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        async {
            self.qmp()
                .map_err(refused("press the power button"))?
                .system_powerdown()
                .await
                .map_err(refused("press the power button"))
        }
        .boxed()
    }

    fn kill(&self) -> Result<(), EngineError> {
        self.process.kill()
    }

    fn exited(&self) -> BoxFuture<'_, Exit> {
        async {
            let exit = self.process.exited().await;
            let Ok(qmp) = &self.qmp else { return exit };
            qmp.drained().await;
            match qmp.shutdown() {
                Some(cause) if cause.guest && cause.reason == "guest-shutdown" => Exit::PoweredOff,
                _ => exit,
            }
        }
        .boxed()
    }
}
