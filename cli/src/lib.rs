//! The `catalyst` command: argument parsing, output and progress.
//!
//! It speaks REST to a daemon and holds no logic that another client would need too. The
//! one thing it does by itself is to start a daemon on this machine where none answers.

#![forbid(unsafe_code)]

mod args;
mod client;
mod commands;
mod error;
mod events;
mod holder;
mod host;
mod launch;
mod link;
mod names;
mod output;
mod process;
mod progress;
mod session;
mod size;
mod ssh_files;
mod table;
mod tasks;
mod terminal;
mod text;
mod wait;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::error::CliError;

/// Runs one command line (program name first) and returns its exit code: 0, 1 for a failed
/// operation, 2 for wrong use; `ssh` and `guest exec` pass the code of their command on.
///
/// By the name `appcatalyst` any failure is 255, as scripts of that program expect.
pub fn run(words: impl IntoIterator<Item = OsString>) -> ExitCode {
    let words: Vec<OsString> = words.into_iter().collect();
    let name = words.first().and_then(|word| Path::new(word).file_name());
    let failed = |code: u8| match code {
        0 => ExitCode::SUCCESS,
        _ if name == Some("appcatalyst".as_ref()) => ExitCode::from(255),
        code => ExitCode::from(code),
    };
    let result = match args::Cli::try_parse_from(&words) {
        Ok(cli) => commands::run(cli),
        Err(error) => return failed(args::report(&error)),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            if let Some(line) = error.line() {
                output::error(&line);
            }
            failed(error.exit_code())
        }
    }
}

/// The grammar of the command line, from which its manual pages are made.
pub fn grammar() -> clap::Command {
    args::Cli::command()
}

/// What a command gives: its exit code, or what went wrong.
type Outcome = Result<ExitCode, CliError>;
