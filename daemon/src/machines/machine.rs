//! One VM's task: commands in order, one at a time, and what its process does meanwhile.
//!
//! ```text
//!              on                      pause
//! powered off ────► powering on ─► powered on ◄────► paused
//!      ▲                            │   ▲    unpause
//!      │  off, end of the process   │   │ guest too slow
//!      ├────────────────────────────┤   │
//!      └──── end of the process ── powering off ◄── shutdown
//! ```
//! `blocked` is a VM whose file cannot be used; it leaves that state when the file is mended.
//! While a guest shuts down, commands are still taken: `off` overtakes a `shutdown`.
//! A process that ends because the guest asked for a reset is followed by the next, as after `on`.

mod adopt;
mod keep;
mod ports;

use std::sync::Arc;
use std::time::Duration;

use catalyst_api::{EventKind, MemoryInfo, PowerOp, StartMode, UpdateVm, VmState};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};
use tracing::Instrument;

pub(super) use self::ports::PortsCommand;
use super::container::Runtime;
use super::error::{ChangeError, FolderError, FreezeError, PowerError, SnapshotError};
use super::freeze::Frozen;
use super::resets::Resets;
use super::shared::Shared;
use super::{Context, attendant, folders, registered, snapshots, start, suspend};
use crate::engine::{Exit, VmProcess};
use crate::store::{Began, VmDir, files, logs};

/// How long a guest may take to shut down. Vagrant's HTTP client gives up after 60 s and does
/// not catch that, so the answer comes before (AppCatalyst reference section 1.4).
pub const SHUTDOWN_LIMIT: Duration = Duration::from_secs(50);
/// How often the logs of a running VM are looked at, so that a guest cannot fill the disk.
const LOG_CHECK: Duration = Duration::from_secs(30);

type Reply<E> = oneshot::Sender<Result<(), E>>;

/// What a VM can be asked.
#[derive(Debug)]
pub(super) enum Command {
    Power {
        op: PowerOp,
        /// With `on`: boot, whatever else would be possible.
        cold: bool,
        reply: Reply<PowerError>,
    },
    /// Ends its process, if it has one: nobody wanted to be rid of the VM, so why is kept.
    End {
        reason: &'static str,
        reply: Reply<PowerError>,
    },
    Update {
        update: UpdateVm,
        reply: Reply<ChangeError>,
    },
    /// Powers off if `force`, removes the folder and ends the task.
    Delete {
        force: bool,
        reply: Reply<ChangeError>,
    },
    /// Freezes the VM, which goes on, for others to go on from.
    Freeze {
        reply: oneshot::Sender<Result<Arc<Frozen>, FreezeError>>,
    },
    /// Goes on from another VM's memory, as its clone.
    GoOn {
        from: Arc<Frozen>,
        reply: Reply<PowerError>,
    },
    /// Makes a snapshot, goes back to one, or deletes one.
    Snapshot {
        request: snapshots::Request,
        reply: Reply<SnapshotError>,
    },
    /// Adds a folder, or removes one.
    Folders {
        change: folders::Change,
        reply: Reply<FolderError>,
    },
    /// Publishes a port of the guest, or takes one back.
    Ports(PortsCommand),
    /// Where its memory is, and what processor time its process took, in milliseconds.
    Usage {
        reply: oneshot::Sender<Result<(MemoryInfo, u64), PowerError>>,
    },
    /// Does something with the files of a VM that lies still; the reply names the state if it does not.
    Still {
        work: Work,
        reply: oneshot::Sender<Result<(), VmState>>,
    },
}

/// What is done with the files of a VM, where it may take its time.
pub(super) struct Work(pub Box<dyn FnOnce(VmDir) + Send>);

impl std::fmt::Debug for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Work")
    }
}

/// A command, and the request that it belongs to in the log.
pub(super) type Asked = (Command, tracing::Span);

pub(super) struct Machine {
    context: Arc<Context>,
    shared: Arc<Shared>,
    process: Option<Running>,
    shutdown: Option<Shutdown>,
    resets: Resets,
    /// The process that the VM goes with, if it is a container.
    runtime: Option<Runtime>,
}

struct Running {
    process: Arc<dyn VmProcess>,
    attendant: JoinHandle<()>,
    folders: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.attendant.abort();
        self.folders.abort();
    }
}

/// A guest that was asked to shut down.
struct Shutdown {
    deadline: Instant,
    replies: Vec<Reply<PowerError>>,
}

enum Happening {
    RuntimeEnded,
    Command(Option<Asked>),
    Exited(Exit),
    NoRoom,
    TooSlow,
    LogCheck,
}

