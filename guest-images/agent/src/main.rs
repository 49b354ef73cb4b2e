//! The program inside the guest.

fn main() {}
