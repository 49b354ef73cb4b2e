//! The balloon: any bytes are page numbers.

#![no_main]

use std::sync::Arc;

use catalyst_vmm::devices::balloon::Balloon;
use catalyst_vmm_fuzz::{All, Guest, Op, Plain, threads};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|ops: All<Op<Plain>>| {
    let balloon = Balloon::new(Arc::clone(&threads().reactor));
    Guest::new(balloon).run(&ops.0, |balloon, which, _| balloon.set_target(u32::from(which) << 2));
});
