//! The network of the VMs beside what else a host has: firewalls that drop what they forward, a VPN, resolvers that change.
//! A second namespace plays the outside world.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use catalyst_tests::world::{ran, run};
use catalyst_tests::{Checks, Ran, World, skip};

use crate::common::wait_until;

/// An address of the outside world, behind both of its links.
const OUTSIDE: &str = "203.0.113.1";
/// The links: interface, host's address, the outside's.
const LINKS: [(&str, &str, &str); 2] =
    [("up0", "192.0.2.1", "192.0.2.2"), ("vpn0", "198.51.100.1", "198.51.100.2")];
/// dockerd's filter rules with one network, as 20.10 makes them.
const DOCKER: &str = "iptables -P FORWARD DROP
    for chain in DOCKER DOCKER-ISOLATION-STAGE-1 DOCKER-ISOLATION-STAGE-2 DOCKER-USER; do iptables -N $chain; done
    iptables -A FORWARD -j DOCKER-USER
    iptables -A FORWARD -j DOCKER-ISOLATION-STAGE-1
    iptables -A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
    iptables -A FORWARD -o docker0 -j DOCKER
    iptables -A FORWARD -i docker0 ! -o docker0 -j ACCEPT
    iptables -A FORWARD -i docker0 -o docker0 -j ACCEPT
    iptables -A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
    iptables -A DOCKER-ISOLATION-STAGE-1 -j RETURN
    iptables -A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
    iptables -A DOCKER-ISOLATION-STAGE-2 -j RETURN
    iptables -A DOCKER-USER -s 203.0.113.66/32 -j DROP
    iptables -A DOCKER-USER -j RETURN";
const NO_DOCKER: &str = "iptables -F; iptables -X; iptables -P FORWARD ACCEPT";
/// With a copy of /etc, where ufw keeps its rules and dnsmasq watches the folder of resolv.conf; then the command.
const ENTER: &str = r#"mount --bind "$0/etc" /etc; exec "$@""#;

pub fn beside(checks: &mut Checks) {
    let outside = World::empty();
    let host = Host::new(&outside);
    alone(checks, &host);
    firewalls(checks, &host);
    moves(checks, &host, &outside);
}

struct Host {
    world: World,
}

impl Host {
    fn new(outside: &World) -> Self {
        let mut world = World::empty();
        let root = world.path("root");
        fs::create_dir(&root).unwrap();
        run(std::process::Command::new("cp").args(["-a", "/etc"]).arg(&root));
        let _ = fs::remove_file(root.join("etc/resolv.conf"));
        fs::write(root.join("etc/resolv.conf"), "nameserver 192.0.2.2\n").unwrap();
        run(outside.command("ip").args(["address", "add", &format!("{OUTSIDE}/32"), "dev", "lo"]));
        for (name, here, there) in LINKS {
            let peer = ["link", "add", name, "type", "veth", "peer", "name", name, "netns", outside.netns()];
            run(world.command("ip").args(peer));
            for (side, address) in [(&world, here), (outside, there)] {
                run(side.command("ip").args(["address", "add", &format!("{address}/24"), "dev", name]));
                run(side.command("ip").args(["link", "set", name, "up"]));
            }
            // A resolver on each link, which knows a name that the other does not.
            let mut resolver = outside.command("dnsmasq");
            resolver.args(["--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--bind-interfaces"]);
            resolver.args([&format!("--listen-address={there}"), "--pid-file=", "--user=root"]);
            if name == LINKS[0].0 {
                resolver.arg(format!("--listen-address={OUTSIDE}"));
            }
            run(resolver.arg(format!("--address=/{name}.test/{OUTSIDE}")));
        }
        run(world.command("ip").args(["route", "add", "default", "via", LINKS[0].2]));
        let words = ["sh", "-ec", ENTER, root.to_str().unwrap()];
        world.wrapper = words.map(Into::into).to_vec();
        world.start_daemon();
        Self { world }
    }

    fn root(&self) -> PathBuf {
        self.world.path("root")
    }

    /// A script where the daemon finds what it finds.
    fn command(&self, script: &str) -> std::process::Command {
        let mut command = self.world.command("sh");
        command.args(["-ec", ENTER]).arg(self.root()).args(["sh", "-ec", script]);
        command
    }

    fn sh(&self, script: &str) -> Ran {
        ran(self.command(script))
    }

    fn on(&self, id: &str) {
        self.world.catalyst(&["vmpower", "on", id, "--wait", "--timeout", "280"]).ok();
    }

    fn off(&self) {
        for id in self.world.catalyst(&["vmpower", "list"]).ok().lines() {
            self.world.catalyst(&["vmpower", "off", id]).ok();
        }
    }

    fn guest(&self, words: &[&str]) -> Ran {
        self.world.catalyst(&[&["guest", "exec", "web1", "--"], words].concat())
    }

    /// Whether the guest reaches the outside world.
    fn reaches(&self) -> bool {
        // Not by ping, which ufw lets through for everybody.
        let connect = format!("timeout 3 bash -c 'exec 3<>/dev/tcp/{OUTSIDE}/53'");
        self.guest(&["sh", "-c", &connect]).code() == 0
    }

