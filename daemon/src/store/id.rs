//! VM ids: what may be one.

use std::fmt;

use thiserror::Error;

/// Longest id. A host name label has at most 63 octets (RFC 1035 section 2.3.4).
pub const MAX_LEN: usize = 63;

/// Ids that would be ambiguous: `/api/vms/power/{id}` overlaps `/api/vms/{id}/…`
/// (AppCatalyst reference section 1.1).
const RESERVED: [&str; 1] = ["power"];

/// Why a string is no VM id.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum IdError {
    /// Nothing there.
    #[error("A VM id is empty; give it a name such as 'web1'")]
    Empty,
    /// Too long.
    #[error("A VM id has {0} characters; at most {MAX_LEN} are possible")]
    TooLong(usize),
    /// A character that could leave the folder, or a host name cannot carry.
    #[error(
        "The VM id {0:?} has characters other than letters, digits, '-', '_' and '.', or does not start and end with a letter or digit"
    )]
    Characters(String),
    /// A word of the API.
    #[error("The VM id '{0}' is a word of the API; choose another")]
    Reserved(String),
}

/// A checked VM id: safe as a folder name, an URL segment and, nearly, a host name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmId(String);

impl VmId {
    /// Checks `id`: 1 to 63 ASCII letters, digits, `-`, `_`, `.`, with a letter or digit at both ends.
    pub fn parse(id: &str) -> Result<Self, IdError> {
        if id.is_empty() {
            return Err(IdError::Empty);
        }
        if id.len() > MAX_LEN {
            return Err(IdError::TooLong(id.chars().count()));
        }
        let inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = id.as_bytes();
        if !bytes.iter().all(|&byte| inner(byte)) || !ends(bytes.first()) || !ends(bytes.last()) {
            return Err(IdError::Characters(id.to_owned()));
        }
        if RESERVED.iter().any(|word| id.eq_ignore_ascii_case(word)) {
            return Err(IdError::Reserved(id.to_owned()));
        }
        Ok(Self(id.to_owned()))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usual_ids_pass() {
        for id in ["web1", "Web_1.test", "vagrant-4ab1", "a"] {
            assert_eq!(VmId::parse(id).unwrap().as_str(), id);
        }
        assert!(VmId::parse(&"a".repeat(63)).is_ok());
    }

    #[test]
    fn what_could_leave_the_folder_or_the_url_is_refused() {
        for id in ["", "..", ".", "/", "a/b", "../x", "-a", "a-", "a b", "a\0b", "é", "power", "POWER", "a\n"]
        {
            assert!(VmId::parse(id).is_err(), "{id:?}");
        }
        assert_eq!(VmId::parse(&"a".repeat(300)), Err(IdError::TooLong(300)));
    }
}
