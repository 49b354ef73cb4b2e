//! Taking over what an earlier daemon left of a VM: its process, and what was begun with its files.

use catalyst_api::VmState;

use super::super::{start, suspend};
use super::Machine;
use crate::store::files;

impl Machine {
    /// Takes over the process that an earlier daemon left, if there is one.
    pub(super) async fn adopt(&mut self) {
        self.shared.facts().unadopted = false;
        let dir = self.shared.dir().clone();
        self.sweep();
        if crate::engine::process::is_held(&dir.run()) {
            // One that answers late is not off.
            self.shared.enter(VmState::PoweringOn, Some("its process is being found again".to_owned()));
        }
        let user = crate::engine::vm_user(self.shared.address());
        match self.context.engines.adopt(dir.clone(), user).await {
            // It was saved, or was being put together from what was saved, and has not run since.
            Ok(Some(process)) if suspend::still(&dir) == VmState::Suspended => {
                start::end(process.as_ref()).await;
                dir.forget_standing();
                self.shared.enter(VmState::Suspended, None);
            }
            Ok(Some(process)) => {
                // One that was to go on does, and one that was being started when its daemon was killed begins.
                let begins = dir.began().is_none();
                let goes_on = begins || dir.standing().exists();
                let state = match process.is_running().await {
                    Ok(false) if goes_on && process.resume().await.is_ok() => VmState::PoweredOn,
                    Ok(false) => VmState::Paused,
                    _ => VmState::PoweredOn,
                };
                dir.forget_standing();
                self.attach(process, dir.begins().filter(|_| begins));
                self.shared.enter(state, None);
                // The name server that an earlier daemon started is watched by this one from now on.
                if self.shared.container().is_none()
                    && let Err(error) = self.context.network.up().await
                {
                    let reason = crate::http::error::chain(&error).join(": ");
                    tracing::error!(reason, "the VM network cannot be used");
                }
            }
            Ok(None) => {
                // It ended while it was looked for, where it was there at all.
                if suspend::still(&dir) == VmState::Suspended || self.shared.state() == VmState::PoweringOn {
                    self.shared.enter(suspend::still(&dir), None);
                }
                if self.shared.state() == VmState::PoweredOff
                    && let Ok(reason) = files::read_bounded(&dir.reason(), 4096)
                {
                    self.shared.facts().reason = Some(String::from_utf8_lossy(&reason).into_owned());
                }
            }
            Err(error) => {
                let reason = crate::http::error::chain(&error).join(": ");
                self.shared.facts().unadopted = true;
                self.shared.enter(VmState::Blocked, Some(reason));
            }
        }
    }

    /// Ends what a daemon that was killed had begun with the VM's files.
    fn sweep(&self) {
        let dir = self.shared.dir();
        let swept = dir.finish_restoring().and_then(|()| dir.sweep_snapshots());
        if let Err(error) = swept.and_then(|()| dir.collect_layers()) {
            let reason = crate::http::error::chain(&error).join(": ");
            tracing::warn!(vm = %dir.id(), reason, "what an earlier daemon left stays");
        }
    }

    /// Tries again to take over a process that could not be before.
    pub(super) async fn adopt_again(&mut self) {
        if self.shared.facts().unadopted {
            self.adopt().await;
            if !self.shared.facts().unadopted && self.process.is_none() {
                self.shared.enter(VmState::PoweredOff, None);
            }
        }
    }
}
