//! What end-to-end tests and benchmarks stand on: [`World`], a network namespace with a state
//! folder and a daemon in it, used through the real `catalyst` and through curl; and [`harness`],
//! which runs groups of checks and counts them.

// A test says what went wrong by panicking, and that is what its helpers do as well.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::missing_panics_doc)]

pub mod containers;
pub mod docker;
pub mod harness;
pub mod instant;
pub mod load;
pub mod monitor;
pub mod world;

pub use harness::{Checks, skip};
pub use world::{Answer, Ran, World};
