//! The process that serves a VM's folders: started, found again, told what there is, asked what it knows.

use std::collections::BTreeSet;
use std::ffi::{CString, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use catalyst_vmm::devices::fs::mounting;
use catalyst_vmm::folders::{Answer, FolderOwner, MAX_STATE, Request};
use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::super::Context;
use crate::engine::process::{Launch, Process};
use crate::engine::{EngineError, folder, kvm, sockets};
use crate::privilege::as_root;
use crate::saved;
use crate::settings::sibling;
use crate::store::VmDir;
use crate::store::folders::Folder;

/// Below the VM's `run/`.
const RUN: &str = "folders";
const CONTROL: &str = "control.sock";
/// Most files that may be open for a guest.
const OPEN_FILES: u64 = 1 << 20;
/// How long an answer may take: it looks for what the guest had open.
const ANSWERS_WITHIN: Duration = Duration::from_secs(20);
/// The same while the VM may be saved: only one is heard at a time.
const SETTLES_WITHIN: Duration = Duration::from_mins(5);

/// Why folders are not served.
#[derive(Debug, Error)]
pub enum ServingError {
    /// The process.
    #[error("the process that serves folders")]
    Engine(#[from] EngineError),
    /// Its control socket.
    #[error("the process that serves folders does not {what}")]
    Io {
        /// What was asked.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A folder of the host.
    #[error("the folder {path} of the host cannot be shared")]
    Folder {
        /// The folder.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn io(what: &'static str) -> impl FnOnce(io::Error) -> ServingError {
    move |source| ServingError::Io { what, source }
}

/// A process that serves the folders of a VM.
#[derive(Debug)]
pub struct Serving {
    dir: VmDir,
    process: Process,
    /// Its mount namespace.
    namespace: File,
}

/// The process leaves the VM's port alone until this is dropped.
#[derive(Debug)]
pub struct Held(#[allow(dead_code, reason = "it is there to be dropped")] Control);

#[derive(Debug)]
struct Control(BufReader<UnixStream>);

impl Control {
    async fn connect(dir: &VmDir) -> io::Result<Self> {
        sockets::connect(&dir.run().join(RUN), CONTROL).await.map(|stream| Self(BufReader::new(stream)))
    }

    async fn ask(&mut self, request: &Request) -> io::Result<Answer> {
        self.ask_within(request, ANSWERS_WITHIN).await
    }

    async fn ask_within(&mut self, request: &Request, limit: Duration) -> io::Result<Answer> {
        let asked = async {
            let mut line = serde_json::to_vec(request)?;
            line.push(b'\n');
            self.0.write_all(&line).await?;
            let mut answer = Vec::new();
            (&mut self.0).take(4 * MAX_STATE).read_until(b'\n', &mut answer).await?;
            match serde_json::from_slice(&answer)? {
                Answer::Failed(why) => Err(io::Error::other(why)),
                answer => Ok(answer),
            }
        };
        tokio::time::timeout(limit, asked).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl Serving {
    /// Starts one for a VM whose process is there. It goes on with `state`, if another had it before.
    pub(super) async fn begin(
        context: &Context,
        dir: &VmDir,
        state: Option<Vec<u8>>,
    ) -> Result<Self, ServingError> {
        // What served the VM as it was before may still be ending by itself.
        if let Some(former) = folder::find(dir.run().join(RUN), context.owner.uid).await? {
            former.end().await?;
        }
        let port = sockets::connect(&dir.run(), sockets::FOLDERS).await.map_err(io("reach the VM's port"))?;
        let port = port.into_std().map_err(io("reach the VM's port"))?;
        let own = dir.clone();
        let owner = (context.owner.uid, context.owner.gid);
        let launched = tokio::task::spawn_blocking(move || launch(&own, port.into(), state, owner));
        let process = launched.await.map_err(|error| EngineError::Died(error.to_string()))??;
        Self::of(dir, process).await
    }

    /// Finds the one that an earlier daemon has started.
    pub(super) async fn adopt(context: &Context, dir: &VmDir) -> Result<Option<Self>, ServingError> {
        match folder::find(dir.run().join(RUN), context.owner.uid).await? {
            Some(process) => Self::of(dir, process).await.map(Some),
            None => Ok(None),
        }
    }

    async fn of(dir: &VmDir, process: Process) -> Result<Self, ServingError> {
        let ready = async {
            Control::connect(dir).await?.ask(&Request::Ready).await?;
            as_root(|| File::open(format!("/proc/{}/ns/mnt", process.pid())))
        };
        match ready.await {
            Ok(namespace) => Ok(Self { dir: dir.clone(), process, namespace }),
            Err(source) => {
                // Nobody would know of it any more.
                process.end().await?;
                Err(io("begin")(source))
            }
        }
    }

    /// Waits for its end.
    pub(super) async fn exited(&self) {
        self.process.exited().await;
    }

    /// Ends it, since it does not do what it is told.
    pub(super) async fn end(&self) {
        if let Err(error) = self.process.end().await {
            tracing::warn!(vm = %self.dir.id(), %error, "what serves folders lives on");
        }
    }

    /// Mounts what is wanted and not there, takes away what is not wanted, and says whom all belong to. What cannot be mounted
    /// is told with its name; the others are there.
    pub(super) async fn settle(
        &self,
        wanted: &[Folder],
    ) -> Result<Vec<(String, ServingError)>, ServingError> {
        let there = self.mounted().map_err(io("tell what it serves"))?;
        let names: BTreeSet<&str> = wanted.iter().map(|folder| folder.name.as_str()).collect();
        for gone in there.iter().filter(|name| !names.contains(name.as_str())) {
            self.detach(gone).map_err(io("give up a folder"))?;
        }
        let mut failed = Vec::new();
        for folder in wanted.iter().filter(|folder| !there.contains(&folder.name)) {
            if let Err(source) = self.attach(folder) {
                let path = folder.host_path.display().to_string();
                failed.push((folder.name.clone(), ServingError::Folder { path, source }));
            }
        }
        let owner =
            |folder: &Folder| FolderOwner { name: folder.name.clone(), uid: folder.uid, gid: folder.gid };
        let request = Request::Owners { folders: wanted.iter().map(owner).collect() };
        let mut control = Control::connect(&self.dir).await.map_err(io("take what there is"))?;
        control.ask_within(&request, SETTLES_WITHIN).await.map_err(io("take what there is"))?;
        Ok(failed)
    }

    /// What another process needs to go on from here. The port is left alone as long as what comes with it lives.
    pub async fn save(&self) -> Result<(Vec<u8>, Held), ServingError> {
        let failed = || io("tell what the guest has");
        let mut control = Control::connect(&self.dir).await.map_err(failed())?;
        match control.ask(&Request::Save).await.map_err(failed())? {
            Answer::Saved(saved) => {
                let bytes = serde_json::to_vec(&saved).map_err(|error| failed()(error.into()))?;
                Ok((bytes, Held(control)))
            }
            _ => Err(failed()(io::ErrorKind::InvalidData.into())),
        }
    }

    /// The names of what is mounted.
    fn mounted(&self) -> io::Result<BTreeSet<String>> {
        let root = format!("/proc/{}/root", self.process.pid());
        let entries = as_root(|| std::fs::read_dir(root)?.collect::<io::Result<Vec<_>>>())?;
        Ok(entries.into_iter().filter_map(|entry| entry.file_name().into_string().ok()).collect())
    }

    fn attach(&self, folder: &Folder) -> io::Result<()> {
        let opened = open(&folder.host_path)?;
        let name = CString::new(folder.name.as_str())?;
        as_root(|| {
            // By the descriptor: what the owner may reach was asked when it was opened.
            let path = format!("/proc/self/fd/{}", opened.as_raw_fd());
            let tree = mounting::clone_mount(Path::new(&path), folder.read_only, None)?;
            mounting::attach(&tree, &self.namespace, &name)
        })
    }

    fn detach(&self, name: &str) -> io::Result<()> {
        let name = CString::new(name)?;
        as_root(|| mounting::detach(&self.namespace, &name))
    }
}

/// Each file that the guest's kernel remembers is an open one: as many as the system lets a process have.
fn most_open() -> u64 {
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open").ok().and_then(|text| text.trim().parse().ok());
    OPEN_FILES.min(most.unwrap_or(OPEN_FILES))
}

/// Opens a folder of the host with the owner's rights, to be read: one that the owner may only name would be empty in the guest.
pub(super) fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(path)
}

fn launch(
    dir: &VmDir,
    port: OwnedFd,
    state: Option<Vec<u8>>,
    owner: (u32, u32),
) -> Result<Process, EngineError> {
    let run = dir.run().join(RUN);
    sockets::make_folder(&run).map_err(EngineError::io(format!("make the folder {}", run.display())))?;
    let control = sockets::listen(&run, CONTROL)
        .map_err(EngineError::io(format!("listen on {}", run.join(CONTROL).display())))?;
    let program = kvm::program(sibling(kvm::PROGRAM), &format!("folders {}", dir.id()))?;
    let mut args: Vec<OsString> = vec!["folders".into()];
    let mut number = |option: &str, fd: &OwnedFd| {
        args.extend([option.into(), fd.as_raw_fd().to_string().into()]);
    };
    number("--port-fd", &port);
    number("--control-fd", &control);
    let state = state.map(|bytes| saved::in_memory(&bytes)).transpose();
    let state = state.map_err(EngineError::io("copy the state of folders"))?;
    if let Some(state) = &state {
        number("--state-fd", state);
    }
    let launch = Launch {
        engine: catalyst_api::EngineName::Kvm,
        program,
        remedy: kvm::REMEDY,
        args,
        fds: [port, control].into_iter().chain(state).collect(),
        user: owner,
        may_mount: true,
        open_files: Some(most_open()),
        cgroup_of: None,
        large_pages: false,
        log: folder::append(&dir.engine_log())?,
    };
    Process::spawn(launch, &run)
}
