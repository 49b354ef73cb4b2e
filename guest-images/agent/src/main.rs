//! The program inside the guest: what the host asks over the port, it does.

mod cpu_share;
mod exec;
mod files;
mod folders;
mod forget;
mod identity;
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
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use catalyst_agent_protocol::Control;

use crate::outbox::Outbox;
use crate::port::Port;
use crate::session::{Config, Session};

const USAGE: &str = "usage: catalyst-agent [--port PATH] [--root DIR] [--no-network]";

struct Arguments {
    port: Option<PathBuf>,
    config: Config,
}

/// What the program was made from (build.rs); the image builder looks for it in the program's bytes.
#[used]
static SOURCES: &str = concat!("catalyst-agent-sources:", env!("CATALYST_AGENT_SOURCES"));

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|word| word == rest::FILL) {
        return match rest::fill() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("catalyst-agent: free memory cannot be filled: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let Some(arguments) = arguments() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let path = match arguments
        .port
        .map_or_else(|| port::find(catalyst_agent_protocol::PORT_NAME), |path| Ok(Some(path)))
    {
        Ok(Some(path)) => path,
        Ok(None) => {
            // A machine without the port has no host to talk to; its boot goes on.
            eprintln!("catalyst-agent: there is no port {}", catalyst_agent_protocol::PORT_NAME);
            notify::ready();
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("catalyst-agent: the port cannot be looked for: {error}");
            return ExitCode::FAILURE;
        }
    };
    match serve(&path, arguments.config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("catalyst-agent: the port {} failed: {error}", path.display());
            ExitCode::FAILURE
        }
    }
}

fn arguments() -> Option<Arguments> {
    let mut port = None;
    let mut config = Config { root: "/".into(), network: true };
    let mut words = std::env::args_os().skip(1);
    while let Some(word) = words.next() {
        match word.to_str()? {
            "--port" => port = Some(words.next()?.into()),
            "--root" => config.root = words.next()?.into(),
            "--no-network" => config.network = false,
            _ => return None,
        }
    }
    Some(Arguments { port, config })
}

fn serve(path: &std::path::Path, config: Config) -> io::Result<()> {
    let mut port = Port::open(path)?;
    let outbox = Arc::new(Outbox::default());
    let mut writer = port.writer()?;
    let written = Arc::clone(&outbox);
    thread::spawn(move || written.write_to(&mut writer));
    if !config.files_only() {
        power_button::watch();
    }
    outbox.control(0, &Control::Up);
    let session = Session::new(config, outbox);
    port.read(|event| session.handle(event))?;
    session.drop_epoch();
    Ok(())
}
