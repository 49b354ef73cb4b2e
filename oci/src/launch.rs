//! The command `create`: starts a shim, runs hooks when its network namespace is there, and waits until the container is ready.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::SystemTime;

use liboci_cli::Create;
use oci_spec::runtime::{LinuxMemory, LinuxNamespaceType, LinuxResources};
use serde::{Deserialize, Serialize};

use crate::bundle::Bundle;
use crate::cgroup::{Cgroup, Plan};
use crate::daemon::Daemon;
use crate::document;
use crate::failure::{Outcome, Tried, said};
use crate::hooks::{self, Step};
use crate::shim;
use crate::state::{self, Folder, Kept};
use crate::wire::{self, Status};

/// Says in the environment that this process is a shim, and which: its arguments are the container's, as `ps` and `docker top` show them.
pub const ROLE: &str = "CATALYST_OCI_ROLE";
/// The descriptor by which a shim is told what to do.
const ORDERS: RawFd = 3;
/// Memory of a VM without a limit, and the least that one has, in MiB.
const MEMORY: u64 = 128;
/// Most virtual CPUs.
const MOST_CPUS: u64 = 32;

/// What a shim is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// The container's ID.
    pub id: String,
    /// Root of state.
    pub root: PathBuf,
    /// The bundle.
    pub bundle: PathBuf,
    /// The daemon's socket.
    pub socket: PathBuf,
    /// Where the terminal goes, if there is one.
    pub console_socket: Option<PathBuf>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Its cgroup.
    pub cgroup: Vec<PathBuf>,
}

/// What a shim reports.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// It is in the container's network namespace.
    Entered,
    /// The VM of that ID is being made.
    Making(String),
    /// The container is ready.
    Ready,
    /// It will not be.
    Failed(String),
}

/// What to do once hooks have run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Go;

/// What `create` needs to know.
#[derive(Debug)]
pub struct Creation<'a> {
    /// Root of state.
    pub root: &'a Path,
    /// The daemon.
    pub daemon: &'a Daemon,
    /// Whether the engine has systemd's form of cgroups.
    pub systemd: bool,
    /// Whether the terminal may be this process's own, since it stays.
    pub foreground: bool,
}

/// Creates a container; its shim.
pub fn create(arguments: &Create, creation: &Creation<'_>) -> Outcome<Child> {
    let bundle = Bundle::load(&arguments.bundle)?;
    let stdin = !crate::console::is_null(&crate::console::inherited(0).tried(|| "look at stdin".to_owned())?);
    // What the guest would not take is told before anything is made.
    let (container, _) = document::convert(&bundle, stdin)?;
    let socket = match (&arguments.console_socket, &container.process.terminal) {
        (None, Some(_)) if !creation.foreground => {
            return said("A container with a terminal needs --console-socket, to which it is sent");
        }
        (Some(_), None) => return said("--console-socket was given, but the container has no terminal"),
        (socket, _) => socket
            .as_deref()
            .map(std::path::absolute)
            .transpose()
            .tried(|| "find --console-socket".to_owned())?,
    };
    if arguments.preserve_fds > 0 {
        return said("--preserve-fds is not supported: open files of the host cannot be given to a VM");
    }
    let folder = Folder::of(creation.root, &arguments.container_id)?;
    folder.make()?;
    let mut made = Made { folder: &folder, cgroup: None, shim: None, vm: None, daemon: creation.daemon };
    match made.create(arguments, creation, &bundle, socket) {
        Ok(()) => made.shim.take().map_or_else(|| said("The shim was not started"), Ok),
        Err(failure) => {
            made.undo();
            Err(failure)
        }
    }
}

/// What was made so far.
struct Made<'a> {
    folder: &'a Folder,
    cgroup: Option<Cgroup>,
    shim: Option<Child>,
    vm: Option<String>,
    daemon: &'a Daemon,
}

