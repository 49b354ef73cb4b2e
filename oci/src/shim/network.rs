//! The container's network: the interfaces in its network namespace, as the guest is to have them, and their way to the VM's NICs.
//!
//! The interface keeps its address: Docker's resolver asks others by it, from ports that are set apart. All else that comes goes to
//! the VM's tap, and what comes from the tap goes out by the interface.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::process::Stdio;
use std::time::Duration;

use catalyst_agent_protocol::container::{Interface, Network, Route};
use futures_util::{Stream, StreamExt, TryStreamExt};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::{Handle, LinkUnspec, MulticastGroup};
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use crate::failure::{Outcome, Tried, said};

/// How long nothing must have changed before the guest is told of a change, and how long that is waited for.
const SETTLING: Duration = Duration::from_millis(60);
const SETTLING_LIMIT: Duration = Duration::from_secs(1);
/// NICs that a VM has.
const NICS: u8 = 4;
/// What the daemon calls the VM's taps, with the NIC's number.
const TAP: &str = "cattap";
/// Ports of the namespace itself; the guest's own end below.
const OWN_PORTS: (u16, u16) = (60_000, 60_999);

/// What is in the namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    links: Vec<Link>,
    routes: Vec<(u32, Route)>,
    taps: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Link {
    index: u32,
    name: String,
    mac: String,
    mtu: u32,
    addresses: Vec<String>,
}

/// Looks at the namespace.
async fn look(handle: &Handle) -> Outcome<Seen> {
    let what = || "list the network interfaces of the container".to_owned();
    let fail = |error: rtnetlink::Error| std::io::Error::other(error.to_string());
    let links: Vec<LinkMessage> =
        handle.link().get().execute().try_collect().await.map_err(fail).tried(what)?;
    let addresses: Vec<AddressMessage> =
        handle.address().get().execute().try_collect().await.map_err(fail).tried(what)?;
    let mut routes = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut wanted = RouteMessage::default();
        wanted.header.address_family = family;
        let some: Vec<RouteMessage> =
            handle.route().get(wanted).execute().try_collect().await.map_err(fail).tried(what)?;
        routes.extend(some);
    }
    Ok(seen(&links, &addresses, &routes))
}

fn seen(links: &[LinkMessage], addresses: &[AddressMessage], routes: &[RouteMessage]) -> Seen {
    let mut seen = Seen::default();
    for message in links {
        let name = message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        });
        let Some(name) = name else { continue };
        if name.starts_with(TAP) {
            seen.taps.push(name);
        } else if let Some(link) = usable(message, name, addresses) {
            seen.links.push(link);
        }
    }
    seen.links.sort_by_key(|link| link.index);
    for message in routes {
        let route = usable_route(message).and_then(|(index, destination, gateway)| {
            let link = seen.links.iter().find(|link| link.index == index)?;
            Some((index, Route { interface: link.name.clone(), destination, gateway }))
        });
        seen.routes.extend(route);
    }
    // By a route on the link others' gateways are reached.
    seen.routes.sort_by_key(|(_, route)| !route.gateway.is_empty());
    seen
}

fn usable(message: &LinkMessage, name: String, addresses: &[AddressMessage]) -> Option<Link> {
    let flags = message.header.flags;
    if message.header.link_layer_type != LinkLayerType::Ether
        || flags.contains(LinkFlags::Loopback)
        || !flags.contains(LinkFlags::Up)
    {
        return None;
    }
    let (mut mac, mut mtu) = (None, 1500);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Address(octets) if octets.len() == 6 => {
                let digits: Vec<String> = octets.iter().map(|octet| format!("{octet:02x}")).collect();
                mac = Some(digits.join(":"));
            }
            LinkAttribute::Mtu(length) => mtu = *length,
            _ => {}
        }
    }
    let index = message.header.index;
    let own =
        addresses.iter().filter(|address| address.header.index == index).filter_map(address_text).collect();
    Some(Link { index, name, mac: mac?, mtu, addresses: own })
}

/// An address with its prefix; those of the link alone the guest makes for itself.
fn address_text(message: &AddressMessage) -> Option<String> {
    let find = |local: bool| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(address) if local => Some(*address),
            AddressAttribute::Address(address) if !local => Some(*address),
            _ => None,
        })
    };
    let address = find(true).or_else(|| find(false))?;
    if matches!(address, IpAddr::V6(address) if address.is_unicast_link_local()) {
        return None;
    }
    Some(format!("{address}/{}", message.header.prefix_len))
}

