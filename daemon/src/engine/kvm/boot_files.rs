//! Has the kernel on a guest's disk found, by a process of its own that can do nothing else (`catalyst-vmm boot-files`).

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use catalyst_api::EngineName;
use catalyst_vmm::boot_files::{Answer, MAX_ANSWER, NicName, Request};
use catalyst_vmm::description::{Format, Layer};
use rustix::fs::{MemfdFlags, memfd_create};

use super::super::folder::printable;
use super::super::pc::PcDisk;
use super::super::process::{Exit, Launch, Process};
use super::super::{EngineError, PcSpec, folder, sockets};
use super::REMEDY;
use crate::saved::{in_memory, seal};
use crate::store::VmDir;
use crate::store::foreign::image::Parts;

/// Below the VM's `run/`.
const RUN: &str = "boot";
/// How long it may take on a machine that is busy: it reads some ten megabytes.
const LIMIT: Duration = Duration::from_mins(2);

/// What a guest is started by.
#[derive(Debug)]
pub struct Found {
    /// Its kernel.
    pub kernel: OwnedFd,
    /// Its initial RAM disk.
    pub initrd: Option<OwnedFd>,
    /// Its kernel's command line.
    pub command_line: String,
}

/// A search that is under way.
#[derive(Debug)]
pub struct Search {
    dir: VmDir,
    process: Process,
    kernel: File,
    initrd: File,
    answer: File,
}

/// Ends the search that a daemon had begun which was killed.
pub async fn end_former(spec: &PcSpec) -> Result<(), EngineError> {
    match folder::find(spec.dir.run().join(RUN), spec.user).await? {
        Some(former) => former.end().await,
        None => Ok(()),
    }
}

impl Search {
    /// Begins to look at the first disk of `spec`.
    pub fn begin(spec: &PcSpec, program: &Path) -> Result<Self, EngineError> {
        let Some(disk) = spec.disks.first() else {
            return Err(EngineError::Kernel("it has no disk".to_owned()));
        };
        let (file, format) = base(disk)?;
        let layers = [read_only(disk)?, (file.try_clone().map_err(failed())?.into(), format)];
        let ([kernel, to_kernel], [initrd, to_initrd], [answer, to_answer]) =
            (memory()?, memory()?, memory()?);
        let request = Request {
            layers: layers.iter().map(|(fd, format)| Layer { fd: fd.as_raw_fd(), format: *format }).collect(),
            kernel: to_kernel.as_raw_fd(),
            initrd: to_initrd.as_raw_fd(),
            answer: to_answer.as_raw_fd(),
            has_nic: spec.nic.is_some(),
            nic_name: spec.slot.map(|slot| NicName { mac: spec.mac, slot }),
        };
        let request = serde_json::to_vec(&request).map_err(io::Error::from).and_then(|text| in_memory(&text));
        let files = [to_kernel, to_initrd, to_answer].map(OwnedFd::from);
        let fds = layers.into_iter().map(|(fd, _)| fd).chain(files).collect();
        let process = launch(spec, program, request.map_err(failed())?, fds)?;
        Ok(Self { dir: spec.dir.clone(), process, kernel, initrd, answer })
    }

    /// Waits for what is found.
    pub async fn found(self) -> Result<Found, EngineError> {
        let Self { dir, process, kernel, initrd, answer } = self;
        let Ok(exit) = tokio::time::timeout(LIMIT, process.exited()).await else {
            process.end().await?;
            return Err(EngineError::Kernel(format!("it was not found within {} s", LIMIT.as_secs())));
        };
        if exit != Exit::Code(0) {
            let why = format!("what looks for it ended: {}", folder::last_words(&dir, &exit));
            return Err(EngineError::Kernel(why));
        }
        match read(answer).map_err(failed())? {
            Answer::Refused(why) => Err(EngineError::Kernel(printable(&why))),
            Answer::Found { command_line, version, has_initrd } => {
                tracing::info!(vm = %dir.id(), version = printable(&version), "its own kernel is started");
                let kept = |file: File| seal(&file).map(|()| OwnedFd::from(file)).map_err(failed());
                let initrd = if has_initrd { Some(kept(initrd)?) } else { None };
                Ok(Found { kernel: kept(kernel)?, initrd, command_line })
            }
        }
    }
}

/// A file in memory, and the same for the process.
fn memory() -> Result<[File; 2], EngineError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = memfd_create("catalyst-boot", flags).map(File::from);
    let file = file.map_err(|errno| failed()(errno.into()))?;
    let copy = file.try_clone().map_err(failed())?;
    Ok([file, copy])
}

fn failed() -> impl FnOnce(io::Error) -> EngineError {
    EngineError::io("look for the kernel on its disk")
}

/// The overlay, opened anew for reading alone.
fn read_only(disk: &PcDisk) -> Result<(OwnedFd, Format), EngineError> {
    let path = format!("/proc/self/fd/{}", disk.overlay.as_raw_fd());
    Ok((File::open(path).map_err(failed())?.into(), Format::Qcow2))
}

/// What a disk stands on, and its format as the monitor knows it.
pub fn base(disk: &PcDisk) -> Result<(&File, Format), EngineError> {
    match &disk.parts {
        Parts::Raw(file) => Ok((file, Format::Raw)),
        Parts::Qcow2(file) => Ok((file, Format::Qcow2)),
        Parts::Vmdk(_) | Parts::Extents(_) => {
            Err(EngineError::Kernel("a disk of it is a VMDK that was not converted".to_owned()))
        }
    }
}

fn launch(
    spec: &PcSpec,
    program: &Path,
    request: OwnedFd,
    fds: Vec<OwnedFd>,
) -> Result<Process, EngineError> {
    let run = spec.dir.run();
    for folder in [&run, &run.join(RUN)] {
        sockets::make_folder(folder)
            .map_err(EngineError::io(format!("make the folder {}", folder.display())))?;
    }
    let args: [OsString; 3] =
        ["boot-files".into(), "--request-fd".into(), request.as_raw_fd().to_string().into()];
    let launch = Launch {
        engine: EngineName::Kvm,
        program: super::program(program.to_owned(), &format!("boot files {}", spec.dir.id()))?,
        remedy: REMEDY,
        args: args.into(),
        fds: fds.into_iter().chain([request]).collect(),
        user: (spec.user, spec.user),
        may_mount: false,
        open_files: None,
        cgroup_of: None,
        large_pages: false,
        log: folder::append(&spec.dir.engine_log())?,
    };
    Process::spawn(launch, &run.join(RUN))
}

fn read(mut answer: File) -> io::Result<Answer> {
    let mut text = Vec::new();
    answer.rewind()?;
    answer.take(MAX_ANSWER).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}
