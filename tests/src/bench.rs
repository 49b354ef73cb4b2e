//! Measures the promises of docs/SPECIFICATION.md.
fn main() {}
