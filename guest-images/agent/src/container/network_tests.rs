use std::thread;

use catalyst_agent_protocol::container;
use nix::sched::{CloneFlags, unshare};

use super::*;

const VETH_INFO_PEER: u16 = 1;

fn interface(nic: u8, name: &str, addresses: &[&str]) -> container::Interface {
    container::Interface {
        nic,
        name: name.into(),
        mac: format!("02:42:ac:11:00:{:02x}", nic + 2),
        mtu: 1400,
        addresses: addresses.iter().map(ToString::to_string).collect(),
    }
}

fn route(interface: &str, destination: &str, gateway: &str) -> container::Route {
    container::Route { interface: interface.into(), destination: destination.into(), gateway: gateway.into() }
}

#[test]
fn a_default_route_has_its_gateways_family_and_destinations_no_bits_of_hosts() {
    let network = Network {
        interfaces: vec![interface(1, "eth0", &["172.17.0.2/16", "fd00::2/64"])],
        routes: vec![
            route("eth0", "default", "172.17.0.1"),
            route("eth0", "default", "fd00::1"),
            route("eth0", "10.1.2.3/8", ""),
        ],
    };
    let wanted = check(&network, 2).unwrap();
    assert_eq!(wanted.interfaces[0].addresses[0], ("172.17.0.2".parse().unwrap(), 16));
    let to: Vec<String> = wanted
        .routes
        .iter()
        .map(|route| format!("{}/{}", route.destination.0, route.destination.1))
        .collect();
    assert_eq!(to, ["0.0.0.0/0", "::/0", "10.0.0.0/8"]);
}

#[test]
fn what_is_no_network_is_refused() {
    let network = |change: &dyn Fn(&mut Network)| {
        let mut network =
            Network { interfaces: vec![interface(0, "eth0", &["10.0.0.2/8"])], routes: Vec::new() };
        change(&mut network);
        check(&network, 2)
    };
    assert!(network(&|_| ()).is_ok());
    let wrong: [&dyn Fn(&mut Network); 11] = [
        &|network| network.interfaces[0].nic = 2,
        &|network| network.interfaces[0].name = "a/b".into(),
        &|network| network.interfaces[0].name = "lo".into(),
        &|network| network.interfaces[0].name = "eth%d".into(),
        &|network| network.interfaces[0].name = "sixteen-letters-".into(),
        &|network| network.interfaces[0].mac = "01:00:00:00:00:00".into(),
        &|network| network.interfaces[0].addresses.push("10.0.0.2/33".into()),
        &|network| network.interfaces.push(interface(0, "eth1", &[])),
        &|network| network.interfaces.push(interface(1, "eth0", &[])),
        &|network| network.routes.push(route("eth7", "default", "10.0.0.1")),
        &|network| network.routes.push(route("eth0", "10.0.0.0/8", "fd00::1")),
    ];
    for (number, change) in wrong.into_iter().enumerate() {
        assert!(network(change).is_err(), "{number}");
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
    let info = [attribute(libc::IFLA_INFO_KIND, b"veth"), attribute(libc::IFLA_INFO_DATA, &peer)].concat();
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    netlink.change(Message::new(libc::RTM_NEWLINK, flags, &[0; LINK]).attribute(libc::IFLA_LINKINFO, &info))
}

fn in_a_network_of_its_own() {
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
        println!("SKIPPED: no network namespace can be made: {error}");
        return;
    }
    let mut netlink = Netlink::open().unwrap();
    if let Err(error) = add_nics(&mut netlink) {
        println!("SKIPPED: no NICs can be made: {error}");
        return;
    }
    let has_ipv6 =
        std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6").is_ok_and(|off| off == "0\n");
    let before: Vec<String> = links(&mut netlink).unwrap().into_iter().map(|link| link.name).collect();
    let nics = Nics::take().unwrap();
    assert!(links(&mut netlink).unwrap().is_empty(), "they are out of sight");
    let of = |netlink: &mut Netlink, nic: usize| {
        let index = nics.lock().indices[nic];
        links(netlink).unwrap().into_iter().find(|link| Some(link.index) == index)
    };
    let (zero, one) = (&*before[1], &*before[0]);
    let addresses_of_zero: &[&str] =
        if has_ipv6 { &["172.17.0.2/16", "fd00::2/64"] } else { &["172.17.0.2/16"] };
    let mut network = Network {
        interfaces: vec![interface(0, zero, addresses_of_zero), interface(1, one, &["10.9.0.2/24"])],
        routes: vec![route(zero, "default", "172.17.0.1"), route(one, "10.10.0.0/16", "")],
    };
    if has_ipv6 {
        network.routes.push(route(zero, "default", "fd00::1"));
    }
    let apply = |network: &Network| nics.apply(&nics.check(network).unwrap()).unwrap();
    apply(&network);
    apply(&network);
    for (nic, name) in [(0, zero), (1, one)] {
        let link = of(&mut netlink, nic).unwrap();
        assert_eq!((link.name.as_str(), link.mtu, link.up), (name, 1400, true));
        assert_eq!(link.mac[5], u8::try_from(nic).unwrap() + 2);
    }
    let global = |netlink: &mut Netlink, nic: usize| -> Vec<String> {
        let index = nics.lock().indices[nic].unwrap();
        let mut all: Vec<String> = addresses(netlink, index)
            .unwrap()
            .into_iter()
            .filter(|((address, _), scope)| address.is_ipv4() || *scope != libc::RT_SCOPE_LINK)
            .map(|((address, length), _)| format!("{address}/{length}"))
            .collect();
        all.sort();
        all
    };
    assert_eq!(global(&mut netlink, 0), addresses_of_zero);
    assert_eq!(global(&mut netlink, 1), ["10.9.0.2/24"]);
    assert_eq!(routes(&mut netlink).unwrap().len(), network.routes.len());

    // They change names.
    network.interfaces[0].name = one.into();
    network.interfaces[1].name = zero.into();
    network.routes.clear();
    apply(&network);
    assert_eq!(of(&mut netlink, 0).unwrap().name, one);
    assert_eq!(of(&mut netlink, 1).unwrap().name, zero);
    assert_eq!(global(&mut netlink, 1), ["10.9.0.2/24"]);

    // One goes, the other gets another address and another way.
    let less = Network {
        interfaces: vec![interface(0, "net7", &["172.18.0.2/16"])],
        routes: vec![route("net7", "default", "172.18.0.1")],
    };
    apply(&less);
    let link = of(&mut netlink, 0).unwrap();
    assert_eq!(link.name, "net7");
    assert_eq!(global(&mut netlink, 0), ["172.18.0.2/16"]);
    assert_eq!(links(&mut netlink).unwrap().len(), 1);
    let way = (("0.0.0.0".parse().unwrap(), 0), Some("172.18.0.1".parse().unwrap()), link.index);
    assert_eq!(routes(&mut netlink).unwrap(), [way]);

    let far = Network { routes: vec![route("net7", "default", "198.51.100.1")], ..less };
    assert!(nics.apply(&nics.check(&far).unwrap()).is_err(), "the gateway is out of reach");
}

#[test]
fn nics_get_names_addresses_and_routes_and_lose_them() {
    // A network namespace is a thread's, and ends with it.
    thread::spawn(in_a_network_of_its_own).join().unwrap();
}
