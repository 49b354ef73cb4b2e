//! virtio-net (virtio 1.2, section 5.1) over a tap: one queue to receive, one to send.
//!
//! Frames go between the tap and guest memory by one readv or writev each, headers included: the kernel's
//! `virtio_net_hdr` is the driver's own. Nothing is copied on the way, and nothing in a header is looked at here:
//! the kernel refuses what makes no sense.

mod device;
pub mod frame;
mod receive;
mod send;
mod state;
mod tap;
#[cfg(test)]
mod tests;
mod worker;

use std::io;

pub use device::Net;
pub use state::NetState;

/// Longest of each queue. Linux's driver keeps a receive queue full of buffers, so a longer one takes memory of the
/// guest; 256 hold six of the largest frames, or 256 small ones.
pub const QUEUE_SIZE: u16 = 256;
/// The queue whose buffers the device fills.
pub const RECEIVE: usize = 0;
/// The queue whose frames the device sends.
pub const SEND: usize = 1;

/// Bytes of `virtio_net_hdr_v1`, which stands before each frame (section 5.1.6).
pub const HEADER: usize = 12;
/// Most bytes of a frame with its header: 64 KiB of IP packet behind an Ethernet header with a VLAN tag.
pub const MAX_FRAME: usize = HEADER + 18 + (64 << 10);

/// Frames that are sent, and frames that are received, before the other direction and other devices have a turn.
const BUDGET: usize = 64;
/// After so many bytes, four of the longest frames, the driver is told, so that its TCP sees them before a whole batch is
/// through.
const ANNOUNCE_BYTES: usize = 256 << 10;

/// Why a tap cannot serve as a NIC.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The descriptor is none of a tap.
    #[error("Descriptor {fd} is no tap: open /dev/net/tun and attach an interface to it (TUNSETIFF)")]
    NoTap {
        /// The descriptor.
        fd: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The tap was opened in another way.
    #[error(
        "The tap at descriptor {fd} has flags {flags:#x}: open it with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
    )]
    Flags {
        /// The descriptor.
        fd: i32,
        /// What it has (TUNGETIFF).
        flags: i32,
    },
    /// A system call failed.
    #[error("Cannot {what} the tap at descriptor {fd}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The descriptor.
        fd: i32,
        /// Why not.
        #[source]
        source: io::Error,
    },
}
