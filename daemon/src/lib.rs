//! catalyst-daemon: VM store, engines, network, REST.

pub mod access;