impl Machine {
    /// Starts the task of a VM. If `adopted` is given, it first takes over the process that an
    /// earlier daemon left, if there is one, and then drops it.
    pub(super) fn spawn(
        context: Arc<Context>,
        shared: Arc<Shared>,
        commands: mpsc::Receiver<Asked>,
        adopted: Option<oneshot::Sender<()>>,
    ) {
        let resets = Resets::default();
        let machine = Self { context, shared, process: None, shutdown: None, resets, runtime: None };
        tokio::spawn(machine.run(commands, adopted));
    }

    async fn run(mut self, mut commands: mpsc::Receiver<Asked>, adopted: Option<oneshot::Sender<()>>) {
        if adopted.is_some() {
            self.adopt().await;
        }
        drop(adopted);
        if let Some(container) = self.shared.container().cloned() {
            match Runtime::of(&container) {
                Ok(Some(runtime)) => self.runtime = Some(runtime),
                Ok(None) if self.runtime_ended().await => return,
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(vm = %self.shared.dir().id(), %error, "the container's end is not seen");
                }
            }
        }
        let mut log_check = tokio::time::interval(LOG_CHECK);
        log_check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let happening = tokio::select! {
                command = commands.recv() => Happening::Command(command),
                exit = exited(self.process.as_ref()) => Happening::Exited(exit),
                () = no_room(self.process.as_ref()), if self.shared.state() == VmState::PoweredOn => Happening::NoRoom,
                () = too_slow(self.shutdown.as_ref()) => Happening::TooSlow,
                () = runtime_ended(self.runtime.as_ref()) => Happening::RuntimeEnded,
                _ = log_check.tick(), if self.process.is_some() => Happening::LogCheck,
            };
            match happening {
                Happening::Command(None) => return,
                Happening::Command(Some((Command::Delete { force, reply }, span))) => {
                    let result = self.delete(force).instrument(span).await;
                    let deleted = result.is_ok();
                    if deleted {
                        self.context.forget(self.shared.dir().id()).await;
                    }
                    // Whoever asked may have gone.
                    let _ = reply.send(result);
                    if deleted {
                        return;
                    }
                }
                Happening::Command(Some((command, span))) => self.obey(command).instrument(span).await,
                Happening::RuntimeEnded => {
                    if self.runtime_ended().await {
                        return;
                    }
                }
                // A container is started by its engine alone.
                Happening::Exited(Exit::Reset) if self.shutdown.is_none() && self.runtime.is_none() => {
                    self.reset().await;
                }
                Happening::Exited(exit) => self.ended(&exit.to_string()),
                Happening::NoRoom => self.stopped_for_room().await,
                Happening::TooSlow => self.shutdown_failed(),
                Happening::LogCheck => self.bound_logs(),
            }
        }
    }

    async fn obey(&mut self, command: Command) {
        match command {
            Command::Power { op: PowerOp::Shutdown, reply, .. } => self.begin_shutdown(reply).await,
            Command::Power { op, cold, reply } => {
                let result = self.power(op, cold).await;
                let _ = reply.send(result);
            }
            Command::End { reason, reply } => {
                let _ = reply.send(self.kill(reason).await);
            }
            Command::Update { update, reply } => {
                let result = self.update(update);
                let _ = reply.send(self.told(result));
            }
            Command::Freeze { reply } => {
                let _ = reply.send(self.freeze().await.map(Arc::new));
            }
            Command::GoOn { from, reply } => {
                let (context, shared) = (Arc::clone(&self.context), Arc::clone(&self.shared));
                let _ = reply.send(self.begin(None, start::go_on(&context, &shared, &from)).await);
            }
            Command::Snapshot { request, reply } => {
                let result = self.snapshot(request).await;
                let _ = reply.send(self.told(result));
            }
            Command::Folders { change, reply } => {
                let _ = reply.send(self.told(folders::change(&self.shared, change)));
            }
            Command::Ports(command) => self.ports(command).await,
            Command::Usage { reply } => {
                let _ = reply.send(self.usage().await);
            }
            Command::Still { work, reply } => {
                let state = self.shared.state();
                let result = if state == VmState::PoweredOff {
                    let dir = self.shared.dir().clone();
                    let done = tokio::task::spawn_blocking(move || (work.0)(dir)).await;
                    // If the runtime is stopping, nobody reads the reply.
                    done.map_err(|_| state)
                } else {
                    Err(state)
                };
                let _ = reply.send(result);
            }
            Command::Delete { .. } => {}
        }
    }

    /// The process that is the container to its engine has ended, and with it the VM goes; false if that fails.
    async fn runtime_ended(&mut self) -> bool {
        self.runtime = None;
        let id = self.shared.dir().id().clone();
        match self.delete(true).await {
            Ok(()) => {
                self.context.forget(&id).await;
                true
            }
            Err(error) => {
                tracing::error!(vm = %id, reason = crate::http::error::chain(&error).join(": "), "a container's VM stays");
                false
            }
        }
    }

    /// Tells the listeners of a change that was made.
    fn told<T, E>(&self, result: Result<T, E>) -> Result<T, E> {
        if result.is_ok() {
            self.shared.tell_changed();
        }
        result
    }

    async fn power(&mut self, op: PowerOp, cold: bool) -> Result<(), PowerError> {
        self.adopt_again().await;
        let state = self.shared.state();
        let id = self.shared.dir().id().clone();
        if self.shared.facts().unadopted {
            return Err(PowerError::State { id, state, op });
        }
        match (op, state) {
            (PowerOp::On, VmState::PoweredOff | VmState::Blocked | VmState::Suspended) => {
                self.resets = Resets::default();
                self.start(cold, None).await
            }
            (PowerOp::Off, VmState::Suspended) => {
                self.shared.dir().forget_suspended()?;
                self.shared.enter(VmState::PoweredOff, Some("its saved machine was given up".to_owned()));
                Ok(())
            }
            (PowerOp::On | PowerOp::Unpause, VmState::PoweredOn)
            | (PowerOp::Pause, VmState::Paused)
            | (PowerOp::Suspend, VmState::Suspended)
            | (PowerOp::Off, VmState::PoweredOff | VmState::Blocked) => Ok(()),
            (PowerOp::Off, _) => self.kill("it was powered off").await,
            (PowerOp::Pause, VmState::PoweredOn) => {
                self.with_process(op, |process| process.pause()).await?;
                self.shared.enter(VmState::Paused, None);
                Ok(())
            }
            (PowerOp::Unpause | PowerOp::On, VmState::Paused) => {
                self.with_process(op, |process| process.resume()).await?;
                self.shared.enter(VmState::PoweredOn, None);
                self.set_guest_clock();
                Ok(())
            }
            (PowerOp::Suspend, VmState::PoweredOn | VmState::Paused) => self.suspend(state).await,
            _ => Err(PowerError::State { id, state, op }),
        }
    }

    /// The guest's clock stood still with its CPUs.
    fn set_guest_clock(&self) {
        if let Some(agent) = self.shared.agent() {
            attendant::set_clock(&self.shared, agent);
        }
    }

    async fn with_process<'a, F>(&'a self, op: PowerOp, action: F) -> Result<(), PowerError>
    where
        F: FnOnce(
            &'a dyn VmProcess,
        ) -> futures_util::future::BoxFuture<'a, Result<(), crate::engine::EngineError>>,
    {
        let id = self.shared.dir().id().clone();
        let Some(running) = &self.process else {
            return Err(PowerError::State { id, state: self.shared.state(), op });
        };
        action(running.process.as_ref()).await.map_err(|source| PowerError::Engine { id, op, source })
    }

    async fn start(&mut self, cold: bool, reason: Option<&str>) -> Result<(), PowerError> {
        let (context, shared) = (Arc::clone(&self.context), Arc::clone(&self.shared));
        self.begin(reason, start::start(&context, &shared, cold)).await
    }

    /// Enters *powering on*, and *powered on* when what `begins` a process has done so and it runs.
    async fn begin(
        &mut self,
        reason: Option<&str>,
        begins: impl Future<Output = Result<start::Started, PowerError>>,
    ) -> Result<(), PowerError> {
        self.shared.refresh();
        self.open_ports().await;
        self.shared.enter(VmState::PoweringOn, reason.map(str::to_owned));
        let started = Instant::now();
        let id = self.shared.dir().id().clone();
        let begun = async {
            let begun = begins.await?;
            if let Err(source) = begun.process.resume().await {
                start::end(begun.process.as_ref()).await;
                return Err(PowerError::Engine { id: id.clone(), op: PowerOp::On, source });
            }
            Ok(begun)
        };
        match begun.await {
            Ok(start::Started { process, began, folders }) => {
                self.shared.folders.begin_with(folders);
                self.shared.note_alike();
                self.attach(process, Some(began));
                self.shared.enter(VmState::PoweredOn, None);
                tracing::info!(vm = %id, ms = started.elapsed().as_millis(), mode = %began.mode, "started");
                Ok(())
            }
            Err(error) => {
                let reason = crate::http::error::chain(&error).join(": ");
                self.shared.enter(suspend::still(self.shared.dir()), Some(reason));
                self.shared.refresh();
                Err(error)
            }
        }
    }

    /// Takes a process over: one that began so just now, or one that was found.
    fn attach(&mut self, process: Arc<dyn VmProcess>, began: Option<Began>) {
        let dir = self.shared.dir();
        // Why it was off the last time says nothing of the next.
        let _ = std::fs::remove_file(dir.reason());
        // Nobody has spoken with its agent yet, but who has let a template come to rest.
        let first = began.is_some_and(|began| matches!(began.mode, StartMode::Cold | StartMode::Warm));
        // The guest of a process that was found is the one that clients have spoken with since this daemon listens.
        let is_another = began.is_some_and(|began| began.mode != StartMode::Resume);
        let began = match began {
            Some(began) => {
                if let Err(error) = dir.note_began() {
                    tracing::warn!(vm = %dir.id(), %error, "the next daemon will not know how it began");
                }
                Some(began)
            }
            None => dir.began(),
        };
        {
            let mut facts = self.shared.facts();
            facts.pid = Some(process.pid());
            facts.started = Some(process.started());
            facts.engine = process.engine();
            facts.began = began;
        }
        if is_another {
            self.context.ports.cut(dir.id());
        }
        self.resets.started();
        crate::systemd::place(dir.id().clone(), process.pid());
        let (context, shared) = (Arc::clone(&self.context), Arc::clone(&self.shared));
        let attendant = if shared.is_foreign() {
            tokio::spawn(registered::attend(context, shared))
        } else {
            tokio::spawn(attendant::attend(context, shared, Arc::clone(&process), first))
        };
        let (context, shared) = (Arc::clone(&self.context), Arc::clone(&self.shared));
        let folders = tokio::spawn(folders::attend(context, shared));
        self.process = Some(Running { process, attendant, folders });
    }

    async fn begin_shutdown(&mut self, reply: Reply<PowerError>) {
        let id = self.shared.dir().id().clone();
        match self.shared.state() {
            VmState::PoweredOff => drop(reply.send(Ok(()))),
            VmState::PoweringOff => {
                if let Some(shutdown) = &mut self.shutdown {
                    shutdown.replies.push(reply);
                }
            }
            VmState::PoweredOn => match self.ask_guest().await {
                Ok(()) => {
                    self.shutdown =
                        Some(Shutdown { deadline: Instant::now() + SHUTDOWN_LIMIT, replies: vec![reply] });
                    self.shared.enter(VmState::PoweringOff, None);
                }
                Err(source) => {
                    drop(reply.send(Err(PowerError::Engine { id, op: PowerOp::Shutdown, source })));
                }
            },
            state => drop(reply.send(Err(PowerError::State { id, state, op: PowerOp::Shutdown }))),
        }
    }

    /// Asks the agent; where there is none, or it does not answer, presses the power button.
    async fn ask_guest(&self) -> Result<(), crate::engine::EngineError> {
        if let Some(agent) = self.shared.agent()
            && self.shared.guest().agent
            && agent.shutdown(catalyst_agent_link::ShutdownKind::PowerOff).await.is_ok()
        {
            return Ok(());
        }
        match &self.process {
            Some(running) => running.process.power_button().await,
            None => Ok(()),
        }
    }

    /// The guest's writes found no room, and it stands by itself until somebody has made some.
    async fn stopped_for_room(&self) {
        let Some(running) = &self.process else { return };
        // It may have been paused and made to go on since.
        if matches!(running.process.is_running().await, Ok(false)) {
            let dir = self.shared.dir();
            let reason = format!(
                "the file system of {} is full: make room, then run: catalyst vmpower unpause {}",
                dir.path().display(),
                dir.id()
            );
            self.shared.enter(VmState::Paused, Some(reason));
        }
    }

    fn shutdown_failed(&mut self) {
        let Some(shutdown) = self.shutdown.take() else { return };
        let id = self.shared.dir().id();
        self.shared.enter(VmState::PoweredOn, Some("the guest did not shut down in time".to_owned()));
        for reply in shutdown.replies {
            let error = PowerError::GuestTimeout { id: id.clone(), seconds: SHUTDOWN_LIMIT.as_secs() };
            let _ = reply.send(Err(error));
        }
    }

    async fn kill(&mut self, reason: &str) -> Result<(), PowerError> {
        let id = self.shared.dir().id().clone();
        if let Some(shutdown) = self.shutdown.take() {
            for reply in shutdown.replies {
                let _ = reply.send(Err(PowerError::Overtaken(id.clone())));
            }
        }
        let Some(running) = &self.process else { return Ok(()) };
        running.process.kill().map_err(|source| PowerError::Engine { id, op: PowerOp::Off, source })?;
        running.process.exited().await;
        self.ended(reason);
        Ok(())
    }

    /// The process ended because the guest asked for a reset: the VM is started again, cold, by its file as it is now.
    async fn reset(&mut self) {
        if let Some(reason) = self.resets.too_many() {
            return self.ended(&reason);
        }
        self.release();
        if let Err(error) = self.start(true, Some("the guest asked for a reset")).await {
            let reason = crate::http::error::chain(&error).join(": ");
            self.keep_reason(&format!("it was not started again after a reset: {reason}"));
        }
    }

    /// Forgets the process, which is gone.
    fn release(&mut self) {
        self.process = None;
        {
            let mut facts = self.shared.facts();
            facts.pid = None;
            facts.started = None;
            facts.began = None;
            facts.agent = None;
            facts.engine = self.context.engines.name();
        }
        self.shared.set_guest(catalyst_api::GuestStatus::default());
    }

    /// Keeps why the VM is off, for the next daemon.
    fn keep_reason(&self, reason: &str) {
        let path = self.shared.dir().reason();
        if let Err(error) = files::write_atomically(&path, reason.as_bytes(), 0o600) {
            tracing::warn!(path = %path.display(), %error, "cannot keep why the VM is off");
        }
    }

    /// The process is gone, and the VM is off.
    fn ended(&mut self, reason: &str) {
        self.release();
        self.keep_reason(reason);
        self.shared.enter(VmState::PoweredOff, Some(reason.to_owned()));
        for reply in self.shutdown.take().map(|shutdown| shutdown.replies).unwrap_or_default() {
            let _ = reply.send(Ok(()));
        }
    }

    fn update(&mut self, update: UpdateVm) -> Result<(), ChangeError> {
        let dir = self.shared.dir();
        let (vmx, mut config) = dir.read()?;
        if let Some(name) = update.name {
            config.name = name;
        }
        if let Some(cpus) = update.cpus {
            config.cpus = cpus;
        }
        if let Some(memory) = update.memory_mib {
            config.memory_mib = memory;
        }
        if let Some(tags) = update.tags {
            config.tags = tags;
        }
        if let Some(autostart) = update.autostart {
            config.autostart = autostart;
        }
        config.check()?;
        dir.write(vmx, &config)?;
        self.shared.facts().config = Some(config);
        Ok(())
    }

    async fn delete(&mut self, force: bool) -> Result<(), ChangeError> {
        self.adopt_again().await;
        let id = self.shared.dir().id().clone();
        let state = self.shared.state();
        if self.shared.facts().unadopted {
            return Err(ChangeError::State { id, state });
        }
        if self.process.is_some() {
            if !force {
                return Err(ChangeError::State { id, state });
            }
            if let Err(PowerError::Engine { source, .. }) = self.kill("it is being deleted").await {
                return Err(source.into());
            }
        }
        let (store, dir) = (self.context.store.clone(), self.shared.dir().clone());
        match tokio::task::spawn_blocking(move || store.delete(&dir)).await {
            Ok(result) => result?,
            Err(_) => return Err(ChangeError::Stopping),
        }
        self.context.events.send(EventKind::VmDeleted { id: id.to_string() });
        Ok(())
    }

    fn bound_logs(&self) {
        let dir = self.shared.dir();
        for path in [dir.console_log(), dir.engine_log()] {
            if let Err(error) = logs::bound(&path) {
                tracing::warn!(path = %path.display(), %error, "cannot cut the log");
            }
        }
    }
}

async fn exited(running: Option<&Running>) -> Exit {
    match running {
        Some(running) => running.process.exited().await,
        None => std::future::pending().await,
    }
}

async fn runtime_ended(runtime: Option<&Runtime>) {
    match runtime {
        Some(runtime) => runtime.ended().await,
        None => std::future::pending().await,
    }
}

async fn no_room(running: Option<&Running>) {
    match running {
        Some(running) => running.process.no_room().await,
        None => std::future::pending().await,
    }
}

async fn too_slow(shutdown: Option<&Shutdown>) {
    match shutdown {
        Some(shutdown) => tokio::time::sleep_until(shutdown.deadline).await,
        None => std::future::pending().await,
    }
}
