//! User-data: what a new guest is to be set up with, in a part of cloud-init's `#cloud-config` (its "NoCloud" source), or as a
//! shell script. It is read here, typed and whole, so that what is wrong is told when the VM is made.

mod cloud_config;
pub mod host;

use catalyst_agent_protocol::SetUp;
use catalyst_agent_protocol::set_up::{Content, NewFile};
use thiserror::Error;

/// Longest text, in bytes.
pub const MAX_SIZE: usize = 256 * 1024;
/// Most bytes of all files together, as they are written.
const MAX_CONTENT: usize = 4 << 20;
/// Most users, and most keys of one.
const MAX_USERS: usize = 64;
/// Most files, and most commands.
const MAX_ITEMS: usize = 256;
/// Where a script lies in the guest.
const SCRIPT: &str = "/var/lib/catalyst/user-data.sh";

/// Why a text is no user-data.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum UserDataError {
    /// It is too long.
    #[error("The user-data has {0} bytes; at most {MAX_SIZE} are possible")]
    TooLong(usize),
    /// It is something else.
    #[error(
        "The user-data is neither a '#cloud-config' nor a script: its first line says which, '#cloud-config' or '#!…'"
    )]
    Kind,
    /// A line of it is wrong.
    #[error("The user-data is wrong in line {line}: {what}")]
    Line {
        /// Which.
        line: u64,
        /// What is wrong.
        what: String,
    },
    /// It is wrong as a whole.
    #[error("The user-data is wrong: {0}")]
    Whole(String),
    /// There is too much of something.
    #[error("The user-data has {count} {what}; at most {most} are possible")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
        /// The most.
        most: usize,
    },
}

/// What a text asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserData {
    /// The guest's own name.
    pub hostname: Option<String>,
    /// The rest, for no instance yet.
    pub set_up: SetUp,
}

impl UserData {
    /// Reads a text.
    pub fn parse(text: &str) -> Result<Self, UserDataError> {
        if text.len() > MAX_SIZE {
            return Err(UserDataError::TooLong(text.len()));
        }
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        if text.starts_with("#!") {
            return Ok(Self::script(text));
        }
        if text.lines().next().is_none_or(|line| line.trim_end() != "#cloud-config") {
            return Err(UserDataError::Kind);
        }
        let data = cloud_config::parse(text)?;
        data.check()?;
        Ok(data)
    }

    fn script(text: &str) -> Self {
        let file = NewFile {
            path: SCRIPT.to_owned(),
            content: Content(text.as_bytes().to_vec()),
            owner: ("root".to_owned(), "root".to_owned()),
            mode: 0o700,
            append: false,
        };
        let commands = vec![SCRIPT.to_owned()];
        Self { hostname: None, set_up: SetUp { files: vec![file], commands, ..SetUp::default() } }
    }

    fn check(&self) -> Result<(), UserDataError> {
        let SetUp { users, authorized_keys, files, commands, .. } = &self.set_up;
        let keys = users.iter().map(|user| user.authorized_keys.len()).chain([authorized_keys.len()]);
        let content: usize = files.iter().map(|file| file.content.0.len()).sum();
        for (what, count, most) in [
            ("users", users.len(), MAX_USERS),
            ("keys of one user", keys.max().unwrap_or(0), MAX_USERS),
            ("files", files.len(), MAX_ITEMS),
            ("commands", commands.len(), MAX_ITEMS),
            ("bytes in files", content, MAX_CONTENT),
        ] {
            if count > most {
                return Err(UserDataError::TooMany { what, count, most });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(text: &str) -> String {
        UserData::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn a_script_is_run_as_it_is() {
        let data = UserData::parse("#!/bin/sh\necho hi\n").unwrap();
        assert_eq!(data.set_up.files[0].content.0, b"#!/bin/sh\necho hi\n");
        assert_eq!(
            (data.set_up.files[0].mode, data.set_up.commands.as_slice()),
            (0o700, [SCRIPT.to_owned()].as_slice())
        );
    }

    #[test]
    fn what_is_something_else_or_too_much_is_told() {
        for text in ["", "hello", "users: []\n", "#cloud-boothook\n", "#include\nhttp://x\n"] {
            assert!(wrong(text).contains("'#cloud-config'"), "{text:?}");
        }
        assert!(wrong(&"x".repeat(MAX_SIZE + 1)).contains("262145 bytes"));
        let many = "- 'true'\n".repeat(MAX_ITEMS + 1);
        assert!(wrong(&format!("#cloud-config\nruncmd:\n{many}")).contains("257 commands"));
    }
}
