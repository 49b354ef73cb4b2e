//! catalyst-daemon: VM store, engines, network, REST.

pub mod network;
pub mod privilege;
