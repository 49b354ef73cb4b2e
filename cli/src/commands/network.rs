//! `network …`

use std::process::ExitCode;

use catalyst_api::NetworkInfo;

use super::Context;
use crate::Outcome;
use crate::args::Network;
use crate::output;
use crate::table::{Cell, Table, Tone};

/// Runs a `network` command.
pub fn run(context: &Context, command: Network) -> Outcome {
    let client = context.client()?;
    match command {
        Network::Show => {
            let network = client.network()?;
            if context.json {
                output::json(&network)?;
            } else {
                output::print(&description(&network).render(output::colours()))?;
            }
        }
        Network::Down => {
            client.network_down()?;
            output::info("Took down the network of the VMs; the next power-on sets it up again");
            if context.json {
                output::json(&client.network()?)?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn description(network: &NetworkInfo) -> Table {
    let mut pairs = Table::pairs();
    let state = if network.up { Cell::toned("up", Tone::Good) } else { Cell::toned("down", Tone::Faint) };
    pairs.pair("State", state);
    pairs.pair("Bridge", &network.bridge);
    pairs.pair("Subnet", &network.subnet);
    pairs.pair("Gateway", &network.gateway);
    if let Some(pid) = network.dnsmasq_pid {
        pairs.pair("DHCP and DNS", format!("dnsmasq, pid {pid}"));
    }
    pairs.pair("Leases", network.leases.to_string());
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_that_is_down_says_so() {
        let network = NetworkInfo {
            bridge: "catalyst0".to_owned(),
            subnet: "10.87.0.0/24".to_owned(),
            gateway: "10.87.0.1".to_owned(),
            up: false,
            dnsmasq_pid: None,
            leases: 3,
        };
        let text = description(&network).render(false);
        assert!(text.starts_with("State    down\n") && text.ends_with("Leases   3\n"), "{text}");
    }
}
