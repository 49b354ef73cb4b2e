//! A Docker daemon of our own, whose containers are VMs: Debian's `dockerd` with `catalyst-oci` as its runtime.
//!
//! It runs in a mount and a network namespace of its own, on the bridge of the VMs. So nothing of it meets a Docker daemon
//! that this machine has: bridge, subnets, iptables' chains, containerd, and files in `/run` are each one's own; and when
//! its last process has ended, all of them are gone. Its published ports are the host's: what it runs for each of them
//! (`catalyst-oci`, role `port`) listens in both namespaces.
//!
//! It outlives this daemon, as VMs do, and is found again by the next one.

mod error;
mod files;
mod leftovers;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use catalyst_api::DockerInfo;
use nix::unistd::Group;
use rustix::process::Pid;
use tokio::net::UnixDatagram;
use tokio::process::Command;

pub use self::error::DockerError;
use self::files::Files;
use crate::access::owner::Owner;
use crate::access::unix_socket::listen_for_another;
use crate::engine::process::Process;
use crate::network::program::find;
use crate::network::{Lease, Network};
use crate::privilege::{as_root, as_root_blocking};
use crate::systemd;
use crate::user_data::host::proxy_behind;

/// What makes its namespaces.
const SCRIPT: &str = include_str!("start.sh");
/// Where its programs are: containerd, its shims, iptables.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Who has its lease; no VM is called so.
const LEASE: &str = ".docker";
/// Whose members may use a Docker daemon, and with it do as root does.
const GROUP: &str = "docker";
/// Longest wait until it is ready; the first time it makes its folders.
const START: Duration = Duration::from_secs(90);
/// Longest wait for its end. It gives containers 10 s, or what they were made with, and then kills them.
const STOP: Duration = Duration::from_mins(1);

/// The Docker daemon of this state folder; copies are the same one.
#[derive(Debug, Clone)]
pub struct Docker(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    network: Network,
    owner: Owner,
    files: Files,
    /// Held while it is brought up or taken down.
    changing: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Up(Arc<Process>),
    /// With the reason, where nobody has asked for it.
    Down(Option<String>),
}

/// The programs that it takes.
struct Programs {
    dockerd: PathBuf,
    unshare: PathBuf,
}

impl Programs {
    fn find() -> Result<Self, DockerError> {
        find("ip", "iproute2")?;
        find("iptables", "iptables")?;
        Ok(Self { dockerd: find("dockerd", "docker.io")?, unshare: find("unshare", "util-linux")? })
    }
}

impl Docker {
    /// The one of that state folder, found again if it runs. What one that has ended left is ended.
    pub async fn load(state_dir: &Path, network: Network, owner: Owner) -> Self {
        let files = Files::new(state_dir, network.docker_folder());
        let (changing, state) = (tokio::sync::Mutex::default(), Mutex::new(State::Down(None)));
        let docker = Self(Arc::new(Inner { network, owner, files, changing, state }));
        let files = docker.0.files.clone();
        let (pid, lease) = as_root(|| (leftovers::running(&files), files.noted_lease()));
        let process = pid.and_then(Pid::from_raw).and_then(|pid| Process::open(pid).ok());
        // Only now the number is pinned: ask again.
        let process = process.filter(|_| as_root(|| leftovers::running(&files)) == pid);
        match process {
            Some(process) => {
                if let Some(lease) = lease {
                    let kept = docker.0.network.lease_for(LEASE, Some((lease.mac, lease.address)));
                    if let Err(error) = kept {
                        tracing::warn!(%error, "the address of Docker's daemon may be given to others");
                    }
                }
                tracing::info!(pid = process.pid(), "Docker's daemon is up");
                docker.keep(process);
            }
            None if as_root(|| files.run().exists()) => docker.clean().await,
            None => {}
        }
        docker
    }

