//! The ring-0 probe: does `/dev/kvm` run kernel-mode guest code, and at what speed?
//!
//! That the device opens says little. Some machines offer a `/dev/kvm` that runs user-mode guest code at full
//! speed and interprets kernel-mode code, a thousand times slower and not every instruction; no Linux kernel boots
//! there. So the probe runs kernel-mode code and measures it, and tries by name the instructions that such an
//! interpreter is known to lack and that every kernel executes within its first second.
//!
//! Guest code gets at most [`GUEST_CODE`] in all, and making the guest at most [`SET_UP`], whatever the kernel does:
//! the probe works on a thread of its own that is
//! signalled at each step's deadline, and left behind if even that does not bring it back.

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

use bounded::{Overrun, Worker};
use guest::{Guest, RunError};
use report::NoSpeed;
pub use report::{Check, Device, Outcome, ProbeReport, Verdict};

/// The longest that guest code is run, in all, by the wall clock. On a processor it is some 20 ms.
pub const GUEST_CODE: Duration = Duration::from_millis(200);

/// The longest that opening the device and making a guest may take. On a processor it is a few milliseconds; inside
/// an emulated machine, where the kernel waits for other processors at every step, it has been seen to take 150.
pub const SET_UP: Duration = Duration::from_millis(500);

/// The least speed, in kernel-mode guest instructions per second, at which KVM is worth taking.
///
/// QEMU's software CPU reaches several hundred million, the slowest genuine KVM about as many, an interpreter
/// inside the kernel a few million: the bar stands in the wide gap between.
pub const REQUIRED_INSTRUCTIONS_PER_SECOND: u64 = 20_000_000;

/// The longest that the measured loop may take; it has a figure at any time.
const MEASURING: Duration = Duration::from_millis(100);
/// The longest that one instruction may take, so that one that never ends leaves time for the others.
const ONE_INSTRUCTION: Duration = Duration::from_millis(80);

/// The API version that KVM has had since Linux 2.6.22 (Documentation/virt/kvm/api.rst, `KVM_GET_API_VERSION`).
const KVM_API_VERSION: i32 = 12;

/// Probes `/dev/kvm`. Never fails and never hangs: what went wrong is in the report.
///
/// Takes 50 ms or so; at the very most [`SET_UP`], [`GUEST_CODE`] and a short grace.
pub fn run() -> ProbeReport {
    run_on(Path::new("/dev/kvm"))
}

/// Probes `/dev/kvm`, and again where time ran out, at most so many times in all: a busy machine is no reason to do
/// without KVM.
pub fn run_up_to(attempts: u8) -> ProbeReport {
    let mut report = run();
    for _ in 1..attempts {
        if !report.out_of_time {
            break;
        }
        report = run();
    }
    report
}

/// Probes the KVM device at `path`; see [`run`].
pub fn run_on(path: &Path) -> ProbeReport {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else {
        return ProbeReport::without_device(Device::Missing);
    };
    let mut prober = match Prober::start() {
        Ok(prober) => prober,
        Err(overrun) => return ProbeReport::without_device(Device::Failed { reason: overrun.to_string() }),
    };
    match prober.step(SET_UP, move |state| open(&path, state)) {
        Ok(Ok(KVM_API_VERSION)) => prober.measure(),
        Ok(Ok(version)) => {
            let reason = format!("the device speaks KVM API version {version}, not {KVM_API_VERSION}");
            ProbeReport::of_opened(Some(version), Err(NoSpeed { reason, out_of_time: false }), Vec::new())
        }
        Ok(Err(device)) => ProbeReport::without_device(device),
        Err(error) => ProbeReport::without_device(Device::Failed { reason: format!("opening it {error}") }),
    }
}

/// Why a step of the probe gave no result.
#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error("the time of the probe was used up before")]
    NoTime,
    #[error("{0}")]
    Overrun(Overrun),
    #[error("{0}")]
    Run(#[from] RunError),
}

impl StepError {
    /// Whether it says nothing but that there was not time enough.
    fn is_out_of_time(&self) -> bool {
        matches!(
            self,
            Self::NoTime
                | Self::Overrun(Overrun::Deaf)
                | Self::Run(RunError::Interrupted { .. } | RunError::NoGuest)
        )
    }
}

/// What lives on the probe's thread.
#[derive(Default)]
struct State {
    kvm: Option<Kvm>,
    guest: Option<Guest>,
}

/// Opens the device: its API version, or what became of it.
fn open(path: &CStr, state: &mut State) -> Result<i32, Device> {
    match Kvm::new_with_path(path) {
        Ok(kvm) => {
            let version = kvm.get_api_version();
            state.kvm = Some(kvm);
            Ok(version)
        }
        Err(error) => Err(Device::from_open_error(&std::io::Error::from_raw_os_error(error.errno()))),
    }
}

/// The probe under way: its thread, and the deadline of the present part.
struct Prober {
    worker: Worker<State>,
    deadline: Instant,
}

impl Prober {
    fn start() -> Result<Self, Overrun> {
        let deadline = Instant::now() + SET_UP;
        Ok(Self { worker: Worker::start()?, deadline })
    }

    /// The speed first, then each instruction, each as a program of its own.
    fn measure(&mut self) -> ProbeReport {
        let made = self.make_guest(SET_UP);
        self.deadline = Instant::now() + GUEST_CODE;
        let speed = made.and_then(|()| self.run(MEASURING, speed::measure));
        let speed =
            speed.map_err(|error| NoSpeed { reason: error.to_string(), out_of_time: error.is_out_of_time() });
        let checks = checks::ALL.iter().map(|check| Check {
            name: check.name.to_owned(),
            outcome: match self.run(ONE_INSTRUCTION, check.run) {
                Ok(()) => Outcome::Ran,
                Err(error) if error.is_out_of_time() => Outcome::OutOfTime { reason: error.to_string() },
                Err(error) => Outcome::Failed { reason: error.to_string() },
            },
        });
        let checks = checks.collect();
        ProbeReport::of_opened(Some(KVM_API_VERSION), speed, checks)
    }

    fn make_guest(&mut self, most: Duration) -> Result<(), StepError> {
        self.step(most, |state| {
            let Some(kvm) = &state.kvm else { return Err(RunError::NoGuest) };
            state.guest = Some(Guest::new(kvm)?);
            Ok(())
        })?
        .map_err(StepError::Run)
    }

    /// Runs one program in the guest.
    fn run<T: Send + 'static>(
        &mut self,
        most: Duration,
        program: fn(&mut Guest) -> Result<T, RunError>,
    ) -> Result<T, StepError> {
        let step = self.step(most, move |state| match &mut state.guest {
            Some(guest) => program(guest),
            None => Err(RunError::NoGuest),
        })?;
        Ok(step?)
    }

    /// One step on the probe's thread, within `most` and the time that is left.
    fn step<T: Send + 'static>(
        &mut self,
        most: Duration,
        job: impl FnOnce(&mut State) -> T + Send + 'static,
    ) -> Result<T, StepError> {
        let limit = self.deadline.saturating_duration_since(Instant::now()).min(most);
        if limit.is_zero() {
            return Err(StepError::NoTime);
        }
        self.worker.call(limit, job).map_err(StepError::Overrun)
    }
}

#[cfg(test)]
mod tests;
