//! The guest's one address and its default route.

use std::io;
use std::net::Ipv4Addr;

use catalyst_agent_protocol::Identity;

use super::netlink::{Message, Netlink, attribute, half, word};

/// `struct ifinfomsg`: family, type, index, flags, mask of changed flags.
const LINK: usize = 16;
/// `struct ifaddrmsg`: family, prefix, flags, scope, index.
const ADDRESS: usize = 8;
const INET: u8 = 2;
const INET6: u8 = 10;
/// Of rtnetlink's neighbours: a state, and what attributes hold.
const NUD_STALE: u16 = 4;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
/// `ARPHRD_ETHER`.
const ETHERNET: u16 = 1;

#[derive(Clone, Copy, Debug)]
struct Link {
    index: u32,
    mac: [u8; 6],
    up: bool,
}

/// Gives the NIC with this MAC address the identity's address and the guest its default route. If
/// no NIC has the MAC address, the first Ethernet one gets that too, as a clone's must. What is so
/// already stays as it is, so that connections live on.
pub fn apply(identity: &Identity, mac: [u8; 6], gateway_mac: Option<[u8; 6]>) -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    let links = links(&mut netlink)?;
    let link = links.iter().find(|link| link.mac == mac).or_else(|| links.first());
    let mut link = *link.ok_or_else(|| io::Error::other("there is no Ethernet NIC"))?;
    if link.mac != mac {
        link.up = change_mac(&mut netlink, link, mac)?;
    }
    address(&mut netlink, link.index, identity.address, identity.prefix)?;
    if !link.up {
        set_link(&mut netlink, link.index, true, None)?;
    }
    // Index 1 is the loopback of every network namespace.
    set_link(&mut netlink, 1, true, None)?;
    default_route(&mut netlink, link.index, identity.gateway)
        .map_err(|error| io::Error::other(format!("the route by {}: {error}", identity.gateway)))?;
    match gateway_mac {
        Some(mac) => neighbour(&mut netlink, link.index, identity.gateway, mac),
        None => Ok(()),
    }
}

/// Tells the kernel a neighbour's MAC address, to be confirmed when it is next used. A clone is asked for its banner as soon
/// as it is reached; a question by ARP that it asked before that would be asked anew only after a second.
fn neighbour(netlink: &mut Netlink, index: u32, address: Ipv4Addr, mac: [u8; 6]) -> io::Result<()> {
    // struct ndmsg: family, padding, index, state, flags, type.
    let header =
        [&[INET, 0, 0, 0][..], &index.to_ne_bytes(), &NUD_STALE.to_ne_bytes(), &[0, libc::RTN_UNICAST]]
            .concat();
    let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
    netlink.change(
        Message::new(libc::RTM_NEWNEIGH, flags, &header)
            .attribute(NDA_DST, &address.octets())
            .attribute(NDA_LLADDR, &mac),
    )
}

/// Gives a link another MAC address; whether it is up after that. Most drivers refuse that while it is; virtio's does not,
/// and a way down and up again takes long. Then the IPv6 address that is made of the MAC address is ours to change.
fn change_mac(netlink: &mut Netlink, link: Link, mac: [u8; 6]) -> io::Result<bool> {
    let old = link_local_addresses(netlink, link.index)?;
    if link.up && old.iter().all(|address| *address == eui64(link.mac)) {
        let now = Message::new(libc::RTM_NEWLINK, 0, &link_header(link.index, None));
        match netlink.change(now.attribute(libc::IFLA_ADDRESS, &mac)) {
            Ok(()) if old.is_empty() => return Ok(true),
            Ok(()) => return change_link_local(netlink, link, mac).map(|()| true),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(error),
        }
    }
    set_link(netlink, link.index, false, None)?;
    set_link(netlink, link.index, false, Some(mac))?;
    Ok(false)
}

/// The link-local address of a MAC address (RFC 4291, appendix A).
fn eui64(mac: [u8; 6]) -> [u8; 16] {
    let mut address = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, 0, 0, 0];
    address[13..].copy_from_slice(&mac[3..]);
    address
}

fn link_local_addresses(netlink: &mut Netlink, index: u32) -> io::Result<Vec<[u8; 16]>> {
    let bodies = netlink.dump(libc::RTM_GETADDR, &[INET6, 0, 0, 0, 0, 0, 0, 0])?;
    let ours = bodies.iter().filter(|body| {
        (body.first(), body.get(3)) == (Some(&INET6), Some(&libc::RT_SCOPE_LINK))
            && word(body, 4) == Some(index)
    });
    Ok(ours.filter_map(|body| attribute(body, ADDRESS, libc::IFA_ADDRESS)?.try_into().ok()).collect())
}

