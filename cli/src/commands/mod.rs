//! The commands, one module for each domain.

mod console;
mod daemon;
pub mod docker;
mod doctor;
mod events;
mod exec;
mod folder;
mod guest;
mod image;
mod logs;
mod network;
mod port;
mod power;
pub mod snapshot;
pub mod ssh;
mod ssh_config;
mod template;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use catalyst_api::Version;
use catalyst_api::config::Config;
use clap::CommandFactory;

use crate::Outcome;
use crate::args::{self, Cli, Command};
use crate::client::Client;
use crate::error::CliError;
use crate::host::Host;
use crate::progress::Board;
use crate::{launch, output};

/// How many VMs are worked on at once.
const AT_ONCE: usize = 16;

/// What every command has.
#[derive(Debug)]
pub struct Context {
    host: Host,
    json: bool,
    timeout: Duration,
    /// The proxy setting of the user's file.
    passes_proxy: bool,
}

impl Context {
    /// The daemon; started if need be.
    fn connect(&self) -> Result<(Client, Version), CliError> {
        launch::connect(&self.host)
    }

    /// The daemon, where nothing else of it is asked for.
    fn client(&self) -> Result<Client, CliError> {
        self.connect().map(|(client, _)| client)
    }
}

/// What the user has set.
fn settings() -> Result<Config, CliError> {
    let folder = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    match folder("HOME") {
        Some(home) => Ok(Config::load(&home, folder("XDG_CONFIG_HOME").as_deref())?),
        None => Ok(Config::default()),
    }
}

/// Runs the command.
pub fn run(cli: Cli) -> Outcome {
    let settings = settings()?;
    let context = Context {
        host: Host::choose(cli.global.host.as_deref(), &settings)?,
        passes_proxy: settings.proxy.as_deref() == Some("host"),
        json: cli.global.json,
        timeout: Duration::from_secs(cli.global.timeout),
    };
    match cli.command {
        Command::Vm(command) => vm::run(&context, command),
        Command::Vmpower(command) => power::run(&context, command),
        Command::Guest(args::Guest::Getip(command)) => guest::getip(&context, &command),
        Command::Guest(args::Guest::Exec(command)) => exec::run(&context, command),
        Command::Ssh(command) => ssh::run(&context, &command),
        Command::SshConfig(command) => ssh_config::run(&context, &command),
        Command::Docker(command) => docker::run(&context, command),
        Command::Console(command) => console::run(&context, &command.id),
        Command::Logs(command) => logs::run(&context, &command),
        Command::Folder(command) => folder::run(&context, command),
        Command::Image(command) => image::run(&context, command),
        Command::Template(command) => template::run(&context, command),
        Command::Port(command) => port::run(&context, command),
        Command::Network(command) => network::run(&context, command),
        Command::Doctor => doctor::run(&context),
        Command::Daemon(command) => daemon::run(&context, command),
        Command::Events { vm } => events::run(&context, vm.as_deref()),
        Command::Completion { shell } => completion(shell),
        Command::Version => version(&context),
    }
}

/// Does `work` for each id, several at once. Where there are several, each error is told when
/// it comes and the others go on.
fn for_each(ids: &[String], board: &Board, work: impl Fn(&str) -> Result<(), CliError> + Sync) -> Outcome {
    if let [id] = ids {
        return work(id).map(|()| ExitCode::SUCCESS);
    }
    let attempt = |id: &str| match work(id) {
        Ok(()) => true,
        Err(error) => {
            if let Some(line) = error.line() {
                board.aside(|| output::error(&line));
            }
            false
        }
    };
    let mut all_well = true;
    for group in ids.chunks(AT_ONCE) {
        std::thread::scope(|scope| {
            let running: Vec<_> = group.iter().map(|id| scope.spawn(|| attempt(id))).collect();
            for handle in running {
                all_well &= handle.join().unwrap_or(false);
            }
        });
    }
    if all_well { Ok(ExitCode::SUCCESS) } else { Err(CliError::Told) }
}

fn completion(shell: clap_complete::Shell) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "catalyst", &mut script);
    output::bytes(&script)?;
    Ok(ExitCode::SUCCESS)
}

fn version(context: &Context) -> Outcome {
    let own = env!("CARGO_PKG_VERSION");
    // Whether a daemon runs is the answer here, not a reason to start one or to fail.
    let daemon = Client::new(context.host.clone()).probe();
    if context.json {
        output::json(&serde_json::json!({ "catalyst": own, "daemon": daemon.ok() }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let answer = match daemon {
        Ok(daemon) => format!("catalyst-daemon {} at {}", daemon.version, context.host),
        Err(error) => crate::error::chain(&error),
    };
    output::print(&format!("catalyst {own}\n{}\n", crate::text::clean(&answer)))?;
    Ok(ExitCode::SUCCESS)
}
