//! Up, down, beside others, and what stands in the way.

use std::fs;
use std::net::UdpSocket;
use std::os::unix::fs::MetadataExt;
use std::time::Instant;

use catalyst_daemon::network::{Network, NetworkConfig, NetworkError};

use crate::namespace::{Hidden, Host, cannot_run, vanished};

fn ip_forward(host: &Host) -> String {
    host.namespace.run("cat /proc/sys/net/ipv4/ip_forward").trim().to_owned()
}

#[test]
fn up_and_down_leave_no_trace_however_often() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    // Settings of before that switching forwarding on and off would lose.
    host.namespace.run(
        "ip link add other0 type bridge && cd /proc/sys/net/ipv4/conf &&
         echo 1 > other0/forwarding && echo 0 > all/accept_redirects",
    );
    host.block_on(|| async {
        let network = Network::load(host.config("state")).await.unwrap();
        let before = host.traces();
        for _ in 0..2 {
            let began = Instant::now();
            network.up().await.unwrap();
            println!("up: {:?}", began.elapsed());
            let first = network.status().await;
            network.up().await.unwrap();
            let second = network.status().await;
            assert!(first.up && first.forwarding_set_by_us, "{first:?}");
            assert_eq!(first, second, "the second up changes nothing");
            assert_eq!(ip_forward(&host), "1");
            assert_ne!(host.traces(), before);
            let began = Instant::now();
            network.down().await.unwrap();
            println!("down: {:?}", began.elapsed());
            network.down().await.unwrap();
            assert_eq!(host.traces(), before);
            assert!(!network.status().await.up);
        }
    });
}

#[test]
fn two_networks_live_side_by_side_and_the_last_puts_forwarding_back() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    host.block_on(|| async {
        let before = host.traces();
        let one = Network::load(host.config("one")).await.unwrap();
        let two = Network::load(host.config("two")).await.unwrap();
        assert_eq!((one.bridge(), two.bridge()), ("catalyst0", "catalyst1"), "chosen before either is up");
        assert!(!one.subnet().overlaps(two.subnet()));
        one.up().await.unwrap();
        two.up().await.unwrap();
        assert!(one.status().await.up && two.status().await.up);
        one.down().await.unwrap();
        assert_eq!(ip_forward(&host), "1", "the other one needs it");
        assert!(two.status().await.up && !one.status().await.up);
        two.down().await.unwrap();
        assert_eq!(host.traces(), before);
    });
}

#[test]
fn forwarding_that_was_on_stays_on() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    host.namespace.run("echo 1 > /proc/sys/net/ipv4/ip_forward");
    host.block_on(|| async {
        let network = Network::load(host.config("state")).await.unwrap();
        network.up().await.unwrap();
        assert!(!network.status().await.forwarding_set_by_us);
        network.down().await.unwrap();
        assert_eq!(ip_forward(&host), "1");
    });
}

#[test]
fn a_bridge_removed_by_hand_does_not_keep_forwarding_on() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    host.block_on(|| async {
        let one = Network::load(host.config("one")).await.unwrap();
        let two = Network::load(host.config("two")).await.unwrap();
        one.up().await.unwrap();
        two.up().await.unwrap();
        host.namespace.run("ip link delete catalyst0");
        two.down().await.unwrap();
        assert_eq!(ip_forward(&host), "0");
        one.down().await.unwrap();
        assert_eq!(host.namespace.run("nft list ruleset"), "");
        assert!(host.namespace.processes().is_empty());
    });
}

#[test]
fn the_subnet_avoids_the_routes_of_all_tables_and_names_a_collision_that_came_later() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    host.namespace.run(
        "ip link add vpn0 type bridge && ip link set vpn0 up && ip address add 10.9.9.9/32 dev vpn0 &&
         ip route add 10.208.0.0/13 dev vpn0 table 77 && ip route add 172.29.3.0/24 dev vpn0",
    );
    host.block_on(|| async {
        let network = Network::load(host.config("state")).await.unwrap();
        let subnet = network.subnet();
        assert_eq!(subnet.to_string(), "10.216.0.0/20", "the first past the route in table 77");
        host.namespace.run("ip route add 10.216.0.0/16 dev vpn0");
        let lease = network.lease_for("web1", None).unwrap();
        let error = network.up().await.unwrap_err().to_string();
        assert!(error.contains("10.216.0.0/20") && error.contains("route 10.216.0.0/16 on vpn0"), "{error}");
        assert!(network.status().await.warnings[0].contains("vpn0"));
        // Nobody holds an address in it any more: now another can be taken.
        network.release("web1");
        network.up().await.unwrap();
        assert_eq!(network.subnet().to_string(), "10.217.0.0/20");
        assert!(!network.subnet().contains(lease.address));
        let reloaded = Network::load(host.config("state")).await.unwrap();
        assert_eq!(reloaded.subnet(), network.subnet(), "and is kept");
        network.down().await.unwrap();
    });
}

