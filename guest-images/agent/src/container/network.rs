//! The network of a container, which is that of its VM: what is wanted, checked, and the kernel's messages that make it so.

use std::collections::HashSet;
use std::fmt::Display;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use catalyst_agent_protocol::container::Network;
use nix::sched::{CloneFlags, unshare};

use crate::identity::netlink::{Message, Netlink, attribute, half, word};
use crate::identity::parse_mac;

/// `struct ifinfomsg`: family, type, index, flags, mask of changed flags.
const LINK: usize = 16;
/// `struct ifaddrmsg`: family, prefix, flags, scope, index.
const ADDRESS: usize = 8;
/// `struct rtmsg`.
const ROUTE: usize = 12;
const INET: u8 = 2;
const INET6: u8 = 10;
/// `ARPHRD_ETHER`.
const ETHERNET: u16 = 1;
/// The loopback of every network namespace.
const LOOPBACK: u32 = 1;
/// Longest name of an interface, in bytes (`IFNAMSIZ` less the NUL).
const MAX_NAME: usize = 15;
/// An IPv6 address that nobody else has is not to be looked for (`IFA_F_NODAD`).
const NO_SEARCH: u8 = 2;
/// What there may be of each, so that a document stays within reason.
const MOST: usize = 1024;

/// The VM's NICs, by their numbers: the order of the MAC addresses that they had at boot. Those that are not in use are out of sight,
/// in a network namespace of their own.
#[derive(Debug)]
pub struct Nics {
    /// The namespace of the agent and of the container.
    here: OwnedFd,
    aside: OwnedFd,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// To the kernel in the other namespace.
    aside: Netlink,
    /// The number that the kernel knows each by here; none for what is out of sight.
    indices: Vec<Option<u32>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Link {
    index: u32,
    name: String,
    mac: [u8; 6],
    mtu: u32,
    up: bool,
}

/// An address with its prefix's length.
type Prefix = (IpAddr, u8);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Interface {
    nic: usize,
    name: String,
    mac: Option<[u8; 6]>,
    mtu: Option<u32>,
    addresses: Vec<Prefix>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Route {
    /// Among the interfaces.
    interface: usize,
    destination: Prefix,
    gateway: Option<IpAddr>,
}

/// What is wanted, readable and within reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    interfaces: Vec<Interface>,
    routes: Vec<Route>,
}

impl Nics {
    /// Takes those that there are now out of sight.
    pub fn take() -> io::Result<Self> {
        let (aside, other) = thread::scope(|scope| scope.spawn(another_namespace).join())
            .unwrap_or_else(|_| Err(io::Error::other("a thread ended early")))?;
        let mut netlink = Netlink::open()?;
        let mut links = links(&mut netlink)?;
        links.sort_by_key(|link| link.mac);
        let indices = links.iter().map(|link| Some(link.index)).collect();
        let state = Mutex::new(State { aside: other, indices });
        let nics = Self { here: own_namespace()?, aside, state };
        let mut state = nics.lock();
        for nic in 0..links.len() {
            nics.hide(&mut netlink, &mut state, nic)?;
        }
        drop(state);
        Ok(nics)
    }

    /// Checks what is wanted of them.
    pub fn check(&self, network: &Network) -> Result<Wanted, String> {
        check(network, self.lock().indices.len())
    }

