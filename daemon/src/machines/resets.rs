//! How often a guest may reset itself: one that does so soon after each start is not started again for ever.

use std::time::Duration;

use tokio::time::Instant;

/// A reset so soon after the start counts.
const SOON: Duration = Duration::from_secs(20);
/// So many of them in a row are no accident.
const MOST: u32 = 5;

/// The resets of a VM since it was powered on.
#[derive(Debug)]
pub(super) struct Resets {
    started: Instant,
    in_a_row: u32,
}

impl Default for Resets {
    fn default() -> Self {
        Self { started: Instant::now(), in_a_row: 0 }
    }
}

impl Resets {
    /// Its process was started, or found, now.
    pub(super) fn started(&mut self) {
        self.started = Instant::now();
    }

    /// Counts a reset; the reason why the VM is off, if it was one too many.
    pub(super) fn too_many(&mut self) -> Option<String> {
        self.count(self.started.elapsed())
    }

    fn count(&mut self, after: Duration) -> Option<String> {
        self.in_a_row = if after < SOON { self.in_a_row + 1 } else { 0 };
        (self.in_a_row > MOST).then(|| {
            format!(
                "the guest reset itself {} times in a row, each within {} s of its start",
                self.in_a_row,
                SOON.as_secs()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT_ONCE: Duration = Duration::from_millis(1);

    #[test]
    fn a_guest_that_only_resets_is_off_after_a_few_times_with_the_reason() {
        let mut resets = Resets::default();
        for _ in 0..MOST {
            assert_eq!(resets.count(AT_ONCE), None);
        }
        let reason = resets.count(AT_ONCE).unwrap();
        assert!(reason.contains("6 times in a row") && reason.contains("20 s"), "{reason}");
    }

    #[test]
    fn resets_that_come_late_are_never_too_many() {
        let mut resets = Resets::default();
        for _ in 0..10 * MOST {
            assert_eq!(resets.count(SOON), None);
            assert_eq!(resets.count(AT_ONCE), None);
        }
    }
}
