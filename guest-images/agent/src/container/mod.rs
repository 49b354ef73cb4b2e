//! The one container of a VM that is one (docs/CONTAINERS.md).
//!
//! ```text
//! agent ── keeper (here) ── launch ──► the agent's program anew, in the container's namespaces (stage)
//!                                        root: trees, mounts, devices │ credentials │ program ── exec ──► the program
//! ```
//! Its network is the VM's, its processes, mounts, IPC, names and cgroup are its own.

pub mod plan;
pub mod resolver;
pub mod stage;

mod cgroup;
mod credentials;
mod devices;
mod inside;
mod launch;
mod network;
mod options;
mod program;
mod root;

use std::fmt::Display;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use catalyst_agent_protocol::container::{Capabilities, Container, DOCUMENT, Network, Process};
use catalyst_agent_protocol::{Control, ExecSpec, Problem, ProblemKind};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;

use self::cgroup::Watch;
use self::launch::{Launched, Shape, Waiting, launch};
use self::network::Nics;
use self::plan::{Plan, Task};
use self::resolver::Resolver;
use crate::exec::{self, Manner};
use crate::folders::Folders;
use crate::identity;
use crate::session::Session;
use crate::spawn::Spawned;
use crate::stream::Stream;

/// Longest document, in bytes.
const MAX_DOCUMENT: u64 = 8 * 1024 * 1024;

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

/// What a VM has for its container.
#[derive(Debug, Default)]
pub struct Place {
    /// The folder of the trees that the host serves.
    trees: PathBuf,
    /// The top of the cgroups.
    cgroups: Option<PathBuf>,
    /// The system is the container's, and so is its network.
    of_vm: bool,
    nics: Option<Nics>,
    /// The host's trees, if they come over a port.
    folders: Option<Arc<Folders>>,
    /// The container's first process, until it is made.
    first: Mutex<Option<First>>,
}

/// A container's first process, made before there is a container. In a VM that goes on from another's memory it is there already.
#[derive(Debug)]
struct First {
    waiting: Waiting,
    /// The mount of the host's trees that it sees.
    trees: u64,
}

impl Place {
    /// A folder of trees, in a system that is left as it is: for tests.
    pub fn of_folder(trees: PathBuf) -> Self {
        Self { trees, ..Self::default() }
    }

    /// The VM's own, when it has just booted.
    pub fn of_vm() -> Self {
        let nics = Nics::take();
        if let Err(error) = &nics {
            eprintln!("catalyst-agent: the NICs cannot be made ready: {error}");
        }
        let cgroups = PathBuf::from("/sys/fs/cgroup");
        cgroup::enable(&cgroups);
        // Made now, it is there in what is cloned from this VM, and its making is no part of the container's.
        if let Err(error) = cgroup::make(&cgroups, 0) {
            eprintln!("catalyst-agent: the container's cgroup cannot be made: {error}");
        }
        let folders = Folders::of_container();
        let first = First::prepare(&folders, &cgroups);
        if let Err(error) = &first {
            eprintln!("catalyst-agent: the container's first process is not made in advance: {error}");
        }
        Self {
            trees: crate::folders::ROOT.into(),
            cgroups: Some(cgroups),
            of_vm: true,
            nics: nics.ok(),
            folders: Some(folders),
            first: Mutex::new(first.ok()),
        }
    }

    /// The process that was made in advance, if it sees what there is now.
    fn take_first(&self) -> Option<Waiting> {
        let First { waiting, trees } = lock(&self.first).take()?;
        if self.folders.as_ref().is_some_and(|folders| folders.mounted() == Some(trees)) {
            return Some(waiting);
        }
        waiting.give_up();
        None
    }
}

impl First {
    fn prepare(folders: &Arc<Folders>, cgroups: &Path) -> std::io::Result<Self> {
        // It has what is mounted now.
        let trees = folders.mount_all().map_err(|problem| std::io::Error::other(problem.message))?;
        let waiting = Waiting::start(Shape { own: OWN, init: None, terminal: false, stdin: true })?;
        let joined = fs::write(cgroup::of_container(cgroups).join("cgroup.procs"), waiting.pid().to_string());
        match joined {
            Ok(()) => Ok(Self { waiting, trees }),
            Err(error) => {
                waiting.give_up();
                Err(error)
            }
        }
    }
}

/// Keeps the container.
#[derive(Debug)]
pub struct Keeper {
    place: Place,
    state: Mutex<State>,
    resolver: Mutex<Option<Arc<Resolver>>>,
    watch: Mutex<Option<Arc<Watch>>>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    None,
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
    capabilities: Capabilities,
}