#[test]
fn a_link_of_somebody_elses_is_left_alone() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    host.namespace.run("ip link add catalyst0 type bridge && ip link add mine type veth peer name yours");
    host.block_on(|| async {
        let before = host.traces();
        let chosen = Network::load(host.config("state")).await.unwrap();
        assert_eq!(chosen.bridge(), "catalyst1");
        for bridge in ["catalyst0", "mine"] {
            let config = NetworkConfig { bridge: Some(bridge.to_owned()), ..host.config(bridge) };
            let network = Network::load(config).await.unwrap();
            let error = network.up().await.unwrap_err();
            assert!(matches!(error, NetworkError::ForeignLink { .. }), "{error}");
            network.down().await.unwrap();
        }
        assert_eq!(host.traces(), before);
    });
}

#[test]
fn an_up_that_fails_says_why_and_leaves_nothing() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    host.block_on(|| async {
        let network = Network::load(host.config("state")).await.unwrap();
        let before = host.traces();
        let taken = UdpSocket::bind(("0.0.0.0", 53)).unwrap();
        let error = network.up().await.unwrap_err().to_string();
        assert!(error.contains("dnsmasq") && error.contains("Address already in use"), "{error}");
        assert!(!error.contains('\n'));
        assert_eq!(host.traces(), before);
        drop(taken);
        network.up().await.unwrap();
        network.down().await.unwrap();
    });
}

#[test]
fn bad_wishes_are_refused_and_a_change_waits_for_down() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    host.block_on(|| async {
        for bridge in ["", "no/slash", "name-that-is-too-long", "a\"; flush ruleset"] {
            let config = NetworkConfig { bridge: Some(bridge.to_owned()), ..host.config("state") };
            assert!(matches!(Network::load(config).await, Err(NetworkError::BadBridge(_))), "{bridge}");
        }
        let public = NetworkConfig { subnet: Some("8.8.8.0/24".parse().unwrap()), ..host.config("state") };
        assert!(matches!(Network::load(public).await, Err(NetworkError::BadSubnet { .. })));
        let network = Network::load(host.config("state")).await.unwrap();
        network.up().await.unwrap();
        let other =
            NetworkConfig { subnet: Some("192.168.77.0/24".parse().unwrap()), ..host.config("state") };
        let error = Network::load(other.clone()).await.unwrap_err();
        assert!(matches!(error, NetworkError::ChangeWhileUp { .. }), "{error}");
        network.down().await.unwrap();
        let changed = Network::load(other).await.unwrap();
        assert_eq!(changed.lease_for("web1", None).unwrap().address.to_string(), "192.168.77.10");
    });
}

#[test]
fn it_works_from_threads_that_act_on_files_as_the_owner() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let state = host.folder().join("state");
    fs::create_dir(&state).unwrap();
    std::os::unix::fs::chown(&state, Some(65534), Some(65534)).unwrap();
    host.block_on(|| async {
        nix::unistd::setfsgid(nix::unistd::Gid::from_raw(65534));
        nix::unistd::setfsuid(nix::unistd::Uid::from_raw(65534));
        let network = Network::load(host.config("state")).await.unwrap();
        let lease = network.lease_for("web1", None).unwrap();
        network.up().await.unwrap();
        let tap = network.open_tap(&lease).await.unwrap();
        assert_eq!(network.status().await.ports, std::slice::from_ref(&tap.name));
        let name = tap.name.clone();
        drop(tap);
        vanished(&host, &name).await;
        network.release("web1");
        network.down().await.unwrap();
        assert!(fs::write(host.folder().join("roots"), "").is_err(), "the thread is the owner's again");
        assert_eq!(fs::metadata(state.join("network.json")).unwrap().uid(), 65534);
    });
}

