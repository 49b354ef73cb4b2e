//! End-to-end tests: the real CLI, REST by curl, real VMs, each group in a world of its own.
//!
//!     make e2e                                          # all
//!     cargo test -p catalyst-tests --test e2e -- life   # the groups whose name has the word

// A check says what went wrong by panicking.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod access;
mod bad_input;
mod beside;
mod common;
mod container_clients;
mod container_faults;
mod containers;
mod cpus;
mod crash;
mod daemons;
mod deb;
mod docker_tools;
mod docker_up;
mod faults;
mod folders;
mod foreign;
mod full;
mod hosts;
mod images;
mod instant;
mod legacy;
mod life;
mod machine;
mod many;
mod owner;
mod pair;
mod pods;
mod ports;
mod rounds;
mod schemas;
mod settings;
mod snapshots;
mod systemd;
mod templates;
mod ui;
mod user_data;
mod vagrant;

use catalyst_tests::harness::{self, Group};

// The longest come first: groups run side by side.
const GROUPS: &[Group] = &[
    ("machine", machine::machine),
    ("beside", beside::beside),
    ("docker_tools", docker_tools::docker_tools),
    ("containers", containers::containers),
    ("container_clients", container_clients::container_clients),
    ("container_faults", container_faults::container_faults),
    ("docker_up", docker_up::docker_up),
    ("pods", pods::pods),
    ("many", many::many),
    ("instant", instant::instant),
    ("foreign", foreign::foreign),
    ("deb", deb::deb),
    ("systemd", systemd::systemd),
    ("full", full::full),
    ("faults", faults::faults),
    ("rounds", rounds::rounds),
    ("snapshots", snapshots::snapshots),
    ("vagrant", vagrant::vagrant),
    ("ui", ui::ui),
    ("user_data", user_data::user_data),
    ("templates", templates::templates),
    ("folders", folders::folders),
    ("ports", ports::ports),
    ("life", life::life),
    ("owner", owner::owner),
    ("pair", pair::pair),
    ("cpus", cpus::cpus),
    ("crash", crash::crash),
    ("access", access::access),
    ("bad_input", bad_input::bad_input),
    ("hosts", hosts::hosts),
    ("legacy", legacy::legacy),
    ("driver_2015", legacy::driver_2015),
    ("disk_full", crash::disk_full),
    ("schemas", schemas::schemas),
    ("settings", settings::settings),
    ("daemons", daemons::daemons),
    ("images", images::images),
];

fn main() {
    harness::run(GROUPS, 3);
}
