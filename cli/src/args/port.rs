//! `port …`

use catalyst_api::{PortName, PublishPort};
use clap::Subcommand;

use super::PORT;
use crate::names;

/// `port …`
#[derive(Debug, Subcommand)]
pub enum Port {
    /// Publish a port of the guest, and print the port of this machine; it is kept until it is removed
    Add {
        /// The VM
        #[arg(value_parser = names::vm_id)]
        vm: String,
        /// Where it is to be, and the guest's port: 8080:80, 0.0.0.0:8080:80, 53:53/udp; 0:80 lets the daemon choose
        #[arg(value_name = PORT)]
        port: PublishPort,
    },
    /// List the published ports of a VM, or of all
    #[command(visible_alias = "ls")]
    List {
        /// The VM
        #[arg(value_parser = names::vm_id)]
        vm: Option<String>,
    },
    /// Take published ports back, and end what goes through them
    #[command(visible_alias = "rm")]
    Remove {
        /// The VM
        #[arg(value_parser = names::vm_id)]
        vm: String,
        /// The ports of this machine: 8080, 53/udp, 0.0.0.0:8080
        #[arg(required = true, value_name = "[ADDRESS:]PORT[/PROTOCOL]")]
        ports: Vec<PortName>,
    },
}