#[test]
fn rules_that_somebody_flushed_are_back_after_the_next_power_on() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    host.block_on(|| async {
        let network = Network::load(host.config("state")).await.unwrap();
        network.up().await.unwrap();
        let rules = host.namespace.run("nft list ruleset");
        network.up().await.unwrap();
        host.namespace.run("nft flush ruleset");
        network.up().await.unwrap();
        assert_eq!(host.namespace.run("nft list ruleset"), rules);
        host.namespace.run("nft add table ip theirs && nft flush chain inet catalyst_catalyst0 forward");
        network.up().await.unwrap();
        assert!(host.namespace.run("nft list ruleset").contains(rules.trim()));
        host.namespace
            .run("nft add chain ip theirs f '{ type filter hook forward priority 0; policy drop; }'");
        let warnings = network.status().await.warnings;
        assert!(warnings.iter().any(|warning| warning.contains("table ip theirs")), "{warnings:?}");
    });
}

#[test]
fn another_namespace_has_a_network_of_the_same_names() {
    if cannot_run() {
        return;
    }
    let (one, two) = (Host::new(), Host::new());
    let second = |state: &str| NetworkConfig { run_dir: one.run_dir(), ..two.config(state) };
    let before = two.traces();
    let first = one.block_on(|| async {
        let network = Network::load(one.config("state")).await.unwrap();
        network.up().await.unwrap();
        network.status().await
    });
    two.block_on(|| async {
        let network = Network::load(second("state")).await.unwrap();
        network.up().await.unwrap();
        let status = network.status().await;
        assert_eq!((&status.bridge, status.subnet), (&first.bridge, first.subnet));
        assert_ne!(status.dnsmasq_pid, first.dnsmasq_pid);
        network.down().await.unwrap();
        assert_eq!(two.traces(), before);
    });
    one.block_on(|| async {
        let network = Network::load(one.config("state")).await.unwrap();
        assert_eq!(network.status().await, first, "the first one did not notice");
    });
}

#[test]
fn what_is_missing_is_named_with_the_command_that_brings_it() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    host.block_on(|| async {
        let network = Network::load(host.config("state")).await.unwrap();
        let lease = network.lease_for("web1", None).unwrap();
        let before = host.traces();
        for (hidden, remedy) in [
            ("/usr/sbin/dnsmasq", "sudo apt install dnsmasq-base"),
            ("/usr/sbin/nft", "sudo apt install nftables"),
        ] {
            let hidden = Hidden::new(hidden);
            let error = network.up().await.unwrap_err().to_string();
            drop(hidden);
            assert!(error.contains(remedy) && !error.contains('\n'), "{error}");
            assert_eq!(host.traces(), before);
        }
        network.up().await.unwrap();
        let hidden = Hidden::new("/dev/net/tun");
        let error = network.open_tap(&lease).await.unwrap_err().to_string();
        drop(hidden);
        assert!(error.contains("/dev/net/tun") && error.contains("sudo modprobe tun"), "{error}");
        network.open_tap(&lease).await.unwrap();
    });
}

#[test]
fn without_root_it_reads_and_leases_and_says_that_it_cannot_do_more() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let state = host.folder().join("state");
    fs::create_dir(&state).unwrap();
    std::os::unix::fs::chown(&state, Some(65534), Some(65534)).unwrap();
    host.block_on(|| async {
        // SAFETY: plain system call; unlike the C library's function it changes this thread alone, which ends with
        // this test.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
        assert_eq!(changed, 0);
        let network = Network::load(host.config("state")).await.unwrap();
        let lease = network.lease_for("web1", None).unwrap();
        assert!(!network.status().await.up);
        for error in [network.up().await.unwrap_err(), network.down().await.unwrap_err()] {
            assert!(matches!(error, NetworkError::NotRoot { .. }), "{error}");
            assert!(error.to_string().contains("sudo"), "{error}");
        }
        assert!(network.open_tap(&lease).await.is_err());
        assert!(!network.answers_arp(lease.address, lease.mac).await);
        network.release("web1");
    });
}
