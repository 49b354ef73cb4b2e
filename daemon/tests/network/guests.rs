//! What guests get: addresses, names, the way out, and nothing more.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use catalyst_daemon::network::{Mac, Network, NetworkError};

use crate::namespace::{Hidden, Host, Namespace, cannot_run, comes_to, resolve, vanished};

#[test]
fn dhcp_gives_the_fixed_lease_and_names_come_and_go_with_the_machines() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    host.block_on(|| async {
        let network = Network::load(host.config("state")).await.unwrap();
        let web1 = network.lease_for("web1", None).unwrap();
        let web2 = network.lease_for("Web_2.test", None).unwrap();
        network.up().await.unwrap();
        let one = host.guest(&network, "port1", &web1);
        let two = host.guest(&network, "port2", &web2);
        assert!(!network.answers_arp(web1.address, web1.mac).await, "nobody has it yet");
        let told = host.dhcp(&one, "").unwrap();
        let (address, gateway) = (web1.address, web1.gateway);
        let expected = format!("ip={address} mask=20 router={gateway} dns={gateway} domain=catalyst");
        assert!(told.starts_with(&expected), "{told}");
        // A name that a guest gives itself is nobody's.
        assert!(
            host.dhcp(&two, "-x hostname:evil -F evil.catalyst").unwrap().contains(&web2.address.to_string())
        );
        for name in ["evil", "evil.catalyst"] {
            assert_eq!(resolve(&one, gateway, name), None);
        }
        assert!(network.answers_arp(web1.address, web1.mac).await);
        assert!(!network.answers_arp(web1.address, web2.mac).await, "another machine's");
        assert_eq!(resolve(&two, gateway, "web1.catalyst"), Some(web1.address.to_string()));
        assert_eq!(resolve(&one, gateway, "web_2-test.catalyst"), Some(web2.address.to_string()));
        assert_eq!(resolve(&one, gateway, "host.catalyst"), Some(gateway.to_string()));
        one.run(&format!("busybox ping -c 1 -W 2 {} && busybox ping -c 1 -W 2 {gateway}", web2.address));

        network.release("web1");
        comes_to(&two, gateway, "web1.catalyst", None).await;
        // The next machine gets the same address, by DHCP too, although the lease of the old one still runs.
        let next = network.lease_for("next", None).unwrap();
        assert_eq!(next.address, web1.address);
        let tap = network.open_tap(&next).await.unwrap();
        host.namespace.run("ip link delete port1");
        let three = host.guest(&network, "port3", &next);
        assert!(host.dhcp(&three, "").unwrap().contains(&next.address.to_string()));
        comes_to(&two, gateway, "next.catalyst", Some(&next.address.to_string())).await;
        drop(tap);
    });
}

#[test]
fn a_machine_without_lease_gets_no_address() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    host.block_on(|| async {
        let network = Network::load(host.config("state")).await.unwrap();
        let mut lease = network.lease_for("web1", None).unwrap();
        network.up().await.unwrap();
        lease.mac = Mac([2, 0, 0, 0, 0, 1]);
        let stranger = host.guest(&network, "port1", &lease);
        assert_eq!(host.dhcp(&stranger, ""), None);
        let error = network.open_tap(&lease).await.unwrap_err();
        assert!(matches!(error, NetworkError::NoLease { .. }), "{error}");
    });
}

#[test]
fn dnsmasq_listens_on_the_bridge_only() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    host.namespace
        .run("ip link add lan0 type bridge && ip address add 192.0.2.1/24 dev lan0 && ip link set lan0 up");
    host.block_on(|| async {
        let network = Network::load(host.config("state")).await.unwrap();
        network.up().await.unwrap();
        let gateway = network.status().await.gateway;
        let sockets = host.namespace.run("ss -Hlntu | awk '{print $1, $5}' | sort");
        let expected = format!("tcp {gateway}:53\nudp 0.0.0.0%catalyst0:67\nudp {gateway}:53\n");
        assert_eq!(sockets, expected);
    });
}

/// Connects from inside `from`; the address that the other side sees, or how it failed.
fn connect(from: &Namespace, to: &TcpListener, address: &str) -> Result<SocketAddr, ErrorKind> {
    let port = to.local_addr().unwrap().port();
    let to_address = SocketAddr::new(address.parse().unwrap(), port);
    from.inside(|| TcpStream::connect_timeout(&to_address, Duration::from_millis(700)))
        .map_err(|error| error.kind())
        .map(|_stream| to.accept().unwrap().1)
}

