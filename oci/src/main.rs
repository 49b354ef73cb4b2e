//! catalyst-oci: an OCI runtime with runc's command line, whose containers are VMs (docs/CONTAINERS.md).
//!
//! - `args`, `log`, `failure`: what was asked, what went wrong.
//! - `bundle`, `document`, `process`, `metadata`: the specification, and what the guest and the daemon are told of it.
//! - `state`, `wire`: what is kept of a container, and how commands speak with its shim.
//! - `launch`, `hooks`, `cgroup`, `daemon`: the command `create`.
//! - `shim`, `stdio`, `console`: the process that is the container to its engine.
//! - `exec`, `commands`, `about`: the other commands.
//! - `port`: what a Docker daemon of `catalyst docker up` runs for each published port.

mod about;
mod args;
mod bundle;
mod cgroup;
mod commands;
mod console;
mod daemon;
mod document;
mod exec;
mod failure;
mod hooks;
mod launch;
mod log;
mod metadata;
mod port;
mod process;
mod shim;
mod state;
mod stdio;
mod wire;

use std::path::Path;

use clap::Parser;

use args::{Arguments, Command};
use commands as on;
use daemon::Daemon;
use failure::{Outcome, chain};

fn main() {
    std::process::exit(match std::env::var(launch::ROLE).as_deref() {
        Ok("shim") => shim::run(),
        Ok("exec") => exec::stand_in(),
        Ok("port") => port::run(),
        _ => command(),
    });
}

fn command() -> i32 {
    let arguments = Arguments::parse();
    let (log, is_json) =
        (arguments.global.log.clone(), arguments.global.log_format.as_deref() == Some("json"));
    match run(arguments) {
        Ok(code) => code,
        Err(failure) => {
            log::error(&chain(&failure), log.as_deref(), is_json);
            1
        }
    }
}

fn run(arguments: Arguments) -> Outcome<i32> {
    let systemd = arguments.global.systemd_cgroup;
    let root = arguments.global.root.unwrap_or_else(|| state::DEFAULT_ROOT.into());
    let root = std::path::absolute(&root).unwrap_or(root);
    let root: &Path = &root;
    let socket = arguments.socket.unwrap_or_else(args::default_socket);
    let daemon = Daemon::at(std::path::absolute(&socket).unwrap_or(socket));
    let done = |outcome: Outcome| outcome.map(|()| 0);
    match arguments.command {
        Command::Create(create) => {
            let creation = launch::Creation { root, daemon: &daemon, systemd, foreground: false };
            launch::create(&create, &creation).map(|_| 0)
        }
        Command::Start(start) => done(on::start(root, &start.container_id)),
        Command::State(state) => done(on::state(root, &state.container_id)),
        Command::Kill(kill) => done(on::kill(root, &kill)),
        Command::Delete(delete) => done(on::delete(root, &delete)),
        Command::Events(events) => done(on::events(root, &events)),
        Command::Exec(exec) => exec::exec(&exec, root),
        Command::Features(_) => done(on::print(&about::features().to_string())),
        Command::List(list) => done(about::list(root, &list)),
        Command::Pause(pause) => done(on::pause(root, &pause.container_id, true)),
        Command::Ps(ps) => done(on::ps(root, &ps)),
        Command::Resume(resume) => done(on::pause(root, &resume.container_id, false)),
        Command::Run(run) => on::run(run, root, &daemon, systemd),
        Command::Spec(spec) => done(about::spec(&spec)),
        Command::Update(update) => done(on::update(root, &update)),
    }
}
