//! Groups of checks: a group has a world of its own, its checks run in order and may build on
//! one another; groups run side by side. A check that cannot run says SKIPPED and why.

use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// A group: its name and what it does.
pub type Group = (&'static str, fn(&mut Checks));

/// Runs the checks of one group.
#[derive(Debug)]
pub struct Checks {
    group: &'static str,
    filter: Vec<String>,
    failed_before: bool,
    passed: usize,
    failed: usize,
    skipped: usize,
}

struct Skipped(String);

/// Ends a check that cannot run here.
pub fn skip(why: impl Into<String>) -> ! {
    panic_any(Skipped(why.into()))
}

impl Checks {
    /// Runs one check. Those after a failed one run too: they may hold on their own.
    pub fn check(&mut self, name: &str, body: impl FnOnce()) {
        if !is_wanted(name) {
            return;
        }
        let started = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(body));
        let seconds = started.elapsed().as_secs_f32();
        let full = format!("{}: {name}", self.group);
        match outcome {
            Ok(()) => {
                self.passed += 1;
                println!("test {full} ... ok ({seconds:.1} s)");
            }
            Err(cause) => {
                if let Ok(skipped) = cause.downcast::<Skipped>() {
                    self.skipped += 1;
                    println!("test {full} ... SKIPPED: {}", skipped.0);
                } else {
                    self.failed += 1;
                    self.failed_before = true;
                    println!("test {full} ... FAILED ({seconds:.1} s)");
                }
            }
        }
    }

    /// Whether a check of this group has failed, so that its world is worth a look.
    pub fn any_failed(&self) -> bool {
        self.failed_before
    }

    /// Words of the command line that are not names of groups, for those who sample.
    pub fn words(&self) -> &[String] {
        &self.filter
    }
}

/// Whether a check is to run: all are, unless `CATALYST_TEST_CHECKS` has words of those that are, between bars.
fn is_wanted(name: &str) -> bool {
    let Ok(words) = std::env::var("CATALYST_TEST_CHECKS") else { return true };
    words.split('|').any(|words| name.contains(words))
}

/// Runs all groups whose name has one of the words of the command line in it (all, if there are
/// none), `workers` at a time, and ends the process: with 1 if a check failed.
pub fn run(groups: &[Group], workers: usize) -> ! {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let wanted = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word.as_str()));
    let chosen: Vec<Group> = groups.iter().filter(|(name, _)| wanted(name)).copied().collect();
    let next = AtomicUsize::new(0);
    let totals = Mutex::new((0, 0, 0));
    std::thread::scope(|scope| {
        for _ in 0..workers.max(1) {
            scope.spawn(|| {
                while let Some((group, body)) = chosen.get(next.fetch_add(1, Ordering::SeqCst)) {
                    let checks = run_group(group, *body, &words);
                    let mut totals = totals.lock().unwrap_or_else(PoisonError::into_inner);
                    totals.0 += checks.passed;
                    totals.1 += checks.failed;
                    totals.2 += checks.skipped;
                }
            });
        }
    });
    let (passed, failed, skipped) = totals.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!("\n{passed} passed, {failed} failed, {skipped} skipped");
    // Nothing but skipped checks is not a success.
    std::process::exit(i32::from(failed > 0 || passed == 0));
}

fn run_group(group: &'static str, body: fn(&mut Checks), words: &[String]) -> Checks {
    let mut checks =
        Checks { group, filter: words.to_vec(), failed_before: false, passed: 0, failed: 0, skipped: 0 };
    // What a group does between its checks can fail as well.
    if let Err(cause) = catch_unwind(AssertUnwindSafe(|| body(&mut checks))) {
        if let Ok(skipped) = cause.downcast::<Skipped>() {
            checks.skipped += 1;
            println!("test {group} ... SKIPPED: {}", skipped.0);
        } else {
            checks.failed += 1;
            println!("test {group} ... FAILED: it ended early");
        }
    }
    checks
}
