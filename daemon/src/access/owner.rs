//! The owner: the user whom the daemon serves, to whom VM folders and keys belong.

use std::ffi::CString;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::unistd::{Gid, Uid, User, getgrouplist, getuid};

/// The user whom the daemon serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// The user's number.
    pub uid: u32,
    /// The user's primary group.
    pub gid: u32,
    /// The login name.
    pub name: String,
    /// The home folder.
    pub home: PathBuf,
    /// All groups of the user, the primary one among them.
    pub groups: Vec<u32>,
}

/// Why there is no owner.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    /// No such user.
    #[error("there is no user {wanted}; {source_of} must name one by login name or number")]
    Unknown {
        /// The name or number that was looked for.
        wanted: String,
        /// Where it came from.
        source_of: &'static str,
    },
    /// Another user's daemon needs root.
    #[error("only root can run a daemon for {wanted}: start it with sudo, or leave --owner out")]
    NotRoot {
        /// The user that was asked for.
        wanted: String,
    },
    /// The user database did not answer.
    #[error("cannot look up user {wanted} in the user database")]
    Lookup {
        /// The name or number that was looked for.
        wanted: String,
        /// The system's answer.
        #[source]
        source: Errno,
    },
}

/// `--owner`, as it is named in messages.
const OPTION: &str = "--owner";
/// The variable by which sudo names the user who called it (sudo(8)).
const SUDO_UID: &str = "SUDO_UID";

impl Owner {
    /// The owner by `--owner USER|UID`; without one, the user who called sudo, or else the one who runs the daemon.
    pub fn resolve(option: Option<&str>) -> Result<Self, OwnerError> {
        let sudo = std::env::var(SUDO_UID).ok();
        Self::resolve_from(option, sudo.as_deref(), getuid())
    }

    fn resolve_from(option: Option<&str>, sudo: Option<&str>, runner: Uid) -> Result<Self, OwnerError> {
        let owner = match (option, sudo) {
            (Some(wanted), _) => Self::find(wanted, OPTION)?,
            // Without root the variable is a leftover, and could not be followed anyway.
            (None, Some(uid)) if runner.is_root() => Self::find(uid, SUDO_UID)?,
            (None, _) => Self::find(&runner.to_string(), "the uid that runs the daemon")?,
        };
        if runner.is_root() || owner.uid == runner.as_raw() {
            Ok(owner)
        } else {
            Err(OwnerError::NotRoot { wanted: owner.name })
        }
    }

    /// A login name first, since one may consist of digits; a number second.
    fn find(wanted: &str, source_of: &'static str) -> Result<Self, OwnerError> {
        let failed = |source| OwnerError::Lookup { wanted: wanted.to_owned(), source };
        let unknown = || OwnerError::Unknown { wanted: wanted.to_owned(), source_of };
        if wanted.is_empty() || wanted.contains('\0') {
            return Err(unknown());
        }
        let user = if let Some(user) = User::from_name(wanted).map_err(failed)? {
            user
        } else {
            let uid = wanted.parse().map_err(|_| unknown())?;
            User::from_uid(Uid::from_raw(uid)).map_err(failed)?.ok_or_else(unknown)?
        };
        let name = CString::new(user.name.as_str()).map_err(|_| unknown())?;
        let groups = getgrouplist(&name, user.gid).map_err(failed)?;
        Ok(Self {
            uid: user.uid.as_raw(),
            gid: user.gid.as_raw(),
            name: user.name,
            home: user.dir,
            groups: groups.into_iter().map(Gid::as_raw).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: Uid = Uid::from_raw(0);
    const NOBODY: Uid = Uid::from_raw(65534);

    fn resolve(option: Option<&str>, sudo: Option<&str>, runner: Uid) -> Result<Owner, OwnerError> {
        Owner::resolve_from(option, sudo, runner)
    }

    #[test]
    fn the_option_leads_then_sudo_then_the_runner() {
        assert_eq!(resolve(Some("nobody"), Some("0"), ROOT).unwrap().uid, 65534);
        assert_eq!(resolve(None, Some("65534"), ROOT).unwrap().name, "nobody");
        assert_eq!(resolve(None, None, ROOT).unwrap().uid, 0);
    }

    #[test]
    fn a_number_finds_the_whole_user() {
        let root = resolve(Some("0"), None, ROOT).unwrap();
        assert_eq!((root.name.as_str(), root.gid), ("root", 0));
        assert_eq!(root.home, PathBuf::from("/root"));
        assert!(root.groups.contains(&0));
    }

    #[test]
    fn without_root_sudo_is_not_believed_and_nobody_else_is_served() {
        assert_eq!(resolve(None, Some("0"), NOBODY).unwrap().uid, 65534);
        assert!(matches!(resolve(Some("root"), None, NOBODY), Err(OwnerError::NotRoot { .. })));
        assert_eq!(resolve(Some("nobody"), None, NOBODY).unwrap().uid, 65534);
    }

    #[test]
    fn unknown_users_are_named_with_their_source() {
        for wanted in ["", "no such user", "4000000000", "-1", "a\0b", "99999999999999999999"] {
            let error = resolve(Some(wanted), None, ROOT).unwrap_err().to_string();
            assert!(error.contains("--owner"), "{error}");
        }
        let error = resolve(None, Some("4000000000"), ROOT).unwrap_err().to_string();
        assert!(error.contains("SUDO_UID"), "{error}");
    }
}
