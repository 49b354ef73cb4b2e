//! The PC's CMOS clock, compatible with the MC146818, at ports 0x70 (index) and 0x71 (data). `vm-superio` has only ARM's
//! clock, the PL031, so this is our own.
//!
//! It is the host's clock in UTC, which the guest cannot set: writes are taken and forgotten. There are no alarms and no
//! interrupts, which Linux's `rtc_cmos` does without. Numbers are BCD and hours go to 23.

mod clock;
mod device;
#[cfg(test)]
mod tests;

pub use device::{Rtc, RtcState};
