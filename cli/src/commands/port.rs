//! `port …`

use std::net::IpAddr;
use std::process::ExitCode;

use catalyst_api::{HostAddress, Port, PortName, PortState, PublishPort};

use super::{Context, for_each};
use crate::progress::Board;
use crate::table::{Cell, Table, Tone};
use crate::{Outcome, args, output};

/// Runs a `port` command.
pub fn run(context: &Context, command: args::Port) -> Outcome {
    match command {
        args::Port::Add { vm, port } => add(context, &vm, &port),
        args::Port::List { vm } => list(context, vm),
        args::Port::Remove { vm, ports } => remove(context, &vm, &ports),
    }
}

fn add(context: &Context, vm: &str, port: &PublishPort) -> Outcome {
    let made = context.client()?.publish(vm, port)?;
    told(vm, &made);
    if context.json {
        output::json(&made)?;
    } else {
        output::print(&format!("{}\n", made.host_port))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Tells people where a port is.
pub fn told(vm: &str, port: &Port) {
    output::info(&format!(
        "Published port {}/{} of VM '{vm}' on {}",
        port.guest_port,
        port.protocol,
        place(port)
    ));
}

fn list(context: &Context, vm: Option<String>) -> Outcome {
    let client = context.client()?;
    let one = vm.is_some();
    let ids = match vm {
        Some(vm) => vec![vm],
        None => client.vms(None)?.into_iter().filter(|vm| !vm.ports.is_empty()).map(|vm| vm.id).collect(),
    };
    let mut all = Vec::new();
    for id in ids {
        let ports = client.ports(&id)?;
        all.extend(ports.into_iter().map(|port| (id.clone(), port)));
    }
    if !context.json {
        output::print(&table(&all).render(output::colours()))?;
    } else if one {
        output::json(&all.iter().map(|(_, port)| port).collect::<Vec<_>>())?;
    } else {
        let with_vm = |(vm, port): &(String, Port)| serde_json::json!({ "vm": vm, "port": port });
        output::json(&all.iter().map(with_vm).collect::<Vec<_>>())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn table(all: &[(String, Port)]) -> Table {
    let mut table = Table::new(&["VM", "HOST", "GUEST", "STATE", "REASON"]);
    for (vm, port) in all {
        let tone = match port.state {
            PortState::Listening => Tone::Good,
            PortState::Waiting => Tone::Bad,
        };
        table.row(vec![
            Cell::from(vm),
            Cell::from(place(port)),
            Cell::from(format!("{}/{}", port.guest_port, port.protocol)),
            Cell::toned(port.state.as_str(), tone),
            Cell::from(port.reason.as_deref().unwrap_or_default()),
        ]);
    }
    table
}

fn remove(context: &Context, vm: &str, ports: &[PortName]) -> Outcome {
    let client = context.client()?;
    // Written as they are removed by, so that `for_each` can tell each by its name.
    let names: Vec<String> = ports.iter().map(ToString::to_string).collect();
    for_each(&names, &Board::new(), |name| {
        let Some(port) = ports.iter().find(|port| port.to_string() == name) else { return Ok(()) };
        client.unpublish(vm, port)?;
        output::info(&format!("Removed port {} of VM '{vm}'", name.replace('-', "/")));
        if context.json {
            output::json_line(&serde_json::json!({ "vm": vm, "port": name, "deleted": true }))?;
        }
        Ok(())
    })
}

/// Where a port is on the host.
fn place(port: &Port) -> String {
    match port.host_address {
        HostAddress::Ip(IpAddr::V6(ip)) => format!("[{ip}]:{}", port.host_port),
        address => format!("{address}:{}", port.host_port),
    }
}

/// A port in a list of several.
pub fn short(port: &Port) -> String {
    let waiting = if port.state == PortState::Waiting { " (waiting)" } else { "" };
    format!("{} to {}/{}{waiting}", place(port), port.guest_port, port.protocol)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_where_a_port_is_and_why_it_waits() {
        let port = |text: &str, reason: Option<&str>| {
            let PublishPort { host_port, guest_port, protocol, host_address } = text.parse().unwrap();
            let state = reason.map_or(PortState::Listening, |_| PortState::Waiting);
            let reason = reason.map(str::to_owned);
            ("web1".to_owned(), Port { host_address, host_port, guest_port, protocol, state, reason })
        };
        let all = [port("8000:80", None), port("[::1]:53:53/udp", Some("taken by nc\x1b[2J"))];
        assert_eq!(
            table(&all).render(false),
            "VM    HOST            GUEST   STATE      REASON\n\
             web1  localhost:8000  80/tcp  listening\n\
             web1  [::1]:53        53/udp  waiting    taken by nc [2J\n"
        );
        assert_eq!(short(&all[1].1), "[::1]:53 to 53/udp (waiting)");
    }
}
