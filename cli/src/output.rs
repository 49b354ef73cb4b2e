//! What goes to stdout and stderr.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::error::plain_io;
use crate::text::clean;

/// Why something could not be printed.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// The reader has gone: not worth a word.
    #[error("nobody reads the output")]
    Gone,
    /// It cannot be written.
    #[error("cannot write to standard output: {}", plain_io(.0))]
    Write(io::Error),
    /// It cannot be put into JSON.
    #[error("cannot put the answer into JSON")]
    Json(#[from] serde_json::Error),
}

impl From<io::Error> for OutputError {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe { Self::Gone } else { Self::Write(error) }
    }
}

/// Writes `text` to stdout as it is.
pub fn print(text: &str) -> Result<(), OutputError> {
    bytes(text.as_bytes())
}

/// Writes bytes to stdout as they are.
pub fn bytes(data: &[u8]) -> Result<(), OutputError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(data)?;
    Ok(stdout.flush()?)
}

/// Writes `value` to stdout as JSON for people and programs.
pub fn json(value: &impl Serialize) -> Result<(), OutputError> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// Writes `value` to stdout as one line of JSON, for answers that come one by one.
pub fn json_line(value: &impl Serialize) -> Result<(), OutputError> {
    print(&format!("{}\n", serde_json::to_string(value)?))
}

/// `Info: …` on stderr. A stderr that cannot be written to is no reason to fail.
pub fn info(line: &str) {
    let _ = writeln!(io::stderr().lock(), "Info: {}", clean(line));
}

/// `Error: …` on stderr.
pub fn error(line: &str) {
    let _ = writeln!(io::stderr().lock(), "Error: {}", clean(line));
}

/// Whether stdout is a terminal.
pub fn on_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Whether to use colours on stdout: on a terminal that knows them, and unless NO_COLOR is set.
pub fn colours() -> bool {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    on_terminal() && !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}
