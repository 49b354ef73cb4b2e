//! Devices, a folder each, all of one shape:
//!
//! | file | |
//! |---|---|
//! | `mod.rs` | what it is, its numbers, its errors |
//! | `device.rs` | the device as its driver sees it: features, configuration, activation |
//! | `worker.rs` | what its thread does with the queues |
//! | `request.rs`, … | what is read from guest memory, parsed and checked |
//! | `state.rs` | what is saved of it |
//! | `tests.rs` | driven from the guest's side of the queues |
//!
//! No device knows another one, or KVM.

pub mod balloon;
pub mod block;
pub mod fs;
pub mod i8042;
pub mod net;
pub mod power;
pub mod rng;
pub mod rtc;
pub mod serial;
pub mod uart;
pub mod vsock;
