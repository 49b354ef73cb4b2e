//! Starting dnsmasq again when it ends unasked: running guests have no other name server.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Network;
use super::process::Process;

/// Time between the end of a dnsmasq, or a failed start, and the next start: one that ends at once shall not keep a
/// processor busy.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(30);

impl Network {
    /// Brings the network up again whenever its dnsmasq ends and it was not [`Network::down`] that ended it. Never
    /// returns; the daemon runs it beside everything else. Wakes up for such an end only. Watches from the first
    /// [`Network::up`] of this process on.
    pub async fn keep_serving(&self) {
        let mut serving = self.inner.serving.subscribe();
        loop {
            let Ok(process) = serving.wait_for(Option::is_some).await.map(|process| process.clone()) else {
                // The sender lives as long as self.
                return std::future::pending().await;
            };
            let Some(process) = process else { continue };
            tokio::select! {
                ended = ended(&process) => if let Err(error) = ended {
                    tracing::warn!(%error, "cannot watch dnsmasq: it will be looked after at the next power-on");
                    let _ = serving.changed().await;
                    continue;
                },
                _ = serving.changed() => continue,
            }
            tracing::warn!(bridge = self.bridge(), "dnsmasq ended; starting it again");
            tokio::time::sleep(PAUSE).await;
            // A power-on may have been faster, and a down may have come since.
            while self.inner.serving.borrow().as_ref().is_some_and(|now| Arc::ptr_eq(now, &process)) {
                let Err(error) = self.up().await else { break };
                tracing::warn!(%error, "guests have neither names nor new addresses");
                tokio::time::sleep(PAUSE_AFTER_FAILURE).await;
            }
        }
    }
}

async fn ended(process: &Process) -> io::Result<()> {
    let pidfd = process.pidfd()?;
    // SAFETY: an OwnedFd is open, and the same descriptor, until the AsyncFd drops it.
    let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE)? };
    pidfd.readable().await.map(|_| ())
}
