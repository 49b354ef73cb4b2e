//! What the probe found, as data and as a sentence.

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

use super::REQUIRED_INSTRUCTIONS_PER_SECOND;

/// What became of opening the device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum Device {
    /// It opened.
    Opened,
    /// There is no such file, or no driver behind it.
    Missing,
    /// The file is there, but this user may not open it.
    Denied,
    /// It did not open for another reason.
    Failed {
        /// The kernel's answer.
        reason: String,
    },
}

impl Device {
    pub(super) fn from_open_error(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO | libc::ENOTDIR) => Self::Missing,
            Some(libc::EACCES | libc::EPERM) => Self::Denied,
            _ => Self::Failed { reason: error.to_string() },
        }
    }
}

/// What became of one tried instruction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "outcome")]
pub enum Outcome {
    /// It ran and had its effect.
    Ran,
    /// It did not; why, with the exit and the instruction's bytes.
    Failed {
        /// The exit reason in words.
        reason: String,
    },
    /// The probe's time ended first: this says nothing about the instruction.
    OutOfTime {
        /// What took the time.
        reason: String,
    },
}

/// One tried instruction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// The instruction, as an assembler writes it.
    pub name: String,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// Whether KVM can carry a VM here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Verdict {
    /// It can.
    Usable,
    /// Kernel-mode code runs too slowly, which means that it is interpreted.
    Slow {
        /// What was measured, in instructions per second.
        instructions_per_second: u64,
        /// What is asked for, in instructions per second.
        required: u64,
    },
    /// The device is there, but does not do what a VM needs.
    Unusable {
        /// Why.
        reason: String,
    },
    /// There is no device.
    Absent,
}

/// The probe's result. Its `Display` is a sentence for people; its JSON form carries that sentence as `summary`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// What became of opening the device.
    pub device: Device,
    /// The answer to `KVM_GET_API_VERSION`, if it was asked.
    pub api_version: Option<i32>,
    /// Speed of a loop in kernel mode, in instructions per second, if it ran.
    pub instructions_per_second: Option<u64>,
    /// The instructions that were tried by name.
    pub checks: Vec<Check>,
    /// Whether KVM can carry a VM here.
    pub verdict: Verdict,
    /// Whether the probe's time ended before all was tried. Then the machine may only have been busy: a verdict
    /// against KVM should be asked for again.
    pub out_of_time: bool,
    /// All of it in one sentence.
    pub summary: String,
}

/// Why there is no speed.
pub(super) struct NoSpeed {
    pub(super) reason: String,
    /// Whether it was only for want of time.
    pub(super) out_of_time: bool,
}

impl ProbeReport {
    /// The report where the device did not open.
    pub(super) fn without_device(device: Device) -> Self {
        let (verdict, summary) = match &device {
            Device::Denied => {
                let reason = "this user may not open /dev/kvm: join the group kvm (sudo usermod -aG kvm $USER) \
                              and log in again";
                (Verdict::Unusable { reason: reason.to_owned() }, format!("KVM is not usable: {reason}"))
            }
            Device::Failed { reason } => {
                let reason = format!("/dev/kvm does not open: {reason}");
                (Verdict::Unusable { reason: reason.clone() }, format!("KVM is not usable: {reason}"))
            }
            Device::Missing | Device::Opened => (
                Verdict::Absent,
                "KVM is absent: there is no /dev/kvm (the processor's virtualization is switched off or taken, or \
                 the module kvm_intel or kvm_amd is not loaded)"
                    .to_owned(),
            ),
        };
        Self {
            device,
            api_version: None,
            instructions_per_second: None,
            checks: Vec::new(),
            verdict,
            out_of_time: false,
            summary,
        }
    }

    /// The report where the device opened; `speed` is the rate, or why there is none.
    pub(super) fn of_opened(
        api_version: Option<i32>,
        speed: Result<u64, NoSpeed>,
        checks: Vec<Check>,
    ) -> Self {
        let out_of_time = speed.as_ref().is_err_and(|none| none.out_of_time)
            || checks.iter().any(|check| matches!(check.outcome, Outcome::OutOfTime { .. }));
        let speed = speed.map_err(|none| none.reason);
        let verdict = verdict(&speed, &checks);
        let summary = summary(&verdict, speed.as_ref().ok().copied(), &checks);
        Self {
            device: Device::Opened,
            api_version,
            instructions_per_second: speed.ok(),
            checks,
            verdict,
            out_of_time,
            summary,
        }
    }
}

impl fmt::Display for ProbeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.summary)?;
        for check in &self.checks {
            match &check.outcome {
                Outcome::Ran => write!(f, "\n  {}: runs", check.name)?,
                Outcome::Failed { reason } | Outcome::OutOfTime { reason } => {
                    write!(f, "\n  {}: {reason}", check.name)?;
                }
            }
        }
        Ok(())
    }
}

fn verdict(speed: &Result<u64, String>, checks: &[Check]) -> Verdict {
    match speed {
        Err(reason) => Verdict::Unusable { reason: format!("the speed could not be measured: {reason}") },
        Ok(rate) if *rate < REQUIRED_INSTRUCTIONS_PER_SECOND => {
            Verdict::Slow { instructions_per_second: *rate, required: REQUIRED_INSTRUCTIONS_PER_SECOND }
        }
        Ok(_) => match missing(checks) {
            None => Verdict::Usable,
            Some(missing) => Verdict::Unusable { reason: missing },
        },
    }
}

