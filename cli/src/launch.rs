//! Reaching a daemon, and starting one on this machine where none answers.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use catalyst_api::Version;
use nix::unistd::{Uid, User, geteuid};

use crate::client::{Client, ClientError};
use crate::error::{CliError, PlainIo};
use crate::host::Host;
use crate::output;
use crate::process::Watched;
use crate::text::{clean, shell_word};

/// File name of the daemon's program.
pub const DAEMON: &str = "catalyst-daemon";
/// Longest wait for a daemon to listen.
const START: Duration = Duration::from_secs(30);
/// How much of a failed daemon's last words is read, in bytes.
const MAX_WORDS: u64 = 64 << 10;

/// Why no daemon could be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// There is no program to start.
    #[error(
        "no daemon answers at {host}, and {DAEMON} is neither beside this program nor in PATH; \
             install it, or name a daemon by --host"
    )]
    NoProgram {
        /// Where nobody answered.
        host: Host,
    },
    /// Only root can.
    #[error("no daemon answers at {host}, and starting one takes root; run: {command}")]
    NeedsRoot {
        /// Where nobody answered.
        host: Host,
        /// What to type.
        command: String,
    },
    /// The kernel would not run it.
    #[error("cannot run '{}'", .program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// Why.
        source: PlainIo,
    },
    /// It said no.
    #[error("the daemon did not start: {0}")]
    Refused(String),
    /// It neither listens nor ends.
    #[error("the daemon (pid {pid}) does not listen after {} s; stop it with: kill {pid}", START.as_secs())]
    Slow {
        /// Its process.
        pid: u32,
    },
}

/// A client of the daemon at `host`, having made sure that it is one. Where nobody chose a
/// host and nobody listens at the default one, a daemon is started.
pub fn connect(host: &Host) -> Result<(Client, Version), CliError> {
    let client = Client::new(host.clone());
    match client.probe() {
        Ok(version) => Ok((client, version)),
        Err(ClientError::NoAnswer { .. }) if !host.explicit => {
            // What the user has set may not be what the owner of the daemon has, whom sudo names.
            let elsewhere = *host != Host::local();
            let options = [OsString::from("--listen"), host.to_string().into()];
            start(host, if elsewhere { &options } else { &[] })?;
            let version = client.probe()?;
            told_started(&version);
            Ok((client, version))
        }
        Err(error) => Err(error.into()),
    }
}

/// Says which daemon has been started.
pub fn told_started(version: &Version) {
    output::info(&format!(
        "Started the daemon (pid {}, owner {}, state in '{}')",
        version.pid, version.owner, version.state_dir
    ));
}

/// Runs `catalyst-daemon --background OPTIONS`, which returns when the daemon listens.
pub fn start(host: &Host, options: &[OsString]) -> Result<(), LaunchError> {
    let Some(program) = find() else { return Err(LaunchError::NoProgram { host: host.clone() }) };
    if !geteuid().is_root() {
        return Err(LaunchError::NeedsRoot { host: host.clone(), command: sudo_command(&program, options) });
    }
    let (status, words) = run(&program, options)?;
    if status.success() { Ok(()) } else { Err(LaunchError::Refused(last_words(&words, status))) }
}

/// Runs the program to the end of its foreground part; its stderr goes to a file, since a
/// daemon that kept a pipe of ours would keep us waiting for its end.
fn run(program: &Path, options: &[OsString]) -> Result<(ExitStatus, String), LaunchError> {
    let failed = |error: io::Error| LaunchError::Run { program: program.to_owned(), source: PlainIo(error) };
    let mut words = tempfile::tempfile().map_err(failed)?;
    let mut child = Command::new(program)
        .arg("--background")
        .args(options)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(words.try_clone().map_err(failed)?)
        .spawn()
        .map_err(failed)?;
    let pid = child.id();
    if Watched::new(pid).is_some_and(|watched| !watched.ended_within(START)) {
        return Err(LaunchError::Slow { pid });
    }
    let status = child.wait().map_err(failed)?;
    Ok((status, read_back(&mut words).map_err(failed)?))
}

fn read_back(file: &mut File) -> io::Result<String> {
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(MAX_WORDS).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The last line a failed daemon said, without its "Error:".
fn last_words(words: &str, status: ExitStatus) -> String {
    let last = words.lines().map(str::trim).rfind(|line| !line.is_empty());
    match last {
        Some(line) => clean(line.strip_prefix("Error:").unwrap_or(line).trim()),
        None => format!("{status}, without a word"),
    }
}

/// The daemon's program: beside this one, else in PATH.
fn find() -> Option<PathBuf> {
    let beside = env::current_exe().ok().and_then(|own| Some(own.parent()?.join(DAEMON)));
    beside.into_iter().chain(in_path()).find(|file| is_program(file))
}

fn in_path() -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).filter(|folder| folder.is_absolute()).map(|folder| folder.join(DAEMON)).collect()
}

fn is_program(file: &Path) -> bool {
    file.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

/// The one command that starts a daemon which belongs to this user.
fn sudo_command(program: &Path, options: &[OsString]) -> String {
    let mut words =
        vec!["sudo".to_owned(), shell_word(&program.to_string_lossy()), "--background".to_owned()];
    if !options.iter().any(|option| option == OsStr::new("--owner")) {
        words.extend(["--owner".to_owned(), shell_word(&own_name())]);
    }
    words.extend(options.iter().map(|option| shell_word(&option.to_string_lossy())));
    words.join(" ")
}

fn own_name() -> String {
    let uid = Uid::current();
    User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn the_sudo_command_can_be_pasted() {
        let command = sudo_command(
            Path::new("/opt/my programs/catalyst-daemon"),
            &["--listen".into(), "[::1]:1".into()],
        );
        let owner = own_name();
        assert_eq!(
            command,
            format!(
                "sudo '/opt/my programs/catalyst-daemon' --background --owner {owner} --listen '[::1]:1'"
            )
        );
        let command = sudo_command(Path::new("/d"), &["--owner".into(), "eve".into()]);
        assert_eq!(command, "sudo /d --background --owner eve");
    }

    #[test]
    fn the_last_words_of_a_daemon_are_its_error() {
        let status = ExitStatus::from_raw(256);
        assert_eq!(last_words("log line\nError: port 8080 is taken\n\n", status), "port 8080 is taken");
        assert_eq!(last_words("", status), "exit status: 1, without a word");
    }

    #[test]
    fn a_program_that_speaks_and_fails_is_quoted() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join(DAEMON);
        let draft = folder.path().join("draft");
        std::fs::write(&draft, "#!/bin/sh\necho \"Error: no $1\" >&2\nexit 3\n").unwrap();
        // By another process: what this one has open for writing, a child of another thread has too.
        let done = Command::new("install").arg("-m755").args([&draft, &program]).status().unwrap();
        assert!(done.success());
        let (status, words) = run(&program, &[]).unwrap();
        assert_eq!((status.code(), last_words(&words, status).as_str()), (Some(3), "no --background"));
    }
}
