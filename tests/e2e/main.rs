//! End-to-end tests: through the real `catalyst`, real REST, real daemons and real VM processes.

// A test says what went wrong by panicking.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod access;
mod bad_input;
mod common;
mod crash;
mod daemons;
mod hosts;
mod images;
mod legacy;

use catalyst_tests::harness::{self, Group};

const GROUPS: &[Group] = &[
    ("bad_input", bad_input::bad_input),
    ("hosts", hosts::hosts),
    ("legacy", legacy::legacy),
    ("crash", crash::crash),
    ("disk_full", crash::disk_full),
    ("daemons", daemons::daemons),
    ("access", access::access),
    ("images", images::images),
];

fn main() {
    harness::run(GROUPS, 2)
}