impl Begun {
    fn is_running(&self) -> bool {
        let mut fds = [PollFd::new(self.init.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO) == Ok(0)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Keeper {
    /// No container yet.
    pub fn new(place: Place) -> Arc<Self> {
        Arc::new(Self { place, state: Mutex::default(), resolver: Mutex::default(), watch: Mutex::default() })
    }

    /// Makes the container of the document, or of the one that lies ready.
    pub fn create(&self, session: &Arc<Session>, document: Option<String>) -> Step<()> {
        {
            let mut state = lock(&self.state);
            if !matches!(*state, State::None) {
                return Err(problem(ProblemKind::Invalid, "the VM has its container already"));
            }
            *state = State::Making;
        }
        let made = self.make(session, document);
        let (state, result) = match made {
            Ok(ready) => (State::Ready(Box::new(ready)), Ok(())),
            Err(problem) => (State::None, Err(problem)),
        };
        *lock(&self.state) = state;
        result
    }

    fn make(&self, session: &Arc<Session>, document: Option<String>) -> Step<Ready> {
        let document = match document {
            Some(document) => document,
            None => read_document(&session.config.root.join(DOCUMENT.trim_start_matches('/')))?,
        };
        let container = plan::container(&document)?;
        if container.unix_ns > 0 {
            identity::go_on(&session.config, container.unix_ns, &container.seed)?;
        }
        if self.place.of_vm && !container.hostname.is_empty() {
            nix::unistd::sethostname(&container.hostname).map_err(doing("setting the host name"))?;
        }
        self.set_network(&container.network)?;
        if container.resolver {
            self.listen_for_names(session)?;
        }
        if let Some(folders) = &self.place.folders {
            folders.wait_for_trees()?;
        }
        let cgroup = match &self.place.cgroups {
            Some(top) => Some(cgroup::make(top, container.pids_limit).map_err(doing("making a cgroup"))?),
            None => None,
        };
        if let Some(cgroup) = &cgroup {
            lock(&self.watch).get_or_insert_with(|| Watch::begin(cgroup, session));
        }
        self.launch_first(container, document, cgroup)
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

    fn launch_first(&self, container: Container, document: String, cgroup: Option<PathBuf>) -> Step<Ready> {
        let Process { terminal, stdin, capabilities, .. } = container.process;
        let task = Task::Create { document, trees: self.place.trees.clone() };
        let launched = if let Some(waiting) = self.place.take_first() {
            // It is in the cgroup already.
            waiting.without(terminal.is_some(), stdin).follow(&Plan { cgroup: None, task })?
        } else {
            let shape = Shape { own: OWN, init: None, terminal: terminal.is_some(), stdin };
            launch(&Plan { cgroup: cgroup.clone(), task }, shape)?
        };
        match exec::pidfd(launched.spawned.pid) {
            Ok(init) => Ok(Ready { launched, begun: Begun { init, cgroup, capabilities } }),
            Err(error) => {
                launched.give_up();
                Err(doing("watching the container's first process")(error))
            }
        }
    }

    /// Starts the container's program as the stream's.
    pub fn start(&self, session: &Arc<Session>, stream: &Arc<Stream>) -> Step<()> {
        let ready = {
            let mut state = lock(&self.state);
            match std::mem::take(&mut *state) {
                State::Ready(ready) => {
                    *state = State::Making;
                    ready
                }
                other => {
                    *state = other;
                    return Err(problem(ProblemKind::Invalid, "no container is ready to be started"));
                }
            }
        };
        let Ready { launched, begun } = *ready;
        let spawned = launched.begin();
        // Also where it could not begin: a VM has one container in its life.
        *lock(&self.state) = State::Begun(Arc::new(begun));
        exec::run(session, stream, spawned?, None, Manner::Contained)
    }

    /// Runs another program in the container, as the stream's.
    pub fn exec(&self, session: &Arc<Session>, stream: &Arc<Stream>, process: Process) -> Step<()> {
        let (terminal, stdin) = (process.terminal.is_some(), process.stdin);
        let spawned = self.join(Task::Join(process), terminal, stdin)?;
        exec::run(session, stream, spawned, None, Manner::Contained)
    }

    /// Whether commands of whoever has the VM run in the container.
    pub fn is_running(&self) -> bool {
        matches!(&*lock(&self.state), State::Begun(begun) if begun.is_running())
    }

    /// Runs a command of whoever has the VM in the container.
    pub fn guest_exec(&self, spec: ExecSpec) -> Step<Spawned> {
        let capabilities = self.begun()?.capabilities;
        let (terminal, stdin) = (spec.terminal.is_some(), spec.stdin);
        self.join(Task::Guest { spec, capabilities }, terminal, stdin)
    }

    fn begun(&self) -> Step<Arc<Begun>> {
        match &*lock(&self.state) {
            State::Begun(begun) if begun.is_running() => Ok(Arc::clone(begun)),
            _ => Err(problem(ProblemKind::Invalid, "the container is not running")),
        }
    }

    fn join(&self, task: Task, terminal: bool, stdin: bool) -> Step<Spawned> {
        let begun = self.begun()?;
        let shape = Shape { own: CloneFlags::empty(), init: Some(begun.init.as_fd()), terminal, stdin };
        launch(&Plan { cgroup: begun.cgroup.clone(), task }, shape)?.begin()
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
        let watch = lock(&self.watch).clone();
        if let Some(watch) = watch {
            watch.look();
        }
    }
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