    /// Makes it so. What is so already stays, so that connections live on.
    pub fn apply(&self, wanted: &Wanted) -> io::Result<()> {
        let mut netlink = Netlink::open()?;
        let mut state = self.lock();
        netlink.change(link_message(LOOPBACK, Some(true)))?;
        self.make_room(&mut netlink, &mut state, wanted)?;
        let mut indices = Vec::new();
        for interface in &wanted.interfaces {
            let index = self
                .show(&mut netlink, &mut state, interface.nic)
                .and_then(|index| set_up(&mut netlink, index, interface).map(|()| index));
            indices.push(index.map_err(saying(&interface.name))?);
        }
        set_routes(&mut netlink, &wanted.routes, &indices)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hides what is not wanted, and renames what has the name of another.
    fn make_room(&self, netlink: &mut Netlink, state: &mut State, wanted: &Wanted) -> io::Result<()> {
        for link in links(netlink)? {
            let Some(nic) = state.indices.iter().position(|index| *index == Some(link.index)) else {
                continue;
            };
            let interface = wanted.interfaces.iter().find(|interface| interface.nic == nic);
            if interface.is_none() {
                self.hide(netlink, state, nic)?;
            } else if interface.is_some_and(|interface| interface.name != link.name) {
                // A link that is up keeps its name.
                netlink.change(link_message(link.index, Some(false)))?;
                rename(netlink, link.index, &aside_name(nic))?;
            }
        }
        Ok(())
    }

    fn hide(&self, netlink: &mut Netlink, state: &mut State, nic: usize) -> io::Result<()> {
        let Some(index) = state.indices[nic] else { return Ok(()) };
        netlink.change(link_message(index, Some(false)))?;
        rename(netlink, index, &aside_name(nic))?;
        netlink.change(move_message(index, &self.aside))?;
        state.indices[nic] = None;
        Ok(())
    }

    /// Brings a NIC into sight; the number that the kernel knows it by.
    fn show(&self, netlink: &mut Netlink, state: &mut State, nic: usize) -> io::Result<u32> {
        if let Some(index) = state.indices[nic] {
            return Ok(index);
        }
        let find = |netlink: &mut Netlink| {
            let name = aside_name(nic);
            let found = links(netlink)?.into_iter().find(|link| link.name == name);
            found.map(|link| link.index).ok_or_else(|| io::Error::other("the NIC is gone"))
        };
        let there = find(&mut state.aside)?;
        state.aside.change(move_message(there, &self.here))?;
        let index = find(netlink)?;
        state.indices[nic] = Some(index);
        Ok(index)
    }
}

/// What a NIC is called that has no name of its own.
fn aside_name(nic: usize) -> String {
    format!("nic{nic}.aside")
}

fn own_namespace() -> io::Result<OwnedFd> {
    File::open("/proc/thread-self/ns/net").map(OwnedFd::from)
}

/// For a thread that ends with it: the namespace lives for as long as this.
fn another_namespace() -> io::Result<(OwnedFd, Netlink)> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    Ok((own_namespace()?, Netlink::open()?))
}

/// Says with an error what it was about.
fn saying(what: impl Display) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// `indices` has the links of the interfaces that the routes are by.
fn set_routes(netlink: &mut Netlink, wanted: &[Route], indices: &[u32]) -> io::Result<()> {
    let way = |route: &Route| (route.destination, route.gateway, indices[route.interface]);
    let there = routes(netlink)?;
    for route in &there {
        if !wanted.iter().any(|one| way(one) == *route) {
            netlink.change(route_message(libc::RTM_DELROUTE, 0, *route))?;
        }
    }
    // What is on a link first: a gateway must be in reach.
    let (by_gateway, on_link): (Vec<&Route>, Vec<&Route>) =
        wanted.iter().partition(|route| route.gateway.is_some());
    for route in on_link.into_iter().chain(by_gateway) {
        if !there.contains(&way(route)) {
            let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
            let (to, length) = route.destination;
            netlink
                .change(route_message(libc::RTM_NEWROUTE, flags, way(route)))
                .map_err(saying(format_args!("the route to {to}/{length}")))?;
        }
    }
    Ok(())
}

/// Name, MAC address, MTU and addresses, and up.
fn set_up(netlink: &mut Netlink, index: u32, wanted: &Interface) -> io::Result<()> {
    let link = links(netlink)?.into_iter().find(|link| link.index == index);
    let mut link = link.ok_or_else(|| io::Error::other("the NIC is gone"))?;
    if link.name != wanted.name {
        rename(netlink, index, &wanted.name)?;
    }
    if let Some(mac) = wanted.mac.filter(|mac| *mac != link.mac) {
        if link.up {
            netlink.change(link_message(index, Some(false)))?;
            link.up = false;
        }
        netlink.change(link_message(index, None).attribute(libc::IFLA_ADDRESS, &mac))?;
    }
    if let Some(mtu) = wanted.mtu.filter(|mtu| *mtu != link.mtu) {
        netlink.change(link_message(index, None).attribute(libc::IFLA_MTU, &mtu.to_ne_bytes()))?;
    }
    if !link.up {
        netlink.change(link_message(index, Some(true)))?;
    }
    let there = addresses(netlink, index)?;
    for (prefix, scope) in &there {
        // The kernel's own address of the link is no document's.
        let own = prefix.0.is_ipv6() && *scope == libc::RT_SCOPE_LINK;
        if !own && !wanted.addresses.contains(prefix) {
            change_address(netlink, index, *prefix, false)?;
        }
    }
    for prefix in &wanted.addresses {
        if !there.iter().any(|(one, _)| one == prefix) {
            let (address, length) = prefix;
            change_address(netlink, index, *prefix, true)
                .map_err(saying(format_args!("{address}/{length}")))?;
        }
    }
    Ok(())
}

fn check(network: &Network, nics: usize) -> Result<Wanted, String> {
    if network.interfaces.len() > nics {
        return Err(format!("{} interfaces are too many: the VM has {nics}", network.interfaces.len()));
    }
    let (mut names, mut numbers) = (HashSet::new(), HashSet::new());
    let interfaces = network.interfaces.iter().map(|one| {
        let nic = usize::from(one.nic);
        if nic >= nics || !numbers.insert(nic) {
            return Err(format!("the VM has {nics} NICs, and no {nic} or not twice"));
        }
        if !is_name(&one.name) || !names.insert(one.name.as_str()) {
            return Err(format!("{:?} is no name of an interface, or another's", one.name));
        }
        if one.addresses.len() > MOST {
            return Err(format!("{} has too many addresses", one.name));
        }
        let mac = match one.mac.as_str() {
            "" => None,
            text => Some(parse_mac(text).ok_or_else(|| format!("{text:?} is no host's MAC address"))?),
        };
        let addresses = one
            .addresses
            .iter()
            .map(|text| prefix(text).ok_or_else(|| format!("{text:?} is no address with its prefix")));
        let mtu = (one.mtu != 0).then_some(one.mtu);
        Ok(Interface {
            nic,
            name: one.name.clone(),
            mac,
            mtu,
            addresses: addresses.collect::<Result<_, _>>()?,
        })
    });
    let interfaces: Vec<Interface> = interfaces.collect::<Result<_, String>>()?;
    if network.routes.len() > MOST {
        return Err("there are too many routes".into());
    }
    let routes = network.routes.iter().map(|one| {
        let interface = interfaces.iter().position(|interface| interface.name == one.interface);
        let interface =
            interface.ok_or_else(|| format!("a route has the unknown interface {:?}", one.interface))?;
        let bad = || format!("the route to {:?} by {:?} is none", one.destination, one.gateway);
        let gateway: Option<IpAddr> = match one.gateway.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| bad())?),
        };
        let any = || match gateway {
            Some(IpAddr::V6(_)) => (IpAddr::from([0_u8; 16]), 0),
            _ => (IpAddr::from([0_u8; 4]), 0),
        };
        let destination =
            if one.destination == "default" { any() } else { prefix(&one.destination).ok_or_else(bad)? };
        if gateway.is_some_and(|gateway| gateway.is_ipv4() != destination.0.is_ipv4()) {
            return Err(bad());
        }
        Ok(Route { interface, destination: masked(destination), gateway })
    });
    let routes = routes.collect::<Result<_, String>>()?;
    Ok(Wanted { interfaces, routes })
}

