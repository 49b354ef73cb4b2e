//! catalyst-daemon: VM store, engines, network, REST.

mod background;

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use catalyst_api::config::Config;
use catalyst_daemon::access::guard::protect;
use catalyst_daemon::access::listen::ListenOptions;
use catalyst_daemon::access::owner::Owner;
use catalyst_daemon::access::peer::Peer;
use catalyst_daemon::access_keys::AccessKeys;
use catalyst_daemon::docker::Docker;
use catalyst_daemon::engine::Engines;
use catalyst_daemon::events::Events;
use catalyst_daemon::http::{self, App};
use catalyst_daemon::images::Images;
use catalyst_daemon::machines::{Context, Machines};
use catalyst_daemon::network::{Network, NetworkConfig};
use catalyst_daemon::settings::{
    self, Args, EngineChoice, LISTEN, Settings, default_state_dir, owners_config,
};
use catalyst_daemon::store::Store;
use catalyst_daemon::tasks::Tasks;
use catalyst_daemon::usage::Usage;
use catalyst_daemon::{privilege, probe, release, systemd};
use catalyst_images::ImageStore;
use clap::Parser;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

/// How long requests under way may take once the daemon stops.
const GRACE: Duration = Duration::from_secs(3);
/// How long what a killed daemon was just starting may hold its lock; it takes milliseconds.
const LEFTOVERS: Duration = Duration::from_secs(5);

/// Why the daemon did not start.
#[derive(Debug, Error)]
enum StartError {
    #[error(
        "catalyst-daemon needs root to set up networks and to start VM processes; run: sudo {program} --owner {user}"
    )]
    NotRoot { program: String, user: String },
    #[error("Cannot make the state folder {path}")]
    StateDir {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error("Another daemon (pid {pid}) uses the state folder {path}; stop it, or take another --state-dir")]
    Locked { path: String, pid: String },
    #[error("Cannot start the daemon")]
    Runtime(#[source] std::io::Error),
}

fn main() -> ExitCode {
    let args = Args::parse();
    // Before Linux 6.4 rustix reads /proc/self/auxv for this, once, and panics where it may not: the owner's threads may not.
    let _ = rustix::param::page_size();
    let outcome = match args.release {
        Some(what) => release::run(what, &args.image_dir).map_err(Into::into),
        None if args.background => go_into_background(args),
        None => run(args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let message = http::error::chain(error.as_ref()).join(": ");
            background::tell_failure(&message);
            eprintln!("Error: {message}");
            ExitCode::FAILURE
        }
    }
}

/// What the owner has set is read with the owner's rights, and so is the log's folder that is set.
fn with_settings(args: Args, owner: &Owner) -> Result<(Args, Config), Box<dyn Error>> {
    privilege::act_as(owner.uid, owner.gid);
    let config = owners_config(owner, is_own(owner))?;
    Ok((args.over(&config)?, config))
}

/// Whether the environment is the owner's.
fn is_own(owner: &Owner) -> bool {
    owner.uid == rustix::process::getuid().as_raw()
}

fn go_into_background(args: Args) -> Result<(), Box<dyn Error>> {
    let owner = Owner::resolve(args.owner.as_deref())?;
    let (args, _) = with_settings(args, &owner)?;
    background::start(args.log_dir.as_deref())
}

