//! systemd, where it runs: a scope for each VM's process and for Docker's daemon, and whether the host is being shut down.
//!
//! A scope (systemd.scope(5)) is what systemd knows the VM by, and what keeps it when the daemon's unit ends. It is asked for
//! when the VM runs already: nobody waits for it.

use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use thiserror::Error;
use tokio::process::Command;

use crate::privilege::as_root;
use crate::store::VmId;

/// It is there while systemd runs (sd_booted(3)).
const RUNS: &str = "/run/systemd/system";
/// Longest wait for systemd's answer.
const ANSWER: Duration = Duration::from_secs(10);
/// The manager, as busctl(1) takes it.
const MANAGER: [&str; 3] =
    ["org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"];

/// Why systemd did not do it.
#[derive(Debug, Error)]
enum SystemdError {
    /// The program that asks it.
    #[error("Cannot run {program}, which is part of systemd")]
    Run {
        /// Its name.
        program: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It said no.
    #[error("{program}: {said}")]
    Refused {
        /// Who was asked.
        program: &'static str,
        /// The answer.
        said: String,
    },
    /// It says nothing.
    #[error("{program} got no answer of systemd within {} s", ANSWER.as_secs())]
    Silent {
        /// Who asked.
        program: &'static str,
    },
}

/// Whether systemd runs here.
pub fn runs() -> bool {
    as_root(|| Path::new(RUNS).is_dir())
}

/// Puts the process of a VM into a scope of its own in a while, unless it has one.
pub fn place(id: VmId, pid: u32) {
    tokio::spawn(async move {
        if !runs() || as_root(|| unit_of(&pid.to_string())).is_some_and(|unit| is_scope(&unit)) {
            return;
        }
        let begun = std::time::Instant::now();
        let plain = format!("{SCOPE}{id}.scope");
        let description = format!("Catalyst VM {id}");
        let placed = match start_scope(&plain, &description, pid).await {
            // That of its last process may not be gone yet, and another daemon may have a VM of that id.
            Err(SystemdError::Refused { .. }) => {
                start_scope(&format!("{SCOPE}{id}-{pid}.scope"), &description, pid).await
            }
            other => other,
        };
        match placed {
            Ok(()) => tracing::debug!(vm = %id, ms = begun.elapsed().as_millis(), "has a scope"),
            Err(error) => {
                let reason = crate::http::error::chain(&error).join(": ");
                tracing::warn!(vm = %id, reason, "the VM has no scope of systemd; it runs all the same");
            }
        }
    });
}

/// Puts Docker's daemon on that bridge into a scope of its own, and with it what it will start.
pub async fn place_docker(bridge: &str, pid: u32) {
    if !runs() {
        return;
    }
    let name = format!("{SCOPE}docker-{bridge}-{pid}.scope");
    if let Err(error) = start_scope(&name, "Docker's daemon of Catalyst", pid).await {
        let reason = crate::http::error::chain(&error).join(": ");
        tracing::warn!(reason, "Docker's daemon has no scope of systemd; it runs all the same");
    }
}

/// What names of our scopes begin with.
const SCOPE: &str = "catalyst-";

fn is_scope(unit: &str) -> bool {
    unit.strip_prefix(SCOPE).is_some_and(|rest| matches!(rest.rsplit_once('.'), Some((_, "scope"))))
}

/// The unit that a process belongs to: the last folder of its control group (proc(5)).
fn unit_of(pid: &str) -> Option<String> {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    unit_in(&groups)
}

fn unit_in(groups: &str) -> Option<String> {
    let path = groups
        .lines()
        .find_map(|line| line.strip_prefix("0::").or(line.split_once("name=systemd:").map(|it| it.1)))?;
    let unit =
        path.rsplit('/').find(|name| matches!(name.rsplit_once('.'), Some((_, "service" | "scope"))))?;
    Some(unit.to_owned())
}

/// `StartTransientUnit` (org.freedesktop.systemd1(5)). When the host goes down, the daemon's own unit is stopped first,
/// and with it the guests.
async fn start_scope(name: &str, description: &str, pid: u32) -> Result<(), SystemdError> {
    let pid = pid.to_string();
    let own = unit_of("self");
    let mut words = vec!["--quiet", "call"];
    words.extend(MANAGER);
    words.extend(["StartTransientUnit", "ssa(sv)a(sa(sv))", name, "fail"]);
    words.push(if own.is_some() { "5" } else { "4" });
    words.extend(["Description", "s", description, "Slice", "s", "machine.slice", "PIDs", "au", "1", &pid]);
    words.extend(["CollectMode", "s", "inactive-or-failed"]);
    if let Some(own) = &own {
        words.extend(["Before", "as", "1", own]);
    }
    words.push("0");
    ask("busctl", &words).await.map(drop)
}

/// Whether the host is being shut down or started again.
pub async fn host_stops() -> bool {
    // It answers by its exit status as well, which is not 0 then.
    runs()
        && matches!(ask("systemctl", &["is-system-running"]).await,
        Err(SystemdError::Refused { said, .. }) if said.trim() == "stopping")
}

async fn ask(program: &'static str, words: &[&str]) -> Result<String, SystemdError> {
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(ANSWER, command.output()).await;
    let output = output.map_err(|_| SystemdError::Silent { program })?;
    let output = output.map_err(|source| SystemdError::Run { program, source })?;
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        return Ok(said(&output.stdout));
    }
    let words = if output.stderr.is_empty() { &output.stdout } else { &output.stderr };
    Err(SystemdError::Refused { program, said: said(words) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_of_a_process_is_read_from_either_kind_of_control_groups() {
        let of = |groups| unit_in(groups);
        assert_eq!(
            of("0::/system.slice/system-catalyst.slice/catalyst@me.service\n").as_deref(),
            Some("catalyst@me.service")
        );
        assert_eq!(
            of("12:pids:/x\n1:name=systemd:/user.slice/user-0.slice/session-3.scope\n").as_deref(),
            Some("session-3.scope")
        );
        assert_eq!(of("0::/machine.slice/catalyst-web1.scope\n").as_deref(), Some("catalyst-web1.scope"));
        assert_eq!(of("0::/\n"), None);
        assert!(is_scope("catalyst-web1.scope") && !is_scope("catalyst@me.service"));
    }
}