    /// How it is.
    pub fn info(&self) -> DockerInfo {
        let files = &self.0.files;
        let (pid, reason) = match &*self.state() {
            State::Up(process) => (Some(process.pid()), None),
            State::Down(reason) => (None, reason.clone()),
        };
        DockerInfo {
            up: pid.is_some(),
            pid,
            host: format!("unix://{}", files.socket().display()),
            log: files.log().display().to_string(),
            data: files.data().display().to_string(),
            reason,
        }
    }

    /// Whether it is up.
    pub fn is_up(&self) -> bool {
        matches!(&*self.state(), State::Up(_))
    }

    /// Brings it up; whether it was down. Once begun it goes on, also when the future is dropped.
    pub async fn up(&self, by_root: bool) -> Result<bool, DockerError> {
        if !by_root && !self.owner_may() {
            return Err(DockerError::NotAllowed { owner: self.0.owner.name.clone() });
        }
        let docker = self.clone();
        let done = tokio::spawn(async move { docker.bring_up().await }).await;
        done.unwrap_or(Err(DockerError::Stopping))
    }

    /// Ends it with its containers; whether it was up. Once begun it goes on, also when the future is dropped.
    pub async fn down(&self) -> Result<bool, DockerError> {
        let docker = self.clone();
        let done = tokio::spawn(async move { docker.take_down().await }).await;
        done.unwrap_or(Err(DockerError::Stopping))
    }

    /// Whether the owner can do as root does anyway.
    fn owner_may(&self) -> bool {
        let owner = &self.0.owner;
        let group = || Group::from_name(GROUP).ok().flatten();
        owner.uid == 0 || group().is_some_and(|group| owner.groups.contains(&group.gid.as_raw()))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock; if it did, the state would still be whole.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn bring_up(&self) -> Result<bool, DockerError> {
        let _changing = self.0.changing.lock().await;
        if self.is_up() {
            return Ok(false);
        }
        let programs = Programs::find()?;
        let network = &self.0.network;
        network.up().await?;
        let lease = network.lease_for(LEASE, None)?;
        match self.start(&programs, &lease).await {
            Ok(process) => {
                tracing::info!(pid = process.pid(), address = %lease.address, "Docker's daemon is up");
                self.keep(process);
                Ok(true)
            }
            Err(error) => {
                self.clean().await;
                Err(error)
            }
        }
    }

    async fn start(&self, programs: &Programs, lease: &Lease) -> Result<Process, DockerError> {
        let files = &self.0.files;
        let config = files.settings(files.owners_settings()?, lease, &self.cgroup());
        as_root(|| files.prepare(lease, &config))?;
        let (log, log_began) = files.open_log()?;
        let notify = as_root(|| UnixDatagram::bind(files.notify()));
        let failed = |what, path| move |source| DockerError::File { what, path, source };
        let notify = notify.map_err(failed("make the socket", files.notify()))?;
        let socket = listen_for_another(&files.socket(), &self.0.owner)?;
        let errors = log.try_clone().map_err(failed("open", files.log()))?;
        let mut command = self.command(programs, lease);
        command.stdin(Stdio::from(socket)).stdout(log).stderr(errors);
        let child = command
            .spawn()
            .map_err(|source| DockerError::Run { program: programs.unshare.clone(), source })?;
        let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        let ended = || DockerError::Ended { log: files.log(), said: files.said(log_began) };
        let process = Process::open(pid.ok_or_else(ended)?)?;
        // Before it has started containerd.
        systemd::place_docker(self.0.network.bridge(), process.pid()).await;
        let outcome = tokio::select! {
            said = ready(&notify) => said.map_err(failed("read", files.notify())),
            _ = process.exited() => Err(ended()),
            () = tokio::time::sleep(START) => {
                let said = files.said(log_began);
                Err(DockerError::Slow { seconds: START.as_secs(), log: files.log(), said })
            }
        };
        if outcome.is_err() {
            process.end().await?;
        }
        outcome.map(|()| process)
    }

    fn command(&self, programs: &Programs, lease: &Lease) -> Command {
        let files = &self.0.files;
        let mut command = Command::new(&programs.unshare);
        command.args(["--mount", "--propagation", "slave", "--net", "sh", "-ec", SCRIPT, "sh"]);
        command.arg(std::process::id().to_string()).arg(files.run()).arg(self.0.network.bridge());
        command.arg(lease.mac.to_string()).arg(format!("{}/{}", lease.address, lease.prefix));
        command.arg(lease.gateway.to_string()).arg(&programs.dockerd);
        command.arg("--config-file").arg(files.config()).arg(files.pid_option());
        command.env_clear().env("PATH", PATH).env("LC_ALL", "C.UTF-8").env("HOME", "/root").current_dir("/");
        command.env("LISTEN_FDS", "1").env("NOTIFY_SOCKET", files.notify());
        for name in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"] {
            let Ok(proxy) = std::env::var(name) else { continue };
            match proxy_behind(lease.gateway, &proxy) {
                Ok(proxy) => drop(command.env(name, proxy)),
                Err(error) => tracing::warn!(%error, name, "Docker's daemon pulls without this proxy"),
            }
        }
        for name in ["NO_PROXY", "no_proxy"] {
            command.envs(std::env::var(name).map(|value| (name, value)));
        }
        // What ends a terminal's programs is not for it.
        command.process_group(0);
        command
    }

