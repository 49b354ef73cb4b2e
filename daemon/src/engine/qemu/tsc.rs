//! The rates of the host's time stamp counter and of QEMU's timer, which Linux cannot measure reliably.
//!
//! QEMU's software CPU shows the guest the host's counter. With the hardware-reduced ACPI of
//! `microvm` Linux has no timer to measure it against (it uses neither PIT nor HPET then) and
//! stops early in its boot, so the rate is told by `tsc_early_khz=` (the kernel's
//! Documentation/admin-guide/kernel-parameters.txt).
//!
//! Against that counter it measures the timer of its CPUs, in a tenth of a second in which a busy host may not let it run.
//! That rate cannot be told the kernel; the images' first program compares what came of it, by `apic_timer_khz=`.

use std::arch::x86_64::_rdtsc;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Long enough that the error of reading two clocks (some 100 ns) is below 10 ppm.
const SPAN: Duration = Duration::from_millis(20);
/// Measured this often: the smallest result was disturbed least.
const ROUNDS: usize = 3;

/// QEMU's local APIC counts nanoseconds (hw/intc/apic.c), and Linux has it divide them by 16.
const APIC_TIMER_KHZ: u32 = 62_500;

/// The rate in kHz, measured once in some 60 ms of sleep.
pub fn khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(measure)
}

/// What tells the guest of the rates: `khz` is the counter's, at `hz` timer interrupts a second (0 if unknown).
///
/// `lpj` is the same rate in loops a tick. It spares every CPU after the first a measurement of some 0.3 s, which a
/// busy host draws out to seconds.
pub fn arguments(khz: u64, hz: u32) -> String {
    let lpj = khz.saturating_mul(1000).checked_div(u64::from(hz));
    let lpj = lpj.map(|lpj| format!(" lpj={lpj}")).unwrap_or_default();
    format!("tsc_early_khz={khz}{lpj} apic_timer_khz={APIC_TIMER_KHZ}")
}

fn measure() -> u64 {
    let mut rates: Vec<u64> = (0..ROUNDS)
        .map(|_| {
            let (start, first) = read();
            std::thread::sleep(SPAN);
            let (end, last) = read();
            let ns = end.duration_since(start).as_nanos().max(1);
            u64::try_from(u128::from(last.wrapping_sub(first)) * 1_000_000 / ns).unwrap_or(u64::MAX)
        })
        .collect();
    rates.sort_unstable();
    rates[ROUNDS / 2]
}

/// Both clocks at the same moment, as near as can be: of some tries the quickest.
fn read() -> (Instant, u64) {
    let tries = (0..5).map(|_| {
        let before = Instant::now();
        // SAFETY: rdtsc is there on every x86-64 processor and changes nothing.
        let counter = unsafe { _rdtsc() };
        (before.elapsed(), before, counter)
    });
    match tries.min_by_key(|(took, _, _)| *took) {
        Some((took, before, counter)) => (before + took / 2, counter),
        None => (Instant::now(), 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rates_are_told_the_counters_in_both_units_where_the_tick_is_known() {
        assert_eq!(arguments(2_596_146, 250), "tsc_early_khz=2596146 lpj=10384584 apic_timer_khz=62500");
        assert_eq!(arguments(2_596_146, 0), "tsc_early_khz=2596146 apic_timer_khz=62500");
    }

    #[test]
    fn two_measurements_agree_within_a_hundred_ppm() {
        let (one, two) = (measure(), measure());
        assert!(one > 100_000, "{one} kHz");
        assert!(one.abs_diff(two) < one / 10_000, "{one} and {two} kHz");
    }
}