/// Interface, destination and gateway of a route that the guest does not make for itself.
fn usable_route(message: &RouteMessage) -> Option<(u32, String, String)> {
    let header = &message.header;
    let by_kernel = header.protocol == RouteProtocol::Kernel;
    let main = header.table == RouteHeader::RT_TABLE_MAIN;
    if by_kernel || !main || header.kind != RouteType::Unicast {
        return None;
    }
    let (mut index, mut destination, mut gateway) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(number) => index = Some(*number),
            RouteAttribute::Destination(address) => destination = Some(route_address(address)?),
            RouteAttribute::Gateway(address) => gateway = Some(route_address(address)?),
            _ => {}
        }
    }
    let gateway = gateway.map(|address| address.to_string()).unwrap_or_default();
    let destination = match destination {
        Some(address) => format!("{address}/{}", header.destination_prefix_length),
        // A default route on the link has no gateway to tell its family.
        None if gateway.is_empty() && header.address_family == AddressFamily::Inet => "0.0.0.0/0".to_owned(),
        None if gateway.is_empty() => "::/0".to_owned(),
        None => "default".to_owned(),
    };
    Some((index?, destination, gateway))
}

fn route_address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

impl Seen {
    /// How many interfaces there are.
    pub fn count(&self) -> usize {
        self.links.len()
    }

    /// The first address, without its prefix.
    pub fn first_address(&self) -> Option<String> {
        let all = self.links.iter().flat_map(|link| &link.addresses);
        all.filter_map(|address| address.split_once('/')).map(|(address, _)| address.to_owned()).next()
    }

    /// Whether there is a way to everywhere.
    pub fn leads_out(&self) -> bool {
        self.routes.iter().any(|(_, route)| matches!(route.destination.as_str(), "default" | "0.0.0.0/0"))
    }

    /// Refuses a namespace in which another VM has the interfaces.
    pub fn check_free(&self) -> Outcome {
        if self.taps.is_empty() {
            return Ok(());
        }
        said(
            "The network namespace is that of a VM that no container of this engine has: give this container a network \
              of its own",
        )
    }
}

/// Which interface has which NIC.
#[derive(Debug, Default)]
struct Joined {
    nics: BTreeMap<u32, u8>,
    rules: String,
}

impl Joined {
    /// Gives each interface a NIC; one that has one keeps it. The network as the guest is to have it.
    fn assign(&mut self, seen: &Seen) -> Network {
        self.nics.retain(|index, _| seen.links.iter().any(|link| link.index == *index));
        for link in &seen.links {
            let free = (0..NICS).find(|nic| !self.nics.values().any(|taken| taken == nic));
            if let (false, Some(nic)) = (self.nics.contains_key(&link.index), free) {
                self.nics.insert(link.index, nic);
            }
        }
        let interface = |link: &Link| {
            Some(Interface {
                nic: *self.nics.get(&link.index)?,
                name: link.name.clone(),
                mac: link.mac.clone(),
                mtu: link.mtu,
                addresses: link.addresses.clone(),
            })
        };
        let routes = seen.routes.iter().filter(|(index, _)| self.nics.contains_key(index));
        Network {
            interfaces: seen.links.iter().filter_map(interface).collect(),
            routes: routes.map(|(_, route)| route.clone()).collect(),
        }
    }

    async fn join(&mut self, handle: &Handle, seen: &Seen) -> Outcome<Network> {
        let network = self.assign(seen);
        let rules = rules(&network);
        if rules == self.rules {
            return Ok(network);
        }
        for interface in &network.interfaces {
            set_up_tap(handle, interface).await?;
        }
        apply(&rules).await?;
        self.rules = rules;
        Ok(network)
    }
}

/// The container's network, and what changes in it.
pub struct Wires {
    handle: Handle,
    changes: Box<dyn Stream<Item = ()> + Unpin + Send>,
    seen: Seen,
    joined: Joined,
}

