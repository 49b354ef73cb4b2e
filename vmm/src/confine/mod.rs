//! Takes away from the process what a monitor does not need, before the first guest instruction.
//!
//! The daemon starts the monitor as the VM's own user, with no new privileges and `CAP_SYS_ADMIN` as its only
//! (ambient) capability. Before the first thread is made the monitor
//!
//! 1. opens what it will need of the old root (see `devices::fs::ShareRoot`);
//! 2. calls [`enter_namespace`]: its root is an empty folder of its own mount namespace from then on. Below it the
//!    daemon mounts shares later, from outside by setns(2); nothing is ever mounted in the host's namespace, and all
//!    goes away with the process;
//! 3. calls [`drop_privileges`]: no capability is left, and Landlock leaves it only what is below that root.
//!
//! Each thread gets its system call filter when it begins.

mod landlock;
mod namespace;
mod privilege;
mod seccomp;

use std::fs::File;
use std::io;

pub use landlock::Landlock;
pub use namespace::enter_namespace;
pub use seccomp::{Filters, ROLES, Role, SeccompError};

/// Why the process could not be confined. What the kernel does not have is none of these: see [`Confinement`].
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// A system call failed.
    #[error("Cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel has Landlock, but took the rules badly.
    #[error("Cannot restrict the process by Landlock")]
    Landlock(#[from] ::landlock::RulesetError),
}

/// What was taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confinement {
    /// The bounding set is empty. Without `CAP_SETPCAP` the kernel does not let go of it; no new privileges makes up
    /// for that, since nothing that is executed can gain a capability.
    pub bounding_set: bool,
    /// How far Landlock reaches.
    pub landlock: Landlock,
}

impl Confinement {
    /// What is not as tight as it could be, for a person; none if all is.
    fn shortcoming(self) -> Option<String> {
        let why = match self.landlock {
            Landlock::Full => return None,
            Landlock::Partial => "this kernel's Landlock is older than version 6 and restricts less",
            Landlock::None => "this kernel has no Landlock (or it is not among its lsm=)",
        };
        Some(format!("{why}; the monitor runs confined by the rest"))
    }
}

/// Lets all threads allocate from one heap; call it before there are others. glibc gives each thread one of its own, and
/// opens a file of /proc when such a heap shrinks for the first time, which no filter allows. One takes less memory, too.
pub fn share_one_heap() {
    // SAFETY: it sets a number of the allocator. Where that fails, all is as it was.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives up every privilege, for good: capabilities, new privileges, being traced or dumped by its own user, and by
/// Landlock every file but those below `roots`, TCP, and other processes' abstract sockets and signals.
///
/// It holds for the calling thread and those that it makes later, so call it before there are others. Descriptors
/// that are open stay as they are. What the kernel lacks of Landlock is told in one line on stderr.
pub fn drop_privileges(roots: &[&File]) -> Result<Confinement, ConfineError> {
    confine(roots, 0)
}

/// The same for a process of root's that serves files to which it must be what root is: it keeps the capabilities for their
/// owners, modes and file capabilities, and keeps them while it acts as another user.
pub fn keep_owners(roots: &[&File]) -> Result<Confinement, ConfineError> {
    privilege::keep_capabilities_as_others()?;
    confine(roots, privilege::OWNERS)
}

fn confine(roots: &[&File], kept: u32) -> Result<Confinement, ConfineError> {
    let bounding_set = privilege::drop_capabilities(kept)?;
    privilege::forbid_new_privileges()?;
    privilege::forbid_dumps()?;
    let landlock = landlock::restrict(roots)?;
    let confinement = Confinement { bounding_set, landlock };
    if let Some(shortcoming) = confinement.shortcoming() {
        eprintln!("catalyst-vmm: {shortcoming}");
    }
    Ok(confinement)
}

/// What a system call that tells of errors by -1 returned.
fn check(what: &'static str, returned: libc::c_long) -> Result<libc::c_long, ConfineError> {
    if returned == -1 {
        Err(ConfineError::System { what, source: io::Error::last_os_error() })
    } else {
        Ok(returned)
    }
}

#[cfg(test)]
mod tests;
