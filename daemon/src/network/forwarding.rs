//! The host's IPv4 forwarding: switched on for the first network of a namespace, put back by the last.
//!
//! Writing `ip_forward` changes more than itself (Documentation/networking/ip-sysctl.rst: the change "resets all
//! configuration parameters to their default state"): each interface's `forwarding`, and `accept_redirects` of all.
//! So those are kept too. What was before is written down before anything changes, each network leaves a mark, and
//! only the last `down` puts things back: a crash anywhere between leaves files from which the next one goes on.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::NetworkError;
use super::state::{absent_is_fine, make_folder, read_small, remove_unfinished, write_public};

const SYSCTL: &str = "/proc/sys/net/ipv4";

/// The host's settings of before.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Before {
    ip_forward: bool,
    accept_redirects: bool,
    /// By interface.
    forwarding: BTreeMap<String, bool>,
}

/// Switches forwarding on for the network with that bridge. `folder` is [`super::state::RunDir::forwarding`], its
/// parent must be there; to be called under the lock and as root.
pub(crate) fn enable(folder: &Path, bridge: &str) -> Result<(), NetworkError> {
    let before = folder.join("before");
    let note = || -> io::Result<()> {
        make_folder(folder)?;
        if !before.exists() {
            write_public(&before, &serde_json::to_string(&Before::read()?)?)?;
        }
        write_public(&folder.join(mark(bridge)), "")
    };
    note().map_err(NetworkError::file("write", &before))?;
    let path = Path::new(SYSCTL).join("ip_forward");
    if read_switch(&path).map_err(NetworkError::file("read", &path))? {
        return Ok(());
    }
    fs::write(&path, "1").map_err(NetworkError::file("write", &path))
}

/// Takes the mark of the network with that bridge away and, if no other network is left, puts the host's settings
/// back, unless somebody else has come to need them. `bridges` are the bridges there are: the mark of one that somebody removed
/// by hand counts for nothing. To be called under the lock and as root.
pub(crate) fn disable(
    folder: &Path,
    bridge: &str,
    bridges: &[String],
    needed: bool,
) -> Result<(), NetworkError> {
    let own = folder.join(mark(bridge));
    absent_is_fine(fs::remove_file(&own)).map_err(NetworkError::file("remove", &own))?;
    let before_path = folder.join("before");
    for path in [&own, &before_path] {
        remove_unfinished(path).map_err(NetworkError::file("remove what is left of", path))?;
    }
    let Some(text) = read_small(&before_path).map_err(NetworkError::file("read", &before_path))? else {
        // Nothing was changed before that was written; at most the folder was made.
        let _ = fs::remove_dir(folder);
        return Ok(());
    };
    if bridges.iter().any(|other| other != bridge && folder.join(mark(other)).exists()) {
        return Ok(());
    }
    // Root's own file, written whole: not to be read only if somebody else changed it. Then nothing is put back.
    if let Ok(before) = serde_json::from_str::<Before>(&text)
        && !needed
    {
        before.put_back().map_err(|(path, source)| NetworkError::File { verb: "write", path, source })?;
    }
    fs::remove_dir_all(folder).map_err(NetworkError::file("remove", folder))
}

/// Whether forwarding was off before Catalyst's networks, which have switched it on.
pub(crate) fn set_by_us(folder: &Path) -> bool {
    let text = read_small(&folder.join("before")).ok().flatten();
    text.and_then(|text| serde_json::from_str::<Before>(&text).ok()).is_some_and(|before| !before.ip_forward)
}

fn mark(bridge: &str) -> String {
    format!("for-{bridge}")
}

impl Before {
    fn read() -> io::Result<Self> {
        let mut forwarding = BTreeMap::new();
        for entry in fs::read_dir(Path::new(SYSCTL).join("conf"))?.flatten() {
            // An interface that vanishes meanwhile has nothing to be put back.
            if let Ok(on) = read_switch(&entry.path().join("forwarding")) {
                forwarding.insert(entry.file_name().to_string_lossy().into_owned(), on);
            }
        }
        Ok(Self {
            ip_forward: read_switch(&Path::new(SYSCTL).join("ip_forward"))?,
            accept_redirects: read_switch(&Path::new(SYSCTL).join("conf/all/accept_redirects"))?,
            forwarding,
        })
    }

    /// Puts back what switching on has changed; the path that could not be written on failure.
    fn put_back(&self) -> Result<(), (PathBuf, io::Error)> {
        if self.ip_forward {
            return Ok(());
        }
        let write = |path: PathBuf, on: bool| {
            fs::write(&path, if on { "1" } else { "0" }).map_err(|error| (path, error))
        };
        write(Path::new(SYSCTL).join("ip_forward"), false)?;
        write(Path::new(SYSCTL).join("conf/all/accept_redirects"), self.accept_redirects)?;
        for (interface, on) in &self.forwarding {
            let path = Path::new(SYSCTL).join("conf").join(interface).join("forwarding");
            if *on && interface != "all" && path.exists() {
                write(path, true)?;
            }
        }
        Ok(())
    }
}

fn read_switch(path: &Path) -> io::Result<bool> {
    Ok(fs::read_to_string(path)?.trim() != "0")
}
