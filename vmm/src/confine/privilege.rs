//! Capabilities (capabilities(7)) and the process flags of prctl(2).

use super::{ConfineError, check};

/// `_LINUX_CAPABILITY_VERSION_3`: sets of 64 bits.
const VERSION_3: u32 = 0x2008_0522;
/// Capabilities that a set can have.
const CAPABILITIES: libc::c_ulong = 64;
/// `CAP_SYS_ADMIN`.
const SYS_ADMIN: u32 = 21;

/// `CAP_CHOWN`, `CAP_DAC_OVERRIDE`, `CAP_FOWNER`, `CAP_FSETID`, `CAP_SETGID`, `CAP_SETUID`, `CAP_SETFCAP`.
pub(super) const OWNERS: u32 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 31;
/// `SECBIT_NOROOT`, `SECBIT_NO_SETUID_FIXUP`, and both for good (capabilities(7), "The securebits flags").
const SECUREBITS: libc::c_ulong = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3;

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// `struct __user_cap_data_struct`, the lower or upper half of the three sets.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Whether the calling thread may mount.
pub(super) fn has_sys_admin() -> Result<bool, ConfineError> {
    let mut header = Header { version: VERSION_3, pid: 0 };
    let mut sets = [Sets::default(); 2];
    // SAFETY: version 3 means a header and two halves, which is what the kernel gets to fill.
    let returned = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) };
    check("read the process's capabilities", returned)?;
    Ok(sets[0].effective >> SYS_ADMIN & 1 == 1)
}

/// Lets the process keep its capabilities while it acts as another user, as root without a change of them does not; and gain
/// none for being root. It takes `CAP_SETPCAP`.
///
/// What the guest's kernel has allowed must be done: it knows groups of a user that are not told here.
pub(super) fn keep_capabilities_as_others() -> Result<(), ConfineError> {
    check("keep capabilities as another user", prctl(libc::PR_SET_SECUREBITS, SECUREBITS).into()).map(drop)
}

/// Empties all sets of capabilities but for those in `kept`; false if the bounding set could not be emptied so.
pub(super) fn drop_capabilities(kept: u32) -> Result<bool, ConfineError> {
    // The bounding set first, since it takes CAP_SETPCAP.
    let bounding = (0..CAPABILITIES)
        .map(|capability| (capability, prctl(libc::PR_CAPBSET_READ, capability)))
        // Those that the kernel knows come first.
        .take_while(|(_, held)| *held >= 0)
        .filter(|(capability, _)| u64::from(kept) >> capability & 1 == 0)
        .all(|(capability, held)| held == 0 || prctl(libc::PR_CAPBSET_DROP, capability) == 0);
    let cleared = prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong);
    check("clear the ambient capabilities", cleared.into())?;
    let mut header = Header { version: VERSION_3, pid: 0 };
    let sets = [Sets { effective: kept, permitted: kept, inheritable: 0 }, Sets::default()];
    // SAFETY: version 3 means a header and two halves, which the kernel reads.
    let returned = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) };
    check("give up the capabilities", returned)?;
    Ok(bounding)
}

/// Nothing that is executed gains privileges; Landlock and seccomp ask for it.
pub(super) fn forbid_new_privileges() -> Result<(), ConfineError> {
    check("set no_new_privs", prctl(libc::PR_SET_NO_NEW_PRIVS, 1).into()).map(drop)
}

/// No core dump holds guest memory, and processes of the same user can neither trace the monitor nor open what it
/// has open. Its own use of its /proc/self/fd is not touched by it: the kernel lets a process into its own.
pub(super) fn forbid_dumps() -> Result<(), ConfineError> {
    check("forbid dumps of the process", prctl(libc::PR_SET_DUMPABLE, 0).into()).map(drop)
}

fn prctl(operation: libc::c_int, argument: libc::c_ulong) -> libc::c_int {
    let none: libc::c_ulong = 0;
    // SAFETY: the operations used here take a number and nothing more.
    unsafe { libc::prctl(operation, argument, none, none, none) }
}
