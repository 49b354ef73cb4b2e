//! A function on a thread of its own, stopped by a signal at its deadline.
//!
//! The signal is blocked in the thread and is let through only inside `KVM_RUN` (see
//! [`super::guest`]): it stays pending whenever it comes, so that there is no moment in which it is lost, and no
//! handler of the process is needed.

use std::fmt;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use vmm_sys_util::signal::{self, Killable, SIGRTMIN};

/// How long a signalled thread gets to come back.
const GRACE: Duration = Duration::from_millis(15);

/// Why a bounded call gave no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Overrun {
    /// The thread could not be started, or ended without a result.
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

enum Message<T> {
    /// The signal is blocked in the thread: from now on it may be sent.
    Armed,
    Done(T),
}

/// The signal that ends `KVM_RUN`.
pub(super) fn kick_signal() -> i32 {
    SIGRTMIN()
}

/// Runs `work` and returns its result; at `limit` its thread is signalled, which ends a `KVM_RUN` in it.
///
/// Returns within `limit` and a short grace.
pub(super) fn call<T, F>(limit: Duration, work: F) -> Result<T, Overrun>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let (sender, receiver) = channel();
    let thread = thread::Builder::new().name("probe".to_owned()).spawn(move || {
        // An error here means that it is blocked already, which is as good.
        let _ = signal::block_signal(kick_signal());
        // A receiver that is gone has given up on this thread: there is nobody to tell.
        let _ = sender.send(Message::Armed);
        let _ = sender.send(Message::Done(work()));
    });
    let Ok(thread) = thread else { return Err(Overrun::NoThread) };
    let mut armed = false;
    let mut wait = limit;
    let mut kicked = false;
    loop {
        match receiver.recv_timeout(wait) {
            Ok(Message::Armed) => armed = true,
            Ok(Message::Done(result)) => return Ok(result),
            Err(RecvTimeoutError::Disconnected) => return Err(Overrun::NoThread),
            Err(RecvTimeoutError::Timeout) if kicked || !armed => return Err(Overrun::Deaf),
            Err(RecvTimeoutError::Timeout) => {
                kicked = thread.kill(kick_signal()).is_ok();
                wait = GRACE;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_result_comes_through() {
        assert_eq!(call(Duration::from_secs(5), || 7), Ok(7));
    }

    #[test]
    fn a_panic_is_no_hang() {
        assert_eq!(call::<(), _>(Duration::from_secs(5), || panic!("meant")), Err(Overrun::NoThread));
    }

    #[test]
    fn a_thread_that_ignores_the_signal_is_left_behind() {
        let begin = Instant::now();
        let (hold, held) = channel::<()>();
        let result = call(Duration::from_millis(10), move || held.recv().is_ok());
        assert_eq!(result, Err(Overrun::Deaf));
        assert!(begin.elapsed() < Duration::from_secs(2), "took {:?}", begin.elapsed());
        drop(hold);
    }
}
