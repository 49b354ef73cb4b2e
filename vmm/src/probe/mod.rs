//! The ring-0 probe: does `/dev/kvm` run kernel-mode guest code, and at what speed?
//!
//! That the device opens says little. Some machines offer a `/dev/kvm` that runs user-mode guest code at full
//! speed and interprets kernel-mode code, a thousand times slower and not every instruction; no Linux kernel boots
//! there. So the probe runs kernel-mode code and measures it, and tries by name the instructions that such an
//! interpreter is known to lack and that every kernel executes within its first second.
//!
//! [`run`] takes at most [`BUDGET`], whatever the kernel does: each guest runs on a thread of its own that is
//! signalled at its deadline, and left behind if even that does not bring it back.

mod bounded;
mod checks;
mod guest;
mod report;
mod speed;

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;

use bounded::Overrun;
use guest::RunError;
pub use report::{Check, Device, Outcome, ProbeReport, Verdict};

/// The longest that [`run`] takes, by the wall clock.
pub const BUDGET: Duration = Duration::from_millis(200);

/// The least speed, in kernel-mode guest instructions per second, at which KVM is worth taking.
///
/// QEMU's software CPU reaches several hundred million, the slowest genuine KVM about as many, an interpreter
/// inside the kernel a few million: the bar stands in the wide gap between.
pub const REQUIRED_INSTRUCTIONS_PER_SECOND: u64 = 20_000_000;

/// What guests get of the budget; the rest is for waiting for a signalled guest, and for the report itself.
const WORK: Duration = Duration::from_millis(160);
/// The longest that one guest may take, so that one that never ends leaves time for the others.
const ONE_GUEST: Duration = Duration::from_millis(70);

/// The API version that KVM has had since Linux 2.6.22 (Documentation/virt/kvm/api.rst, `KVM_GET_API_VERSION`).
const KVM_API_VERSION: i32 = 12;

/// Probes `/dev/kvm`. Never fails and never hangs: what went wrong is in the report.
pub fn run() -> ProbeReport {
    run_on(Path::new("/dev/kvm"))
}

/// Probes the KVM device at `path`; see [`run`].
pub fn run_on(path: &Path) -> ProbeReport {
    let deadline = Instant::now() + WORK;
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else {
        return ProbeReport::without_device(Device::Missing);
    };
    match bounded::call(time_left(deadline), {
        let path = path.clone();
        move || open(&path)
    }) {
        Ok(Ok(version)) if version == KVM_API_VERSION => measure(&path, version, deadline),
        Ok(Ok(version)) => ProbeReport::of_opened(Some(version), Err(version_reason(version)), Vec::new()),
        Ok(Err(device)) => ProbeReport::without_device(device),
        Err(overrun) => {
            ProbeReport::of_opened(None, Err(format!("opening the device {overrun}")), Vec::new())
        }
    }
}

/// The speed first, alone, then each check in a guest of its own.
fn measure(path: &CStr, version: i32, deadline: Instant) -> ProbeReport {
    let speed = guest_run(path, deadline, speed::measure);
    let mut deaf = matches!(speed, Err(GuestError::Overrun(Overrun::Deaf)));
    let mut checks = Vec::with_capacity(checks::ALL.len());
    for check in checks::ALL {
        let outcome = if deaf {
            Outcome::NotRun { reason: "an earlier guest could not be stopped".to_owned() }
        } else {
            match guest_run(path, deadline, check.run) {
                Ok(()) => Outcome::Ran,
                Err(GuestError::NoTime) => Outcome::NotRun { reason: GuestError::NoTime.to_string() },
                Err(error) => {
                    deaf = matches!(error, GuestError::Overrun(Overrun::Deaf));
                    Outcome::Failed { reason: error.to_string() }
                }
            }
        };
        checks.push(Check { name: check.name.to_owned(), outcome });
    }
    ProbeReport::of_opened(Some(version), speed.map_err(|error| error.to_string()), checks)
}

/// Why a guest gave no result.
#[derive(Debug, thiserror::Error)]
enum GuestError {
    #[error("the time of the probe was used up before")]
    NoTime,
    #[error("{0}")]
    Overrun(Overrun),
    #[error("{0}")]
    Run(RunError),
}

/// Runs `work` with a device descriptor of its own on a thread of its own, within the time that is left.
fn guest_run<T: Send + 'static>(
    path: &CStr,
    deadline: Instant,
    work: fn(&Kvm) -> Result<T, RunError>,
) -> Result<T, GuestError> {
    let limit = time_left(deadline).min(ONE_GUEST);
    if limit.is_zero() {
        return Err(GuestError::NoTime);
    }
    let path = path.to_owned();
    bounded::call(limit, move || {
        let kvm = Kvm::new_with_path(&path)
            .map_err(|error| RunError::SetUp { step: "opening the device again", error })?;
        work(&kvm)
    })
    .map_err(GuestError::Overrun)?
    .map_err(GuestError::Run)
}

/// Opens the device and asks for its API version.
fn open(path: &CStr) -> Result<i32, Device> {
    match Kvm::new_with_path(path) {
        Ok(kvm) => Ok(kvm.get_api_version()),
        Err(error) => Err(Device::from_open_error(&std::io::Error::from_raw_os_error(error.errno()))),
    }
}

fn version_reason(version: i32) -> String {
    format!("the device speaks KVM API version {version}, not {KVM_API_VERSION}")
}

fn time_left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

#[cfg(test)]
mod tests;
