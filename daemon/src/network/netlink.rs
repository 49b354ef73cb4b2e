//! Links, addresses and routes by rtnetlink (`rtnetlink(7)`), in the network namespace of the calling thread.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{
    BridgeStpState, InfoBridge, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage};
use rtnetlink::{Handle, LinkBridge, LinkMessageBuilder, LinkUnspec};

use super::address::{Mac, Subnet};
use super::error::NetworkError;
use super::subnet::HostRange;

/// One link of the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub index: u32,
    pub name: String,
    pub mac: Option<Mac>,
    pub is_bridge: bool,
    pub is_up: bool,
    /// Index of the bridge that it is a port of.
    pub bridge: Option<u32>,
}

/// A connection to the kernel's rtnetlink; closed when dropped.
#[derive(Debug)]
pub(crate) struct Netlink {
    handle: Handle,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Netlink {
    /// Opens a connection in the network namespace of the calling thread.
    pub fn open() -> Result<Self, NetworkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(|source| {
            NetworkError::Netlink { task: "open an rtnetlink socket".to_owned(), source }
        })?;
        Ok(Self { handle, task: tokio::spawn(connection) })
    }

    /// Tells the kernel which hardware address an address behind `link` has, to be confirmed when it is next used: who waits
    /// for an answer by ARP goes on. With `None` it forgets the one that it knows.
    pub async fn introduce(
        &self,
        link: &Link,
        address: Ipv4Addr,
        mac: Option<Mac>,
    ) -> Result<(), NetworkError> {
        let request = self.handle.neighbours().add(link.index, address.into()).replace();
        let request = match mac {
            Some(mac) => request.link_layer_address(&mac.0).state(NeighbourState::Stale),
            None => request.state(NeighbourState::Failed),
        };
        request
            .execute()
            .await
            .map_err(|error| failed(format!("introduce {address} to {}", link.name), &error))
    }

    /// The link of that name, if there is one.
    pub async fn link(&self, name: &str) -> Result<Option<Link>, NetworkError> {
        let found = self.handle.link().get().match_name(name.to_owned()).execute().next().await;
        match found {
            None => Ok(None),
            Some(Ok(message)) => Ok(Some(Link::from(&message))),
            Some(Err(error)) if errno(&error) == Some(libc::ENODEV) => Ok(None),
            Some(Err(error)) => Err(failed(format!("look up the link {name}"), &error)),
        }
    }

    /// Every link.
    pub async fn links(&self) -> Result<Vec<Link>, NetworkError> {
        self.handle
            .link()
            .get()
            .execute()
            .map_ok(|message| Link::from(&message))
            .try_collect()
            .await
            .map_err(|error| failed("list the links of this machine".to_owned(), &error))
    }

    /// Names of the ports of the bridge with that index.
    pub async fn ports(&self, bridge: u32) -> Result<Vec<String>, NetworkError> {
        let links = self.links().await?;
        Ok(links.into_iter().filter(|link| link.bridge == Some(bridge)).map(|link| link.name).collect())
    }

    /// Makes a bridge, not yet up, with that hardware address; spanning tree and multicast snooping off: there is
    /// one bridge, and nobody to query for group members.
    pub async fn add_bridge(&self, name: &str, mac: Mac) -> Result<(), NetworkError> {
        let message = LinkMessageBuilder::<LinkBridge>::new(name)
            .address(mac.0.to_vec())
            .append_info_data(InfoBridge::ForwardDelay(0))
            .append_info_data(InfoBridge::StpState(BridgeStpState::Disabled))
            .append_info_data(InfoBridge::MulticastSnooping(false))
            .build();
        let done = self.handle.link().add(message).execute().await;
        done.map_err(|error| failed(format!("make the bridge {name}"), &error))
    }

    /// Sets the link's alias, a text that `ip link` shows.
    pub async fn set_alias(&self, link: &Link, alias: &str) -> Result<(), NetworkError> {
        let message = LinkUnspec::new_with_index(link.index).alias(alias).build();
        let done = self.handle.link().set(message).execute().await;
        done.map_err(|error| failed(format!("set the alias of {}", link.name), &error))
    }

    /// Sets the link up.
    pub async fn set_up(&self, link: &Link) -> Result<(), NetworkError> {
        let done =
            self.handle.link().set(LinkUnspec::new_with_index(link.index).up().build()).execute().await;
        done.map_err(|error| failed(format!("set {} up", link.name), &error))
    }

    /// Makes the link a port of the bridge and sets it up.
    pub async fn attach(&self, link: &Link, bridge: &Link) -> Result<(), NetworkError> {
        let message = LinkUnspec::new_with_index(link.index).controller(bridge.index).up().build();
        let done = self.handle.link().set(message).execute().await;
        done.map_err(|error| failed(format!("attach {} to {}", link.name, bridge.name), &error))
    }