/// What the kernel takes for a name (dev_valid_name in net/core/dev.c), without a `%`, which it would count up.
fn is_name(name: &str) -> bool {
    let bad = |byte: u8| byte.is_ascii_whitespace() || matches!(byte, b'/' | b':' | b'%' | 0);
    (1..=MAX_NAME).contains(&name.len())
        && ![".", "..", "lo", "all", "default"].contains(&name)
        && !name.bytes().any(bad)
}

/// An address with the length of its prefix; alone, it is one host's.
fn prefix(text: &str) -> Option<Prefix> {
    let (address, length) =
        text.split_once('/').map_or((text, None), |(address, length)| (address, Some(length)));
    let address: IpAddr = address.parse().ok()?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let length = length.map_or(Some(most), |length| length.parse().ok())?;
    (length <= most).then_some((address, length))
}

/// Without the bits that a destination must not have.
fn masked((address, length): Prefix) -> Prefix {
    let address = match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
            IpAddr::V4((u32::from(address) & mask).into())
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
            IpAddr::V6((u128::from(address) & mask).into())
        }
    };
    (address, length)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { INET } else { INET6 }
}

fn from_octets(octets: &[u8]) -> Option<IpAddr> {
    match octets.len() {
        4 => <[u8; 4]>::try_from(octets).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(octets).ok().map(IpAddr::from),
        _ => None,
    }
}