fn change_link_local(netlink: &mut Netlink, link: Link, mac: [u8; 6]) -> io::Result<()> {
    let header = [&[INET6, 64, 0, libc::RT_SCOPE_LINK][..], &link.index.to_ne_bytes()].concat();
    let change = |kind: u16, flags: i32, mac: [u8; 6]| {
        Message::new(kind, flags, &header).attribute(libc::IFA_ADDRESS, &eui64(mac))
    };
    netlink.change(change(libc::RTM_DELADDR, 0, link.mac))?;
    netlink.change(change(libc::RTM_NEWADDR, libc::NLM_F_CREATE, mac))
}

fn links(netlink: &mut Netlink) -> io::Result<Vec<Link>> {
    let parse = |body: Vec<u8>| {
        let flags = word(&body, 8)?;
        let mac = attribute(&body, LINK, libc::IFLA_ADDRESS)?.try_into().ok()?;
        let link = Link { index: word(&body, 4)?, mac, up: flags & 1 != 0 };
        (half(&body, 2)? == ETHERNET).then_some(link)
    };
    let mut links: Vec<Link> =
        netlink.dump(libc::RTM_GETLINK, &[0; LINK])?.into_iter().filter_map(parse).collect();
    links.sort_by_key(|link| link.index);
    Ok(links)
}

/// Of a link's flags, IFF_UP alone is changed, if that is wanted.
fn link_header(index: u32, up: Option<bool>) -> Vec<u8> {
    let mut header = vec![0; 4];
    header.extend(index.to_ne_bytes());
    header.extend(u32::from(up == Some(true)).to_ne_bytes());
    header.extend(u32::from(up.is_some()).to_ne_bytes());
    header
}

fn set_link(netlink: &mut Netlink, index: u32, up: bool, mac: Option<[u8; 6]>) -> io::Result<()> {
    let mut message = Message::new(libc::RTM_NEWLINK, 0, &link_header(index, Some(up)));
    if let Some(mac) = mac {
        message = message.attribute(libc::IFLA_ADDRESS, &mac);
    }
    netlink.change(message)
}

/// Makes an address the only one of a link.
fn address(netlink: &mut Netlink, index: u32, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
    let mut there = false;
    for body in netlink.dump(libc::RTM_GETADDR, &[INET, 0, 0, 0, 0, 0, 0, 0])? {
        if body.first() != Some(&INET) || word(&body, 4) != Some(index) {
            continue;
        }
        let local = attribute(&body, ADDRESS, libc::IFA_LOCAL);
        if body[1] == prefix && local == Some(&address.octets()) {
            there = true;
        } else if let (Some(header), Some(local)) = (body.get(..ADDRESS), local) {
            let message = Message::new(libc::RTM_DELADDR, 0, header).attribute(libc::IFA_LOCAL, local);
            match netlink.change(message) {
                // It went with another: a secondary address goes with its primary.
                Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {}
                other => other?,
            }
        }
    }
    if there && has_address(netlink, index, address, prefix)? {
        return Ok(());
    }
    let mut header = vec![INET, prefix, 0, 0];
    header.extend(index.to_ne_bytes());
    let octets = address.octets();
    let host_bits = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
    let broadcast = u32::from(address) | host_bits;
    let mut message = Message::new(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, &header)
        .attribute(libc::IFA_LOCAL, &octets)
        .attribute(libc::IFA_ADDRESS, &octets);
    // A network of two or one has no broadcast address (RFC 3021).
    if prefix < 31 {
        message = message.attribute(libc::IFA_BROADCAST, &broadcast.to_be_bytes());
    }
    netlink.change(message)
}

fn has_address(netlink: &mut Netlink, index: u32, address: Ipv4Addr, prefix: u8) -> io::Result<bool> {
    let bodies = netlink.dump(libc::RTM_GETADDR, &[INET, 0, 0, 0, 0, 0, 0, 0])?;
    Ok(bodies.iter().any(|body| {
        body.get(1) == Some(&prefix)
            && word(body, 4) == Some(index)
            && attribute(body, ADDRESS, libc::IFA_LOCAL) == Some(&address.octets())
    }))
}