    /// Notes the process, and notices its end.
    fn keep(&self, process: Process) {
        let process = Arc::new(process);
        *self.state() = State::Up(Arc::clone(&process));
        let docker = self.clone();
        tokio::spawn(async move {
            process.exited().await;
            let _changing = docker.0.changing.lock().await;
            let is_it = |state: &State| matches!(state, State::Up(now) if Arc::ptr_eq(now, &process));
            if !is_it(&docker.state()) {
                return;
            }
            tracing::warn!(pid = process.pid(), "Docker's daemon has ended by itself");
            docker.clean().await;
            let log = docker.0.files.log();
            *docker.state() = State::Down(Some(format!("it ended by itself; see {}", log.display())));
        });
    }

    async fn take_down(&self) -> Result<bool, DockerError> {
        let _changing = self.0.changing.lock().await;
        let before = std::mem::replace(&mut *self.state(), State::Down(None));
        let State::Up(process) = before else { return Ok(false) };
        process.terminate()?;
        if tokio::time::timeout(STOP, process.exited()).await.is_err() {
            tracing::warn!(pid = process.pid(), "Docker's daemon does not end when it is asked to");
            process.end().await?;
        }
        self.clean().await;
        tracing::info!("Docker's daemon is down");
        Ok(true)
    }

    /// Takes away all that is left of one that has ended, but for its data and its log.
    async fn clean(&self) {
        let (files, cgroup) = (self.0.files.clone(), self.cgroup());
        let cable = as_root_blocking(move || {
            leftovers::end_all(&files.mark(), &leftovers::cgroups(&cgroup));
            let cable = files.cable();
            if let Err(error) = std::fs::remove_dir_all(files.run()) {
                tracing::debug!(%error, "the folder of Docker's daemon");
            }
            cable
        })
        .await;
        // It would go with its namespace, but only in a while.
        if let Some(cable) = cable
            && let Err(error) = self.0.network.unplug(&cable).await
        {
            tracing::warn!(%error, "the cable of Docker's daemon");
        }
        // One that stays is replaced by the next start.
        let _ = std::fs::remove_file(self.0.files.socket());
        self.0.network.release(LEASE);
    }

    /// The cgroup above those of its containers: of no other daemon of this boot, as its folder is.
    fn cgroup(&self) -> String {
        let namespace = self.0.files.run().ancestors().nth(2).and_then(Path::file_name).unwrap_or_default();
        format!("/catalyst-docker-{}-{}", namespace.to_string_lossy(), self.0.network.bridge())
    }
}

/// Waits until it says that it is ready (sd_notify(3)).
async fn ready(notify: &UnixDatagram) -> std::io::Result<()> {
    let mut said = [0; 4096];
    loop {
        let length = notify.recv(&mut said).await?;
        if said[..length].split(|byte| *byte == b'\n').any(|line| line == b"READY=1") {
            return Ok(());
        }
    }
}
