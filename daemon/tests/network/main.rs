//! The network on real bridges, with real clients, each test in network namespaces of its own.

// All of this crate is tests; clippy.toml's leave for tests covers only functions marked so.
#![allow(clippy::unwrap_used)]

mod guests;
mod lifecycle;
mod namespace;
mod restart;
