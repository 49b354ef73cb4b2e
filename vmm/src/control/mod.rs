//! The control socket: how the caller speaks to a running monitor.

pub mod protocol;
