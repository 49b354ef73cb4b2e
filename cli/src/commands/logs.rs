//! `logs`: what the serial console printed, or the VM's process.

use std::process::ExitCode;

use super::Context;
use crate::Outcome;
use crate::args::Logs;
use crate::output;
use crate::text::TerminalFilter;

/// Prints a log. In a pipe byte for byte; on a terminal without what could drive it, since a
/// guest writes what it likes.
pub fn run(context: &Context, asked: &Logs) -> Outcome {
    let client = context.client()?;
    let mut stream = if asked.engine {
        client.engine_log(&asked.id, asked.follow)?
    } else {
        client.console_log(&asked.id, asked.follow)?
    };
    let mut filter = output::on_terminal().then(TerminalFilter::default);
    let mut all = Vec::new();
    let mut buffer = vec![0; 32 << 10];
    loop {
        let count = stream.next(&mut buffer)?;
        let chunk = &buffer[..count];
        if context.json {
            all.extend_from_slice(chunk);
        } else if let Some(filter) = &mut filter {
            output::bytes(&filter.pass(chunk))?;
        } else {
            output::bytes(chunk)?;
        }
        if context.json && (asked.follow || count == 0) {
            told_json(&mut all, count == 0)?;
        }
        if count == 0 {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// Every whole line as a JSON object, and at the end the rest too.
fn told_json(all: &mut Vec<u8>, at_end: bool) -> Result<(), output::OutputError> {
    let whole =
        if at_end { all.len() } else { all.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1) };
    for line in String::from_utf8_lossy(&all[..whole]).lines() {
        output::json_line(&serde_json::json!({ "line": line }))?;
    }
    all.drain(..whole);
    Ok(())
}
