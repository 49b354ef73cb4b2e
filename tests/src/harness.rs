//! Groups of checks: a group has a world of its own, its checks run in order and may build on
//! one another; groups run side by side. A check that cannot run says SKIPPED and why.

use std::any::Any;
use std::cell::RefCell;
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
    passed: usize,
    /// Name and cause of each.
    failed: Vec<String>,
    skipped: usize,
}

thread_local! {
    /// Where this thread panicked last.
    static PANICKED_AT: RefCell<String> = const { RefCell::new(String::new()) };
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
            Err(cause) => self.ended_by(cause, &full, &format!(" ({seconds:.1} s)")),
        }
    }

    /// Counts what was ended by a panic, and says so; `how` is said of one that failed.
    fn ended_by(&mut self, cause: Box<dyn Any + Send>, name: &str, how: &str) {
        match cause.downcast::<Skipped>() {
            Ok(skipped) => {
                self.skipped += 1;
                println!("test {name} ... SKIPPED: {}", skipped.0);
            }
            Err(cause) => {
                self.failed.push(format!("{name}{how}: {}", what_went_wrong(&*cause)));
                println!("test {name} ... FAILED{how}");
            }
        }
    }

    /// Whether a check of this group has failed, so that its world is worth a look.
    pub fn any_failed(&self) -> bool {
        !self.failed.is_empty()
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
    let totals = Mutex::new((0, Vec::new(), 0));
    remember_where_threads_panic();
    std::thread::scope(|scope| {
        for _ in 0..workers.max(1) {
            scope.spawn(|| {
                while let Some((group, body)) = chosen.get(next.fetch_add(1, Ordering::SeqCst)) {
                    let checks = run_group(group, *body, &words);
                    let mut totals = totals.lock().unwrap_or_else(PoisonError::into_inner);
                    totals.0 += checks.passed;
                    totals.1.extend(checks.failed);
                    totals.2 += checks.skipped;
                }
            });
        }
    });
    let (passed, failed, skipped) = totals.into_inner().unwrap_or_else(PoisonError::into_inner);
    // Again, since they may be thousands of lines further up.
    for failed in &failed {
        println!("\nfailed: {failed}");
    }
    println!("\n{passed} passed, {} failed, {skipped} skipped", failed.len());
    // Nothing but skipped checks is not a success.
    std::process::exit(i32::from(!failed.is_empty() || passed == 0));
}

fn remember_where_threads_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICKED_AT.set(panic.location().map(ToString::to_string).unwrap_or_default());
        print(panic);
    }));
}

/// Of the panic that this thread was caught in: its place and the beginning of its message.
fn what_went_wrong(cause: &(dyn Any + Send)) -> String {
    let text = cause.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| cause.downcast_ref::<&str>().copied()).unwrap_or_default();
    format!("{}: {}", PANICKED_AT.take(), text.chars().take(2000).collect::<String>())
}

fn run_group(group: &'static str, body: fn(&mut Checks), words: &[String]) -> Checks {
    let mut checks = Checks { group, filter: words.to_vec(), passed: 0, failed: Vec::new(), skipped: 0 };
    // What a group does between its checks can fail as well.
    if let Err(cause) = catch_unwind(AssertUnwindSafe(|| body(&mut checks))) {
        checks.ended_by(cause, group, ": it ended early");
    }
    checks
}