fn run(args: Args) -> Result<(), Box<dyn Error>> {
    let owner = Owner::resolve(args.owner.as_deref())?;
    if !rustix::process::geteuid().is_root() {
        let program = std::env::args().next().unwrap_or_default();
        return Err(StartError::NotRoot { program, user: owner.name }.into());
    }
    let filter = tracing_subscriber::EnvFilter::try_new(&args.log)?;
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(std::io::stderr).init();
    // What the daemon writes is its owner's business alone.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    settings::raise_descriptors();
    let (uid, gid) = (owner.uid, owner.gid);
    let (args, config) = with_settings(args, &owner)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_keep_alive(Duration::from_secs(5))
        .on_thread_start(move || privilege::act_as(uid, gid))
        .enable_all()
        .build()
        .map_err(StartError::Runtime)?;
    let outcome = runtime.block_on(serve(args, config, owner));
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

async fn serve(args: Args, config: Config, owner: Owner) -> Result<(), Box<dyn Error>> {
    let own_environment = is_own(&owner);
    let listen = args.listen.unwrap_or_else(|| LISTEN.to_owned());
    let state_dir = match args.state_dir {
        Some(dir) => std::path::absolute(dir).map_err(StartError::Runtime)?,
        None => default_state_dir(&owner, own_environment),
    };
    let _lock = lock_state_dir(&state_dir)?;
    let stop = Arc::new(Notify::new());
    let settings = Arc::new(Settings {
        state_dir: state_dir.clone(),
        image_dir: args.image_dir.clone(),
        listen: listen.clone(),
    });
    // Listening comes first: a taken port is the most likely thing to be wrong.
    let address = listen.parse()?;
    let socket = state_dir.join("catalyst.sock");
    let listener = ListenOptions { tcp: &address, unix: Some(&socket), owner: &owner }.bind()?;

    // Measured beside what else a start does; from the first answer on the daemon knows its engine.
    let engine = args.engine.unwrap_or(EngineChoice::Auto);
    let engines = tokio::spawn(Engines::choose(engine, probe::run()));
    let events = Events::default();
    let images = ImageStore::open(&args.image_dir).with_own(owner.uid);
    let tasks = Tasks::new(events);
    let image_tasks = Images::new(images.clone(), tasks.clone(), state_dir.clone());
    if let Err(error) = image_tasks.register() {
        tracing::warn!(dir = %args.image_dir.display(), %error, "cannot note the use of the images");
    }
    let mut network = NetworkConfig::new(&state_dir);
    network.bridge = args.bridge;
    let network = Network::load(network).await?;
    let (serving, admitted) = (network.clone(), network.clone());
    tokio::spawn(async move { serving.keep_serving().await });
    tokio::spawn(async move { admitted.keep_admitted().await });
    let access_keys = AccessKeys::open(&state_dir, &owner.home)?;
    if let Some(vm_dir) = args.vm_dir {
        Store::lie_in(&state_dir, &std::path::absolute(vm_dir).map_err(StartError::Runtime)?)?;
    }
    let store = Store::open(&state_dir)?;
    let engines = engines.await.map_err(|error| StartError::Runtime(std::io::Error::other(error)))??;
    tracing::info!(engine = %engines.name(), why = engines.why(), "engine");
    let docker = Docker::load(&state_dir, network.clone(), owner.clone()).await;
    let mut context = Context::new(store, images, network, engines, tasks, owner.clone(), access_keys);
    context.warms_by_itself = !args.no_warming;
    context.parent = config.parent;
    let machines = Machines::load(context).await?;

    let usage = Arc::new(Usage::new(machines.clone()));
    let app_machines = machines.clone();
    let stopping_docker = docker.clone();
    let app = App { machines, docker, images: image_tasks, usage, settings, stop: Arc::clone(&stop) };
    let router = protect(http::router(app), listener.policy());
    tracing::info!(listen, state_dir = %state_dir.display(), owner = %owner.name, "ready");
    background::tell_ready();
    let (starting, state) = (app_machines.clone(), state_dir.clone());
    tokio::spawn(async move {
        starting.warm_at_first().await;
        starting.autostart(&state).await;
    });
    let stopping = Arc::new(Notify::new());
    let served = axum::serve(listener, router.into_make_service_with_connect_info::<Peer>())
        .with_graceful_shutdown(stopped(stop, (app_machines, stopping_docker), Arc::clone(&stopping)));
    tokio::select! {
        result = served => result.map_err(StartError::Runtime)?,
        () = overdue(stopping) => {}
    }
    tracing::info!("stopped; VMs and Docker's daemon run on");
    Ok(())
}

/// Waits for a signal or a request to stop, and passes it on as `stopping`. Where the host stops, guests shut down first.
async fn stopped(stop: Arc<Notify>, (machines, docker): (Machines, Docker), stopping: Arc<Notify>) {
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    match signals {
        (Ok(mut terminate), Ok(mut interrupt)) => tokio::select! {
            () = stop.notified() => {}
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        },
        _ => stop.notified().await,
    }
    if systemd::host_stops().await {
        tracing::info!("the host stops; guests shut down");
        if let Err(error) = docker.down().await {
            tracing::warn!(
                reason = http::error::chain(&error).join(": "),
                "Docker's daemon was not taken down"
            );
        }
        machines.shut_down().await;
    }
    stopping.notify_one();
}

/// Ends the wait for clients that keep their connections open: those who listen to events do.
async fn overdue(stopping: Arc<Notify>) {
    stopping.notified().await;
    tokio::time::sleep(GRACE).await;
}

/// Whether the process `pid` is gone, or dead and not yet reaped.
fn has_ended(pid: &str) -> bool {
    let Some(pid) = pid.parse().ok().and_then(Pid::from_raw) else { return false };
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&Timespec::default())) == Ok(1),
        Err(errno) => errno == Errno::SRCH,
    }
}

/// Waits for the lock on `file`. A daemon that was killed while it started a program has a child that holds
/// its descriptors, listening sockets too, until that has become the program.
fn lock_within(file: &File, limit: Duration) -> std::io::Result<bool> {
    let (done, wait) = std::sync::mpsc::channel();
    let file = file.try_clone()?;
    std::thread::spawn(move || {
        // Nobody waits any more for an answer that comes too late: then the process is ending.
        let _ = done.send(rustix::fs::flock(&file, FlockOperation::LockExclusive).is_ok());
    });
    Ok(wait.recv_timeout(limit).unwrap_or(false))
}

fn lock_state_dir(state_dir: &Path) -> Result<File, StartError> {
    let shown = || state_dir.display().to_string();
    let error = |source| StartError::StateDir { path: shown(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(state_dir).map_err(error)?;
    let path = state_dir.join("daemon.lock");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path)
        .map_err(error)?;
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let pid = fs::read_to_string(&path).unwrap_or_default().trim().to_owned();
        if !has_ended(&pid) || !lock_within(&file, LEFTOVERS).map_err(error)? {
            return Err(StartError::Locked { path: shown(), pid });
        }
    }
    file.set_len(0).map_err(error)?;
    std::io::Write::write_all(&mut &file, std::process::id().to_string().as_bytes()).map_err(error)?;
    Ok(file)
}
