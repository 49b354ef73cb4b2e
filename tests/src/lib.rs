//! End-to-end tests through the real CLI and REST with real VMs.