impl Made<'_> {
    fn create(
        &mut self,
        arguments: &Create,
        creation: &Creation<'_>,
        bundle: &Bundle,
        console_socket: Option<PathBuf>,
    ) -> Outcome {
        let id = &arguments.container_id;
        let linux = bundle.linux()?;
        let resources = linux.resources().clone().unwrap_or_default();
        let (cpus, memory_mib) = size(&resources)?;
        let plan = Plan::new(linux.cgroups_path().as_deref(), id, creation.systemd)?;
        let cgroup = self.cgroup.insert(plan.cgroup());
        let mut kept = Kept {
            id: id.clone(),
            pid: 0,
            start_time: 0,
            bundle: bundle.path.clone(),
            rootfs: bundle.rootfs.clone(),
            annotations: bundle.spec.annotations().clone().unwrap_or_default().into_iter().collect(),
            created: state::rfc3339(SystemTime::now()),
            vm: String::new(),
            socket: creation.daemon.socket().to_owned(),
            cgroup: cgroup.folders().to_vec(),
            memory_mib,
        };
        self.folder.save_spec(&bundle.spec)?;
        // Before it is made: whoever deletes what a creation that was cut off leaves knows it by this.
        self.folder.save(&kept)?;
        plan.make()?;
        let limited = memory_limit(&resources).is_some();
        cgroup.apply(&resources, limited.then_some(memory_mib))?;

        let network = linux.namespaces().iter().flatten().find(|n| n.typ() == LinuxNamespaceType::Network);
        let network = network
            .and_then(|namespace| namespace.path().clone())
            .filter(|path| !path.as_os_str().is_empty());
        let process = bundle.spec.process().as_ref();
        let args = process.and_then(|process| process.args().clone()).unwrap_or_default();
        let (shim, orders) = spawn("shim", &args, &[(shim::NETWORK, network.as_deref())])?;
        let pid = shim.id();
        self.shim = Some(shim);
        cgroup.join(pid)?;
        kept.pid = pid;
        kept.start_time = state::start_time(pid).unwrap_or_default();
        self.folder.save(&kept)?;
        let (root, socket) = (creation.root.to_owned(), kept.socket.clone());
        let bundle_path = bundle.path.clone();
        let order = Order {
            id: id.clone(),
            root,
            bundle: bundle_path,
            socket,
            console_socket,
            cpus,
            memory_mib,
            cgroup: kept.cgroup.clone(),
        };
        tell(&orders, &order)?;
        if let Some(adjustment) = process.and_then(oci_spec::runtime::Process::oom_score_adj) {
            // Only a wish: a user's own engine may not lower it.
            let _ = std::fs::write(format!("/proc/{pid}/oom_score_adj"), adjustment.to_string());
        }
        loop {
            match hear(&orders)? {
                Report::Entered => {
                    hooks::run(&bundle.spec, Step::Created, &kept, Status::Creating)?;
                    tell(&orders, &Go)?;
                }
                Report::Making(vm) => {
                    self.vm = Some(vm.clone());
                    kept.vm = vm;
                    self.folder.save(&kept)?;
                }
                Report::Ready => break,
                Report::Failed(why) => return said(why),
            }
        }
        arguments.pid_file.as_deref().map_or(Ok(()), |path| write_pid(path, pid))
    }

    fn undo(&mut self) {
        if let Some(mut shim) = self.shim.take() {
            // It may have ended already.
            let _ = shim.kill();
            let _ = shim.wait();
        }
        // The first failure is the one that is told.
        if let Some(vm) = &self.vm {
            let _ = self.daemon.delete(vm);
        }
        if let Some(cgroup) = &self.cgroup {
            let _ = cgroup.remove();
        }
        let _ = self.folder.remove();
    }
}

fn tell(orders: &UnixStream, message: &impl Serialize) -> Outcome {
    wire::send(orders, message, &[]).tried(|| "speak with the container's shim".to_owned())
}

fn hear(orders: &UnixStream) -> Outcome<Report> {
    match wire::receive(orders).tried(|| "hear of the container's shim".to_owned())? {
        Some((report, _)) => Ok(report),
        None => said("The container's shim has ended before the container was ready"),
    }
}

/// Virtual CPUs and memory in MiB.
fn size(resources: &LinuxResources) -> Outcome<(u32, u64)> {
    let quota = resources.cpu().as_ref().and_then(|cpu| {
        let quota = u64::try_from(cpu.quota()?).ok().filter(|quota| *quota > 0)?;
        Some(quota.div_ceil(cpu.period().filter(|period| *period > 0).unwrap_or(100_000)))
    });
    let cpus = u32::try_from(quota.unwrap_or(1).clamp(1, MOST_CPUS)).unwrap_or(1);
    let memory = memory_limit(resources).unwrap_or(MEMORY);
    let disabled = resources.memory().as_ref().and_then(LinuxMemory::disable_oom_killer);
    if disabled == Some(true) {
        return said("A VM's kernel ends programs when memory is short: --oom-kill-disable is not supported");
    }
    Ok((cpus, memory))
}