#[test]
fn guests_reach_out_with_the_hosts_address_and_are_not_reached_from_outside() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let outside = Namespace::new();
    host.namespace.run(&format!(
        "ip link add wan0 type veth peer name eth0 netns {} && ip address add 198.51.100.1/24 dev wan0 &&
         ip link set wan0 up && ip route add default via 198.51.100.2",
        outside.path()
    ));
    host.block_on(|| async {
        let network = Network::load(host.config("one")).await.unwrap();
        let other = Network::load(host.config("two")).await.unwrap();
        let lease = network.lease_for("web1", None).unwrap();
        let foreign = other.lease_for("web1", None).unwrap();
        network.up().await.unwrap();
        other.up().await.unwrap();
        outside.run(&format!(
            "ip address add 198.51.100.2/24 dev eth0 && ip link set eth0 up &&
             ip route add {} via 198.51.100.1",
            network.subnet()
        ));
        let guest = host.guest(&network, "port1", &lease);
        host.dhcp(&guest, "").unwrap();
        let neighbour = host.guest(&other, "port2", &foreign);
        host.dhcp(&neighbour, "").unwrap();

        let server = outside.inside(|| TcpListener::bind("0.0.0.0:0").unwrap());
        let seen = connect(&guest, &server, "198.51.100.2").unwrap();
        assert_eq!(seen.ip().to_string(), "198.51.100.1", "the host's address");

        let service = guest.inside(|| TcpListener::bind("0.0.0.0:0").unwrap());
        let address = lease.address.to_string();
        let from_host = connect(&host.namespace, &service, &address).unwrap();
        assert_eq!(from_host.ip().to_string(), lease.gateway.to_string(), "the host reaches its guests");
        assert_eq!(connect(&outside, &service, &address), Err(ErrorKind::TimedOut));
        assert_eq!(
            connect(&neighbour, &service, &address),
            Err(ErrorKind::TimedOut),
            "another network's guest"
        );

        // A guest that sends with an address of the outside's is not heard.
        guest.run("ip address add 198.51.100.77/32 dev lo");
        let said = guest.try_run("busybox ping -c 1 -W 1 -I 198.51.100.77 198.51.100.2");
        assert!(!said.status.success());
        let counted = outside.run("ip -s -j neighbour");
        assert!(!counted.contains("198.51.100.77"));
    });
}

#[test]
fn a_tap_vanishes_with_its_descriptor_and_keeps_the_network_up() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    host.block_on(|| async {
        let network = Network::load(host.config("state")).await.unwrap();
        let lease = network.lease_for("web1", None).unwrap();
        let error = network.open_tap(&lease).await.unwrap_err();
        assert!(matches!(error, NetworkError::NoBridge { .. }), "{error}");
        network.up().await.unwrap();
        let tap = network.open_tap(&lease).await.unwrap();
        let second = network.open_tap(&network.lease_for("web2", None).unwrap()).await.unwrap();
        assert_ne!(tap.name, second.name);
        assert!(host.namespace.run(&format!("ip link show {}", tap.name)).contains("master catalyst0"));
        let copy = tap.fd.try_clone().unwrap();
        let name = tap.name.clone();
        let second_name = second.name.clone();
        drop((tap, second));
        vanished(&host, &second_name).await;
        let error = network.down().await.unwrap_err();
        assert!(error.to_string().contains(&format!("{name} is still on bridge catalyst0")), "{error}");
        assert!(network.status().await.up, "a refused down changes nothing");
        drop(copy);
        vanished(&host, &name).await;
        network.down().await.unwrap();
    });
}

#[test]
fn many_at_once_get_distinct_leases_and_cables() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    host.block_on(|| async {
        let network = Network::load(host.config("state")).await.unwrap();
        let start = std::sync::Barrier::new(10);
        let leases: Vec<_> = std::thread::scope(|scope| {
            let one = |n: i32| {
                start.wait();
                network.lease_for(&format!("vm{n}"), None).unwrap()
            };
            let threads: Vec<_> = (0..10).map(|n| scope.spawn(move || one(n))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let addresses: HashSet<Ipv4Addr> = leases.iter().map(|lease| lease.address).collect();
        assert_eq!(addresses, (10..20).map(|n| network.subnet().nth(n).unwrap()).collect());
        assert_eq!(leases.iter().map(|lease| lease.mac).collect::<HashSet<_>>().len(), 10);

        // Ten power-ons at once, of which the first makes the network.
        let began = Instant::now();
        let on = leases.iter().map(|lease| async {
            network.up().await.unwrap();
            network.open_tap(lease).await.unwrap()
        });
        let taps = futures_util::future::join_all(on).await;
        println!("ten power-ons at once: {:?}", began.elapsed());
        assert_eq!(taps.iter().map(|tap| &tap.name).collect::<HashSet<_>>().len(), 10);
        assert_eq!(network.status().await.ports.len(), 10);
        let guest = host.guest(&network, "port1", &leases[0]);
        host.dhcp(&guest, "").unwrap();
        for lease in &leases {
            let name = format!("{}.catalyst", lease.name);
            comes_to(&guest, lease.dns, &name, Some(&lease.address.to_string())).await;
        }
    });
}

#[test]
fn names_of_the_world_come_from_the_hosts_name_server_and_ours_do_not_reach_it() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let world = Namespace::new();
    host.namespace.run(&format!(
        "ip link add wan0 type veth peer name eth0 netns {} && ip address add 198.51.100.1/24 dev wan0 &&
         ip link set wan0 up",
        world.path()
    ));
    world.run(
        "ip address add 198.51.100.2/24 dev eth0 && ip link set eth0 up &&
         exec dnsmasq --conf-file=/dev/null --no-hosts --no-resolv --pid-file --interface=eth0 --bind-interfaces \
             --address=/example.test/203.0.113.7 --address=/catalyst/203.0.113.8 --log-facility=/dev/null",
    );
    let resolv = host.folder().join("resolv.conf");
    std::fs::write(&resolv, "nameserver 198.51.100.2\n").unwrap();
    host.block_on(|| async {
        let _resolv = Hidden::behind("/etc/resolv.conf", &resolv);
        let network = Network::load(host.config("state")).await.unwrap();
        let lease = network.lease_for("web1", None).unwrap();
        network.up().await.unwrap();
        let guest = host.guest(&network, "port1", &lease);
        host.dhcp(&guest, "").unwrap();
        assert_eq!(resolve(&guest, lease.dns, "www.example.test").as_deref(), Some("203.0.113.7"));
        assert_eq!(resolve(&guest, lease.dns, "nobody.catalyst"), None);
        network.down().await.unwrap_err();
    });
}
