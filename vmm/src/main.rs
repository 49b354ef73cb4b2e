//! catalyst-vmm: one process is one VM on KVM. Today it answers one question: can this machine's KVM run one?

use std::io::Write as _;
use std::process::ExitCode;

use catalyst_vmm::probe;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "catalyst-vmm", version, about = "The Catalyst monitor: one process is one VM on KVM")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs kernel-mode code under /dev/kvm for at most 200 ms at a time and says what it can do.
    ///
    /// The exit code is 0 whatever the verdict is; 1 only if the report could not be written.
    Probe {
        /// The whole report as one JSON object on stdout.
        #[arg(long)]
        json: bool,
        /// How often to try in all, where a busy machine leaves no time for an answer.
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=10))]
        attempts: u8,
    },
}

fn main() -> ExitCode {
    let Command::Probe { json, attempts } = Arguments::parse().command;
    let report = probe::run_up_to(attempts);
    let text = if json { serde_json::to_string_pretty(&report) } else { Ok(report.to_string()) };
    let written =
        text.map_err(std::io::Error::from).and_then(|text| writeln!(std::io::stdout().lock(), "{text}"));
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("catalyst-vmm: cannot write the report to stdout: {error}");
            ExitCode::FAILURE
        }
    }
}
