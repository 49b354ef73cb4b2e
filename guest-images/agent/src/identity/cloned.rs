//! What tells a clone of a running guest from its original, beyond its names and addresses.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use catalyst_agent_protocol::Identity;
use nix::mount::{MsFlags, mount};

use super::random::uuid;
use crate::files::overwrite;
use crate::session::Config;
use crate::spawn::with_ordinary_priority;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Where a user puts programs that are run in each clone before anybody reaches it.
const HOOKS: &str = "etc/catalyst/clone.d";
const HOOK_SECONDS: &str = "60";
const OWN_BOOT_ID: &str = "/run/catalyst/boot_id";

/// Gives the guest another boot_id and another Docker engine id.
pub fn apply(config: &Config) -> io::Result<()> {
    if !config.files_only() {
        boot_id()?;
    }
    let docker = config.root.join("var/lib/docker");
    if docker.is_dir() {
        overwrite(&docker.join("engine-id"), uuid()?.as_bytes(), 0o600, None)?;
    }
    // Up to Docker 20.10 this key is the engine's id; without it dockerd makes another at its start.
    match fs::remove_file(config.root.join("etc/docker/key.json")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The kernel's boot_id lies in its memory, which is the original's: another is mounted over it.
fn boot_id() -> io::Result<()> {
    let own = Path::new(OWN_BOOT_ID);
    if let Some(folder) = own.parent() {
        fs::create_dir_all(folder)?;
    }
    // In place, not replaced: a clone of a clone has this very file mounted.
    fs::write(own, format!("{}\n", uuid()?))?;
    let (file, shown) = (fs::metadata(own)?, fs::metadata(BOOT_ID)?);
    if (file.dev(), file.ino()) != (shown.dev(), shown.ino()) {
        mount(Some(own), BOOT_ID, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    }
    Ok(())
}

/// Runs what a user has put into the folder for clones, in the order of names, each for at most [`HOOK_SECONDS`]. What it
/// writes goes to the agent's log. The first that fails ends it: a clone that is not what it is to be reaches nobody.
pub fn run_hooks(config: &Config, identity: &Identity) -> Result<(), String> {
    let folder = config.root.join(HOOKS);
    let Ok(entries) = fs::read_dir(&folder) else { return Ok(()) };
    let mut hooks: Vec<PathBuf> =
        entries.flatten().map(|entry| entry.path()).filter(|path| runs(path)).collect();
    hooks.sort();
    for hook in hooks {
        let status = with_ordinary_priority(&mut Command::new("timeout"))
            .arg(HOOK_SECONDS)
            .arg(&hook)
            .stdin(Stdio::null())
            .env("CATALYST_NAME", &identity.hostname)
            .env("CATALYST_ADDRESS", identity.address.to_string())
            .env("CATALYST_MAC", &identity.mac)
            .status();
        let shown = hook.display();
        match status {
            Ok(status) if status.success() => {}
            Ok(status) => return Err(format!("the clone's hook {shown} failed: {status}")),
            Err(error) => return Err(format!("the clone's hook {shown} cannot be run: {error}")),
        }
    }
    Ok(())
}

/// Whether it is a program; what an editor left behind is none.
fn runs(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let plain = !name.starts_with('.') && !name.ends_with('~');
    plain && fs::metadata(path).is_ok_and(|about| about.is_file() && about.mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    fn in_mounts_of_its_own() {
        let private = || {
            unshare(CloneFlags::CLONE_NEWNS)?;
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
            mount(Some("none"), "/run", Some("tmpfs"), MsFlags::empty(), none)
        };
        if let Err(error) = private() {
            println!("SKIPPED: no mount namespace can be made: {error}");
            return;
        }
        let read = || fs::read_to_string(BOOT_ID).unwrap();
        let original = read();
        boot_id().unwrap();
        let clone = read();
        assert_eq!(clone.len(), original.len());
        assert_ne!(clone, original);
        boot_id().unwrap();
        assert_ne!(read(), clone);
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        assert_eq!(mounts.matches(BOOT_ID).count(), 1, "mounts do not pile up");
    }

    #[test]
    fn a_clone_shows_another_boot_id() {
        // A mount namespace made by a thread is that thread's, and ends with it.
        thread::spawn(in_mounts_of_its_own).join().unwrap();
    }
}
