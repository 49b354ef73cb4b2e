//! `ssh`: the system's ssh, told where the VM is and how to trust it.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use catalyst_api::SshInfo;
use nix::unistd::geteuid;

use super::Context;
use crate::Outcome;
use crate::args::Ssh;
use crate::error::PlainIo;
use crate::host::Host;
use crate::progress::Board;
use crate::wait::Wait;

/// Why ssh could not be run.
#[derive(Debug, thiserror::Error)]
pub enum SshError {
    /// The key is not ours to read, or not here.
    #[error("cannot read the key '{}' of VM '{id}'; use ssh as the daemon's owner, on the daemon's machine", .file.display())]
    Key {
        /// The VM.
        id: String,
        /// The key.
        file: PathBuf,
        /// Why.
        source: PlainIo,
    },
    /// No place for the host keys.
    #[error("cannot write the host keys of VM '{id}' to '{}'", .file.display())]
    KnownHosts {
        /// The VM.
        id: String,
        /// The file.
        file: PathBuf,
        /// Why.
        source: PlainIo,
    },
    /// The daemon's answer is no place to log in to.
    #[error("the daemon named '{0}' as the address of the VM, which is none")]
    Address(String),
    /// No ssh.
    #[error("cannot run ssh, which is installed by: sudo apt install openssh-client")]
    Run(#[source] PlainIo),
}

/// Waits until sshd answers and becomes ssh: arguments, terminal and exit code are its own.
pub fn run(context: &Context, asked: &Ssh) -> Outcome {
    let client = context.client()?;
    let wait = Wait { client: &client, id: &asked.id, what: "ssh", limit: context.timeout };
    let info = wait.until(&Board::new(), |_| client.ssh(&asked.id).map(Some))?;
    Err(become_ssh(client.host(), &info, asked).into())
}

/// Only returns if it failed.
fn become_ssh(host: &Host, info: &SshInfo, asked: &Ssh) -> SshError {
    let prepared = usable(&asked.id, info).and_then(|()| write_known_hosts(&asked.id, host, info));
    match prepared {
        Ok(known_hosts) => {
            let error = Command::new("ssh").args(arguments(info, &known_hosts, asked)).exec();
            SshError::Run(PlainIo(error))
        }
        Err(error) => error,
    }
}

/// Whether the key is here, and the daemon's answer a place to log in to.
pub fn usable(id: &str, info: &SshInfo) -> Result<(), SshError> {
    readable(id, &info.key_file)?;
    checked(info)
}

fn readable(id: &str, key: &str) -> Result<(), SshError> {
    let file = PathBuf::from(key);
    match File::open(&file) {
        Ok(_) => Ok(()),
        Err(error) => Err(SshError::Key { id: id.to_owned(), file, source: PlainIo(error) }),
    }
}

/// Address and user become words of ssh's command line: they must not be options.
fn checked(info: &SshInfo) -> Result<(), SshError> {
    let user_is_plain = info.user.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && info.user.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    if user_is_plain && info.address.parse::<std::net::IpAddr>().is_ok() {
        Ok(())
    } else {
        Err(SshError::Address(format!("{}@{}", info.user, info.address)))
    }
}

/// ssh's words: who, where, and that the daemon's host keys are the only ones to trust.
fn arguments(info: &SshInfo, known_hosts: &Path, asked: &Ssh) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec!["-p".into(), info.port.to_string().into()];
    for option in [
        file_option("IdentityFile", Path::new(&info.key_file)),
        file_option("UserKnownHostsFile", known_hosts),
        "GlobalKnownHostsFile=/dev/null".into(),
        "StrictHostKeyChecking=yes".into(),
        // The keys stand there under the bare address, whatever the port.
        format!("HostKeyAlias={}", info.address).into(),
        "CheckHostIP=no".into(),
        "UpdateHostKeys=no".into(),
        "IdentitiesOnly=yes".into(),
        "PreferredAuthentications=publickey".into(),
        // An address may belong to another VM tomorrow: no connection outlives this command.
        "ControlPath=none".into(),
        "LogLevel=ERROR".into(),
    ] {
        words.extend(["-o".into(), option]);
    }
    words.push(format!("{}@{}", info.user, info.address).into());
    words.extend(asked.options.iter().cloned());
    if !asked.command.is_empty() {
        words.push("--".into());
        words.extend(asked.command.iter().cloned());
    }
    words
}

/// `NAME="FILE"` as ssh_config(5) reads it back: quoted, and with its tokens' sign doubled.
fn file_option(name: &str, file: &Path) -> OsString {
    let mut option = format!("{name}=\"").into_bytes();
    for &byte in file.as_os_str().as_bytes() {
        match byte {
            b'%' => option.push(b'%'),
            b'"' | b'\\' => option.push(b'\\'),
            _ => {}
        }
        option.push(byte);
    }
    option.push(b'"');
    OsString::from_vec(option)
}

