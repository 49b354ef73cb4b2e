//! The container of a VM that is one, and those of a pod (docs/CONTAINERS.md).
//!
//! ```text
//! agent ── keeper (here) ── launch ──► the agent's program anew, in the container's namespaces (stage)
//!                                        root: trees, mounts, devices │ credentials │ program ── exec ──► the program
//! ```
//! Its network is the VM's, its mounts and cgroup are its own; IPC, names and processes are, but for a pod's.

pub mod plan;
pub mod reaper;
pub mod resolver;
pub mod stage;

mod cgroup;
mod credentials;
mod devices;
mod inside;
mod launch;
mod network;
mod options;
mod place;
mod program;
mod root;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use catalyst_agent_protocol::container::{Capabilities, Container, DOCUMENT, Network, Process};
use catalyst_agent_protocol::{Control, ExecSpec, Problem, ProblemKind};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;

use self::cgroup::Watch;
use self::launch::{Launched, Shape, Waiting, launch};
pub use self::place::Place;
use self::plan::{Plan, Task};
use self::reaper::Reaper;
use self::resolver::Resolver;
use crate::exec::{self, Manner};
use crate::identity;
use crate::session::Session;
use crate::spawn::Spawned;
use crate::stream::Stream;

/// Longest document, in bytes.
const MAX_DOCUMENT: u64 = 8 * 1024 * 1024;
/// Most containers of a VM.
const MOST: usize = 64;
/// How long the end of a container's first process is waited for, in milliseconds.
const END_LIMIT: u16 = 10_000;

/// What was done, or why not.
pub type Step<T> = Result<T, Problem>;

/// A problem of a kind.
pub fn problem(kind: ProblemKind, message: impl Into<String>) -> Problem {
    Problem { kind, message: message.into() }
}

/// Turns an error into a problem that says what was tried.
fn doing<E: Display>(what: impl Display) -> impl FnOnce(E) -> Problem {
    move |error| problem(ProblemKind::Failed, format!("{what}: {error}"))
}

/// Namespaces that a container's first process has for itself.
const OWN: CloneFlags = CloneFlags::CLONE_NEWPID
    .union(CloneFlags::CLONE_NEWNS)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS);

/// Keeps the containers: the one that the VM is, and those that have joined it, by their names.
#[derive(Debug)]
pub struct Keeper {
    place: Place,
    containers: Mutex<BTreeMap<String, State>>,
    /// One is no longer being made or started.
    settled: Condvar,
    resolver: Mutex<Option<Arc<Resolver>>>,
    /// Namespaces of IPC and names of those that have them together.
    shared: Mutex<Option<Arc<[OwnedFd; 2]>>>,
    /// The first process of those that have processes together.
    reaper: Mutex<Option<Arc<Reaper>>>,
}

#[derive(Debug)]
enum State {
    Making,
    Ready(Box<Ready>),
    Begun(Arc<Begun>),
}

/// A container whose program has not begun.
#[derive(Debug)]
struct Ready {
    launched: Launched,
    begun: Begun,
}

/// What others need to know to go into the container.
#[derive(Debug)]
struct Begun {
    /// Its first process.
    init: OwnedFd,
    cgroup: Option<PathBuf>,
    watch: Option<Arc<Watch>>,
    capabilities: Capabilities,
}

