//! Engine `qemu`: QEMU's software CPU, for machines where KVM is absent or too slow.

pub mod command;
pub mod qmp;
pub mod tsc;

use std::os::fd::AsRawFd;

use catalyst_api::EngineName;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::process::{Exit, Launch, Process, Program};
use super::{Engine, EngineError, StartSpec, VmProcess, folder, sockets};
use crate::store::VmDir;
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
            let Some(process) = folder::find(&dir, user).await? else { return Ok(None) };
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
    let folder::Opened { log, console_log, agent, console } = folder::open(&spec.dir)?;
    let qmp = folder::listen(&spec.dir, QMP_SOCKET)?;
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
        engine: EngineName::Qemu,
        program: Program::InPath(PROGRAM.to_owned()),
        remedy: "install it: sudo apt-get install qemu-system-x86 qemu-utils",
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
        may_mount: false,
        log,
    };
    Process::spawn(launch, &spec.dir.run())
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
