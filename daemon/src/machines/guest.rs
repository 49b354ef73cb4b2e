//! What others may want of a guest: its address, a login, a command in it.

use std::sync::Arc;

use catalyst_api::SshInfo;

use super::error::GuestError;
use super::shared::Shared;
use super::{Machines, has_guest};
use crate::store::identity::Identity;
use catalyst_agent_link::{AgentLink, ExecSession, ExecSpec};

/// The login of the bundled image.
pub const USER: &str = "catalyst";

impl Machines {
    fn guest(&self, id: &str) -> Result<Arc<Shared>, GuestError> {
        let shared = self.get(id)?;
        let state = shared.state();
        if has_guest(state) {
            Ok(shared)
        } else {
            Err(GuestError::State { id: shared.dir().id().clone(), state })
        }
    }

    /// The guest's address, once it holds it: the agent says so, or it answers ARP.
    pub async fn address(&self, id: &str) -> Result<std::net::Ipv4Addr, GuestError> {
        let shared = self.guest(id)?;
        let lease = shared.lease();
        let guest = shared.guest();
        if let Some(container) = shared.container() {
            let not_ready = |missing| GuestError::NotReady { id: shared.dir().id().clone(), missing };
            return match container.info.address {
                Some(std::net::IpAddr::V4(address)) if guest.agent => Ok(address),
                Some(std::net::IpAddr::V4(_)) => Err(not_ready("its agent has not said hello yet")),
                _ => Err(not_ready("it is a container that has no IPv4 address")),
            };
        }
        // An agent that ends says so; of other guests it is known only that they had it once.
        let holds = (guest.identity && guest.agent)
            || (!guest.agent && self.context().network.answers_arp(lease.address, lease.mac).await);
        if holds {
            Ok(lease.address)
        } else {
            let id = shared.dir().id().clone();
            Err(GuestError::NotReady { id, missing: "it does not hold its address yet" })
        }
    }

    /// What `ssh` needs, once sshd answers.
    pub async fn ssh(&self, id: &str) -> Result<SshInfo, GuestError> {
        let shared = self.guest(id)?;
        if shared.special().is_some() {
            return Err(GuestError::NoAgent(shared.dir().id().clone()));
        }
        let address = self.address(id).await?.to_string();
        let id = shared.dir().id().clone();
        if shared.guest().agent && !shared.guest().ssh {
            return Err(GuestError::NotReady { id, missing: "its SSH server does not answer yet" });
        }
        let identity = Identity::load_or_generate(&shared.dir().identity()).map_err(|error| {
            GuestError::Io { what: "read the host keys", id, source: std::io::Error::other(error) }
        })?;
        let known_hosts = identity.host_keys.iter().map(|key| format!("{address} {}", key.public)).collect();
        Ok(SshInfo {
            address,
            port: 22,
            user: USER.to_owned(),
            key_file: self.context().access_keys.private().display().to_string(),
            known_hosts,
        })
    }

    /// The link to the agent, once it has said hello.
    pub fn agent(&self, id: &str) -> Result<AgentLink, GuestError> {
        let shared = self.guest(id)?;
        if shared.is_foreign() {
            return Err(GuestError::NoAgent(shared.dir().id().clone()));
        }
        match shared.agent() {
            Some(link) if shared.guest().agent => Ok(link),
            _ => Err(GuestError::NotReady {
                id: shared.dir().id().clone(),
                missing: "its agent has not said hello yet",
            }),
        }
    }

    /// Starts a command in the guest.
    pub async fn exec(&self, id: &str, request: ExecSpec) -> Result<ExecSession, GuestError> {
        let link = self.agent(id)?;
        let id = self.get(id)?.dir().id().clone();
        link.exec(request).await.map_err(|source| GuestError::Agent { id, source })
    }
}
