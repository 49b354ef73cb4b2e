//! Our monitor and QEMU side by side, each with the same small guest: for benchmarks in the lab.

pub mod guest;
pub mod machine;

pub use machine::{Machine, Which};