    /// Whether the guest finds the name that the resolver of a link knows.
    fn resolves(&self, link: &str) -> bool {
        self.guest(&["getent", "ahostsv4", &format!("{link}.test")]).stdout.contains(OUTSIDE)
    }

    fn doctor(&self) -> String {
        let doctor = self.world.curl("GET", "/v1/doctor", None).json();
        let checks = doctor["checks"].as_array().unwrap().clone();
        checks.iter().find(|check| check["name"] == "network").unwrap()["found"].as_str().unwrap().to_owned()
    }
}

fn alone(checks: &mut Checks, host: &Host) {
    checks.check("a guest reaches the outside world and its names", || {
        for id in ["web1", "other"] {
            host.world.catalyst(&["vm", "create", id]).ok();
        }
        host.on("web1");
        assert!(host.reaches() && host.resolves("up0"));
        assert!(!host.doctor().contains("let through"), "{}", host.doctor());
    });
}

/// A firewall, how it is started and ended, and what lists the rules that a user knows of it.
struct Firewall {
    name: &'static str,
    programs: &'static [&'static str],
    start: &'static str,
    stop: &'static str,
    list: &'static str,
    place: &'static str,
}

const FIREWALLS: [Firewall; 2] = [
    Firewall {
        name: "Docker",
        programs: &["iptables"],
        start: DOCKER,
        stop: NO_DOCKER,
        list: "iptables -S",
        place: "Docker's chain DOCKER-USER",
    },
    Firewall {
        name: "ufw",
        programs: &["ufw", "iptables"],
        start: "ufw --force enable; ufw allow 2222/tcp; ufw route deny in on eth7",
        stop: "ufw --force disable",
        list: "cat /etc/ufw/user.rules /etc/ufw/user6.rules; ufw show added; iptables -S",
        place: "ufw",
    },
];

fn firewalls(checks: &mut Checks, host: &Host) {
    for firewall in FIREWALLS {
        let name = firewall.name;
        checks.check(
            &format!("guests are let through {name} at its own place, and nothing stays there"),
            || {
                for program in firewall.programs {
                    if host.sh(&format!("command -v {program}")).code() != 0 {
                        skip(format!("there is no {program}: make setup-tests"));
                    }
                }
                beside_firewall(host, &firewall);
            },
        );
    }
}

fn beside_firewall(host: &Host, firewall: &Firewall) {
    host.sh(firewall.start).ok();
    let before = host.sh(firewall.list).ok().to_owned();
    assert!(!host.reaches(), "it drops what it does not know");
    assert!(host.doctor().contains("does not let the guests"), "{}", host.doctor());
    host.world.catalyst(&["vmpower", "on", "other"]).ok();
    assert!(host.reaches() && host.resolves("up0"), "{}\n{}", host.sh(firewall.list).stdout, host.doctor());
    let found = host.doctor();
    assert!(found.contains(&format!("let through by {}", firewall.place)), "{found}");
    assert!(!found.contains("drops"), "{found}");
    assert!(host.sh(firewall.list).ok().contains("catalyst0"));
    host.off();
    host.world.catalyst(&["network", "down"]).ok();
    assert_eq!(host.sh(firewall.list).ok(), before);
    // The next one comes up with it there from the start.
    host.on("web1");
    assert!(host.reaches() && host.resolves("up0"));
    host.off();
    host.world.catalyst(&["network", "down"]).ok();
    assert_eq!(host.sh(firewall.list).ok(), before);
    host.sh(firewall.stop).ok();
    host.on("web1");
}

fn moves(checks: &mut Checks, host: &Host, outside: &World) {
    checks.check("the default route moves to a VPN and back, and guests follow", || {
        host.on("web1");
        let ip = |side: &World, words: &[&str]| run(side.command("ip").args(words));
        let seen = |link: &str| {
            let mut count = outside.command("cat");
            let count = ran({
                count.arg(format!("/sys/class/net/{link}/statistics/rx_packets"));
                count
            });
            count.ok().parse::<u64>().unwrap()
        };
        for (name, _, there) in [LINKS[1], LINKS[0]] {
            ip(&host.world, &["link", "set", name, "mtu", "1300"]);
            ip(&host.world, &["route", "replace", "default", "via", there]);
            let before = seen(name);
            assert!(host.reaches(), "by {name}");
            assert!(seen(name) >= before + 2, "it is {name} that is used");
        }
    });
    checks.check("a resolver that changes is asked by guests that run", || {
        let file = host.root().join("etc/resolv.conf");
        assert!(host.resolves("up0") && !host.resolves("vpn0"));
        fs::write(&file, format!("nameserver {}\n", LINKS[1].2)).unwrap();
        wait_until("the other one is asked", Duration::from_mins(1), || host.resolves("vpn0"));
        fs::write(&file, format!("nameserver {}\n", LINKS[0].2)).unwrap();
        wait_until("the first one is asked again", Duration::from_mins(1), || {
            host.guest(&["getent", "ahostsv4", "again.up0.test"]).stdout.contains(OUTSIDE)
        });
    });
}
