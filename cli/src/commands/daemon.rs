//! `daemon start|stop|status`

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use catalyst_api::Version;

use super::Context;
use crate::args::{Daemon, DaemonStart};
use crate::client::{Client, ClientError};
use crate::error::CliError;
use crate::host::Host;
use crate::process::Watched;
use crate::table::{Cell, Table, Tone};
use crate::{Outcome, launch, output};

/// Longest wait for a stopped daemon to end.
const END: Duration = Duration::from_secs(30);
/// Longest wait for one with which Docker's daemon ends, in 60 s, and then the guests, which have 50 s.
const END_WITH_VMS: Duration = Duration::from_secs(130);

/// Runs a `daemon` command.
pub fn run(context: &Context, command: Daemon) -> Outcome {
    match command {
        Daemon::Start(options) => start(context, options),
        Daemon::Stop { vms } => stop(context, vms),
        Daemon::Status => status(context),
    }
}

fn start(context: &Context, mut options: DaemonStart) -> Outcome {
    if options.listen.is_none() && context.host.explicit {
        options.listen = Some(context.host.to_string());
    }
    let host = match options.listen.as_deref() {
        Some(listen) => Host::parse(listen)?,
        None => context.host.clone(),
    };
    let client = Client::new(host.clone());
    match client.probe() {
        Ok(version) => {
            output::info(&format!("A daemon already runs at {host}"));
            return told(context, &host, &version);
        }
        Err(ClientError::NoAnswer { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    launch::start(&host, &words(options))?;
    let version = client.probe()?;
    launch::told_started(&version);
    if context.json {
        output::json(&version)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The options as the daemon takes them.
fn words(options: DaemonStart) -> Vec<OsString> {
    let named = [
        ("--state-dir", options.state_dir),
        ("--listen", options.listen.map(OsString::from)),
        ("--owner", options.owner.map(OsString::from)),
    ];
    let given =
        named.into_iter().filter_map(|(name, value)| value.map(|value| [OsString::from(name), value]));
    given.flatten().chain(options.more).collect()
}

fn stop(context: &Context, vms: bool) -> Outcome {
    let limit = if vms { END_WITH_VMS } else { END };
    let client = Client::new(context.host.clone());
    let version = client.probe()?;
    // Watched from before the request, so that its pid cannot have become another's.
    let watched = context.host.is_loopback().then(|| Watched::named(version.pid, launch::DAEMON)).flatten();
    // Where its process cannot be seen, the end of its events is its end.
    let events = if watched.is_none() { client.events(None, Some(limit)).ok() } else { None };
    client.stop(vms)?;
    if let Some(watched) = watched {
        if !watched.ended_within(limit) {
            return Err(CliError::StillRunning { pid: version.pid, seconds: limit.as_secs() });
        }
    } else if let Some(events) = events {
        events.wait_for_end();
    }
    let note = if vms { " and its VMs" } else { "; its VMs keep running" };
    output::info(&format!("Stopped the daemon (pid {}){note}", version.pid));
    if context.json {
        output::json(&serde_json::json!({ "pid": version.pid, "stopped": true }))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn status(context: &Context) -> Outcome {
    let version = Client::new(context.host.clone()).probe()?;
    told(context, &context.host, &version)
}

fn told(context: &Context, host: &Host, version: &Version) -> Outcome {
    if context.json {
        output::json(version)?;
    } else {
        output::print(&description(host, version).render(output::colours()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn description(host: &Host, version: &Version) -> Table {
    let mut pairs = Table::pairs();
    pairs.pair("Daemon", Cell::toned(format!("running at {host}"), Tone::Good));
    pairs.pair("Version", &version.version);
    pairs.pair("Pid", version.pid.to_string());
    pairs.pair("Owner", &version.owner);
    pairs.pair("State", &version.state_dir);
    pairs.pair("Images", &version.image_dir);
    pairs.pair("Engine", version.engine.to_string());
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_reach_the_daemon_in_its_words() {
        let options = DaemonStart {
            state_dir: Some("/s".into()),
            listen: Some("127.0.0.1:9".to_owned()),
            owner: None,
            more: vec!["--engine".into(), "qemu".into()],
        };
        assert_eq!(words(options), ["--state-dir", "/s", "--listen", "127.0.0.1:9", "--engine", "qemu"]);
    }
}
