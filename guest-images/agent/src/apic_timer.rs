//! Whether Linux has measured the timer of its CPUs right.
//!
//! Where it knows neither PIT nor HPET it measures the local APIC's timer once, at boot, against the TSC, for a tenth of a second.
//! If the host keeps the CPU from running just then, the timer is late from then on, or taken for none and not used. Who
//! emulates the CPU says what is right, by an argument of the kernel, which gives it to the first process.

use std::fs;

/// The argument: the timer's rate in kHz, after Linux has it divided by 16.
const ARGUMENT: &str = "apic_timer_khz";
/// What clocks and timers there are (kernel/time/timer_list.c).
const TIMERS: &str = "/proc/timer_list";
/// Takes lines for the kernel's log (Documentation/ABI/testing/dev-kmsg). The kernel writes them to the console before it goes on.
const LOG: &str = "/dev/kmsg";
/// What makes a line an error, which is not kept quiet.
const ERROR: &str = "<3>";
/// Takes letters as keys with SysRq (Documentation/admin-guide/sysrq.rst); `b` is a reset.
const SYSRQ: &str = "/proc/sysrq-trigger";

/// Starts the machine again if its timer is wrong: the next boot measures anew.
pub fn check() {
    let Some(right) = std::env::var(ARGUMENT).ok().and_then(|khz| khz.parse().ok()) else { return };
    let is = match fs::read_to_string(TIMERS) {
        Ok(list) => measured(&list),
        Err(error) => return eprintln!("catalyst-agent: {TIMERS} cannot be read: {error}"),
    };
    if is_about(is, right) {
        return;
    }
    let why =
        format!("{ERROR}catalyst-agent: the timer of {right} kHz was measured to have {is}; starting again");
    let _ = fs::write(LOG, why);
    // At once: an orderly restart needs the timer.
    if let Err(error) = fs::write(SYSRQ, "b") {
        eprintln!("catalyst-agent: the machine cannot be reset: {error}");
    }
}

/// The rate of the first CPU's timer in kHz; 0 where there is none. Linux keeps it in units of 2^-32 GHz.
fn measured(list: &str) -> u64 {
    let mult = list.lines().find_map(|line| line.strip_prefix(" mult:")?.trim().parse().ok());
    mult.map_or(0, |mult: u64| mult.saturating_mul(1_000_000) >> 32)
}

/// A busy host makes it wrong by a tenth, which does no harm.
fn is_about(khz: u64, right: u64) -> bool {
    (right.saturating_mul(4) / 5..=right.saturating_mul(6) / 5).contains(&khz)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What it says of a timer, with the lines around.
    fn list(mult: &str) -> String {
        format!(
            "Tick Device: mode:     1\nPer CPU device: 0\nClock Event Device: lapic\n max_delta_ns:   34359875825\n \
             min_delta_ns:   1000\n mult:           {mult}\n shift:          32\n mode:           3\n"
        )
    }

    #[test]
    fn a_timer_measured_without_disturbance_is_right() {
        let khz = measured(&list("268434382"));
        assert_eq!(khz, 62_499);
        assert!(is_about(khz, 62_500));
    }

    #[test]
    fn a_timer_three_times_too_late_and_one_that_was_given_up_are_wrong() {
        for mult in ["828987743", "25769", "1", "18446744073709551615", "-1", ""] {
            assert!(!is_about(measured(&list(mult)), 62_500), "{mult}");
        }
        assert!(!is_about(measured("Clock Event Device: <NULL>\n"), 62_500));
    }
}
