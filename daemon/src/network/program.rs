//! The two programs beside us, `nft` and `dnsmasq`: where they are, and how one is run to its end.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::error::NetworkError;
use super::process::Process;

/// Where programs are looked for: the system's folders only. They run as root, and `PATH` may be the owner's.
const FOLDERS: [&str; 6] =
    ["/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin", "/run/current-system/sw/bin"];

/// How long a program may take; nft and dnsmasq's start take milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// The paths of the programs that the network needs.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    pub nft: PathBuf,
    pub dnsmasq: PathBuf,
}

impl Programs {
    /// Finds both, or says which package is missing.
    pub fn find() -> Result<Self, NetworkError> {
        Ok(Self { nft: nft()?, dnsmasq: find("dnsmasq", "dnsmasq-base")? })
    }
}

/// The path of `nft`.
pub(crate) fn nft() -> Result<PathBuf, NetworkError> {
    find("nft", "nftables")
}

pub(crate) fn find(program: &'static str, package: &'static str) -> Result<PathBuf, NetworkError> {
    FOLDERS
        .iter()
        .map(|folder| Path::new(folder).join(program))
        .find(|path| {
            path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
        })
        .ok_or(NetworkError::MissingProgram { program, package })
}

/// A command with nothing of our environment.
pub(crate) fn command(path: &Path) -> Command {
    let mut command = Command::new(path);
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C").current_dir("/");
    command
}

/// Runs nft to its end with `input`; its output, or its complaint as an error. Waits.
///
/// nft has a copy of `lock` until it ends, so that one whose daemon is killed does not change a table that the next
/// daemon thinks it has in hand.
pub(crate) fn run_nft(
    path: &Path,
    arguments: &[&str],
    input: &str,
    task: &str,
    lock: Option<&File>,
) -> Result<String, NetworkError> {
    let mut command = command(path);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if let Some(lock) = lock.and_then(|lock| lock.try_clone().ok()) {
        // SAFETY: between fork and exec only dup is called, which is async-signal-safe (signal-safety(7)). The copy
        // that it makes is not closed by exec, and in the child alone.
        unsafe {
            command.pre_exec(move || match libc::dup(lock.as_raw_fd()) {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            });
        }
    }
    let output = finish_with(&mut command, path, input, PATIENCE)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = match output.status.signal() {
        Some(signal) => format!("it was ended by signal {signal}"),
        None => last_lines(&String::from_utf8_lossy(&output.stderr), 3),
    };
    Err(NetworkError::Program { program: "nft", task: task.to_owned(), output: said })
}

/// Runs a command to its end, which it must find within [`PATIENCE`], else it is killed. Waits.
pub(crate) fn finish(command: &mut Command, path: &Path) -> Result<Output, NetworkError> {
    finish_within(command, path, PATIENCE)
}

/// The same with another patience.
pub(crate) fn finish_within(
    command: &mut Command,
    path: &Path,
    patience: Duration,
) -> Result<Output, NetworkError> {
    finish_with(command, path, "", patience)
}

fn finish_with(
    command: &mut Command,
    path: &Path,
    input: &str,
    patience: Duration,
) -> Result<Output, NetworkError> {
    let failed = |source: io::Error| NetworkError::Spawn { program: path.to_owned(), source };
    let mut child = command.spawn().map_err(failed)?;
    // Not reaped before this thread waits for it below: the pid is still the child's.
    let process = Process::open(child.id().cast_signed()).map_err(failed)?;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            if !process.ended_within(patience) {
                process.signal(Signal::SIGKILL);
            }
        });
        if let Some(mut stdin) = child.stdin.take() {
            // A program that ends without reading says why in its output.
            let _ = stdin.write_all(input.as_bytes());
        }
        child.wait_with_output().map_err(failed)
    })
}

/// The last `count` lines that say something, in one line of at most some 400 characters.
pub(crate) fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let shown = lines[lines.len().saturating_sub(count)..].join("; ");
    if shown.is_empty() {
        return "it said nothing".to_owned();
    }
    shown.chars().filter(|c| !c.is_control()).take(400).collect()
}
