//! catalyst-vmm: one process is one VM on KVM.

use std::io::Write as _;
use std::os::fd::RawFd;
use std::process::ExitCode;

use catalyst_vmm::folders::{Serving, Tree};
use catalyst_vmm::{boot_files, chain, folders, probe, run};
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "catalyst-vmm", version, about = "The Catalyst monitor: one process is one VM on KVM")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the machine that a description says, until it ends.
    ///
    /// Exit status: 0 the guest switched itself off, 10 it asked for a reset, 11 it met a triple fault, 12 it could not
    /// go on, 13 asked to quit; 1 the machine could not be built, 2 wrong use.
    Run {
        /// The descriptor from which the description is read, as JSON, to its end. It names further descriptors.
        #[arg(long, value_name = "FD", value_parser = clap::value_parser!(RawFd).range(3..))]
        description_fd: RawFd,
    },
    /// Serves folders of the host to a VM's guest over a port, until the VM's process ends.
    Folders {
        /// Connected stream socket of the port; with --keep-owners one by which that comes (SCM_RIGHTS).
        #[arg(long, value_name = "FD", value_parser = clap::value_parser!(RawFd).range(3..))]
        port_fd: RawFd,
        /// Listening stream socket on which it is told what there is, and asked for its state.
        #[arg(long, value_name = "FD", value_parser = clap::value_parser!(RawFd).range(3..))]
        #[arg(required_unless_present = "keep_owners")]
        control_fd: Option<RawFd>,
        /// What an earlier process saved.
        #[arg(long, value_name = "FD", value_parser = clap::value_parser!(RawFd).range(3..))]
        state_fd: Option<RawFd>,
        /// Serves the trees as root: files belong to the same users in the guest as here.
        #[arg(long)]
        keep_owners: bool,
        /// A tree and its descriptor: a mount that is nowhere yet (open_tree), or a file or folder (O_PATH).
        #[arg(long, value_name = "NAME=FD", requires = "keep_owners")]
        tree: Vec<Tree>,
    },
    /// Finds the kernel and the initial RAM disk on a guest's disk.
    BootFiles {
        /// The descriptor from which the request is read, as JSON, to its end. It names further descriptors.
        #[arg(long, value_name = "FD", value_parser = clap::value_parser!(RawFd).range(3..))]
        request_fd: RawFd,
    },
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
    match Arguments::parse().command {
        Command::Run { description_fd } => match run::run(description_fd) {
            Ok(cause) => ExitCode::from(cause.exit_status()),
            Err(error) => {
                eprintln!("catalyst-vmm: {}", chain(&error));
                ExitCode::FAILURE
            }
        },
        Command::Folders { port_fd, control_fd, state_fd, keep_owners, tree } => {
            let descriptors = folders::Descriptors { port: port_fd, control: control_fd, state: state_fd };
            let serving = if keep_owners { Serving::KeepingOwners(tree) } else { Serving::AsOneUser };
            ended(folders::run(descriptors, serving))
        }
        Command::BootFiles { request_fd } => ended(boot_files::run(request_fd)),
        Command::Probe { json, attempts } => show_probe(json, attempts),
    }
}

fn ended(done: Result<(), impl std::error::Error>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("catalyst-vmm: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn show_probe(json: bool, attempts: u8) -> ExitCode {
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
