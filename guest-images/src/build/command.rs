//! Runs the programs that a build consists of, so that nothing of them is left when the builder ends.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read};
use std::process::{Command, ExitStatus, Stdio};

/// Lines of output that an error quotes.
const LAST_LINES: usize = 20;
/// Longest line that is kept, in bytes; the rest of a longer one starts a new line.
const MAX_LINE: u64 = 4096;

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It could not be started.
    #[error("cannot run '{command}'{hint}")]
    Start {
        /// The command.
        command: String,
        /// What to install, if the program is missing.
        hint: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It failed.
    #[error("'{command}' failed ({status}); its last lines:\n{output}")]
    Failed {
        /// The command.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// Its last lines of output.
        output: String,
    },
}

/// A command that dies with the builder.
pub fn command(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", program]);
    command
}

/// A command in mount and process namespaces of its own: what it mounts and whom it starts is gone with it,
/// also when it is killed. `--net` as `extra` takes the network away as well.
pub fn isolated(extra: &[&str], program: &str) -> Command {
    let mut command = command("unshare");
    command
        .args(["--mount", "--pid", "--mount-proc", "--fork", "--kill-child"])
        .args(extra)
        .args(["--", program]);
    command
}

/// Runs `command` to its end and gives every line that it prints to `line`.
pub fn run(mut command: Command, mut line: impl FnMut(&str)) -> Result<(), CommandError> {
    let text = shown(&command);
    let program = program(&command);
    let start = |source: io::Error| CommandError::Start {
        hint: match source.kind() {
            io::ErrorKind::NotFound => format!(": install the package that has {program}"),
            _ => String::new(),
        },
        command: text.clone(),
        source,
    };
    let (reader, writer) = io::pipe().map_err(start)?;
    let errors = writer.try_clone().map_err(start)?;
    let mut child = command
        .env("LC_ALL", "C.UTF-8")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(errors)
        .spawn()
        .map_err(start)?;
    // The command holds the pipe's other end; with it gone, the output ends when the program does.
    drop(command);
    let mut last = VecDeque::new();
    let mut reader = BufReader::new(reader);
    loop {
        let mut bytes = Vec::new();
        match reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut bytes) {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        let printed = String::from_utf8_lossy(&bytes);
        let printed = printed.trim_end();
        if printed.is_empty() {
            continue;
        }
        line(printed);
        if last.len() == LAST_LINES {
            last.pop_front();
        }
        last.push_back(printed.to_owned());
    }
    let status = child.wait().map_err(|source| CommandError::Start {
        command: text.clone(),
        hint: String::new(),
        source,
    })?;
    if status.success() {
        return Ok(());
    }
    Err(CommandError::Failed { command: text, status, output: Vec::from(last).join("\n") })
}

/// The command as it would be typed, without what isolates it.
fn shown(command: &Command) -> String {
    let words: Vec<_> = inner(command).map(|word| quoted(&word.to_string_lossy())).collect();
    words.join(" ")
}

fn program(command: &Command) -> String {
    inner(command).next().map(|word| word.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The words of the command after the last wrapper (`setpriv … --`, `unshare … --`).
fn inner(command: &Command) -> impl Iterator<Item = &OsStr> {
    let wrappers = ["setpriv", "unshare"];
    let words: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
    let mut at = 0;
    while wrappers.iter().any(|wrapper| words.get(at) == Some(&OsStr::new(wrapper))) {
        match words[at..].iter().position(|word| *word == "--") {
            Some(end) => at += end + 1,
            None => break,
        }
    }
    words.into_iter().skip(at)
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.to_owned() } else { format!("'{word}'") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = command("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_failure_names_the_command_and_its_last_lines() {
        let mut seen = 0;
        let error = run(shell("seq 1 30; echo broken >&2; exit 3"), |_| seen += 1).unwrap_err();
        assert_eq!(seen, 31);
        let message = error.to_string();
        assert!(message.starts_with("'sh -c 'seq 1 30"), "{message}");
        assert!(message.contains("exit status: 3"), "{message}");
        assert!(message.ends_with("29\n30\nbroken") && !message.contains("\n9\n"), "{message}");
    }

    #[test]
    fn a_program_that_is_missing_is_named() {
        let error = run(Command::new("/nonexistent/mmdebstrap"), |_| ()).unwrap_err();
        assert!(
            error.to_string().contains("install the package that has /nonexistent/mmdebstrap"),
            "{error}"
        );
    }

    #[test]
    fn endless_lines_are_cut() {
        let mut longest = 0;
        run(shell("head -c 100000 /dev/zero | tr '\\0' x"), |line| longest = longest.max(line.len()))
            .unwrap();
        assert_eq!(longest, 4096);
    }
}
