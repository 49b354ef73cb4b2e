//! What the network keeps on disk: its settings in the state folder, and its traces of one boot below `/run`.
//!
//! Everything that a program running as root reads or runs (dnsmasq's configuration above all, which may name
//! programs) lies below `/run/catalyst`, which is root's, and nothing of it in the state folder, which is the
//! owner's: the owner of a daemon shall not become root through it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::address::Subnet;
use super::error::NetworkError;
use super::subnet::{HostRange, unfit};

/// The largest file that is read; all of ours are far smaller.
const FILE_LIMIT: u64 = 64 * 1024;

/// Name of the settings' file in the state folder.
const SETTINGS: &str = "network.json";

/// The bridge and subnet of one state folder, for good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub bridge: String,
    pub subnet: Subnet,
}

impl Settings {
    /// Reads the settings of `state_dir`; `None` where there are none yet.
    pub fn read(state_dir: &Path) -> Result<Option<Self>, NetworkError> {
        let path = state_dir.join(SETTINGS);
        let Some(text) = read_small(&path).map_err(NetworkError::file("read", &path))? else {
            return Ok(None);
        };
        let bad = |reason: String| NetworkError::BadState { path: path.clone(), reason };
        let settings: Self = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
        if !is_bridge_name(&settings.bridge) {
            return Err(bad(format!("{:?} is no bridge name", settings.bridge)));
        }
        if let Some(reason) = unfit(settings.subnet) {
            return Err(bad(format!("subnet {}: {reason}", settings.subnet)));
        }
        Ok(Some(settings))
    }

    /// Writes them so that a crash leaves the old ones or these.
    pub fn write(&self, state_dir: &Path) -> Result<(), NetworkError> {
        let path = state_dir.join(SETTINGS);
        let new = state_dir.join(format!(".{SETTINGS}.new"));
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| NetworkError::BadState { path: path.clone(), reason: error.to_string() })?;
        let write = || -> io::Result<()> {
            let mut file = File::create(&new)?;
            file.write_all(text.as_bytes())?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(state_dir)?.sync_all()
        };
        write().map_err(|error| {
            let _ = fs::remove_file(&new);
            NetworkError::file("write", &path)(error)
        })
    }
}

/// Whether `name` is a name that we give to a bridge: as the kernel's `dev_valid_name`, and plain enough for nft.
pub(crate) fn is_bridge_name(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
}

/// A reservation of a bridge and a subnet by a state folder, seen by the other daemons of this boot and namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Claim {
    pub state_dir: PathBuf,
    #[serde(flatten)]
    pub settings: Settings,
}

impl Claim {
    /// Its subnet, for the choice of another.
    pub fn range(&self) -> HostRange {
        let user = format!("network {} of {}", self.settings.bridge, self.state_dir.display());
        HostRange { subnet: self.settings.subnet, user }
    }
}

/// The folder of one network namespace below `/run/catalyst`.
///
/// It is named by the namespace's cookie (`SO_NETNS_COOKIE`, `socket(7)`), which is never used twice in one boot,
/// as the inode number of `/proc/self/ns/net` is; by that number where the kernel is older than 5.14.
#[derive(Debug, Clone)]
pub(crate) struct RunDir {
    root: PathBuf,
    namespace: PathBuf,
}

impl RunDir {
    /// The folder of the calling thread's network namespace below `root`. Creates nothing.
    pub fn of_this_namespace(root: &Path) -> io::Result<Self> {
        let name = match netns_cookie() {
            Ok(cookie) => format!("netns-{cookie}"),
            Err(_) => format!("netns-inode-{}", fs::metadata("/proc/thread-self/ns/net")?.ino()),
        };
        Ok(Self { root: root.to_owned(), namespace: root.join(name) })
    }

    /// Where the running parts of the network with that bridge keep their files.
    pub fn network(&self, bridge: &str) -> PathBuf {
        self.namespace.join("networks").join(bridge)
    }

    /// Where Docker's daemon on the network with that bridge keeps its files.
    pub fn docker(&self, bridge: &str) -> PathBuf {
        self.namespace.join("docker").join(bridge)
    }

