//! Virtual CPUs: what the guest's processor is like, how it begins, and the threads that run it.

pub mod cpuid;
pub mod exits;
mod failure;
pub mod msrs;
pub mod registers;
pub mod runner;
pub mod state;
mod tsc;

pub use exits::{ExitCounts, ExitKind};
pub use runner::{Buses, Vcpus};
pub use state::VcpuState;
