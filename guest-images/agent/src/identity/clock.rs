//! The clock.

use std::io;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use crate::session::Config;

/// Sets the clock to nanoseconds since 1970.
pub fn set(config: &Config, unix_ns: u64) -> io::Result<()> {
    if config.files_only() {
        return Ok(());
    }
    let out = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let seconds = i64::try_from(unix_ns / 1_000_000_000).map_err(out)?;
    let nanoseconds = i64::try_from(unix_ns % 1_000_000_000).map_err(out)?;
    let problem = |error| io::Error::other(format!("the clock cannot be set: {error}"));
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(seconds, nanoseconds)).map_err(problem)
}
