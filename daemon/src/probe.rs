//! The probe of `/dev/kvm`, run as a process of its own: whatever the kernel does with it, the
//! daemon goes on.

use std::process::Stdio;
use std::time::Duration;

use catalyst_vmm::probe::ProbeReport;
use tokio::process::Command;

use crate::http::error::plain;
use crate::settings::sibling;

/// The probe bounds itself, guest code to 200 ms a try; this is for one that hangs nevertheless.
const LIMIT: Duration = Duration::from_secs(5);

/// Runs `catalyst-vmm probe --json`; the error is one line.
pub async fn run() -> Result<ProbeReport, String> {
    let program = sibling("catalyst-vmm");
    let shown = program.display();
    let child = Command::new(&program)
        .args(["probe", "--json"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("cannot run {shown}: {}", plain(&error.to_string())))?;
    let output = tokio::time::timeout(LIMIT, child.wait_with_output())
        .await
        .map_err(|_| format!("{shown} did not end within {} s", LIMIT.as_secs()))?
        .map_err(|error| format!("cannot run {shown}: {error}"))?;
    serde_json::from_slice(&output.stdout).map_err(|_| {
        let words = String::from_utf8_lossy(&output.stderr);
        format!("{shown} gave no report: {}", words.lines().last().unwrap_or("it said nothing"))
    })
}
