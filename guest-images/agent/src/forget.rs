//! Forgetting who the guest is, before its disk becomes others': keys, ids and logs of its own.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::session::Config;
use crate::{set_up, users};

/// Files below the root that are of one guest alone.
const FILES: &[&str] = &[
    "etc/docker/key.json",
    "var/lib/docker/engine-id",
    "var/lib/dbus/machine-id",
    "var/lib/systemd/random-seed",
    set_up::NOTE,
    set_up::SCRIPT,
    set_up::LOG,
];
/// Files below a user's home: who may log in, and what was typed.
const OF_USERS: &[&str] = &[".ssh/authorized_keys", ".bash_history"];
const HOST_KEYS: &str = "etc/ssh";
const JOURNALS: &str = "var/log/journal";
const BLOCK: usize = 64 * 1024;

/// Takes them away, and overwrites them before: what is deleted alone stays in free blocks of the disk.
pub fn forget(config: &Config) -> io::Result<()> {
    let root = &config.root;
    let mut files: Vec<PathBuf> = FILES.iter().map(|name| root.join(name)).collect();
    files.extend(keys_of_host(&root.join(HOST_KEYS)));
    for home in users::homes(root) {
        let home = root.join(home.trim_start_matches('/'));
        files.extend(OF_USERS.iter().map(|name| home.join(name)));
        files.push(home.join(".ssh").join(set_up::FURTHER_KEYS));
    }
    for file in files {
        wipe(&file).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", file.display())))?;
    }
    match fs::remove_dir_all(root.join(JOURNALS)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if !config.files_only() {
        nix::unistd::sync();
    }
    Ok(())
}

fn keys_of_host(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let is_key =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("ssh_host_"));
    entries.map(|entry| entry.path()).filter(is_key).collect()
}

/// Fills a file with zeros and deletes it. A link is deleted, and what it leads to left alone: users make links.
fn wipe(path: &Path) -> io::Result<()> {
    let opened = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    match opened {
        Ok(mut file) => {
            let about = file.metadata()?;
            if about.is_file() && about.nlink() == 1 {
                let zeros = vec![0; BLOCK];
                let mut left = usize::try_from(about.len()).unwrap_or(usize::MAX);
                while left > 0 {
                    let length = left.min(BLOCK);
                    file.write_all(&zeros[..length])?;
                    left -= length;
                }
                file.sync_all()?;
            }
        }
        // Nothing there, no folder above it, a link, a FIFO that nobody reads.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => return Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENXIO | libc::EISDIR)) => {}
        Err(error) => return Err(error),
    }
    match fs::remove_file(path) {
        Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::IsADirectory) => {
            Err(error)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_overwritten_and_gone_and_the_rest_stays() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        for folder in ["etc/ssh", "etc/docker", "home/ann/.ssh", "var/log/journal/0123", "var/lib/catalyst"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        fs::write(root.join("etc/passwd"), "ann:x:1:1::/home/ann:/bin/sh\nbob:x:2:2::/home/bob:/bin/sh\n")
            .unwrap();
        let key = root.join("etc/ssh/ssh_host_ed25519_key");
        let keys = root.join("home/ann/.ssh/authorized_keys");
        let own = root.join("home/ann/.ssh/id_ed25519");
        let config = root.join("etc/ssh/sshd_config");
        // A guest that was cut off while its commands ran.
        let commands = root.join(set_up::SCRIPT);
        for path in [&key, &keys, &own, &config, &commands] {
            fs::write(path, "SECRET").unwrap();
        }
        let other = root.join("etc/elsewhere");
        fs::write(&other, "stays").unwrap();
        std::os::unix::fs::symlink(&other, root.join("home/ann/.bash_history")).unwrap();
        let mut held = fs::File::open(&key).unwrap();
        forget(&Config::of_files(root)).unwrap();
        let mut text = String::new();
        io::Read::read_to_string(&mut held, &mut text).unwrap();
        assert_eq!(text, "\0\0\0\0\0\0");
        assert!(!key.exists() && !keys.exists() && !root.join("home/ann/.bash_history").exists());
        assert!(!commands.exists());
        assert!(own.exists() && config.exists() && !root.join("var/log/journal").exists());
        assert_eq!(fs::read_to_string(other).unwrap(), "stays");
    }
}
