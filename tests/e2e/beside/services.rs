//! The real dockerd, ufw, firewalld and NetworkManager, each in a host of its own: what one leaves is in no other's way.

use std::fs;
use std::time::Duration;

use catalyst_tests::world::HANG;
use catalyst_tests::{Checks, World, skip};

use super::{Host, Service};
use crate::common::wait_until;

/// How long a service may take to come up on a machine that is busy.
const PATIENCE: Duration = HANG;

/// A firewall of others.
struct Firewall {
    name: &'static str,
    /// What it cannot do without, and which target brings it.
    programs: &'static [&'static str],
    made_by: &'static str,
    /// What is started before it comes up, and what runs while it is up, if anything does.
    before: &'static str,
    service: Option<&'static str>,
    /// Ends with 0 when it is up.
    is_up: &'static str,
    /// What a user has of his own in it.
    own: &'static str,
    /// Loads all its rules anew.
    reload: &'static str,
    /// All that a user knows of its rules.
    list: &'static str,
    place: &'static str,
}

const FIREWALLS: [Firewall; 3] = [
    Firewall {
        name: "dockerd",
        programs: &["dockerd", "containerd", "iptables"],
        made_by: "make firewall-tools",
        // It sets this itself where it switches forwarding on, which the network of VMs has done before it here.
        before: "iptables -P FORWARD DROP; mkdir -p $0/docker",
        service: Some(
            r#"exec dockerd --data-root "$0/docker/data" --exec-root /run/docker --pidfile /run/docker.pid --host unix:///run/docker.sock --storage-driver vfs"#,
        ),
        is_up: "iptables -S FORWARD | grep -q docker0 && iptables -S DOCKER-USER",
        own: "iptables -I DOCKER-USER -s 203.0.113.66/32 -j DROP",
        reload: "iptables -F DOCKER-USER; iptables -A DOCKER-USER -s 203.0.113.66/32 -j DROP; iptables -A DOCKER-USER -j RETURN",
        list: "iptables -S",
        place: "Docker's chain DOCKER-USER",
    },
    Firewall {
        name: "ufw",
        programs: &["ufw", "iptables"],
        made_by: "make setup-tests",
        before: "ufw allow 2222/tcp; ufw route deny in on eth7",
        service: None,
        is_up: "ufw --force enable",
        own: ":",
        reload: "ufw reload",
        list: "cat /etc/ufw/user.rules /etc/ufw/user6.rules; ufw show added; iptables -S",
        place: "ufw",
    },
    Firewall {
        name: "firewalld",
        programs: &["firewalld", "dbus-daemon", "busctl"],
        made_by: "make firewall-tools",
        before: ":",
        service: Some("exec firewalld --nofork --nopid"),
        is_up: "firewall-cmd --state",
        own: "firewall-cmd --permanent --add-port=2222/tcp; firewall-cmd --add-port=2222/tcp",
        reload: "firewall-cmd --reload",
        list: "firewall-cmd --list-all-zones; firewall-cmd --permanent --list-all-zones; find /etc/firewalld -type f | sort",
        place: "firewalld",
    },
];

pub fn firewalls(checks: &mut Checks) {
    for firewall in FIREWALLS {
        let name = firewall.name;
        let (mut made, mut service) = (None, None);
        checks.check(
            &format!("{name} comes up while VMs run: they are let through, and nobody else is"),
            || {
                let outside = World::empty();
                let host = Host::new(&outside);
                needs(&host, firewall.programs, firewall.made_by);
                let (host, _) = made.insert((host, outside));
                host.on();
                assert!(host.reaches());
                wait_until("strangers get through", PATIENCE, || host.lets_strangers_through());
                service = comes_up(host, &firewall);
                is_let_through(host, &firewall);
                host.sh(firewall.reload).ok();
                is_let_through(host, &firewall);
            },
        );
        let Some((host, _outside)) = &made else { continue };
        checks.check(
            &format!("{name} is as before after network down, and VMs that start then get through"),
            || {
                host.off();
                host.world.catalyst(&["network", "down"]).ok();
                let without = host.sh(firewall.list).ok().to_owned();
                assert!(!without.contains("catalyst") && without.contains(mark_of(&firewall)), "{without}");
                if name == "dockerd" {
                    // Its containers need it, whoever has switched it on.
                    assert_eq!(host.sh("cat /proc/sys/net/ipv4/ip_forward").ok().trim(), "1");
                }
                host.on();
                is_let_through(host, &firewall);
                host.off();
                host.world.catalyst(&["network", "down"]).ok();
                assert_eq!(host.sh(firewall.list).ok(), without, "{}", host.world.daemon_log());
            },
        );
        if name == "firewalld" {
            checks.check("it is met also where there is no busctl, as without systemd", || {
                // What is no file is no program either.
                let busctl = host.sh("command -v busctl").ok().to_owned();
                host.sh(&format!("mount --bind /dev/null {busctl}")).ok();
                host.on();
                is_let_through(host, &firewall);
                host.off();
                host.world.catalyst(&["network", "down"]).ok();
                assert!(!host.sh(firewall.list).ok().contains("catalyst"));
                host.sh(&format!("umount {busctl}")).ok();
            });
            checks.check("no reload of firewalld that would lose what is set for now alone", || {
                for_now(host, &firewall);
            });
            checks.check("what firewalld was told goes also while it does not run", || {
                stopped(host, &firewall, service.take().unwrap());
            });
        }
    }
}

