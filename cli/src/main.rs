//! catalyst: the command line, a client of the daemon's REST API.

use std::process::ExitCode;

fn main() -> ExitCode {
    catalyst_cli::run(std::env::args_os())
}