    /// Removes the link; one that is gone already is no error.
    pub async fn remove(&self, link: &Link) -> Result<(), NetworkError> {
        match self.handle.link().del(link.index).execute().await {
            Err(error) if errno(&error) != Some(libc::ENODEV) => {
                Err(failed(format!("remove {}", link.name), &error))
            }
            _ => Ok(()),
        }
    }

    /// Gives the link that one IPv4 address and takes away every other.
    pub async fn set_address(&self, link: &Link, address: Ipv4Addr, prefix: u8) -> Result<(), NetworkError> {
        let task = || format!("give {} the address {address}/{prefix}", link.name);
        let present: Vec<_> = self
            .handle
            .address()
            .get()
            .set_link_index_filter(link.index)
            .execute()
            .try_collect()
            .await
            .map_err(|error| failed(task(), &error))?;
        let mut there = false;
        for message in present {
            if message.header.index != link.index || message.header.family != AddressFamily::Inet {
                continue;
            }
            let own = message.attributes.contains(&AddressAttribute::Local(IpAddr::V4(address)));
            if own && message.header.prefix_len == prefix {
                there = true;
            } else {
                let done = self.handle.address().del(message).execute().await;
                done.map_err(|error| failed(format!("remove an old address of {}", link.name), &error))?;
            }
        }
        if there {
            return Ok(());
        }
        let done = self.handle.address().add(link.index, IpAddr::V4(address), prefix).execute().await;
        done.map_err(|error| failed(task(), &error))
    }

    /// What addresses the host uses: those of its links and the routes of all its tables, except through `own`.
    pub async fn host_ranges(&self, own: Option<u32>) -> Result<Vec<HostRange>, NetworkError> {
        let names = self.links().await?;
        let name = |index: u32| {
            names
                .iter()
                .find(|link| link.index == index)
                .map_or_else(|| format!("link {index}"), |l| l.name.clone())
        };
        let mut ranges = Vec::new();
        let addresses: Vec<_> = self
            .handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|error| failed("list the addresses of this machine".to_owned(), &error))?;
        for message in addresses.iter().filter(|message| own != Some(message.header.index)) {
            let local = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(IpAddr::V4(address)) => Some(*address),
                _ => None,
            });
            if let Some(address) = local {
                let prefix = message.header.prefix_len;
                let user = format!("address {address}/{prefix} of {}", name(message.header.index));
                ranges.push(HostRange { subnet: Subnet::containing(address, prefix), user });
            }
        }
        let mut every_table = RouteMessage::default();
        every_table.header.address_family = AddressFamily::Inet;
        let routes: Vec<_> = self
            .handle
            .route()
            .get(every_table)
            .execute()
            .try_collect()
            .await
            .map_err(|error| failed("list the routes of this machine".to_owned(), &error))?;
        ranges.extend(routes.iter().filter_map(|route| route_range(route, own, &name)));
        Ok(ranges)
    }
}

/// The range that a route is for; none for one through `own` and for the kernel's cached ones.
fn route_range(route: &RouteMessage, own: Option<u32>, name: &dyn Fn(u32) -> String) -> Option<HostRange> {
    if route.header.address_family != AddressFamily::Inet || route.header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let mut destination = Ipv4Addr::UNSPECIFIED;
    let mut out = None;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => destination = *address,
            RouteAttribute::Oif(index) => out = Some(*index),
            _ => {}
        }
    }
    if out.is_some() && out == own {
        return None;
    }
    let subnet = Subnet::containing(destination, route.header.destination_prefix_length);
    let through = out.map_or_else(String::new, |index| format!(" on {}", name(index)));
    Some(HostRange { subnet, user: format!("route {subnet}{through}") })
}

impl From<&LinkMessage> for Link {
    fn from(message: &LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            mac: None,
            is_bridge: false,
            is_up: message.header.flags.contains(LinkFlags::Up),
            bridge: None,
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Address(octets) => link.mac = octets.as_slice().try_into().ok().map(Mac),
                LinkAttribute::Controller(index) => link.bridge = Some(*index),
                LinkAttribute::LinkInfo(infos) => {
                    link.is_bridge = infos.contains(&LinkInfo::Kind(InfoKind::Bridge));
                }
                _ => {}
            }
        }
        link
    }
}

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(message.raw_code().unsigned_abs().cast_signed()),
        _ => None,
    }
}

fn failed(task: String, error: &rtnetlink::Error) -> NetworkError {
    match errno(error) {
        Some(libc::EPERM) => NetworkError::NotRoot { task },
        Some(code) => NetworkError::Netlink { task, source: io::Error::from_raw_os_error(code) },
        None => NetworkError::Netlink { task, source: io::Error::other(error.to_string()) },
    }
}