/// Skips the check where the host has not all of these.
fn needs(host: &Host, programs: &[&str], made_by: &str) {
    for program in programs {
        if host.sh(&format!("command -v {program}")).code() != 0 {
            skip(format!("there is no {program}: {made_by}"));
        }
    }
}

/// Of what a user has of his own.
fn mark_of(firewall: &Firewall) -> &'static str {
    if firewall.name == "dockerd" { "203.0.113.66" } else { "2222" }
}

fn comes_up(host: &Host, firewall: &Firewall) -> Option<Service> {
    host.sh(firewall.before).ok();
    let service = firewall.service.map(|service| host.service(firewall.name, service));
    wait_until(&format!("{} is up", firewall.name), PATIENCE, || host.sh(firewall.is_up).code() == 0);
    host.sh(firewall.own).ok();
    service
}

/// Waits until `doctor` says so, and looks whether it is true.
fn is_let_through(host: &Host, firewall: &Firewall) {
    let said = format!("let through by {}", firewall.place);
    let started = std::time::Instant::now();
    while !host.doctor().contains(&said) {
        let rules = || host.sh(firewall.list).stdout;
        assert!(
            started.elapsed() < PATIENCE,
            "{}\n{}\n{}\n{}",
            host.doctor(),
            rules(),
            host.log_of(firewall.name),
            host.world.daemon_log()
        );
        std::thread::sleep(Duration::from_millis(200));
    }
    let found = host.doctor();
    assert!(!found.contains("drops") && !found.contains("does not let"), "{found}");
    assert!(host.reaches() && host.resolves("up0"), "{found}\n{}", host.sh(firewall.list).stdout);
    assert!(!host.lets_strangers_through(), "it drops what it does not know");
    assert!(host.sh(firewall.list).ok().contains("catalyst0"));
}

/// A user's port that a reload would close.
fn for_now(host: &Host, firewall: &Firewall) {
    host.sh("firewall-cmd --add-port=4711/tcp").ok();
    host.on();
    let found = host.doctor();
    assert!(found.contains("firewalld does not let") && found.contains("firewall-cmd --reload"), "{found}");
    assert!(!host.reaches());
    assert!(host.sh("firewall-cmd --list-ports").ok().contains("4711/tcp"), "it is still open");
    host.sh("firewall-cmd --runtime-to-permanent; firewall-cmd --reload").ok();
    is_let_through(host, firewall);
    assert!(host.sh("firewall-cmd --list-ports").ok().contains("4711/tcp"));
}

fn stopped(host: &Host, firewall: &Firewall, service: Service) {
    service.end();
    host.off();
    host.world.catalyst(&["network", "down"]).ok();
    assert_eq!(host.sh("grep -rl catalyst /etc/firewalld || :").ok(), "");
    host.service(firewall.name, firewall.service.unwrap_or_default());
    wait_until("firewalld is up again", PATIENCE, || host.sh(firewall.is_up).code() == 0);
    let list = host.sh(firewall.list).ok().to_owned();
    assert!(!list.contains("catalyst") && list.contains("2222"), "{list}");
}

pub fn network_manager(checks: &mut Checks, host: &Host) {
    checks.check("NetworkManager leaves bridge and taps alone, whoever comes up first", || {
        needs(host, &["NetworkManager", "nmcli", "dbus-daemon"], "make firewall-tools");
        let manager = NetworkManager::start(host);
        let states = || host.sh("nmcli -t -f DEVICE,STATE device").stdout;
        // It came up with a network there.
        let unmanaged =
            |states: &str| states.contains("catalyst0:unmanaged") && states.contains("cattap0:unmanaged");
        let looked = || ["cattap0:", "up0:connected"].iter().all(|word| states().contains(word));
        wait_until("it has looked at all links", PATIENCE, looked);
        let found = states();
        assert!(unmanaged(&found) && found.contains("up0:connected"), "{found}");
        assert!(host.doctor().contains("left alone by NetworkManager"), "{}", host.doctor());
        host.off();
        host.world.catalyst(&["network", "down"]).ok();
        assert_eq!(host.sh("ls /run/NetworkManager/conf.d").stdout, "");
        // And the network comes up with it there.
        host.on();
        wait_until("it has seen the tap", PATIENCE, || states().contains("cattap0:"));
        let found = states();
        assert!(unmanaged(&found) && found.contains("up0:connected"), "{found}");
        assert!(host.reaches() && host.resolves("up0"));
        drop(manager);
    });
}

/// Ends with the check, so that it changes nothing under those that follow.
struct NetworkManager(Option<Service>);

impl NetworkManager {
    fn start(host: &Host) -> Self {
        // It is to leave names and cards of the test alone.
        let settings = "[main]\ndns=none\nno-auto-default=*\n";
        let folder = host.root().join("etc/NetworkManager/conf.d");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("test.conf"), settings).unwrap();
        // Where /sys can be written it waits for udev to have seen each link.
        let script = "exec unshare -m sh -ec 'mount -o remount,bind,ro /sys; mount -t tmpfs tmpfs /var/lib; \
                      exec NetworkManager --no-daemon'";
        let started = Self(Some(host.service("NetworkManager", script)));
        wait_until("NetworkManager is up", PATIENCE, || host.sh("nmcli -t general status").code() == 0);
        started
    }
}

impl Drop for NetworkManager {
    fn drop(&mut self) {
        if let Some(service) = self.0.take() {
            service.end();
        }
    }
}
