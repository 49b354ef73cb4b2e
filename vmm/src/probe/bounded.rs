//! Jobs on a thread of their own, each stopped by a signal at its deadline.
//!
//! The signal is blocked in the thread and is let through only inside `KVM_RUN` (see
//! [`super::guest`]): it stays pending whenever it comes, so that there is no moment in which it is lost, and no
//! handler of the process is needed.

use std::fmt;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::signal::{self, Killable, SIGRTMIN};

/// How long a signalled thread gets to come back.
const GRACE: Duration = Duration::from_millis(250);

/// Why a job gave no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Overrun {
    /// The thread could not be started, or has ended.
    NoThread,
    /// The signal did not bring the thread back; it is left behind and ends with the process.
    Deaf,
}

impl fmt::Display for Overrun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoThread => "found no thread to run on",
            Self::Deaf => "did not end in time, not even when its thread was signalled",
        })
    }
}

/// The signal that ends `KVM_RUN`.
pub(super) fn kick_signal() -> i32 {
    SIGRTMIN()
}

type Job<S> = Box<dyn FnOnce(&mut S) + Send>;

/// A thread with a state of its own, on which jobs run one after another.
///
/// Dropped, it ends after its present job, and its state with it; nobody waits for that.
pub(super) struct Worker<S> {
    thread: JoinHandle<()>,
    jobs: Sender<Job<S>>,
    deaf: bool,
}

impl<S: Default + 'static> Worker<S> {
    /// Starts the thread.
    pub(super) fn start() -> Result<Self, Overrun> {
        let (jobs, queue) = channel::<Job<S>>();
        let (armed, is_armed) = channel();
        let thread = thread::Builder::new().name("probe".to_owned()).spawn(move || {
            // An error here means that it is blocked already, which is as good.
            let _ = signal::block_signal(kick_signal());
            // A receiver that is gone has given up on this thread: there is nobody to tell.
            let _ = armed.send(());
            let mut state = S::default();
            for job in queue {
                // The kick of an earlier job may have come just when that had ended.
                let _ = signal::clear_signal(kick_signal());
                job(&mut state);
            }
        });
        let thread = thread.map_err(|_| Overrun::NoThread)?;
        // Before the signal is blocked, it would end the process.
        is_armed.recv().map_err(|_| Overrun::NoThread)?;
        Ok(Self { thread, jobs, deaf: false })
    }

    /// Runs `job` and returns its result; at `limit` the thread is signalled, which ends a `KVM_RUN` in it.
    ///
    /// Returns within `limit` and a short grace. After [`Overrun::Deaf`] no further job is taken.
    pub(super) fn call<T, F>(&mut self, limit: Duration, job: F) -> Result<T, Overrun>
    where
        T: Send + 'static,
        F: FnOnce(&mut S) -> T + Send + 'static,
    {
        if self.deaf {
            return Err(Overrun::Deaf);
        }
        let (done, result) = channel();
        let job = move |state: &mut S| {
            // As above: without a receiver there is nobody to tell.
            let _ = done.send(job(state));
        };
        self.jobs.send(Box::new(job)).map_err(|_| Overrun::NoThread)?;
        let waited = match result.recv_timeout(limit) {
            Err(RecvTimeoutError::Timeout) => match self.thread.kill(kick_signal()) {
                Ok(()) => result.recv_timeout(GRACE),
                Err(_) => Err(RecvTimeoutError::Timeout),
            },
            waited => waited,
        };
        waited.map_err(|error| match error {
            RecvTimeoutError::Timeout => {
                self.deaf = true;
                Overrun::Deaf
            }
            RecvTimeoutError::Disconnected => Overrun::NoThread,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    const LONG: Duration = Duration::from_secs(5);

    #[test]
    fn jobs_share_their_thread_s_state() {
        let mut worker = Worker::<u32>::start().unwrap();
        assert_eq!(worker.call(LONG, |state| *state = 7), Ok(()));
        assert_eq!(worker.call(LONG, |state| *state), Ok(7));
    }

    #[test]
    fn a_panic_is_no_hang() {
        let mut worker = Worker::<()>::start().unwrap();
        assert_eq!(worker.call::<(), _>(LONG, |()| panic!("meant")), Err(Overrun::NoThread));
        assert_eq!(worker.call(LONG, |()| ()), Err(Overrun::NoThread));
    }

    #[test]
    fn a_thread_that_ignores_the_signal_is_left_behind() {
        let begin = Instant::now();
        let mut worker = Worker::<()>::start().unwrap();
        let (hold, held) = channel::<()>();
        let result = worker.call(Duration::from_millis(10), move |()| held.recv().is_ok());
        assert_eq!(result, Err(Overrun::Deaf));
        assert_eq!(worker.call(LONG, |()| ()), Err(Overrun::Deaf));
        assert!(begin.elapsed() < Duration::from_secs(2), "took {:?}", begin.elapsed());
        drop(hold);
    }

    #[test]
    fn a_late_signal_does_not_reach_the_next_job() {
        let mut worker = Worker::<()>::start().unwrap();
        // The signal of a job that ended just before it came.
        assert_eq!(worker.call(LONG, |()| signal_myself()), Ok(true));
        assert_eq!(worker.call(LONG, |()| is_pending()), Ok(false));
    }

    fn signal_myself() -> bool {
        // SAFETY: the calling thread's own handle is valid, and the signal is blocked in it.
        let sent = unsafe { libc::pthread_kill(libc::pthread_self(), kick_signal()) } == 0;
        sent && is_pending()
    }

    fn is_pending() -> bool {
        // SAFETY: a signal set is plain data, and both calls write or read only that.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigpending(&raw mut set) == 0 && libc::sigismember(&raw const set, kick_signal()) == 1
        }
    }
}
