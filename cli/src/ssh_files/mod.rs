//! What `~/.ssh` says of VMs: blocks in `config`, keys in `known_hosts`.
//!
//! Both are the files themselves and not included ones: paramiko, by which docker-compose and Docker's Python SDK may
//! speak ssh, reads no `Include`, follows no `HostKeyAlias`, and docker 5.0 of Debian fails at a `ProxyCommand`. So a
//! block has the VM's address, and is written anew when that changes. Ours comes first in either file: ssh takes the
//! first value that it finds, paramiko the first key.

mod file;
mod marked;

use std::path::{Path, PathBuf};

use catalyst_api::SshInfo;
use nix::unistd::{User, geteuid};

use self::file::{EditError, Locked};
use self::marked::{Block, Damaged, Marked};

/// Ends our last block, so that what the user has before the first `Host` of their own holds for every host as before.
const TAIL: &str = "Host *\n";
/// What comes after the id in the name of a VM.
const DOMAIN: &str = "catalyst";
const CONFIG: &str = "config";
const KNOWN_HOSTS: &str = "known_hosts";

/// Why `~/.ssh` could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum SshFilesError {
    /// The user has no entry in the user database.
    #[error("cannot find the home of user {0}, which ssh looks for too; give it an entry in /etc/passwd")]
    NoHome(u32),
    /// A file.
    #[error("cannot change '{}'", .file.display())]
    Edit {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: PlainEdit,
    },
    /// What would have to stand there cannot.
    #[error("cannot write {what} '{text}' so that every program reads it alike; use: catalyst ssh {id}")]
    Unwritable {
        /// The VM.
        id: String,
        /// What.
        what: &'static str,
        /// The text.
        text: String,
    },
}

/// An [`EditError`] whose system error tells itself without its number.
#[derive(Debug, thiserror::Error)]
#[error("{}", match .0 { EditError::Io(error) => crate::error::plain_io(error), other => other.to_string() })]
pub struct PlainEdit(EditError);

/// A VM as these files name it.
#[derive(Debug)]
pub struct Login {
    /// Its id.
    pub id: String,
    /// Where it is and what is trusted.
    pub info: SshInfo,
}

/// The files of one user.
#[derive(Debug)]
pub struct SshFiles {
    folder: PathBuf,
    /// The folder of the daemon's VMs.
    of: String,
}

/// The name by which ssh knows a VM.
pub fn name(id: &str) -> String {
    format!("{id}.{DOMAIN}")
}