    /// Where the host's forwarding settings of before are kept.
    pub fn forwarding(&self) -> PathBuf {
        self.namespace.join("forwarding")
    }

    /// Takes the lock under which daemons change the network of this machine; it is held as long as the file is
    /// open. Waits for others, who hold it for milliseconds: to be called where waiting is allowed.
    pub fn lock(&self) -> Result<File, NetworkError> {
        let path = self.lock_path();
        make_folder(&self.root).map_err(NetworkError::file("make", &self.root))?;
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = file.map_err(NetworkError::file("open", &path))?;
        file.lock().map_err(NetworkError::file("lock", &path))?;
        Ok(file)
    }

    /// The file of [`RunDir::lock`].
    pub fn lock_path(&self) -> PathBuf {
        self.root.join("network.lock")
    }

    /// The claims of other state folders. Those whose folder is gone are forgotten.
    pub fn claims_of_others(&self, state_dir: &Path) -> Vec<Claim> {
        let Ok(entries) = fs::read_dir(self.namespace.join("claims")) else { return Vec::new() };
        let mut claims = Vec::new();
        for path in entries.flatten().map(|entry| entry.path()) {
            let Some(claim) = read_claim(&path) else { continue };
            // Only whether it is there is asked: the folder belongs to somebody else.
            if fs::symlink_metadata(claim.state_dir.join(SETTINGS)).is_err() {
                let _ = fs::remove_file(&path);
            } else if claim.state_dir != state_dir {
                claims.push(claim);
            }
        }
        claims
    }

    /// Reserves bridge and subnet, replacing an older claim of the same state folder.
    pub fn claim(&self, claim: &Claim) -> Result<(), NetworkError> {
        let folder = self.namespace.join("claims");
        let path = folder.join(&claim.settings.bridge);
        let work = || -> io::Result<()> {
            make_folder(&self.root)?;
            make_folder(&self.namespace)?;
            make_folder(&folder)?;
            for old in fs::read_dir(&folder)?.flatten().map(|entry| entry.path()) {
                if old != path && read_claim(&old).is_some_and(|other| other.state_dir == claim.state_dir) {
                    fs::remove_file(old)?;
                }
            }
            match read_claim(&path) {
                Some(present) if present == *claim => Ok(()),
                _ => write_public(&path, &serde_json::to_string(claim)?),
            }
        };
        work().map_err(NetworkError::file("write", &path))
    }

    /// Makes and returns the folder of the network with that bridge.
    pub fn make_network(&self, bridge: &str) -> Result<PathBuf, NetworkError> {
        let folder = self.network(bridge);
        let work = || -> io::Result<()> {
            make_folder(&self.root)?;
            make_folder(&self.namespace)?;
            make_folder(&self.namespace.join("networks"))?;
            make_folder(&folder)
        };
        work().map_err(NetworkError::file("make", &folder))?;
        Ok(folder)
    }

    /// Removes the folder of the network with that bridge.
    pub fn remove_network(&self, bridge: &str) -> Result<(), NetworkError> {
        let folder = self.network(bridge);
        absent_is_fine(fs::remove_dir_all(&folder)).map_err(NetworkError::file("remove", &folder))?;
        // Still full where another network is up; then it stays.
        let _ = fs::remove_dir(self.namespace.join("networks"));
        Ok(())
    }
}

fn read_claim(path: &Path) -> Option<Claim> {
    let claim: Claim = serde_json::from_str(&read_small(path).ok()??).ok()?;
    is_bridge_name(&claim.settings.bridge).then_some(claim)
}

fn netns_cookie() -> io::Result<u64> {
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).map_err(io::Error::other)?;
    // SAFETY: the pointers are to a u64 and to its size; the kernel writes at most that much (net/core/sock.c,
    // SO_NETNS_COOKIE, which refuses any other length).
    let status = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if status == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Reads a regular file of at most [`FILE_LIMIT`] bytes as text; `None` if there is none.
pub(crate) fn read_small(path: &Path) -> io::Result<Option<String>> {
    read_bounded(path, FILE_LIMIT)
}

