//! What makes one VM differ from the next inside the guest: machine-id and SSH host keys.
//!
//! The daemon makes them (design decision 6), so that nothing is generated on the way up.

use std::io;
use std::path::Path;

use catalyst_agent_protocol::HostKey;
use rand::RngCore;
use serde::{Deserialize, Serialize};
use ssh_key::{Algorithm, EcdsaCurve, LineEnding, PrivateKey};
use thiserror::Error;

use super::files;

/// Largest identity file that is read, in bytes.
const MAX_SIZE: usize = 64 * 1024;

/// Why a VM's identity could not be had.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// The file is there but cannot be used.
    #[error(
        "Cannot read the VM's identity {path}; restore it, or remove it to give the VM new SSH host keys"
    )]
    Read {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It could not be written.
    #[error("Cannot write the VM's identity {path}")]
    Write {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A key could not be made.
    #[error("Cannot make an SSH host key")]
    Key(#[source] ssh_key::Error),
}

/// The identity of one VM, fixed for its life.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// `/etc/machine-id`: 32 hexadecimal digits (machine-id(5)).
    pub machine_id: String,
    /// SSH host keys.
    pub host_keys: Vec<HostKey>,
}

impl Identity {
    /// Makes a new one.
    pub fn generate() -> Result<Self, IdentityError> {
        let mut id = [0_u8; 16];
        rand::rng().fill_bytes(&mut id);
        // machine-id(5) asks for the form of a version 4 UUID.
        id[6] = (id[6] & 0x0f) | 0x40;
        id[8] = (id[8] & 0x3f) | 0x80;
        let machine_id = id.iter().map(|byte| format!("{byte:02x}")).collect();
        let host_keys =
            [("ed25519", Algorithm::Ed25519), ("ecdsa", Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 })]
                .into_iter()
                .map(|(kind, algorithm)| host_key(kind, algorithm))
                .collect::<Result<_, _>>()
                .map_err(IdentityError::Key)?;
        Ok(Self { machine_id, host_keys })
    }

    /// Reads the identity in the file `path`, or makes one and writes it there (mode 0600).
    pub fn load_or_generate(path: &Path) -> Result<Self, IdentityError> {
        let shown = || path.display().to_string();
        match files::read_bounded(path, MAX_SIZE) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| IdentityError::Read { path: shown(), source: error.into() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let identity = Self::generate()?;
                let bytes = serde_json::to_vec_pretty(&identity).map_err(io::Error::from);
                bytes
                    .and_then(|bytes| files::write_atomically(path, &bytes, 0o600))
                    .map_err(|source| IdentityError::Write { path: shown(), source })?;
                Ok(identity)
            }
            Err(source) => Err(IdentityError::Read { path: shown(), source }),
        }
    }
}

fn host_key(kind: &str, algorithm: Algorithm) -> Result<HostKey, ssh_key::Error> {
    let key = new_key(algorithm, "catalyst")?;
    Ok(HostKey {
        kind: kind.to_owned(),
        private: key.to_openssh(LineEnding::LF)?.to_string(),
        public: key.public_key().to_openssh()?,
    })
}

/// Makes an SSH key with `comment`.
pub fn new_key(algorithm: Algorithm, comment: &str) -> Result<PrivateKey, ssh_key::Error> {
    let mut key = PrivateKey::random(&mut ssh_key::rand_core::OsRng, algorithm)?;
    key.set_comment(comment);
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_made_once_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("identity.json");
        let first = Identity::load_or_generate(&path).unwrap();
        let again = Identity::load_or_generate(&path).unwrap();
        assert_eq!(first.machine_id, again.machine_id);
        assert_eq!(first.host_keys[1].private, again.host_keys[1].private);
        assert_ne!(first.machine_id, Identity::generate().unwrap().machine_id);
        assert!(first.host_keys[0].public.starts_with("ssh-ed25519 "));
        assert!(first.host_keys[1].public.starts_with("ecdsa-sha2-nistp256 "));
    }

    #[test]
    fn a_damaged_identity_is_an_error_not_a_new_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("identity.json");
        std::fs::write(&path, "{").unwrap();
        assert!(matches!(Identity::load_or_generate(&path), Err(IdentityError::Read { .. })));
    }

    #[test]
    fn a_private_key_is_not_in_the_debug_text() {
        let identity = Identity::generate().unwrap();
        assert!(!format!("{identity:?}").contains("PRIVATE"));
    }
}
