//! Firewalls that come up, or are loaded anew, while VMs run: the kernel tells of each change of nftables' rules, and
//! then the bridge is let through again.
//!
//! Rules of the old iptables-legacy are told of by nobody: those are seen at the next power-on. Debian's `iptables`,
//! which Docker and ufw use, is the one on nftables.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use rtnetlink::sys::{Socket, protocols};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep, timeout_at};

use super::Network;
use super::nat;

/// `NFNLGRP_NFTABLES` of `<linux/netfilter/nfnetlink.h>`.
const GROUP: u32 = 7;
/// A firewall comes up in many steps: it is looked at when there was none for so long,
const QUIET: Duration = Duration::from_millis(250);
/// or after so long at the latest.
const LIMIT: Duration = Duration::from_secs(3);
/// After a look that changed something: a program that takes out what we put in shall not keep a processor busy.
const PAUSE: Duration = Duration::from_secs(2);
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(30);

impl Network {
    /// Lets the bridge through firewalls that come up while the network is there. Never returns; the daemon runs it
    /// beside everything else. Wakes up for changes of nftables' rules only.
    pub async fn keep_admitted(&self) {
        let changes = match Changes::listen() {
            Ok(changes) => changes,
            Err(error) => {
                tracing::warn!(%error, "firewalls that come up later are looked at when a VM is powered on");
                return std::future::pending().await;
            }
        };
        // The generation that was looked at.
        let mut seen = None;
        loop {
            if let Err(error) = changes.settled().await {
                tracing::warn!(%error, "cannot watch nftables' rules");
                sleep(PAUSE_AFTER_FAILURE).await;
                continue;
            }
            let now = nat::generation().ok();
            if now.is_some() && now == seen {
                continue;
            }
            match self.admit_again().await {
                Ok(true) => sleep(PAUSE).await,
                Ok(false) => seen = now,
                Err(error) => {
                    tracing::warn!(%error, "guests may be kept from the network by another firewall");
                    sleep(PAUSE_AFTER_FAILURE).await;
                }
            }
        }
    }
}

/// What the kernel tells of changes of nftables' rules in this network namespace.
struct Changes(AsyncFd<Listening>);

struct Listening(Socket);

impl AsRawFd for Listening {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Changes {
    fn listen() -> io::Result<Self> {
        let mut socket = Socket::new(protocols::NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.add_membership(GROUP)?;
        socket.set_non_blocking(true)?;
        // SAFETY: a socket is open, and the same descriptor, until the AsyncFd drops it.
        let socket = unsafe { AsyncFd::register_with_interest(Listening(socket), Interest::READABLE)? };
        Ok(Self(socket))
    }

    /// Waits for a change, and then until they end.
    async fn settled(&self) -> io::Result<()> {
        self.next().await?;
        let limit = Instant::now() + LIMIT;
        while let Ok(next) = timeout_at(limit.min(Instant::now() + QUIET), self.next()).await {
            next?;
        }
        Ok(())
    }

    /// Waits for one, or for more than the kernel had room for. What it says in particular does not matter.
    async fn next(&self) -> io::Result<()> {
        let read = |socket: &Listening| match socket.0.recv_from_full() {
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
            other => other.map(drop),
        };
        self.0.async_io(Interest::READABLE, read).await
    }
}