impl Begun {
    fn is_running(&self) -> bool {
        let mut fds = [PollFd::new(self.init.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO) == Ok(0)
    }

    /// Ends its first process, and with it all others; its cgroup goes.
    fn end(&self) -> Step<()> {
        // SAFETY: numbers alone; it has no effect on a process that has ended.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.init.as_raw_fd(), libc::SIGKILL, 0, 0) };
        let mut fds = [PollFd::new(self.init.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut fds, END_LIMIT), Ok(1..)) {
            return Err(problem(ProblemKind::Failed, "the container's first process does not end"));
        }
        match &self.cgroup {
            // What is left where its processes are not its own is in there.
            Some(cgroup) => cgroup::remove(cgroup).map_err(doing("removing the container's cgroup")),
            None => Ok(()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Keeper {
    /// No container yet.
    pub fn new(place: Place) -> Arc<Self> {
        let (containers, settled) = (Mutex::default(), Condvar::new());
        let (resolver, shared, reaper) = (Mutex::default(), Mutex::default(), Mutex::default());
        Arc::new(Self { place, containers, settled, resolver, shared, reaper })
    }

    /// Makes the container of the document, or of the one that lies ready.
    pub fn create(&self, session: &Arc<Session>, document: Option<String>) -> Step<()> {
        let document = match document {
            Some(document) => document,
            None => read_document(&session.config.root.join(DOCUMENT.trim_start_matches('/')))?,
        };
        let container = plan::container(&document)?;
        let name = container.name.clone();
        {
            let mut containers = lock(&self.containers);
            if containers.contains_key(&name) {
                return Err(problem(ProblemKind::Invalid, "the VM has that container already"));
            }
            if containers.len() >= MOST {
                let message = format!("the VM has {MOST} containers, which are the most");
                return Err(problem(ProblemKind::Invalid, message));
            }
            containers.insert(name.clone(), State::Making);
        }
        let made = self.make(session, &container, document);
        let mut containers = lock(&self.containers);
        self.settled.notify_all();
        match made {
            Ok(ready) => {
                containers.insert(name, State::Ready(Box::new(ready)));
                Ok(())
            }
            Err(problem) => {
                containers.remove(&name);
                Err(problem)
            }
        }
    }

    fn make(&self, session: &Arc<Session>, container: &Container, document: String) -> Step<Ready> {
        let trees = plan::trees_of(&container.name, &self.place.trees)?;
        if !container.joins {
            self.settle(session, container)?;
        }
        if let Some(folders) = &self.place.folders {
            folders.wait_for_trees()?;
        }
        let waiting = self.place.take_first();
        let cgroup = self.place.cgroups.as_ref().map(|top| {
            let is_vm = container.name.is_empty() || waiting.is_some();
            if is_vm { cgroup::of_container(top) } else { cgroup::of_joined(top, &container.name) }
        });
        let watch = cgroup.as_ref().map(|cgroup| {
            let limits = cgroup::Limits { processes: container.pids_limit, memory: container.memory_limit };
            cgroup::make(cgroup, limits)?;
            Watch::begin(container.name.clone(), cgroup, session)
        });
        let made = watch.transpose().map_err(doing("making a cgroup")).and_then(|watch| {
            let launched = self.launch_first(container, document, trees, cgroup.clone(), waiting)?;
            let capabilities = container.process.capabilities;
            let cgroup = cgroup.clone();
            match exec::pidfd(launched.spawned.pid) {
                Ok(init) => Ok(Ready { launched, begun: Begun { init, cgroup, watch, capabilities } }),
                Err(error) => {
                    launched.give_up();
                    Err(doing("watching the container's first process")(error))
                }
            }
        });
        if let (Err(_), false, Some(cgroup)) = (&made, container.name.is_empty(), &cgroup) {
            // Nothing runs in it; the one that the VM is may be tried again.
            let _ = fs::remove_dir(cgroup);
        }
        made
    }

    /// Makes the VM that of its first container.
    fn settle(&self, session: &Arc<Session>, container: &Container) -> Step<()> {
        if container.unix_ns > 0 {
            identity::go_on(&session.config, container.unix_ns, &container.seed)?;
        }
        if self.place.of_vm && !container.hostname.is_empty() {
            nix::unistd::sethostname(&container.hostname).map_err(doing("setting the host name"))?;
        }
        self.set_network(&container.network)?;
        if container.resolver { self.listen_for_names(session) } else { Ok(()) }
    }

    /// Where an earlier attempt at the container has begun to listen, that goes on.
    fn listen_for_names(&self, session: &Arc<Session>) -> Step<()> {
        let mut resolver = lock(&self.resolver);
        if resolver.is_none() {
            let telling = Arc::clone(session);
            let tell = move |control: &Control| telling.tell(control);
            let begun = Resolver::begin(resolver::ADDRESS.into(), Box::new(tell));
            *resolver = Some(begun.map_err(doing("listening for questions about names"))?);
        }
        Ok(())
    }

    fn launch_first(
        &self,
        container: &Container,
        document: String,
        trees: PathBuf,
        cgroup: Option<PathBuf>,
        waiting: Option<Waiting>,
    ) -> Step<Launched> {
        let (terminal, stdin) = (container.process.terminal.is_some(), container.process.stdin);
        let shared = if container.shares { lock(&self.shared).clone() } else { None };
        let task = Task::Create { document, trees, shares: shared.is_some() };
        let reaper = container.shares_processes.then(|| self.reaper()).transpose()?;
        let launched = match (waiting, &shared, &reaper) {
            // It is in the cgroup already.
            (Some(waiting), None, None) => {
                waiting.without(terminal, stdin).follow(&Plan { cgroup: None, task })?
            }
            (waiting, shared, reaper) => {
                if let Some(waiting) = waiting {
                    waiting.give_up();
                }
                let both = CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
                let mut own = if shared.is_some() { OWN.difference(both) } else { OWN };
                own.set(CloneFlags::CLONE_NEWPID, reaper.is_none());
                let among = reaper.as_ref().map(|reaper| reaper.as_fd());
                let shared = shared.as_ref().map_or(&[][..], |shared| &shared[..]);
                launch(&Plan { cgroup, task }, Shape { own, among, init: None, shared, terminal, stdin })?
            }
        };
        if container.shares && shared.is_none() {
            let pid = launched.spawned.pid;
            let open = |name: &str| File::open(format!("/proc/{pid}/ns/{name}")).map(OwnedFd::from);
            match open("ipc").and_then(|ipc| Ok([ipc, open("uts")?])) {
                Ok(both) => *lock(&self.shared) = Some(Arc::new(both)),
                Err(error) => {
                    launched.give_up();
                    return Err(doing("opening the namespaces that containers share")(error));
                }
            }
        }
        Ok(launched)
    }

    /// The first of the processes that containers have together, which is there from the first of those on.
    fn reaper(&self) -> Step<Arc<Reaper>> {
        let mut known = lock(&self.reaper);
        if let Some(reaper) = known.as_ref().filter(|reaper| reaper.is_running()) {
            return Ok(Arc::clone(reaper));
        }
        let reaper = Reaper::start().map_err(doing("starting the first process of those of a pod"))?;
        Ok(Arc::clone(known.insert(Arc::new(reaper))))
    }

    /// Starts a container's program as the stream's.
    pub fn start(&self, session: &Arc<Session>, stream: &Arc<Stream>, name: &str) -> Step<()> {
        let ready = {
            let mut containers = lock(&self.containers);
            match containers.insert(name.to_owned(), State::Making) {
                Some(State::Ready(ready)) => ready,
                other => {
                    // As it was.
                    match other {
                        Some(other) => containers.insert(name.to_owned(), other),
                        None => containers.remove(name),
                    };
                    return Err(problem(ProblemKind::Invalid, "no container is ready to be started"));
                }
            }
        };
        let Ready { launched, begun } = *ready;
        let spawned = launched.begin();
        // Also where it could not begin: a container is started once in its life.
        lock(&self.containers).insert(name.to_owned(), State::Begun(Arc::new(begun)));
        self.settled.notify_all();
        exec::run(session, stream, spawned?, None, Manner::Contained)
    }

    /// Runs another program in a container, as the stream's.
    pub fn exec(
        &self,
        session: &Arc<Session>,
        stream: &Arc<Stream>,
        name: &str,
        process: Process,
    ) -> Step<()> {
        let (terminal, stdin) = (process.terminal.is_some(), process.stdin);
        let begun = self.running().find(|(known, _)| known == name).map(|(_, begun)| begun);
        let begun = begun.ok_or_else(not_running)?;
        let spawned = join(&begun, Task::Join(process), terminal, stdin)?;
        exec::run(session, stream, spawned, None, Manner::Contained)
    }

    /// Ends a container, if it is there, and forgets it and its trees.
    pub fn remove(&self, name: &str) -> Step<()> {
        let trees = plan::trees_of(name, &self.place.trees)?;
        let removed = {
            let is_under_way =
                |all: &mut BTreeMap<String, State>| matches!(all.get(name), Some(State::Making));
            let limit = Duration::from_millis(END_LIMIT.into());
            let waited = self.settled.wait_timeout_while(lock(&self.containers), limit, is_under_way);
            let (mut containers, _) = waited.unwrap_or_else(PoisonError::into_inner);
            if is_under_way(&mut containers) {
                return Err(problem(ProblemKind::Busy, "the container is being made or started"));
            }
            containers.remove(name)
        };
        let ended = match removed {
            Some(State::Begun(begun)) => begun.end(),
            Some(State::Ready(ready)) => {
                let Ready { launched, begun } = *ready;
                launched.give_up();
                begun.end()
            }
            Some(State::Making) | None => Ok(()),
        };
        // They are gone. Whoever looks finds that, and the kernel lets go of all files below, which the host has open for it.
        let _ = fs::symlink_metadata(trees);
        ended
    }

    /// Containers whose program runs, the one that the VM is first.
    fn running(&self) -> impl Iterator<Item = (String, Arc<Begun>)> {
        let running = |(name, state): (&String, &State)| match state {
            State::Begun(begun) if begun.is_running() => Some((name.clone(), Arc::clone(begun))),
            _ => None,
        };
        let all: Vec<_> = lock(&self.containers).iter().filter_map(running).collect();
        all.into_iter()
    }

    /// Whether commands of whoever has the VM run in a container.
    pub fn is_running(&self) -> bool {
        self.running().next().is_some()
    }

    /// Runs a command of whoever has the VM in the container that it is, or in the first of those that it has.
    pub fn guest_exec(&self, spec: ExecSpec) -> Step<Spawned> {
        let (_, begun) = self.running().next().ok_or_else(not_running)?;
        let (terminal, stdin) = (spec.terminal.is_some(), spec.stdin);
        join(&begun, Task::Guest { spec, capabilities: begun.capabilities }, terminal, stdin)
    }

    /// Makes the network so.
    pub fn set_network(&self, network: &Network) -> Step<()> {
        if !self.place.of_vm {
            return Ok(());
        }
        let nics = self.place.nics.as_ref();
        let nics =
            nics.ok_or_else(|| problem(ProblemKind::Failed, "the VM's NICs could not be made ready"))?;
        let wanted = nics.check(network).map_err(|message| problem(ProblemKind::Invalid, message))?;
        nics.apply(&wanted).map_err(doing("setting up the network"))
    }

    /// Passes an answer of the host's on.
    pub fn resolved(&self, query: u32, message: &[u8]) {
        let resolver = lock(&self.resolver).clone();
        if let Some(resolver) = resolver {
            resolver.answer(query, message);
        }
    }

    /// Has told what the kernel has ended until now.
    pub fn look_for_kills(&self) {
        let watches: Vec<_> = lock(&self.containers)
            .values()
            .filter_map(|state| match state {
                State::Begun(begun) => begun.watch.clone(),
                _ => None,
            })
            .collect();
        for watch in watches {
            watch.look();
        }
    }
}

fn not_running() -> Problem {
    problem(ProblemKind::Invalid, "the container is not running")
}

fn join(begun: &Begun, task: Task, terminal: bool, stdin: bool) -> Step<Spawned> {
    let init = Some(begun.init.as_fd());
    let shape = Shape { own: CloneFlags::empty(), among: init, init, shared: &[], terminal, stdin };
    launch(&Plan { cgroup: begun.cgroup.clone(), task }, shape)?.begin()
}

/// Reads the document, which may hold secrets and so does not stay.
fn read_document(path: &Path) -> Step<String> {
    let read = || -> std::io::Result<String> {
        let mut text = String::new();
        File::open(path)?.take(MAX_DOCUMENT + 1).read_to_string(&mut text)?;
        fs::remove_file(path)?;
        Ok(text)
    };
    let text = read().map_err(doing(format_args!("reading {}", path.display())))?;
    if text.len() as u64 > MAX_DOCUMENT {
        let message = format!("the container's document is longer than {MAX_DOCUMENT} bytes");
        return Err(problem(ProblemKind::Invalid, message));
    }
    Ok(text)
}
