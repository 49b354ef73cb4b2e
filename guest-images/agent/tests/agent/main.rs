//! The real agent on a socket, asked by a small host.

// The lint spares test functions, not what helps them.
#![allow(clippy::unwrap_used)]

mod commands;
mod containers;
mod support;
mod talk;
