//! Who may log in to guests: the owner's own SSH keys, and one of Catalyst's.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use ssh_key::{Algorithm, LineEnding};
use thiserror::Error;

use crate::store::files;
use crate::store::identity::new_key;

/// Public keys of the owner that are taken at most.
const MAX_KEYS: usize = 32;
/// Longest public key file, in bytes.
const MAX_SIZE: usize = 16 * 1024;

/// Why Catalyst's own key could not be had.
#[derive(Debug, Error)]
pub enum AccessKeyError {
    /// A file could not be read or written.
    #[error("Cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The key could not be made.
    #[error("Cannot make an SSH key")]
    Key(#[source] ssh_key::Error),
}

/// See the module.
#[derive(Clone, Debug)]
pub struct AccessKeys {
    private: PathBuf,
    public: PathBuf,
    owner_ssh: PathBuf,
}

impl AccessKeys {
    /// Opens the key `<state_dir>/ssh/id_ed25519`, making it if need be; the owner's keys are
    /// those in `<home>/.ssh`.
    pub fn open(state_dir: &Path, home: &Path) -> Result<Self, AccessKeyError> {
        let folder = state_dir.join("ssh");
        let keys = Self {
            private: folder.join("id_ed25519"),
            public: folder.join("id_ed25519.pub"),
            owner_ssh: home.join(".ssh"),
        };
        if keys.private.exists() && keys.public.exists() {
            return Ok(keys);
        }
        let io = |what, path: &Path| {
            let path = path.display().to_string();
            move |source| AccessKeyError::Io { what, path, source }
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(io("make the folder", &folder))?;
        let key = new_key(Algorithm::Ed25519, "catalyst").map_err(AccessKeyError::Key)?;
        let private = key.to_openssh(LineEnding::LF).map_err(AccessKeyError::Key)?;
        let public = key.public_key().to_openssh().map_err(AccessKeyError::Key)?;
        files::write_atomically(&keys.private, private.as_bytes(), 0o600)
            .map_err(io("write", &keys.private))?;
        files::write_atomically(&keys.public, format!("{public}\n").as_bytes(), 0o644)
            .map_err(io("write", &keys.public))?;
        Ok(keys)
    }

    /// Catalyst's private key file.
    pub fn private(&self) -> &Path {
        &self.private
    }

    /// The lines of `authorized_keys`: Catalyst's key and each valid `*.pub` of the owner. Read
    /// anew each time, since the owner may have made a key meanwhile.
    pub fn authorized(&self) -> Vec<String> {
        let mut files = vec![self.public.clone()];
        let own = fs::read_dir(&self.owner_ssh).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut own: Vec<PathBuf> = own.filter(|path| path.extension().is_some_and(|e| e == "pub")).collect();
        own.sort();
        files.extend(own);
        files.iter().take(MAX_KEYS).filter_map(|path| read_key(path)).collect()
    }
}

/// The key in a file, if there is one and it is one.
fn read_key(path: &Path) -> Option<String> {
    let bytes = files::read_bounded(path, MAX_SIZE).ok()?;
    let text = std::str::from_utf8(&bytes).ok()?.trim();
    let known = ssh_key::PublicKey::from_openssh(text).is_ok();
    (known && !text.contains('\n')).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_owners_keys_and_ours_may_log_in_and_junk_may_not() {
        let state = tempfile::tempdir().unwrap();
        let home = tempfile::tempdir().unwrap();
        fs::create_dir(home.path().join(".ssh")).unwrap();
        let own = new_key(Algorithm::Ed25519, "me@desk").unwrap().public_key().to_openssh().unwrap();
        fs::write(home.path().join(".ssh/id_ed25519.pub"), format!("{own}\n")).unwrap();
        fs::write(home.path().join(".ssh/junk.pub"), "ssh-ed25519 nonsense").unwrap();
        fs::write(home.path().join(".ssh/two.pub"), format!("{own}\n{own}\n")).unwrap();
        let keys = AccessKeys::open(state.path(), home.path()).unwrap();
        let again = AccessKeys::open(state.path(), home.path()).unwrap();
        assert_eq!(keys.authorized(), again.authorized());
        assert_eq!(keys.authorized().len(), 2);
        assert!(keys.authorized().contains(&own));
        assert_eq!(keys.private().metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
}
