//! Sockets between host and guest (virtio 1.2, section 5.10): streams of the guest's vsock family are Unix sockets
//! on the host.
//!
//! A client of the host connects to the listener and writes `CONNECT <port>\n`; once the guest has accepted it
//! reads `OK <host port>\n` and the stream is the connection. A connection of the guest to the host (CID 2) goes to
//! the upstream socket, as one message of the port with the stream as its one descriptor.
//!
//! [`Vsock`] is the device; `worker` serves the queues; `links` are the connections with their sockets, of which
//! `connection` knows only the protocol; `host` finds the other end of a new one.

mod connection;
mod device;
mod host;
mod link;
mod links;
mod packet;
mod state;
mod worker;

#[cfg(test)]
mod guest;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod tests;

pub use device::Vsock;
pub use state::VsockState;

/// The host's context ID (section 5.10.4).
const HOST_CID: u64 = 2;
/// Socket type: a stream of bytes (section 5.10.6).
const TYPE_STREAM: u16 = 1;

/// The device's queues, by number (section 5.10.2).
mod queue {
    pub const RX: usize = 0;
    pub const TX: usize = 1;
    pub const EVENT: usize = 2;
}

/// What a packet is for (section 5.10.6).
mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of a SHUTDOWN: what its sender will do no more (section 5.10.6.5).
mod shut {
    pub const RECEIVE: u32 = 1;
    pub const SEND: u32 = 2;
    pub const BOTH: u32 = 3;
}

/// Most connections at once; each has a descriptor.
const MAX_CONNECTIONS: usize = 1024;
/// Bytes of one connection that the guest may send ahead of what the host has read: its buffer here.
const WINDOW: u32 = 256 << 10;
/// Bytes that wait for slow readers of the host, all connections together. A connection that needs more is reset.
const MAX_BUFFERED: usize = 64 << 20;
/// Resets of connections that are not known, waiting for a buffer of the guest; further ones are left out.
const MAX_REPLIES: usize = 2 * MAX_CONNECTIONS;
/// Clients that have not written their line yet. One more, and the one that waits longest goes.
const MAX_CLIENTS: usize = 64;
