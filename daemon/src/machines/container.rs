//! VMs that are containers (docs/CONTAINERS.md): made for a process of their engine's, in its network and cgroups, gone with it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::thread;

use catalyst_api::{ContainerInfo, CreateVm};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::error::CreateError;
use crate::engine::{MAX_NICS, Nic};
use crate::network::tap;
use crate::privilege::as_root;
use crate::store::config::MICRO;
use crate::store::container::Container;

/// What the MAC addresses of such a VM's NICs begin with; the agent gives them others.
const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0xca, 0x7a, 0x00];

/// What the MAC address of NIC `number` is until its guest is told another: the same in the template and in all VMs that go on from it.
pub(crate) fn mac(number: usize) -> [u8; 6] {
    let mut mac = MAC;
    mac[5] = u8::try_from(number).unwrap_or(u8::MAX);
    mac
}

/// What is asked for a container, of which there is little choice.
pub(super) fn check(request: &CreateVm, info: ContainerInfo) -> Result<Container, CreateError> {
    let CreateVm { parent, source, template, disk_gib, publish, user_data, proxy, ca_certificates, .. } =
        request;
    let of_micro = template.as_deref().is_none_or(|name| name == MICRO);
    let more =
        parent.is_some() || source.is_some() || disk_gib.is_some() || user_data.is_some() || proxy.is_some();
    if !of_micro || more || !publish.is_empty() || !ca_certificates.is_empty() {
        return Err(CreateError::Container);
    }
    let pid = info.pid;
    Container::of_running(info).ok_or(CreateError::NoRuntime(pid))
}

/// All NICs of a container's VM, their taps in the network namespace of its engine's process: `cattap0` and so on, not up.
pub(super) fn nics(container: &Container) -> io::Result<Vec<Nic>> {
    let path = format!("/proc/{}/ns/net", container.info.pid);
    let namespace = as_root(|| File::open(path))?;
    // The number may have become another process's before it was opened.
    if !container.is_running() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "its process has ended"));
    }
    // A thread of its own, which ends there.
    let made = thread::spawn(move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        let nic = |number| Ok(Nic { tap: tap::in_this_namespace()?.fd, mac: mac(number) });
        (0..MAX_NICS).map(nic).collect()
    });
    made.join().unwrap_or_else(|_| Err(io::Error::other("the thread that made its taps failed")))
}

/// The process that is a container to its engine.
#[derive(Debug)]
pub(super) struct Runtime(AsyncFd<OwnedFd>);

impl Runtime {
    /// `None` if it has ended.
    pub(super) fn of(container: &Container) -> io::Result<Option<Self>> {
        let Some(pid) = i32::try_from(container.info.pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if !container.is_running() {
            return Ok(None);
        }
        // SAFETY: the descriptor is owned by the AsyncFd and stays the same one until it is dropped.
        Ok(Some(Self(unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?)))
    }

    /// Waits for its end.
    pub(super) async fn ended(&self) {
        // An error of the runtime means that the daemon itself is stopping.
        if self.0.readable().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
