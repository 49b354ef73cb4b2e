//! The program inside the guest: what the host asks over the port, it does.

mod apic_timer;
mod container;
mod cpu_share;
mod exec;
mod files;
mod folders;
mod forget;
mod identity;
mod init;
mod notify;
mod outbox;
mod port;
mod power_button;
mod readiness;
mod rest;
mod session;
mod set_up;
mod shutdown;
mod spawn;
mod stream;
mod users;

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use catalyst_agent_protocol::{CONTAINER_PORT_NAME, Control, PORT_NAME};

use crate::container::{Keeper, Place};
use crate::outbox::Outbox;
use crate::port::Port;
use crate::session::{Config, Session};

const USAGE: &str = "\
usage: catalyst-agent [--port PATH] [--root DIR] [--no-network] [--container-port PATH --trees DIR]";

struct Arguments {
    port: Option<PathBuf>,
    config: Config,
    /// The port of a container's runtime, and the folder of the trees that the container is made of.
    container: Option<(PathBuf, PathBuf)>,
}

/// What the program was made from (build.rs); the image builder looks for it in the program's bytes.
#[used]
static SOURCES: &str = concat!("catalyst-agent-sources:", env!("CATALYST_AGENT_SOURCES"));

fn main() -> ExitCode {
    let first = std::env::args_os().nth(1);
    if first.as_ref().is_some_and(|word| word == container::plan::STAGE) {
        return container::stage::main();
    }
    if first.as_ref().is_some_and(|word| word == container::plan::REAPER) {
        return container::reaper::main();
    }
    if first.is_some_and(|word| word == rest::FILL) {
        return match rest::fill() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("catalyst-agent: free memory cannot be filled: {error}");
                ExitCode::FAILURE
            }
        };
    }
    if init::is_needed() {
        return init::run(|| ended(serve_container_vm()));
    }
    let Some(Arguments { port, mut config, container }) = arguments() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    if let Some((path, trees)) = container {
        config.keeper = Some(Keeper::new(Place::of_folder(trees)));
        serve_in_thread(path, Config { runtime: true, ..config.clone() });
    }
    let path = match port.map_or_else(|| port::find(PORT_NAME), |path| Ok(Some(path))) {
        Ok(Some(path)) => path,
        Ok(None) => {
            // A machine without the port has no host to talk to; its boot goes on.
            eprintln!("catalyst-agent: there is no port {PORT_NAME}");
            notify::ready();
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("catalyst-agent: the port cannot be looked for: {error}");
            return ExitCode::FAILURE;
        }
    };
    ended(serve(&path, config))
}

fn ended(served: io::Result<()>) -> ExitCode {
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("catalyst-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn arguments() -> Option<Arguments> {
    let (mut port, mut container_port, mut trees) = (None, None, None);
    let mut config = Config { root: "/".into(), network: true, keeper: None, runtime: false };
    let mut words = std::env::args_os().skip(1);
    while let Some(word) = words.next() {
        match word.to_str()? {
            "--port" => port = Some(words.next()?.into()),
            "--root" => config.root = words.next()?.into(),
            "--no-network" => config.network = false,
            "--container-port" => container_port = Some(words.next()?.into()),
            "--trees" => trees = Some(words.next()?.into()),
            _ => return None,
        }
    }
    let container = match (container_port, trees) {
        (Some(port), Some(trees)) => Some((port, trees)),
        (None, None) => None,
        _ => return None,
    };
    Some(Arguments { port, config, container })
}

/// Serves the runtime and the daemon, each over a port of its own, in a VM that is a container.
fn serve_container_vm() -> io::Result<()> {
    let keeper = Some(Keeper::new(Place::of_vm()));
    let config = Config { root: "/".into(), network: false, keeper, runtime: false };
    let missing = |name: &str| io::Error::other(format!("this machine has no port {name}"));
    let runtime = port::find(CONTAINER_PORT_NAME)?.ok_or_else(|| missing(CONTAINER_PORT_NAME))?;
    serve_in_thread(runtime, Config { runtime: true, ..config.clone() });
    serve(&port::find(PORT_NAME)?.ok_or_else(|| missing(PORT_NAME))?, config)
}

fn serve_in_thread(path: PathBuf, config: Config) {
    thread::spawn(move || {
        if let Err(error) = serve(&path, config) {
            eprintln!("catalyst-agent: {error}");
        }
    });
}

/// Serves one host after another over a port, for as long as that lives.
fn serve(path: &Path, config: Config) -> io::Result<()> {
    let failed = |error: io::Error| {
        io::Error::new(error.kind(), format!("the port {} failed: {error}", path.display()))
    };
    let mut port = Port::open(path).map_err(failed)?;
    let outbox = Arc::new(Outbox::default());
    let mut writer = port.writer().map_err(failed)?;
    let written = Arc::clone(&outbox);
    thread::spawn(move || written.write_to(&mut writer));
    if !config.files_only() && !config.runtime {
        power_button::watch();
    }
    outbox.control(0, &Control::Up);
    let session = Session::new(config, outbox);
    port.read(|event| session.handle(event)).map_err(failed)?;
    session.drop_epoch();
    Ok(())
}
