//! What is saved of the console device.

use serde::{Deserialize, Serialize};

/// The device: its ports in the order of their numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// The ports.
    pub ports: Vec<SavedPort>,
}

/// A port, as it is saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedPort {
    /// Its number; 0 is the console.
    pub id: u32,
    /// Its name, by which the guest knows it.
    pub name: String,
    /// What was told.
    pub state: PortState,
}

/// What guest and device have told each other of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortState {
    /// The guest must still be told that the port exists.
    pub owes_add: bool,
    /// The guest must still be told that it is a console, or its name.
    pub owes_name: bool,
    /// The guest is ready for the port.
    pub ready: bool,
    /// The guest has opened it.
    pub guest_open: bool,
    /// The guest believes that the host has it open.
    pub told_open: bool,
    /// Since it was told so, a client has gone.
    pub bounced: bool,
    /// Bytes of the next chain of the transmitting queue that the client has already.
    pub sent: u32,
}