fn default_route(netlink: &mut Netlink, index: u32, gateway: Ipv4Addr) -> io::Result<()> {
    // struct rtmsg: family, lengths of destination and source, tos, table, protocol, scope, type.
    let header =
        [INET, 0, 0, 0, libc::RT_TABLE_MAIN, libc::RTPROT_STATIC, libc::RT_SCOPE_UNIVERSE, libc::RTN_UNICAST];
    let message = Message::new(
        libc::RTM_NEWROUTE,
        libc::NLM_F_CREATE | libc::NLM_F_REPLACE,
        &[&header[..], &[0; 4]].concat(),
    )
    .attribute(libc::RTA_GATEWAY, &gateway.octets())
    .attribute(libc::RTA_OIF, &index.to_ne_bytes());
    netlink.change(message)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::thread;
    use std::time::{Duration, Instant};

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    const VETH_INFO_PEER: u16 = 1;
    const GATEWAY: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
    const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

    fn identity(last: u8) -> Identity {
        Identity {
            hostname: "a".into(),
            domain: String::new(),
            mac: String::new(),
            address: [192, 0, 2, last].into(),
            prefix: 24,
            gateway: [192, 0, 2, 1].into(),
            gateway_mac: String::new(),
            dns: [192, 0, 2, 1].into(),
            machine_id: String::new(),
            host_keys: Vec::new(),
            authorized_keys: Vec::new(),
            unix_ns: 0,
            seed: String::new(),
            clone: true,
        }
    }

    /// A pair of NICs, joined.
    fn add_nics(netlink: &mut Netlink) -> io::Result<()> {
        let attribute = |kind: u16, value: &[u8]| {
            let length = u16::try_from(value.len() + 4).unwrap();
            let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
            bytes.extend(value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        let peer = attribute(VETH_INFO_PEER, &[0; LINK]);
        let info =
            [attribute(libc::IFLA_INFO_KIND, b"veth"), attribute(libc::IFLA_INFO_DATA, &peer)].concat();
        let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        netlink
            .change(Message::new(libc::RTM_NEWLINK, flags, &[0; LINK]).attribute(libc::IFLA_LINKINFO, &info))
    }

    /// Local addresses of every link but the loopback.
    fn addresses(netlink: &mut Netlink) -> Vec<(u32, Vec<u8>)> {
        let bodies = netlink.dump(libc::RTM_GETADDR, &[INET, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        let parse =
            |body: &Vec<u8>| Some((word(body, 4)?, attribute(body, ADDRESS, libc::IFA_LOCAL)?.to_vec()));
        bodies.iter().filter_map(parse).filter(|(index, _)| *index != 1).collect()
    }

    fn gateways(netlink: &mut Netlink) -> Vec<Vec<u8>> {
        let bodies = netlink.dump(libc::RTM_GETROUTE, &[INET, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        let of = |body: &Vec<u8>| attribute(body, 12, libc::RTA_GATEWAY).map(<[u8]>::to_vec);
        bodies.iter().filter_map(of).collect()
    }

    fn in_a_network_of_its_own() {
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            println!("SKIPPED: no network namespace can be made: {error}");
            return;
        }
        let mut netlink = Netlink::open().unwrap();
        assert!(apply(&identity(5), MAC, Some(GATEWAY)).is_err(), "there is no NIC");
        if let Err(error) = add_nics(&mut netlink) {
            println!("SKIPPED: no NICs can be made: {error}");
            return;
        }
        let before = links(&mut netlink).unwrap();
        assert_eq!(before.len(), 2);
        assert!(!before[0].up);

        apply(&identity(5), MAC, Some(GATEWAY)).unwrap();
        let after = links(&mut netlink).unwrap();
        assert_eq!((after[0].mac, after[0].up), (MAC, true));
        let index = after[0].index;
        assert_eq!(addresses(&mut netlink), [(index, vec![192, 0, 2, 5])]);
        assert_eq!(gateways(&mut netlink), [[192, 0, 2, 1]]);

        apply(&identity(5), MAC, Some(GATEWAY)).unwrap();
        assert_eq!(addresses(&mut netlink), [(index, vec![192, 0, 2, 5])]);

        // With a carrier it has an IPv6 address as well, where there is IPv6.
        set_link(&mut netlink, before[1].index, true, None).unwrap();
        let has_ipv6 =
            fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6").is_ok_and(|off| off == "0\n");
        let begun = Instant::now();
        while has_ipv6 && link_local_addresses(&mut netlink, index).unwrap().is_empty() {
            assert!(begun.elapsed() < Duration::from_secs(10), "no link-local address");
            thread::sleep(Duration::from_millis(10));
        }

        // The clone's identity: the NIC has the original's address and MAC.
        let other = [0x52, 0x54, 0, 0, 0, 9];
        apply(&identity(9), other, Some(GATEWAY)).unwrap();
        let after = links(&mut netlink).unwrap();
        assert_eq!((after[0].mac, after[0].up), (other, true));
        assert_eq!(addresses(&mut netlink), [(index, vec![192, 0, 2, 9])]);
        let neighbours = netlink.dump(libc::RTM_GETNEIGH, &[INET, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        let known = neighbours.iter().find(|body| attribute(body, 12, NDA_DST) == Some(&[192, 0, 2, 1]));
        assert_eq!(attribute(known.unwrap(), 12, NDA_LLADDR), Some(&GATEWAY[..]));
        let expected = if has_ipv6 { vec![eui64(other)] } else { Vec::new() };
        assert_eq!(link_local_addresses(&mut netlink, index).unwrap(), expected);
        assert_eq!(gateways(&mut netlink), [[192, 0, 2, 1]]);

        let far = Identity { gateway: [198, 51, 100, 1].into(), ..identity(9) };
        assert!(apply(&far, other, None).is_err(), "the gateway is out of reach");
    }

    #[test]
    fn a_nic_gets_its_address_and_the_guest_its_route() {
        // A network namespace is a thread's, and ends with it.
        thread::spawn(in_a_network_of_its_own).join().unwrap();
    }
}
