//! catalyst-daemon: VM store, engines, network, REST.
//!
//! One request's way: client → [`access`] (who may) → handler in [`http`] (parses, no logic) →
//! [`machines`] (knows each VM's state, one task a VM) → [`engine`] → VM process. The only way
//! back up are [`events`].

pub mod access;
pub mod access_keys;
pub mod docker;
pub mod doctor;
pub mod engine;
pub mod events;
pub mod http;
pub mod images;
pub mod machines;
pub mod network;
pub mod ports;
pub mod privilege;
pub mod probe;
pub mod release;
pub mod saved;
pub mod settings;
pub mod store;
pub mod systemd;
pub mod tasks;
pub mod usage;
pub mod user_data;
pub mod warm;