/// The instructions that did not run, as the end of a sentence; `None` if all did.
fn missing(checks: &[Check]) -> Option<String> {
    let names = |wanted: fn(&Outcome) -> bool| {
        let names: Vec<_> =
            checks.iter().filter(|check| wanted(&check.outcome)).map(|check| check.name.as_str()).collect();
        (!names.is_empty()).then(|| names.join(", "))
    };
    let failed = names(|outcome| matches!(outcome, Outcome::Failed { .. }));
    let untried = names(|outcome| matches!(outcome, Outcome::OutOfTime { .. }));
    match (failed, untried) {
        (None, None) => None,
        (Some(failed), None) => Some(format!("it does not run {failed}")),
        (None, Some(untried)) => Some(format!("there was no time for {untried}")),
        (Some(failed), Some(untried)) => {
            Some(format!("it does not run {failed}, and there was no time for {untried}"))
        }
    }
}

fn summary(verdict: &Verdict, speed: Option<u64>, checks: &[Check]) -> String {
    let rate = speed.map(millions).unwrap_or_default();
    match verdict {
        Verdict::Usable => format!("KVM is usable: kernel code runs at about {rate} instructions/s"),
        Verdict::Slow { required, .. } => {
            let missing = missing(checks).map(|missing| format!("; {missing}")).unwrap_or_default();
            format!(
                "KVM opens but interprets kernel code at about {rate} instructions/s ({} are needed){missing}",
                millions(*required)
            )
        }
        Verdict::Unusable { reason } if rate.is_empty() => format!("KVM opens but is not usable: {reason}"),
        Verdict::Unusable { reason } => {
            format!("KVM opens and runs kernel code at about {rate} instructions/s, but {reason}")
        }
        Verdict::Absent => "KVM is absent".to_owned(),
    }
}

/// `1.7 million`, `430 million`.
fn millions(rate: u64) -> String {
    if rate < 10_000_000 {
        format!("{}.{} million", rate / 1_000_000, rate % 1_000_000 / 100_000)
    } else {
        format!("{} million", rate / 1_000_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, outcome: Outcome) -> Check {
        Check { name: name.to_owned(), outcome }
    }

    fn failed() -> Outcome {
        Outcome::Failed { reason: "not interpreted".to_owned() }
    }

    #[test]
    fn fast_with_every_instruction_is_usable() {
        let report = ProbeReport::of_opened(Some(12), Ok(430_000_000), vec![check("int3", Outcome::Ran)]);
        assert_eq!(report.verdict, Verdict::Usable);
        assert_eq!(report.to_string().lines().next(), Some(report.summary.as_str()));
        assert!(report.summary.contains("430 million"), "{}", report.summary);
    }

    #[test]
    fn the_bar_itself_is_fast_enough_and_one_below_is_not() {
        let at = ProbeReport::of_opened(Some(12), Ok(REQUIRED_INSTRUCTIONS_PER_SECOND), Vec::new());
        let below = ProbeReport::of_opened(Some(12), Ok(REQUIRED_INSTRUCTIONS_PER_SECOND - 1), Vec::new());
        assert_eq!(at.verdict, Verdict::Usable);
        assert!(matches!(below.verdict, Verdict::Slow { .. }));
    }

    #[test]
    fn slow_says_its_figure_and_what_is_missing() {
        let checks = vec![check("lock cmpxchg16b", failed()), check("int3", failed())];
        let report = ProbeReport::of_opened(Some(12), Ok(1_712_345), checks);
        assert_eq!(
            report.summary,
            "KVM opens but interprets kernel code at about 1.7 million instructions/s (20 million are needed); it \
             does not run lock cmpxchg16b, int3"
        );
    }

    #[test]
    fn fast_without_an_instruction_is_unusable_and_names_it() {
        let checks = vec![check("xrstor", failed()), check("int3", Outcome::Ran)];
        let report = ProbeReport::of_opened(Some(12), Ok(90_000_000), checks);
        assert_eq!(report.verdict, Verdict::Unusable { reason: "it does not run xrstor".to_owned() });
        assert!(!report.out_of_time);
    }

    #[test]
    fn an_untried_instruction_is_not_taken_for_granted() {
        let untried = Outcome::OutOfTime { reason: "no time".to_owned() };
        let report = ProbeReport::of_opened(Some(12), Ok(90_000_000), vec![check("int3", untried)]);
        assert!(matches!(report.verdict, Verdict::Unusable { .. }));
        assert!(report.out_of_time);
    }

    #[test]
    fn json_comes_back_as_it_went() {
        let checks = vec![check("xrstor", failed()), check("int3", Outcome::Ran)];
        for report in [
            ProbeReport::of_opened(Some(12), Ok(1_700_000), checks),
            ProbeReport::of_opened(
                Some(11),
                Err(NoSpeed { reason: "why".to_owned(), out_of_time: true }),
                Vec::new(),
            ),
            ProbeReport::without_device(Device::Missing),
            ProbeReport::without_device(Device::Denied),
            ProbeReport::without_device(Device::Failed { reason: "EIO".to_owned() }),
        ] {
            let json = serde_json::to_string(&report).unwrap();
            assert_eq!(serde_json::from_str::<ProbeReport>(&json).unwrap(), report, "{json}");
        }
    }
}