impl SshFiles {
    /// Those that ssh reads for the caller, which goes by the user database and not by HOME; `of` is the folder of the
    /// daemon's VMs.
    pub fn of_user(of: &str) -> Result<Self, SshFilesError> {
        let uid = geteuid();
        let user = User::from_uid(uid).ok().flatten().ok_or(SshFilesError::NoHome(uid.as_raw()))?;
        // It becomes part of a line.
        let of = of.trim_end_matches('/').replace(char::is_control, "?");
        Ok(Self { folder: user.dir.join(".ssh"), of })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether programs that go by HOME find these files.
    pub fn is_in_home(&self) -> bool {
        std::env::var_os("HOME").is_none_or(|home| Path::new(&home).join(".ssh") == self.folder)
    }

    /// Writes what is known of these VMs, and takes away what is of this daemon's others that are not in `all`. Says
    /// whether anything was another before.
    pub fn write(&self, logins: &[Login], all: &[String]) -> Result<bool, SshFilesError> {
        for login in logins {
            checked(login)?;
        }
        let Some(locked) = self.locked(true)? else { return Ok(false) };
        let change = |blocks: &mut Vec<Block>, lines: &dyn Fn(&Login) -> String| {
            blocks.retain(|block| block.of != self.of || all.contains(&block.vm));
            for login in logins {
                let new = Block { vm: login.id.clone(), of: self.of.clone(), lines: lines(login) };
                // Neither has a name two VMs, nor an address.
                let takes_its_place = |block: &Block| {
                    block.vm == new.vm || (block.lines != new.lines && has_word(block, &login.info.address))
                };
                let place = blocks.iter().position(takes_its_place).unwrap_or(blocks.len());
                blocks.retain(|block| !takes_its_place(block));
                blocks.insert(place.min(blocks.len()), new);
            }
        };
        let keys = self.edit(&locked, KNOWN_HOSTS, |blocks| change(blocks, &key_lines))?;
        Ok(self.edit(&locked, CONFIG, |blocks| change(blocks, &config_lines))? | keys)
    }

    /// Whether `config` may have a block of a VM of this id, whoever's.
    pub fn has(&self, id: &str) -> bool {
        std::fs::read(self.folder.join(CONFIG)).is_ok_and(|text| {
            Marked::parse(&text).is_ok_and(|marked| marked.blocks.iter().any(|block| block.vm == id))
        })
    }

    /// Puts another address where a VM has a block.
    pub fn moved(&self, id: &str, address: &str) -> Result<bool, SshFilesError> {
        let Some(locked) = self.locked(false)? else { return Ok(false) };
        let mut old = None;
        let ours = |block: &Block| block.vm == id && block.of == self.of;
        self.edit(&locked, CONFIG, |blocks| {
            old = blocks.iter().find(|block| ours(block)).and_then(host_name);
        })?;
        let Some(old) = old.filter(|old| old != address) else { return Ok(false) };
        let change = |blocks: &mut Vec<Block>| {
            blocks.retain(|block| ours(block) || !has_word(block, address));
            for block in blocks.iter_mut().filter(|block| ours(block)) {
                block.lines = replaced(&block.lines, &old, address);
            }
        };
        let keys = self.edit(&locked, KNOWN_HOSTS, change)?;
        Ok(self.edit(&locked, CONFIG, change)? | keys)
    }

    /// Takes away what these files have of VMs of this daemon.
    pub fn forget(&self, ids: &[String]) -> Result<bool, SshFilesError> {
        self.remove(|block| block.of == self.of && ids.contains(&block.vm))
    }

    /// Takes away what these files have of VMs of these ids, whoever's; of all without any.
    pub fn remove_named(&self, ids: &[String]) -> Result<bool, SshFilesError> {
        self.remove(|block| ids.is_empty() || ids.contains(&block.vm))
    }

    fn remove(&self, gone: impl Fn(&Block) -> bool) -> Result<bool, SshFilesError> {
        let Some(locked) = self.locked(false)? else { return Ok(false) };
        let config = self.edit(&locked, CONFIG, |blocks| blocks.retain(|block| !gone(block)))?;
        Ok(self.edit(&locked, KNOWN_HOSTS, |blocks| blocks.retain(|block| !gone(block)))? | config)
    }

    fn locked(&self, make: bool) -> Result<Option<Locked>, SshFilesError> {
        Locked::new(&self.folder, make).map_err(|error| self.failed("", error))
    }

    fn edit(
        &self,
        locked: &Locked,
        name: &str,
        mut change: impl FnMut(&mut Vec<Block>),
    ) -> Result<bool, SshFilesError> {
        let tail = if name == CONFIG { TAIL } else { "" };
        let edited = locked.edit(name, |old| {
            let mut marked = Marked::parse(old).map_err(|Damaged(line)| EditError::Damaged(line))?;
            change(&mut marked.blocks);
            Ok(marked.render(tail))
        });
        edited.map_err(|error| self.failed(name, error))
    }

    fn failed(&self, name: &str, error: EditError) -> SshFilesError {
        let file = if name.is_empty() { self.folder.clone() } else { self.folder.join(name) };
        SshFilesError::Edit { file, source: PlainEdit(error) }
    }
}

/// What cannot be written so that OpenSSH and paramiko read the same: quoting is not the same there, nor are tokens.
fn checked(login: &Login) -> Result<(), SshFilesError> {
    let unwritable = |what, text: &str| {
        Err(SshFilesError::Unwritable { id: login.id.clone(), what, text: text.to_owned() })
    };
    let key = &login.info.key_file;
    if key.contains(|c: char| c.is_control() || "\"\\%$".contains(c)) || !key.starts_with('/') {
        return unwritable("the key's path", key);
    }
    let plain = |word: &str| word.chars().all(|c| c.is_ascii_alphanumeric() || "-+/=.@".contains(c));
    match login
        .info
        .known_hosts
        .iter()
        .find(|line| key_of(line).is_none_or(|(kind, key)| !plain(kind) || !plain(key)))
    {
        Some(line) => unwritable("the host key", line),
        None => Ok(()),
    }
}

/// Kind and key of a line of known_hosts.
fn key_of(line: &str) -> Option<(&str, &str)> {
    let mut words = line.split_whitespace().skip(1);
    Some((words.next()?, words.next()?))
}

/// The VM's names: in lower case too, as URLs are read.
fn names(id: &str) -> Vec<String> {
    let name = name(id);
    let lower = name.to_lowercase();
    if lower == name { vec![name] } else { vec![name, lower] }
}

fn config_lines(login: &Login) -> String {
    let SshInfo { address, port, user, key_file, .. } = &login.info;
    let names = names(&login.id).join(" ");
    [
        format!("Host {names} {address}"),
        format!("  HostName {address}"),
        // Said although it is the usual one: docker-compose's paramiko asks for none otherwise.
        format!("  Port {port}"),
        format!("  User {user}"),
        format!("  IdentityFile \"{key_file}\""),
        "  IdentitiesOnly yes".to_owned(),
        "  PreferredAuthentications publickey".to_owned(),
        "  StrictHostKeyChecking yes".to_owned(),
        "  UserKnownHostsFile ~/.ssh/known_hosts".to_owned(),
        "  CheckHostIP no".to_owned(),
        "  UpdateHostKeys no".to_owned(),
        // What holds for all hosts of the user's is not the way to a VM of this machine.
        "  ProxyCommand none".to_owned(),
    ]
    .map(|line| line + "\n")
    .concat()
}

fn key_lines(login: &Login) -> String {
    let names = names(&login.id).join(",");
    let keys = login.info.known_hosts.iter().filter_map(|line| key_of(line));
    keys.map(|(kind, key)| format!("{names},{} {kind} {key}\n", login.info.address)).collect()
}

/// The address of a block of `config`.
fn host_name(block: &Block) -> Option<String> {
    let line = block.lines.lines().find_map(|line| line.trim().strip_prefix("HostName "))?;
    Some(line.trim().to_owned())
}

/// Whether a block names an address.
fn has_word(block: &Block, address: &str) -> bool {
    block.lines.split([' ', ',', '\n']).any(|word| word == address)
}

/// `lines` with a whole word replaced.
fn replaced(lines: &str, old: &str, new: &str) -> String {
    lines
        .split_inclusive([' ', ',', '\n'])
        .map(|word| {
            let bare = word.trim_end_matches([' ', ',', '\n']);
            if bare == old { word.replacen(old, new, 1) } else { word.to_owned() }
        })
        .collect()
}

#[cfg(test)]
mod tests;
