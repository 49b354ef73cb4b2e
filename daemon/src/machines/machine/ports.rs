//! What a VM publishes: in its file, and on the host.

use catalyst_api::PublishPort;
use tokio::sync::oneshot;

use super::Machine;
use crate::ports::error::PortError;

/// See [`super::Command::Ports`].
#[derive(Debug)]
pub(in crate::machines) enum PortsCommand {
    /// The reply is the port as it is published.
    Publish { port: PublishPort, reply: oneshot::Sender<Result<PublishPort, PortError>> },
    /// Takes one back that is published.
    Unpublish { port: PublishPort, reply: oneshot::Sender<Result<(), PortError>> },
}

impl Machine {
    pub(super) async fn ports(&mut self, command: PortsCommand) {
        // Whoever asked may have gone.
        match command {
            PortsCommand::Publish { port, reply } => {
                let result = self.publish(port).await;
                drop(reply.send(self.told(result)));
            }
            PortsCommand::Unpublish { port, reply } => {
                let result = self.unpublish(port).await;
                drop(reply.send(self.told(result)));
            }
        }
    }

    async fn publish(&mut self, port: PublishPort) -> Result<PublishPort, PortError> {
        let (dir, address) = (self.shared.dir(), self.shared.address());
        let (vmx, mut config) = dir.read()?;
        let made = self.context.ports.publish(dir.id(), address, &[port]).await?;
        config.ports.extend(&made);
        if let Err(error) = dir.write(vmx, &config) {
            for port in &made {
                self.context.ports.unpublish(dir.id(), port).await;
            }
            return Err(error.into());
        }
        self.shared.facts().config = Some(config);
        made.first().copied().ok_or(PortError::Stopping)
    }

    async fn unpublish(&mut self, port: PublishPort) -> Result<(), PortError> {
        let dir = self.shared.dir();
        let (vmx, mut config) = dir.read()?;
        config.ports.retain(|known| *known != port);
        dir.write(vmx, &config)?;
        self.shared.facts().config = Some(config);
        self.context.ports.unpublish(dir.id(), &port).await;
        Ok(())
    }

    /// Opens the ports that the file names now, since clients rewrite it at will.
    pub(super) async fn open_ports(&self) {
        let ports = self.shared.facts().config.as_ref().map(|config| config.ports.clone());
        self.context
            .ports
            .open(self.shared.dir().id(), self.shared.address(), &ports.unwrap_or_default())
            .await;
    }
}