fn links(netlink: &mut Netlink) -> io::Result<Vec<Link>> {
    let bodies = netlink.dump(libc::RTM_GETLINK, &[0; LINK])?;
    Ok(bodies.iter().filter_map(|body| parse_link(body)).collect())
}

fn parse_link(body: &[u8]) -> Option<Link> {
    if half(body, 2)? != ETHERNET {
        return None;
    }
    let name = attribute(body, LINK, libc::IFLA_IFNAME)?;
    Some(Link {
        index: word(body, 4)?,
        name: String::from_utf8_lossy(name.strip_suffix(&[0]).unwrap_or(name)).into_owned(),
        mac: attribute(body, LINK, libc::IFLA_ADDRESS)?.try_into().ok()?,
        mtu: word(attribute(body, LINK, libc::IFLA_MTU)?, 0)?,
        up: word(body, 8)? & 1 != 0,
    })
}

/// Of a link's flags, IFF_UP alone is changed, if that is wanted.
fn link_message(index: u32, up: Option<bool>) -> Message {
    let words = [index, u32::from(up == Some(true)), u32::from(up.is_some())];
    let header = [&[0; 4][..], &words.map(u32::to_ne_bytes).concat()].concat();
    Message::new(libc::RTM_NEWLINK, 0, &header)
}

fn move_message(index: u32, namespace: &OwnedFd) -> Message {
    link_message(index, None).attribute(libc::IFLA_NET_NS_FD, &namespace.as_raw_fd().to_ne_bytes())
}

fn rename(netlink: &mut Netlink, index: u32, name: &str) -> io::Result<()> {
    let name = [name.as_bytes(), &[0]].concat();
    netlink.change(link_message(index, None).attribute(libc::IFLA_IFNAME, &name))
}

/// The addresses of a link with their scopes.
fn addresses(netlink: &mut Netlink, index: u32) -> io::Result<Vec<(Prefix, u8)>> {
    let bodies = netlink.dump(libc::RTM_GETADDR, &[0; ADDRESS])?;
    let ours = bodies.iter().filter(|body| word(body, 4) == Some(index));
    Ok(ours.filter_map(|body| parse_address(body)).collect())
}

fn parse_address(body: &[u8]) -> Option<(Prefix, u8)> {
    let address =
        attribute(body, ADDRESS, libc::IFA_LOCAL).or_else(|| attribute(body, ADDRESS, libc::IFA_ADDRESS))?;
    Some(((from_octets(address)?, *body.get(1)?), *body.get(3)?))
}

