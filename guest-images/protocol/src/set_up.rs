//! What a guest is set up with, once: users, keys, files, commands. It goes to the guest as a file of JSON, since it may be
//! longer than a frame.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Where the host puts the document in the guest; the agent takes it away.
pub const DOCUMENT: &str = "/run/catalyst-set-up.json";
/// Longest document, in bytes.
pub const MAX_DOCUMENT: usize = 8 << 20;

/// The document.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SetUp {
    /// Which VM it was made for: a guest does it once for each.
    pub instance: String,
    /// Users that there are to be.
    pub users: Vec<NewUser>,
    /// More public keys for the user `catalyst`.
    pub authorized_keys: Vec<String>,
    /// Files, which are written when the users are there.
    pub files: Vec<NewFile>,
    /// Shell commands that come before, each by itself; they are not counted.
    pub preparation: Vec<String>,
    /// Pieces of one shell script, which is run when the guest has its network.
    pub commands: Vec<String>,
}

/// A user. One who is there already gets what is missing.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NewUser {
    /// Login name.
    pub name: String,
    /// Full name.
    pub gecos: String,
    /// Further groups; those that are not there are made.
    pub groups: Vec<String>,
    /// Login shell; else bash.
    pub shell: Option<String>,
    /// Hash of a password, as in shadow(5); else no password fits.
    pub password: Option<String>,
    /// Rules of sudoers(5), without the user's name.
    pub sudo: Vec<String>,
    /// Public keys.
    pub authorized_keys: Vec<String>,
}

// A hash never reaches a log.
impl std::fmt::Debug for NewUser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewUser").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A file.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewFile {
    /// Absolute path.
    pub path: String,
    /// What it holds.
    pub content: Content,
    /// Names of its user and group.
    pub owner: (String, String),
    /// Permission bits.
    pub mode: u32,
    /// Whether the content comes after what the file holds.
    #[serde(default)]
    pub append: bool,
}

// Content may be a secret.
impl std::fmt::Debug for NewFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewFile").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Bytes, in JSON as base64.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content(pub Vec<u8>);

impl Serialize for Content {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map(Self).map_err(de::Error::custom)
    }
}

/// How far a guest's setting up is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SetUpState {
    /// Not begun.
    #[default]
    Absent,
    /// Users and files are there; the commands run, or wait for the network.
    Commands,
    /// All is done.
    Done,
    /// It is over, and something failed.
    Failed,
}

/// What a guest says of its setting up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetUpReport {
    /// How far it is.
    pub state: SetUpState,
    /// What failed, with the end of the commands' output.
    #[serde(default)]
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_comes_back_with_every_byte() {
        let file = NewFile {
            path: "/x".into(),
            content: Content((0..=255).collect()),
            owner: ("root".into(), "root".into()),
            mode: 0o644,
            append: true,
        };
        let user = NewUser { name: "ann".into(), password: Some("$6$SECRET".into()), ..NewUser::default() };
        let document = SetUp {
            instance: "1".into(),
            users: vec![user],
            files: vec![file],
            commands: vec!["true".into()],
            ..SetUp::default()
        };
        let text = serde_json::to_string(&document).unwrap();
        assert_eq!(serde_json::from_str::<SetUp>(&text).unwrap(), document);
        assert!(!format!("{document:?}").contains("SECRET"));
    }
}
