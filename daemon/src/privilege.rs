//! File access as root from threads that otherwise act on files as the daemon's owner.
//!
//! The daemon runs as root for its network and its VM processes, but what it does to files it does as the owner:
//! its threads carry the owner's file-system uid and gid (`setfsuid(2)`, `setfsgid(2)`), so a link that the owner
//! planted leads nowhere that the owner could not go. `setfsuid` takes away the capabilities over files
//! (`capabilities(7)`, "Effect of user ID changes on capabilities") and leaves `CAP_NET_ADMIN`. The few files that
//! are root's, `/proc/sys/net`, `/dev/net/tun` and the daemon's folder below `/run`, are reached through here.

use nix::unistd::{Gid, Uid, geteuid, setfsgid, setfsuid};

/// Makes the calling thread act on files as the user `uid` with the group `gid`, until it ends. In a process that is
/// not root this changes nothing.
pub fn act_as(uid: u32, gid: u32) {
    if geteuid().is_root() {
        setfsgid(Gid::from_raw(gid));
        setfsuid(Uid::from_raw(uid));
    }
}

/// Runs `work` with root's file-system identity and puts back the identity that the thread had before,
/// also when `work` panics.
///
/// Where the thread has that identity already, and in a process that is not root, this is a plain call: the
/// kernel then decides, and `work` sees its error. `work` is a closure and no future: nothing of another task can
/// run on the thread before the identity is back. A process that `work` starts is root's, since `execve(2)` sets
/// the file-system ids to the effective ones. Costs six system calls.
pub fn as_root<T>(work: impl FnOnce() -> T) -> T {
    let _identity = RootIdentity::assume();
    work()
}

/// Runs `work` as [`as_root`] does, on a thread of the blocking pool, for work that waits: child processes, locks.
///
/// A panic in `work` goes on in the caller.
pub async fn as_root_blocking<T, F>(work: F) -> T
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    match tokio::task::spawn_blocking(move || as_root(work)).await {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is going away, and every task with it: nothing is left to tell.
            Err(_) => std::future::pending().await,
        },
    }
}

/// The identity to go back to; `None` where nothing was changed.
struct RootIdentity(Option<(Uid, Gid)>);

impl RootIdentity {
    fn assume() -> Self {
        if !geteuid().is_root() {
            return Self(None);
        }
        let (uid, gid) = current();
        if uid.is_root() && gid.as_raw() == 0 {
            return Self(None);
        }
        setfsuid(Uid::from_raw(0));
        setfsgid(Gid::from_raw(0));
        Self(Some((uid, gid)))
    }
}

impl Drop for RootIdentity {
    fn drop(&mut self) {
        if let Some((uid, gid)) = self.0 {
            setfsgid(gid);
            setfsuid(uid);
        }
    }
}

/// The thread's file-system ids. An id of -1 changes nothing, and the call answers the present one.
fn current() -> (Uid, Gid) {
    (setfsuid(Uid::from_raw(u32::MAX)), setfsgid(Gid::from_raw(u32::MAX)))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn an_owner_thread_reaches_roots_file_only_inside_and_is_the_owner_again_after_a_panic() {
        if !geteuid().is_root() {
            println!("SKIPPED: only root can take another file-system identity");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let secret = folder.path().join("secret");
        fs::write(&secret, "root's").unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
        let path = secret.clone();
        std::thread::spawn(move || {
            setfsgid(Gid::from_raw(65534));
            setfsuid(Uid::from_raw(65534));
            assert!(fs::read(&path).is_err(), "the owner reads root's file");
            assert_eq!(as_root(|| fs::read_to_string(&path)).unwrap(), "root's");
            assert!(std::panic::catch_unwind(|| as_root(|| panic!("on purpose"))).is_err());
            assert_eq!(current(), (Uid::from_raw(65534), Gid::from_raw(65534)));
            assert!(fs::read(&path).is_err(), "the owner reads root's file after as_root");
        })
        .join()
        .unwrap();
    }
}