fn change_address(netlink: &mut Netlink, index: u32, prefix: Prefix, add: bool) -> io::Result<()> {
    match netlink.change(address_message(index, prefix, add)) {
        // A secondary address goes with its primary.
        Err(error) if !add && error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(()),
        other => other,
    }
}

fn address_message(index: u32, (address, length): Prefix, add: bool) -> Message {
    let flags = if address.is_ipv6() && add { NO_SEARCH } else { 0 };
    let header = [&[family(address), length, flags, 0][..], &index.to_ne_bytes()].concat();
    let (kind, how) = if add {
        (libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_REPLACE)
    } else {
        (libc::RTM_DELADDR, 0)
    };
    let octets = octets(address);
    let message = Message::new(kind, how, &header)
        .attribute(libc::IFA_LOCAL, &octets)
        .attribute(libc::IFA_ADDRESS, &octets);
    match address {
        // A network of two or one has no broadcast address (RFC 3021).
        IpAddr::V4(address) if add && length < 31 => {
            let host_bits = u32::MAX.checked_shr(length.into()).unwrap_or(0);
            message.attribute(libc::IFA_BROADCAST, &(u32::from(address) | host_bits).to_be_bytes())
        }
        _ => message,
    }
}

/// Destination, gateway and link.
type Way = (Prefix, Option<IpAddr>, u32);

/// The routes that were set here: those of the main table that the kernel did not make itself.
fn routes(netlink: &mut Netlink) -> io::Result<Vec<Way>> {
    let mut all = Vec::new();
    for family in [INET, INET6] {
        let mut header = [0; ROUTE];
        header[0] = family;
        match netlink.dump(libc::RTM_GETROUTE, &header) {
            Ok(bodies) => all.extend(bodies.iter().filter_map(|body| parse_route(body))),
            // A kernel without IPv6.
            Err(error) if family == INET6 && error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}

fn parse_route(body: &[u8]) -> Option<Way> {
    let family = *body.first()?;
    let ours = body.get(4) == Some(&libc::RT_TABLE_MAIN) && body.get(5) == Some(&libc::RTPROT_STATIC);
    if !ours || body.get(7) != Some(&libc::RTN_UNICAST) {
        return None;
    }
    let any = if family == INET { IpAddr::from([0_u8; 4]) } else { IpAddr::from([0_u8; 16]) };
    let destination = attribute(body, ROUTE, libc::RTA_DST).map_or(Some(any), from_octets)?;
    let gateway = attribute(body, ROUTE, libc::RTA_GATEWAY).and_then(from_octets);
    Some(((destination, *body.get(1)?), gateway, word(attribute(body, ROUTE, libc::RTA_OIF)?, 0)?))
}

fn route_message(kind: u16, flags: i32, ((destination, length), gateway, index): Way) -> Message {
    let scope = match gateway {
        None if destination.is_ipv4() => libc::RT_SCOPE_LINK,
        _ => libc::RT_SCOPE_UNIVERSE,
    };
    // struct rtmsg: family, lengths of destination and source, tos, table, protocol, scope, type, flags.
    let header = [
        family(destination),
        length,
        0,
        0,
        libc::RT_TABLE_MAIN,
        libc::RTPROT_STATIC,
        scope,
        libc::RTN_UNICAST,
    ];
    let mut message = Message::new(kind, flags, &[&header[..], &[0; 4]].concat());
    if length > 0 {
        message = message.attribute(libc::RTA_DST, &octets(destination));
    }
    if let Some(gateway) = gateway {
        message = message.attribute(libc::RTA_GATEWAY, &octets(gateway));
    }
    message.attribute(libc::RTA_OIF, &index.to_ne_bytes())
}

#[cfg(test)]
#[path = "network_tests.rs"]
mod tests;
