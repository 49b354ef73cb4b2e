//! Commands that a guest is set up with: one shell script, so that a folder that is changed to and a variable that is set stay
//! so for the next.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::files::replace;
use crate::session::Config;
use crate::spawn::{PATH, with_ordinary_priority};

/// What the commands write, below the root.
pub const LOG: &str = "var/log/catalyst-user-data.log";
/// The commands as a script, while they run.
pub const SCRIPT: &str = "var/lib/catalyst/user-data-commands.sh";
/// Where the script says which of them failed.
const FAILED: &str = "run/catalyst-set-up.failed";
/// How much of the output's end is told, in bytes.
const TAIL: u64 = 400;

/// Runs them; what failed comes back, with the end of the output.
pub fn run(config: &Config, preparation: &[String], commands: &[String]) -> Vec<String> {
    match try_run(config, preparation, commands) {
        Ok(problems) => problems,
        Err(error) => vec![format!("the commands cannot be run: {error}")],
    }
}

fn try_run(config: &Config, preparation: &[String], commands: &[String]) -> io::Result<Vec<String>> {
    let at = |name: &str| config.root.join(name);
    let (script, failed) = (at(SCRIPT), at(FAILED));
    replace(&script, text(preparation, commands).as_bytes(), 0o700, None)?;
    let _ = fs::remove_file(&failed);
    let log = at(LOG);
    if let Some(folder) = log.parent() {
        fs::create_dir_all(folder)?;
    }
    let out = OpenOptions::new().append(true).create(true).mode(0o640).open(&log)?;
    let begun = out.metadata()?.len();
    let mut command = Command::new("/bin/sh");
    command.arg(&script).env_clear();
    command.envs([("HOME", "/root"), ("USER", "root"), ("LOGNAME", "root"), ("SHELL", "/bin/sh")]);
    command.envs([("PATH", PATH), ("LANG", "C.UTF-8")]).env("CATALYST_FAILED", &failed).current_dir("/");
    command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
    let status = with_ordinary_priority(&mut command).status()?;
    let _ = fs::remove_file(&script);
    let named = fs::read_to_string(&failed).unwrap_or_default();
    let _ = fs::remove_file(&failed);
    let mut problems = problems(commands, &named);
    if problems.is_empty() && !status.success() {
        problems.push(format!("the commands ended early, with {status}"));
    }
    if let Some(last) = problems.last_mut() {
        let said = tail(&log, begun).unwrap_or_default();
        if !said.is_empty() {
            // Writing to a String does not fail.
            let _ = write!(last, ": {said}");
        }
    }
    Ok(problems)
}

/// The script: each command, and after it a word if it failed.
fn text(preparation: &[String], commands: &[String]) -> String {
    let mut text = String::from("#!/bin/sh\necho 0 >/proc/self/oom_score_adj\n");
    for command in preparation {
        // Writing to a String does not fail.
        let _ = write!(text, "{command}\n[ $? = 0 ] || echo 0 >>\"$CATALYST_FAILED\"\n");
    }
    for (number, command) in (1..).zip(commands) {
        // Writing to a String does not fail.
        let _ = write!(text, "{command}\n[ $? = 0 ] || echo {number} >>\"$CATALYST_FAILED\"\n");
    }
    text + "exit 0\n"
}

fn problems(commands: &[String], named: &str) -> Vec<String> {
    let of = |number: usize| {
        if number == 0 {
            return Some("passing the host's settings on failed".to_owned());
        }
        let command = commands.get(number.checked_sub(1)?)?;
        let shown: String = command.lines().next().unwrap_or_default().chars().take(60).collect();
        Some(format!("command {number} of {} failed: {shown}", commands.len()))
    };
    let mut all: Vec<String> = named.lines().filter_map(|line| of(line.parse().ok()?)).collect();
    if all.len() > 3 {
        let more = all.len() - 3;
        all.truncate(3);
        all.push(format!("{more} more failed"));
    }
    all
}

/// The end of what was written to the log since `begun`.
fn tail(log: &Path, begun: u64) -> io::Result<String> {
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(begun.max(length.saturating_sub(TAIL))))?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim().replace('\n', " | "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(commands: &[&str]) -> (Vec<String>, String) {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("run")).unwrap();
        let config = Config::of_files(root.path());
        let commands: Vec<String> = commands.iter().map(|&command| command.to_owned()).collect();
        let problems = run(&config, &["Y=6".to_owned(), "test $Y = 6".to_owned()], &commands);
        (problems, fs::read_to_string(root.path().join(LOG)).unwrap())
    }

    #[test]
    fn all_are_run_in_one_shell_and_what_failed_is_named_with_the_end_of_the_output() {
        let (problems, log) =
            ran(&["cd /usr; X=5", "pwd; echo $X$Y", "ls /nowhere", "echo last # a comment", "(exit 3)"]);
        assert!(log.starts_with("/usr\n56\n") && log.ends_with("last\n"), "{log}");
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].contains("command 3 of 5 failed: ls /nowhere"), "{problems:?}");
        assert!(problems[1].contains("command 5 of 5") && problems[1].contains("last"), "{problems:?}");
        assert_eq!(ran(&["true", "echo fine"]).0, Vec::<String>::new());
    }

    #[test]
    fn a_script_that_ends_early_or_cannot_be_understood_is_told() {
        for command in ["exit 4", "set -e; false; echo never", "if true; then"] {
            let (problems, log) = ran(&[command, "echo second"]);
            assert!(problems[0].contains("ended early"), "{command}: {problems:?}");
            assert!(!log.contains("second"), "{log}");
        }
        assert!(ran(&["exit 0", "echo second"]).0.is_empty());
    }
}
