//! The source of random bytes.

#![no_main]

use std::sync::Arc;

use catalyst_vmm::devices::rng::Rng;
use catalyst_vmm_fuzz::{All, Guest, Op, Plain, threads};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|ops: All<Op<Plain>>| {
    Guest::new(Rng::new(Arc::clone(&threads().reactor))).run(&ops.0, |_, _, _| ());
});
