//! The clock.

use std::io;

use std::time::Duration;

use nix::sys::time::{TimeSpec, TimeVal, TimeValLike};
use nix::time::{ClockId, clock_gettime, clock_settime};

use crate::session::Config;

/// A clock that is wrong by no more than this is not set, which all that waits for a time would notice, but goes a little
/// faster or slower until it is right (adjtime(3)).
const SLEWED: Duration = Duration::from_millis(20);

/// Sets the clock to nanoseconds since 1970.
pub fn set(config: &Config, unix_ns: u64) -> io::Result<()> {
    if config.files_only() {
        return Ok(());
    }
    let out = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let seconds = i64::try_from(unix_ns / 1_000_000_000).map_err(out)?;
    let nanoseconds = i64::try_from(unix_ns % 1_000_000_000).map_err(out)?;
    let problem = |error| io::Error::other(format!("the clock cannot be set: {error}"));
    let right = TimeSpec::new(seconds, nanoseconds);
    let wrong = right - clock_gettime(ClockId::CLOCK_REALTIME).map_err(problem)?;
    if Duration::from(if wrong < TimeSpec::seconds(0) { -wrong } else { wrong }) > SLEWED {
        return clock_settime(ClockId::CLOCK_REALTIME, right).map_err(problem);
    }
    let wrong = TimeVal::nanoseconds(wrong.num_nanoseconds());
    // SAFETY: it reads one struct timeval and writes nothing.
    let slewed = unsafe { libc::adjtime(wrong.as_ref(), std::ptr::null_mut()) };
    nix::errno::Errno::result(slewed).map(drop).map_err(problem)
}
