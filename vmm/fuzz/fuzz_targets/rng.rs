//! The source of random bytes.

#![no_main]

use std::sync::Arc;

use catalyst_vmm::devices::rng::Rng;
use catalyst_vmm_fuzz::{Guest, Op, Plain, threads};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|ops: Vec<Op<Plain>>| {
    Guest::new(Rng::new(Arc::clone(&threads().reactor))).run(&ops, |_, _, _| ());
});