/// Writes the VM's host keys where ssh finds them: one file for each daemon and VM, since this
/// program has become ssh when it could be removed.
fn write_known_hosts(id: &str, host: &Host, info: &SshInfo) -> Result<PathBuf, SshError> {
    let folder = runtime_folder();
    let daemon = host.to_string().replace(|c: char| !(c.is_ascii_alphanumeric() || "-.".contains(c)), "_");
    let file = folder.join(format!("known-hosts-{daemon}-{id}"));
    let mut text: String =
        info.known_hosts.iter().map(|line| line.replace(['\n', '\r'], " ") + "\n").collect();
    text.truncate(64 << 10);
    match own_folder(&folder).and_then(|()| replace(&folder, &file, text.as_bytes())) {
        Ok(()) => Ok(file),
        Err(error) => Err(SshError::KnownHosts { id: id.to_owned(), file, source: PlainIo(error) }),
    }
}

/// `$XDG_RUNTIME_DIR/catalyst`, or a folder of this user's under `/tmp`.
fn runtime_folder() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|folder| folder.is_absolute()) {
        Some(folder) if folder.is_dir() => folder.join("catalyst"),
        _ => std::env::temp_dir().join(format!("catalyst-{}", geteuid())),
    }
}

/// Makes the folder, or makes sure that it is this user's alone: in `/tmp` it could be anybody's.
fn own_folder(folder: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => return other,
    }
    let data = fs::symlink_metadata(folder)?;
    if data.is_dir() && data.uid() == geteuid().as_raw() && data.mode() & 0o022 == 0 {
        Ok(())
    } else {
        Err(io::Error::other("the folder belongs to somebody else; remove it"))
    }
}

fn replace(folder: &Path, file: &Path, data: &[u8]) -> io::Result<()> {
    let mut new = tempfile::NamedTempFile::new_in(folder)?;
    new.write_all(data)?;
    new.persist(file)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn info() -> SshInfo {
        SshInfo {
            address: "10.87.0.2".to_owned(),
            port: 22,
            user: "catalyst".to_owned(),
            key_file: "/keys/id".to_owned(),
            known_hosts: vec!["10.87.0.2 ssh-ed25519 AAAA\nevil ssh-rsa BBBB".to_owned()],
        }
    }

    #[test]
    fn options_come_after_the_host_and_the_command_last() {
        let asked = Ssh {
            id: "web1".to_owned(),
            options: vec!["-t".into()],
            command: vec!["ls".into(), "-l".into()],
        };
        let words = arguments(&info(), Path::new("/run/my files/known"), &asked);
        assert_eq!(words[words.len() - 5..], ["catalyst@10.87.0.2", "-t", "--", "ls", "-l"]);
        assert!(words.contains(&"UserKnownHostsFile=\"/run/my files/known\"".into()));
    }

    #[test]
    fn ssh_reads_odd_file_names_back() {
        let file = "/tmp/a b/100%/q\"\\x";
        let asked = Ssh { id: "web1".to_owned(), options: vec!["-G".into()], command: Vec::new() };
        let mut words = arguments(&SshInfo { key_file: file.to_owned(), ..info() }, Path::new(file), &asked);
        words.splice(0..0, ["-F".into(), "/dev/null".into()]);
        let output = match Command::new("ssh").args(words).output() {
            Ok(output) => output,
            Err(error) => return println!("SKIPPED: no ssh to ask ({error})"),
        };
        let settings = String::from_utf8(output.stdout.clone()).unwrap();
        assert!(settings.contains("userknownhostsfile /tmp/a b/100%/q\"\\x\n"), "{settings}{output:?}");
        // ssh -G of some versions shows this one before tokens are replaced.
        assert!(settings.contains("identityfile /tmp/a b/100%"), "{settings}");
        assert!(settings.contains("hostkeyalias 10.87.0.2\n"), "{settings}");
    }

    #[test]
    fn an_address_that_is_an_option_is_refused() {
        assert!(checked(&info()).is_ok());
        assert!(checked(&SshInfo { address: "-oProxyCommand=x".to_owned(), ..info() }).is_err());
        assert!(checked(&SshInfo { user: "-oProxyCommand=x".to_owned(), ..info() }).is_err());
    }

    #[test]
    fn a_folder_that_others_may_write_to_is_not_used() {
        let temp = tempfile::tempdir().unwrap();
        let folder = temp.path().join("catalyst");
        own_folder(&folder).unwrap();
        own_folder(&folder).unwrap();
        replace(&folder, &folder.join("f"), b"x").unwrap();
        assert_eq!(fs::read(folder.join("f")).unwrap(), b"x");
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(own_folder(&folder).is_err());
        let link = temp.path().join("link");
        std::os::unix::fs::symlink(temp.path(), &link).unwrap();
        assert!(own_folder(&link).is_err());
    }
}
