//! The monitor's program on any `/dev/kvm` that opens, with small guests of its own: they take seconds.
//!
//! Where `/dev/kvm` does not open, each test says SKIPPED.

// A test says what went wrong by panicking.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bad_input;
mod boots;
mod confined;
mod devices;
mod ends;
mod exits;
mod guest;
mod machine;
mod pause;
mod restore;
