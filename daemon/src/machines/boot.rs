//! VMs and the host's own life: which are powered on when it has started, and how they end when it is shut down.

use std::path::Path;

use catalyst_api::{PowerOp, VmState};
use futures_util::StreamExt;

use super::Machines;
use super::error::PowerError;
use super::machine::Command;
use crate::http::error::chain;
use crate::store::files;

/// In the state folder: the start of the host for which VMs were powered on.
const FILE: &str = "boot";
/// The number of this start of the host (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// How many are powered on at a time.
const AT_ONCE: usize = 4;
/// Why a VM is off whose guest had to be ended.
const ENDED: &str = "the host was shut down, and the guest did not shut down in time";

impl Machines {
    /// Powers on the VMs that are to be on when the host has started, once for each start of the host.
    pub async fn autostart(&self, state_dir: &Path) {
        let file = state_dir.join(FILE);
        let Ok(boot) = std::fs::read(BOOT_ID) else { return };
        if files::read_bounded(&file, 64).is_ok_and(|last| last == boot) {
            return;
        }
        let wanted = self.list(&[]).into_iter().filter(|vm| vm.view().autostart);
        futures_util::stream::iter(wanted)
            .for_each_concurrent(AT_ONCE, async |vm| {
                let id = vm.dir().id().as_str();
                match self.power(id, PowerOp::On, false).await {
                    Ok(_) => tracing::info!(vm = id, "powered on with the host"),
                    Err(error) => {
                        let reason = chain(&error).join(": ");
                        tracing::error!(vm = id, reason, "not powered on with the host");
                    }
                }
            })
            .await;
        if let Err(error) = files::write_atomically(&file, &boot, 0o600) {
            tracing::warn!(path = %file.display(), %error, "VMs will be powered on again by the next daemon");
        }
    }

    /// Shuts all guests down, at once, and ends those that do not within the time that a guest has for it.
    pub async fn shut_down(&self) {
        let all = self.running().into_iter().map(|vm| async move {
            let id = vm.dir().id().as_str();
            if vm.state() == VmState::Paused {
                // What stands cannot shut down; if it cannot go on, it is ended.
                let _ = self.power(id, PowerOp::Unpause, false).await;
            }
            if let Err(error) = self.power(id, PowerOp::Shutdown, false).await {
                let reason = chain(&error).join(": ");
                tracing::warn!(vm = id, reason, "it is ended");
                if let Err(error) = self.end(id, ENDED).await {
                    tracing::error!(vm = id, reason = chain(&error).join(": "), "it is not ended");
                }
            }
        });
        futures_util::future::join_all(all).await;
    }

    async fn end(&self, id: &str, reason: &'static str) -> Result<(), PowerError> {
        self.ask(id, PowerError::Stopping, |reply| Command::End { reason, reply }).await?.1
    }
}
