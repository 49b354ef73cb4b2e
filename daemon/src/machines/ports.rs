//! Ports of guests on the host, as clients ask for them.

use catalyst_api::{Port, PortName, PublishPort};

use super::Machines;
use super::machine::{Command, PortsCommand};
use crate::ports::error::PortError;

impl Machines {
    /// The published ports of a VM. Those that could not be had are tried again.
    pub async fn ports(&self, id: &str) -> Result<Vec<Port>, PortError> {
        let shared = self.get(id)?;
        self.0.ports.retry(shared.dir().id()).await;
        Ok(self.0.ports.list(shared.dir().id()))
    }

    /// Publishes a port of a VM's guest.
    pub async fn publish(&self, id: &str, port: PublishPort) -> Result<Port, PortError> {
        let publish = |reply| Command::Ports(PortsCommand::Publish { port, reply });
        let (shared, made) = self.ask(id, PortError::Stopping, publish).await?;
        let made = made?;
        let is_it = |port: &Port| {
            (port.host_port, port.protocol, port.host_address)
                == (made.host_port, made.protocol, made.host_address)
        };
        // It may be gone again.
        self.0.ports.list(shared.dir().id()).into_iter().find(is_it).ok_or(PortError::Stopping)
    }

    /// Takes a published port back, and ends what goes through it.
    pub async fn unpublish(&self, id: &str, name: &str) -> Result<(), PortError> {
        let shared = self.get(id)?;
        let name: PortName = name.parse().map_err(PortError::Form)?;
        let port = self.0.ports.find(shared.dir().id(), &name)?;
        let unpublish = |reply| Command::Ports(PortsCommand::Unpublish { port, reply });
        self.ask(id, PortError::Stopping, unpublish).await?.1
    }
}
