//! Driven from the guest's side, over a real tap in a network namespace of the test's own.

mod hostile;
mod receiving;
mod sending;
mod world;