/// The memory in MiB of a VM with the limit that is asked for, if there is one.
pub fn memory_limit(resources: &LinuxResources) -> Option<u64> {
    Some(memory_bytes(resources)?.div_ceil(1 << 20).max(MEMORY))
}

/// The limit of memory in bytes that is asked for, if there is one.
pub fn memory_bytes(resources: &LinuxResources) -> Option<u64> {
    let limit = resources.memory().as_ref()?.limit()?;
    // What is beyond any host's memory is how engines say that there is none.
    u64::try_from(limit).ok().filter(|limit| (1..1 << 50).contains(limit))
}

/// Starts this program again in another role, in a session of its own, with this process's stdin, stdout and stderr. What comes
/// through the socket is its orders.
pub fn spawn(role: &str, args: &[String], paths: &[(&str, Option<&Path>)]) -> Outcome<(Child, UnixStream)> {
    let what = || "start a shim".to_owned();
    let (ours, theirs) = UnixStream::pair().tried(what)?;
    let mut command = Command::new("/proc/self/exe");
    let (name, rest) =
        args.split_first().map_or(("catalyst-oci", &[][..]), |(name, rest)| (name.as_str(), rest));
    let path = std::env::var_os("PATH")
        .unwrap_or_else(|| "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
    command.arg0(name).args(rest).env_clear().env(ROLE, role).env("PATH", path);
    command.envs(paths.iter().filter_map(|(name, path)| Some((name, (*path)?))));
    let orders = theirs.as_raw_fd();
    let prepare = move || {
        // SAFETY: system calls without memory, between fork and exec.
        let failed = unsafe {
            libc::setsid() == -1
                || (orders == ORDERS && libc::fcntl(orders, libc::F_SETFD, 0) == -1)
                || (orders != ORDERS && libc::dup2(orders, ORDERS) == -1)
        };
        if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(prepare) };
    let child = command.spawn().tried(what)?;
    Ok((child, ours))
}

/// A shim's side of the socket; all that was inherited besides is closed.
pub fn take_orders() -> Outcome<UnixStream> {
    // SAFETY: nothing has been opened in this process yet that would be used.
    unsafe { libc::syscall(libc::SYS_close_range, ORDERS + 1, libc::c_uint::MAX, 0) };
    // SAFETY: whoever started this process in a role has made this descriptor; nothing else here has it.
    let orders = unsafe { OwnedFd::from_raw_fd(ORDERS) };
    nix::fcntl::fcntl(&orders, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))
        .tried(|| "take orders by descriptor 3".to_owned())?;
    Ok(UnixStream::from(orders))
}

/// Writes the file that tells an engine the pid; it is there whole or not at all.
pub fn write_pid(path: &Path, pid: u32) -> Outcome {
    let what = || format!("write {}", path.display());
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let aside = path.with_file_name(format!(".{name}.new"));
    std::fs::write(&aside, pid.to_string()).tried(what)?;
    std::fs::rename(&aside, path).tried(what)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_vm_has_the_size_that_limits_say() {
        for (resources, expected) in [
            (json!({}), (1, 128)),
            (json!({"memory": {"limit": 0}}), (1, 128)),
            (json!({"memory": {"limit": -1}}), (1, 128)),
            (json!({"memory": {"limit": 9_223_372_036_854_771_712_u64}}), (1, 128)),
            (json!({"memory": {"limit": 6 << 20}}), (1, 128)),
            (json!({"memory": {"limit": (200 << 20) + 1}}), (1, 201)),
            (json!({"cpu": {"quota": 150_000, "period": 100_000}}), (2, 128)),
            (json!({"cpu": {"quota": 50_000}}), (1, 128)),
            (json!({"cpu": {"quota": -1, "period": 100_000}}), (1, 128)),
            (json!({"cpu": {"quota": 100_000_000, "period": 1000}}), (32, 128)),
        ] {
            let read = serde_json::from_value(resources.clone()).unwrap();
            assert_eq!(size(&read).unwrap(), expected, "{resources}");
        }
        let disabled = serde_json::from_value(json!({"memory": {"disableOOMKiller": true}})).unwrap();
        assert!(size(&disabled).is_err());
    }

    #[test]
    fn a_pid_file_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        write_pid(&path, 42).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "42");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
