//! Who a container's program is and what it may: limits, capabilities, user, as the OCI runtime specification has them ("Process").

use std::fs;
use std::io;

use catalyst_agent_protocol::container::{Capabilities, Process, Rlimit};
use nix::errno::Errno;

use super::{Step, doing};

/// `_LINUX_CAPABILITY_VERSION_3`: masks of 64 bits, in two halves (capset(2)).
const VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Half {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// What the kernel likes it when memory is short; the agent itself is the last to go.
pub fn set_oom_score(process: &Process) -> Step<()> {
    let score = process.oom_score_adj.unwrap_or(0).to_string();
    fs::write("/proc/self/oom_score_adj", score).map_err(doing("setting oom_score_adj"))
}

/// All that is the program's own; this process has every right until then.
pub fn assume(process: &Process) -> Step<()> {
    for limit in &process.rlimits {
        set_limit(limit).map_err(doing(format_args!("setting the limit {}", limit.resource)))?;
    }
    drop_bounding(process.capabilities.bounding).map_err(doing("dropping capabilities"))?;
    become_user(process).map_err(doing(format_args!("becoming user {}:{}", process.uid, process.gid)))?;
    set_capabilities(process.capabilities).map_err(doing("setting capabilities"))?;
    if process.no_new_privileges {
        // SAFETY: numbers alone.
        call(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())
            .map_err(doing("giving up further privileges"))?;
    }
    // SAFETY: a number.
    unsafe { libc::umask(process.umask.unwrap_or(0o022) & 0o777) };
    Ok(())
}

fn call(result: libc::c_long) -> io::Result<()> {
    Ok(Errno::result(result).map(drop)?)
}

fn set_limit(limit: &Rlimit) -> io::Result<()> {
    let value = libc::rlimit { rlim_cur: limit.soft, rlim_max: limit.hard };
    // SAFETY: it reads one struct, which outlives the call.
    call(unsafe { libc::syscall(libc::SYS_setrlimit, limit.resource, &raw const value) })
}

/// Takes from the bounding set what is not wanted; the kernel says which capability is the last.
fn drop_bounding(wanted: u64) -> io::Result<()> {
    for capability in 0..64 {
        // SAFETY: numbers alone.
        let has = unsafe { libc::prctl(libc::PR_CAPBSET_READ, capability, 0, 0, 0) };
        if has < 0 {
            return Ok(());
        }
        if has == 1 && wanted >> capability & 1 == 0 {
            // SAFETY: numbers alone.
            call(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) }.into())?;
        }
    }
    Ok(())
}

/// Takes the user's numbers. What may be done stays for now, also for one that is not root.
fn become_user(process: &Process) -> io::Result<()> {
    let (uid, gid, groups) = (process.uid, process.gid, &process.additional_gids);
    // SAFETY: numbers, and a slice that outlives the call. This process has one thread, so the plain system calls are enough.
    unsafe {
        call(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0).into())?;
        call(libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()))?;
        call(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
        call(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
        call(libc::prctl(libc::PR_SET_KEEPCAPS, 0, 0, 0, 0).into())
    }
}

fn set_capabilities(capabilities: Capabilities) -> io::Result<()> {
    let header = Header { version: VERSION, pid: 0 };
    let data = halves(capabilities);
    // SAFETY: the kernel reads a header and two halves, which outlive the call.
    call(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })?;
    // SAFETY: numbers alone, here and below.
    call(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) }.into())?;
    let usable = capabilities.ambient & capabilities.inheritable & capabilities.permitted;
    for capability in (0..64).filter(|capability| usable >> capability & 1 == 1) {
        // SAFETY: as above.
        let raised =
            unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, capability, 0, 0) };
        match Errno::result(raised) {
            // One that this kernel does not know.
            Ok(_) | Err(Errno::EINVAL) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The masks as the kernel takes them. What is not permitted cannot be in effect.
fn halves(capabilities: Capabilities) -> [Half; 2] {
    let half = |mask: u64, at: u32| u32::try_from(mask >> at & u64::from(u32::MAX)).unwrap_or(0);
    [0, 32].map(|at| Half {
        effective: half(capabilities.effective & capabilities.permitted, at),
        permitted: half(capabilities.permitted, at),
        inheritable: half(capabilities.inheritable, at),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_cut_in_halves_and_what_is_in_effect_is_permitted() {
        let capabilities = Capabilities {
            permitted: 1 << 40 | 1 << 3,
            effective: 1 << 40 | 1 << 5 | 1 << 3,
            inheritable: 1 << 33,
            ..Capabilities::default()
        };
        assert_eq!(
            halves(capabilities),
            [
                Half { effective: 8, permitted: 8, inheritable: 0 },
                Half { effective: 1 << 8, permitted: 1 << 8, inheritable: 2 }
            ]
        );
    }
}
