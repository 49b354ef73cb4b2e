//! Why a port is not published.

use std::io;
use std::net::SocketAddr;

use catalyst_api::{Protocol, PublishPort};
use thiserror::Error;

use crate::access::port_holder::PortHolder;
use crate::machines::error::UnknownVm;
use crate::store::{ConfigError, StoreError, VmId};

/// Why a port of a guest could not be published on the host, or taken back.
#[derive(Debug, Error)]
pub enum PortError {
    /// No such VM.
    #[error(transparent)]
    Unknown(#[from] UnknownVm),
    /// The guest's port cannot be one.
    #[error("A guest's port is 1 to 65535, not 0")]
    GuestPort,
    /// It is named in no form that is known.
    #[error("{0}")]
    Form(String),
    /// Too many.
    #[error(transparent)]
    TooMany(#[from] ConfigError),
    /// A VM of ours has it.
    #[error(
        "Port {port} of the host is published for the VM '{vm}' already; choose another, or run: catalyst port remove {vm} {name}"
    )]
    Published {
        /// The port, as `8080/tcp`.
        port: String,
        /// Whose it is.
        vm: VmId,
        /// What it is removed by.
        name: String,
    },
    /// The daemon's own REST API has it.
    #[error("Cannot listen on {address}: this daemon answers there itself; choose another port of the host")]
    Own {
        /// The address.
        address: SocketAddr,
    },
    /// A program has it.
    #[error(
        "Cannot listen on {address} ({protocol}): the port is taken by {holder}, or choose another port of the host"
    )]
    Taken {
        /// The address.
        address: SocketAddr,
        /// Of what.
        protocol: Protocol,
        /// Who has it.
        holder: PortHolder,
    },
    /// The host keeps it from users.
    #[error(
        "Port {port} of the host is root's: its owner can publish from {least} on; choose another, or let users have it: sysctl net.ipv4.ip_unprivileged_port_start={port}"
    )]
    Privileged {
        /// The port.
        port: u16,
        /// The first that users may have.
        least: u16,
    },
    /// The host does not have that address.
    #[error("The host has no address {0}; ip address shows those that it has")]
    NoAddress(std::net::IpAddr),
    /// Another reason.
    #[error("Cannot listen on {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The VM does not publish it.
    #[error("The VM '{vm}' publishes no port {name} of the host; see: catalyst port list {vm}")]
    NotPublished {
        /// The VM.
        vm: VmId,
        /// What was asked for.
        name: String,
    },
    /// It is at several addresses.
    #[error("The VM '{vm}' publishes {name} at several addresses; say which: {first}, say")]
    Ambiguous {
        /// The VM.
        vm: VmId,
        /// What was asked for.
        name: String,
        /// One that would do.
        first: String,
    },
    /// It could not be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The daemon is stopping.
    #[error("The daemon is stopping")]
    Stopping,
}

impl PortError {
    /// A VM of ours has it: which, and by what it is removed.
    pub(super) fn published(vm: &VmId, port: &PublishPort) -> Self {
        Self::Published {
            port: format!("{}/{}", port.host_port, port.protocol),
            vm: vm.clone(),
            name: super::name_of(port).to_string(),
        }
    }
}
