//! NetworkManager, which otherwise takes the taps of VMs for cables to configure: bridge and taps are unmanaged there,
//! by a file that lasts until the next boot (NetworkManager.conf(5), "unmanaged-devices").
//!
//! The file is there before the bridge, and wherever NetworkManager is installed: it may be started later.

use std::fs;
use std::path::{Path, PathBuf};

use super::beside::{ask, mark, owns_the_system, program};
use super::state::{absent_is_fine, read_small, write_public};

const RUN: &str = "/run/NetworkManager";

/// Has NetworkManager leave the bridge and all taps of ours alone. Waits.
pub(super) fn keep_away(bridge: &str) {
    if program("NetworkManager").is_none() || !owns_the_system() {
        return;
    }
    if is_kept_away(bridge) {
        return;
    }
    let (path, text) = (file(bridge), text(bridge));
    let folder = Path::new(RUN).join("conf.d");
    match fs::create_dir_all(&folder).and_then(|()| write_public(&path, &text)) {
        Ok(()) => reload(),
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "NetworkManager is not told of the bridge");
        }
    }
}

/// Whether NetworkManager is told to.
pub(super) fn is_kept_away(bridge: &str) -> bool {
    owns_the_system() && read_small(&file(bridge)).is_ok_and(|old| old == Some(text(bridge)))
}

/// Takes that back. Waits.
pub(super) fn withdraw(bridge: &str) {
    let path = file(bridge);
    if !owns_the_system() || !path.exists() {
        return;
    }
    match absent_is_fine(fs::remove_file(&path)) {
        Ok(()) => reload(),
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "NetworkManager is still told of the bridge");
        }
    }
}

fn file(bridge: &str) -> PathBuf {
    Path::new(RUN).join("conf.d").join(format!("catalyst-{bridge}.conf"))
}

/// `+=`: what other files say of other devices stays.
fn text(bridge: &str) -> String {
    format!(
        "# {}\n[keyfile]\nunmanaged-devices+=interface-name:{bridge};interface-name:cattap*\n",
        mark(bridge)
    )
}

/// One that does not run reads the file when it starts.
fn reload() {
    let Some(nmcli) = program("nmcli") else { return };
    if let Err(said) = ask(&nmcli, &["general", "reload", "conf"]) {
        tracing::debug!(%said, "NetworkManager does not read its files again");
    }
}