impl Wires {
    /// Looks at the namespace, which must not be taken, and listens to it from then on.
    pub async fn open() -> Outcome<Self> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        let (connection, handle, changes) = rtnetlink::new_multicast_connection(&groups)
            .tried(|| "hear of the container's network".to_owned())?;
        tokio::spawn(connection);
        let seen = look(&handle).await?;
        seen.check_free()?;
        if seen.count() > 0 {
            set_ports_apart();
        }
        let changes = Box::new(changes.map(|_| ()));
        Ok(Self { handle, changes, seen, joined: Joined::default() })
    }

    /// What was there when it was last looked at.
    pub fn seen(&self) -> &Seen {
        &self.seen
    }

    /// The network as the guest is to have it.
    pub fn wanted(&mut self) -> Network {
        self.joined.assign(&self.seen)
    }

    /// Joins interfaces and NICs.
    pub async fn join(&mut self) -> Outcome<Network> {
        self.joined.join(&self.handle, &self.seen).await
    }

    /// Waits until something has changed and nothing changes any more, for a while.
    pub async fn changed(&mut self) {
        if self.changes.next().await.is_none() {
            // The kernel says nothing more.
            return std::future::pending().await;
        }
        let settled = async { while let Ok(Some(())) = timeout(SETTLING, self.changes.next()).await {} };
        let _ = timeout(SETTLING_LIMIT, settled).await;
    }

    /// Looks again, and joins what is there now.
    pub async fn join_again(&mut self) -> Outcome<Network> {
        self.seen = look(&self.handle).await?;
        self.join().await
    }
}

async fn set_up_tap(handle: &Handle, interface: &Interface) -> Outcome {
    let tap = format!("{TAP}{}", interface.nic);
    let what = || format!("set up {tap}, the way to the container's VM");
    // The host itself is to say nothing there; a kernel without IPv6 says nothing anyway.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{tap}/disable_ipv6"), "1");
    let message = LinkUnspec::new_with_name(&tap).mtu(interface.mtu).up().build();
    let done = handle.link().set(message).execute().await;
    done.map_err(|error| std::io::Error::other(error.to_string())).tried(what)
}

/// nft(8)'s rules: each interface and its tap.
fn rules(network: &Network) -> String {
    let mut text = "table netdev catalyst\ndelete table netdev catalyst\n".to_owned();
    if network.interfaces.is_empty() {
        return text;
    }
    text += "table netdev catalyst {\n";
    for interface in &network.interfaces {
        // A String takes all that is written.
        let (name, nic, (first, last)) = (&interface.name, interface.nic, OWN_PORTS);
        let _ = write!(
            text,
            " chain in{nic} {{\n  type filter hook ingress device \"{name}\" priority -500; policy accept;\n\
             \x20 ether type arp dup to \"{TAP}{nic}\" accept\n\
             \x20 meta l4proto {{ tcp, udp }} th sport 53 th dport {first}-{last} accept\n\
             \x20 icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert }} dup to \"{TAP}{nic}\" accept\n\
             \x20 fwd to \"{TAP}{nic}\"\n }}\n\
             \x20chain out{nic} {{\n  type filter hook ingress device \"{TAP}{nic}\" priority -500; policy accept;\n\
             \x20 fwd to \"{name}\"\n }}\n"
        );
    }
    text + "}\n"
}

async fn apply(rules: &str) -> Outcome {
    let what = || "run nft (Debian's nftables), which joins the container's network to its VM".to_owned();
    let mut command = tokio::process::Command::new("nft");
    command.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().tried(what)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(rules.as_bytes()).await.tried(what)?;
    }
    let output = child.wait_with_output().await.tried(what)?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr).trim().replace('\n', " ");
    said(format!("nft did not join the container's network to its VM: {words}"))
}

