//! The control socket: how the caller speaks to a running monitor.

pub mod protocol;
pub mod server;

pub use server::{Commanded, Server};
