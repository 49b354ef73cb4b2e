//! The two programs beside us, `nft` and `dnsmasq`: where they are, and how one is run to its end.

use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::error::NetworkError;

/// Where programs are looked for: the system's folders only. They run as root, and `PATH` may be the owner's.
const FOLDERS: [&str; 6] =
    ["/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin", "/run/current-system/sw/bin"];

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

fn find(program: &'static str, package: &'static str) -> Result<PathBuf, NetworkError> {
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

/// Runs the program to its end with `input`; its output, or its complaint as an error. Waits.
pub(crate) fn run(
    path: &Path,
    program: &'static str,
    arguments: &[&str],
    input: &str,
    task: &str,
) -> Result<String, NetworkError> {
    let spawn_error = |source: io::Error| NetworkError::Spawn { program: path.to_owned(), source };
    let mut child = command(path)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(spawn_error)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends without reading says why in its output.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(spawn_error)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(NetworkError::Program { program, task: task.to_owned(), output: last_lines(&said, 3) })
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