/// Sets apart the ports by which the namespace itself asks.
fn set_ports_apart() {
    let (first, last) = OWN_PORTS;
    // Where it cannot be set, answers to Docker's resolver go to the guest, and names from outside are not found.
    let _ = std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", format!("{first} {last}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str) -> Link {
        let addresses = vec![format!("10.0.0.{index}/24")];
        Link { index, name: name.into(), mac: format!("02:00:00:00:00:{index:02x}"), mtu: 1400, addresses }
    }

    fn route(index: u32, interface: &str, destination: &str, gateway: &str) -> (u32, Route) {
        let [interface, destination, gateway] = [interface, destination, gateway].map(str::to_owned);
        (index, Route { interface, destination, gateway })
    }

    #[test]
    fn an_interface_keeps_its_nic_and_one_that_comes_later_takes_the_next_free_one() {
        let mut joined = Joined::default();
        let mut seen = Seen { links: vec![link(5, "eth0"), link(9, "eth1")], ..Seen::default() };
        seen.routes = vec![route(5, "eth0", "default", "10.0.0.1")];
        let nics = |network: &Network| -> Vec<_> {
            network.interfaces.iter().map(|interface| (interface.name.clone(), interface.nic)).collect()
        };
        let network = joined.assign(&seen);
        assert_eq!(nics(&network), [("eth0".into(), 0), ("eth1".into(), 1)]);
        assert_eq!((network.routes.len(), network.interfaces[0].mtu), (1, 1400));
        seen.links = vec![link(9, "eth1"), link(11, "eth2")];
        seen.routes.clear();
        assert_eq!(nics(&joined.assign(&seen)), [("eth1".into(), 1), ("eth2".into(), 0)]);
        seen.links.extend([link(12, "a"), link(13, "b"), link(14, "one-too-many")]);
        assert_eq!(joined.assign(&seen).interfaces.len(), usize::from(NICS));
    }

    #[test]
    fn rules_join_each_interface_with_its_tap_and_are_taken_away_with_it() {
        let mut joined = Joined::default();
        let seen = Seen { links: vec![link(5, "eth0"), link(9, "eth1")], ..Seen::default() };
        let text = rules(&joined.assign(&seen));
        for part in [
            "hook ingress device \"eth1\"",
            "fwd to \"cattap1\"",
            "hook ingress device \"cattap1\"",
            "fwd to \"eth1\"",
            "dport 60000-60999 accept",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let none = rules(&Network::default());
        assert!(none.contains("delete table") && !none.contains("chain"), "{none}");
    }

    #[test]
    fn the_kernel_s_messages_are_read() {
        let mut eth0 = LinkMessage::default();
        eth0.header.index = 3;
        eth0.header.link_layer_type = LinkLayerType::Ether;
        eth0.header.flags = LinkFlags::Up;
        let name = |name: &str| LinkAttribute::IfName(name.into());
        eth0.attributes =
            vec![name("eth0"), LinkAttribute::Address(vec![2, 66, 172, 17, 0, 2]), LinkAttribute::Mtu(1450)];
        let mut down = eth0.clone();
        down.header.flags = LinkFlags::empty();
        down.attributes[0] = name("eth9");
        let mut tap = eth0.clone();
        tap.attributes[0] = name("cattap0");
        let address = |ip: &str, prefix| {
            let mut message = AddressMessage::default();
            message.header.index = 3;
            message.header.prefix_len = prefix;
            message.attributes = vec![AddressAttribute::Address(ip.parse().unwrap())];
            message
        };
        let addresses = [address("172.17.0.2", 16), address("fe80::1", 64), address("fd00::2", 80)];
        let mut default = RouteMessage::default();
        default.header.address_family = AddressFamily::Inet;
        default.header.table = RouteHeader::RT_TABLE_MAIN;
        default.header.kind = RouteType::Unicast;
        default.header.protocol = RouteProtocol::Boot;
        let gateway = RouteAttribute::Gateway(RouteAddress::Inet([172, 17, 0, 1].into()));
        default.attributes = vec![RouteAttribute::Oif(3), gateway];
        let mut kernels = default.clone();
        kernels.header.protocol = RouteProtocol::Kernel;
        let seen = seen(&[eth0, down, tap], &addresses, &[default, kernels]);
        assert_eq!(seen.count(), 1);
        assert_eq!(seen.links[0].addresses, ["172.17.0.2/16", "fd00::2/80"]);
        assert_eq!((seen.links[0].mac.as_str(), seen.links[0].mtu), ("02:42:ac:11:00:02", 1450));
        assert_eq!(seen.routes, [route(3, "eth0", "default", "172.17.0.1")]);
        assert_eq!(seen.first_address().as_deref(), Some("172.17.0.2"));
        assert!(seen.leads_out() && seen.check_free().is_err());
    }
}
