//! File sharing by virtio-fs (virtio 1.2, section 5.11): FUSE messages over a queue, answered in this process.
//!
//! The `fuse-backend-rs` crate speaks FUSE and does the file work; `files.rs` stands between the two and decides
//! what a guest may do with the host's files. A guest sees one folder, most often the empty root of the monitor's
//! own mount namespace (see `confine`); what the daemon mounts below it appears at once.
//!
//! - **No stale data.** The host's files change under the guest: people edit on the host and build in the guest.
//!   Names and attributes are valid for no time (what serves folders by a port lets some of them hold for a moment), and the guest
//!   drops cached pages when a file's size or time has changed. What has not changed is still read from the guest's cache, and can be
//!   mapped.
//! - **Files belong to the monitor's user.** It cannot switch users; where the owner is somebody else the daemon
//!   maps IDs in the mount. To the guest they can be shown as a user's of its own ([`ShareRoot::shown_as`]).
//! - **Unless they keep their owners** ([`Files::keeping_owners`]): a process with the rights for it serves a container's trees, in which
//!   the guest's users are the host's, with modes, links and some extended attributes.
//! - **No extended attributes** otherwise: the crate reaches them by a path in /proc, which the monitor does not have; and a
//!   guest would ask for `security.capability` at every write.
//! - **No DAX window**, no remote locks (the guest's kernel keeps them among its own processes).
//!
//! Each file that the guest remembers costs one descriptor (`O_PATH`), so their number is limited.

mod device;
mod files;
mod hard_link;
pub mod mounting;
mod request;
mod root;
mod state;
mod worker;
mod xattr;

use std::io;

pub use device::Fs;
pub use files::Files;
pub use root::{ShareRoot, Unrooted};
pub use state::FsState;

/// Longest tag, in bytes (section 5.11.4).
pub const MAX_TAG: usize = 36;

/// Why there is no virtio-fs device.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// A tag that the guest could not mount by.
    #[error("A share's tag is 1 to {MAX_TAG} bytes without zeros, not {0:?}")]
    Tag(String),
    /// What virtio-fs needs of /proc could not be opened.
    #[error("Cannot open /proc/self/fd and /proc/self/mountinfo for file sharing; is /proc mounted?")]
    Proc(#[source] io::Error),
    /// The folder could not be opened.
    #[error("Cannot open the folder to be shared")]
    Root(#[source] io::Error),
    /// The process's root is not the folder that was meant.
    #[error("The folder to be shared is not the root of this process: enter the mount namespace first")]
    NotRoot,
    /// The number of descriptors that the process may have could not be read or set.
    #[error("Cannot raise the number of open files")]
    Limit(#[source] io::Error),
}

#[cfg(test)]
mod confined_tests;
#[cfg(test)]
mod guest;
#[cfg(test)]
mod tests;