/// Reads a regular file of at most `limit` bytes as text; `None` if there is none.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> io::Result<Option<String>> {
    // Not blocking: whoever can put files there could put a pipe.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = match file {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() > limit {
        return Err(io::Error::other(format!("not a file of at most {limit} bytes")));
    }
    let mut text = String::new();
    file.take(limit).read_to_string(&mut text)?;
    Ok(Some(text))
}

/// Replaces a file that others may read, whole or not at all. Only for files below `/run`, hence without fsync.
/// The new file is made beside the folder, where nobody reads the folder's files half written.
pub(crate) fn write_public(path: &Path, text: &str) -> io::Result<()> {
    let new = unfinished(path)?;
    let mut file = File::create(&new)?;
    file.set_permissions(fs::Permissions::from_mode(0o644))?;
    file.write_all(text.as_bytes())?;
    fs::rename(&new, path)
}

/// Takes away what a [`write_public`] that was cut off has left.
pub(crate) fn remove_unfinished(path: &Path) -> io::Result<()> {
    absent_is_fine(fs::remove_file(unfinished(path)?))
}

fn unfinished(path: &Path) -> io::Result<PathBuf> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    Ok(folder.with_extension(format!("{}.new", name.to_string_lossy())))
}

/// Makes a folder that others may read, whatever the umask; its parent must be there.
pub(crate) fn make_folder(path: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o755).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
        Ok(()) => fs::set_permissions(path, fs::Permissions::from_mode(0o755)),
    }
}

/// Takes "there is none" for success.
pub(crate) fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_come_back_and_hostile_ones_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Settings::read(folder.path()).unwrap(), None);
        let settings = Settings { bridge: "catalyst0".to_owned(), subnet: "10.208.0.0/20".parse().unwrap() };
        settings.write(folder.path()).unwrap();
        assert_eq!(Settings::read(folder.path()).unwrap(), Some(settings));
        let path = folder.path().join(SETTINGS);
        for text in [
            String::new(),
            "{}".to_owned(),
            r#"{"bridge":"../x","subnet":"10.0.0.0/20"}"#.to_owned(),
            r#"{"bridge":"a\" ; flush ruleset","subnet":"10.0.0.0/20"}"#.to_owned(),
            r#"{"bridge":"catalyst0","subnet":"8.8.8.0/24"}"#.to_owned(),
            " ".repeat(100_000),
        ] {
            fs::write(&path, &text).unwrap();
            let error = Settings::read(folder.path()).unwrap_err().to_string();
            assert!(error.contains("network.json"), "{error}");
        }
    }

    #[test]
    fn a_pipe_in_place_of_the_settings_does_not_hang() {
        let folder = tempfile::tempdir().unwrap();
        nix::unistd::mkfifo(&folder.path().join(SETTINGS), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(Settings::read(folder.path()).is_err());
    }

    #[test]
    fn claims_of_vanished_state_folders_are_forgotten() {
        let root = tempfile::tempdir().unwrap();
        let run = RunDir::of_this_namespace(root.path()).unwrap();
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let settings =
            |bridge: &str| Settings { bridge: bridge.to_owned(), subnet: "10.208.0.0/20".parse().unwrap() };
        for (folder, bridge) in [(&one, "old"), (&one, "catalyst0"), (&two, "catalyst1")] {
            settings(bridge).write(folder.path()).unwrap();
            run.claim(&Claim { state_dir: folder.path().to_owned(), settings: settings(bridge) }).unwrap();
        }
        let bridges = |mine: &Path| -> Vec<String> {
            run.claims_of_others(mine).into_iter().map(|claim| claim.settings.bridge).collect()
        };
        assert_eq!(bridges(two.path()), ["catalyst0"]);
        assert_eq!(bridges(one.path()), ["catalyst1"]);
        let two = two.path().to_owned();
        fs::remove_dir_all(&two).unwrap();
        assert!(bridges(one.path()).is_empty());
    }

    #[test]
    fn bridge_names_are_what_kernel_and_nft_both_take() {
        for good in ["catalyst0", "a", "br-1_x", "abcdefghijklmno"] {
            assert!(is_bridge_name(good), "{good}");
        }
        for bad in ["", "0a", "a b", "a/b", "a.b", "abcdefghijklmnop", "\u{e9}", "a\"b", "-a"] {
            assert!(!is_bridge_name(bad), "{bad}");
        }
    }
}
