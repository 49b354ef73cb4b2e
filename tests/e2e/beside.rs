//! The network of the VMs beside what else a host has: firewalls that drop what they forward, a VPN, resolvers that change.
//! A second namespace plays the outside world.

mod services;

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use catalyst_tests::world::{HANG, programs, ran, run};
use catalyst_tests::{Checks, Ran, World};

use crate::common::wait_until;

/// An address of the outside world, behind both of its links.
const OUTSIDE: &str = "203.0.113.1";
/// The links: interface, host's address, the outside's.
const LINKS: [(&str, &str, &str); 2] =
    [("up0", "192.0.2.1", "192.0.2.2"), ("vpn0", "198.51.100.1", "198.51.100.2")];
/// Somebody else on the host, who is no guest of ours: the other end of an interface of the host's.
const STRANGER: (&str, &str, &str) = ("lan0", "198.18.0.1", "198.18.0.2");
/// A host's system of its own for all who enter its mount namespace: /run, a copy of /etc, and the programs of
/// `make firewall-tools` laid over /usr. /sys shows this network namespace and has the machine's control groups, which
/// `ip netns exec` would hide. Ends as what keeps the namespace.
const SYSTEM: &str = r#"
    mkdir "$0/groups"
    mount --rbind /sys/fs/cgroup "$0/groups"
    mount -t sysfs sysfs /sys
    mount --rbind "$0/groups" /sys/fs/cgroup
    [ ! -d "$1/usr" ] || mount -t overlay -o "lowerdir=$1/usr:/usr" overlay /usr
    mount --bind "$0/etc" /etc
    mount -t tmpfs tmpfs /run
    mkdir -p /run/dbus /run/lock /run/NetworkManager
    ! command -v dbus-daemon > /dev/null || dbus-daemon --config-file="$0/bus.conf" --nofork &
    echo up > "$0/up"
    exec sleep infinity"#;
/// A system's bus where everybody may do everything, and nothing is started by itself, such as the machine's polkit.
const BUS: &str = r#"<busconfig><type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/></policy>
</busconfig>"#;

pub fn beside(checks: &mut Checks) {
    {
        let outside = World::empty();
        let host = Host::new(&outside);
        alone(checks, &host);
        services::network_manager(checks, &host);
        moves(checks, &host, &outside);
    }
    services::firewalls(checks);
}

/// What a script with `exec` at its end has become.
struct Service(Child);

impl Service {
    /// Has it end as its kind ends, and waits for that.
    fn end(mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        self.0.wait().unwrap();
    }
}

struct Host {
    world: World,
    stranger: World,
    system: Child,
}

impl Host {
    fn new(outside: &World) -> Self {
        let world = World::empty();
        let stranger = World::empty();
        let root = world.path("root");
        fs::create_dir(&root).unwrap();
        run(Command::new("cp").args(["-a", "/etc"]).arg(&root));
        let tools = programs().join("firewall-tools");
        if tools.join("etc").exists() {
            run(Command::new("cp").arg("-a").arg(tools.join("etc")).arg(&root));
        }
        let _ = fs::remove_file(root.join("etc/resolv.conf"));
        fs::write(root.join("etc/resolv.conf"), "nameserver 192.0.2.2\n").unwrap();
        fs::write(root.join("bus.conf"), BUS).unwrap();
        run(outside.command("ip").args(["address", "add", &format!("{OUTSIDE}/32"), "dev", "lo"]));
        let links = LINKS.map(|link| (link, outside)).into_iter().chain([(STRANGER, &stranger)]);
        for ((name, here, there), other) in links {
            let peer = ["link", "add", name, "type", "veth", "peer", "name", name, "netns", other.netns()];
            run(world.command("ip").args(peer));
            for (side, address) in [(&world, here), (other, there)] {
                run(side.command("ip").args(["address", "add", &format!("{address}/24"), "dev", name]));
                run(side.command("ip").args(["link", "set", name, "up"]));
            }
        }
        for (name, _, there) in LINKS {
            // A resolver on each link, which knows a name that the other does not.
            let mut resolver = outside.command("dnsmasq");
            resolver.args(["--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--bind-interfaces"]);
            resolver.args([&format!("--listen-address={there}"), "--pid-file=", "--user=root"]);
            if name == LINKS[0].0 {
                resolver.arg(format!("--listen-address={OUTSIDE}"));
            }
            run(resolver.arg(format!("--address=/{name}.test/{OUTSIDE}")));
        }
        let route = |side: &World, to: &str, via: &str| {
            run(side.command("ip").args(["route", "add", to, "via", via]));
        };
        route(&world, "default", LINKS[0].2);
        route(&stranger, "default", STRANGER.1);
        route(outside, &format!("{}/32", STRANGER.2), LINKS[0].1);
        let mut system = Command::new("nsenter");
        system
            .arg(format!("--net=/run/netns/{}", world.netns()))
            .args(["unshare", "-m", "sh", "-ec", SYSTEM]);
        let system = system.arg(&root).arg(tools).stdin(Stdio::null()).spawn().unwrap();
        let host = Self { world, stranger, system };
        wait_until("the host's system is there", HANG, || root.join("up").exists());
        host.started()
    }

    fn started(mut self) -> Self {
        self.world.wrapper = self.words().map(Into::into).to_vec();
        self.world.start_daemon();
        self
    }

    /// What enters the host's system.
    fn words(&self) -> [String; 5] {
        ["nsenter", "--target", &self.system.id().to_string(), "--mount", "--"].map(str::to_owned)
    }

    fn root(&self) -> PathBuf {
        self.world.path("root")
    }

    /// A script where the daemon finds what it finds.
    fn command(&self, script: &str) -> Command {
        let [program, words @ ..] = self.words();
        let mut command = self.world.command(program);
        command.args(words).args(["sh", "-ec", script]).arg(self.root());
        command
    }

    fn sh(&self, script: &str) -> Ran {
        ran(self.command(script))
    }

    /// Starts what runs until it is ended, with the world at the latest; its log is in the world's folder.
    fn service(&self, name: &str, script: &str) -> Service {
        let log = fs::File::create(self.world.path(&format!("{name}.log"))).unwrap();
        let mut command = self.command(script);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        Service(command.spawn().unwrap())
    }

    fn log_of(&self, name: &str) -> String {
        fs::read_to_string(self.world.path(&format!("{name}.log"))).unwrap_or_default()
    }

    /// Whether somebody else behind the host reaches the outside world through it.
    fn lets_strangers_through(&self) -> bool {
        let connect = format!("timeout 2 bash -c 'exec 3<>/dev/tcp/{OUTSIDE}/53'");
        let mut command = self.stranger.command("sh");
        command.args(["-c", &connect]);
        ran(command).code() == 0
    }

    /// Powers a new VM on: one that was on before starts cold, which takes long.
    fn on(&self) {
        self.off();
        self.world.catalyst(&["vm", "delete", "web1"]);
        self.world.catalyst(&["vm", "create", "web1"]).ok();
        self.world.catalyst(&["vmpower", "on", "web1", "--wait", "--timeout", "280"]).ok();
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
        let connect = format!("timeout 30 bash -c 'exec 3<>/dev/tcp/{OUTSIDE}/53'");
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
        host.on();
        assert!(host.reaches() && host.resolves("up0"));
        wait_until("strangers get through", HANG, || host.lets_strangers_through());
        assert!(!host.doctor().contains("let through"), "{}", host.doctor());
    });
}

impl Drop for Host {
    fn drop(&mut self) {
        // The namespace with all that is mounted in it goes with its last process, which the world ends.
        let _ = self.system.kill();
        let _ = self.system.wait();
    }
}

fn moves(checks: &mut Checks, host: &Host, outside: &World) {
    checks.check("the default route moves to a VPN and back, and guests follow", || {
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
        wait_until("the other one is asked", HANG, || host.resolves("vpn0"));
        fs::write(&file, format!("nameserver {}\n", LINKS[0].2)).unwrap();
        wait_until("the first one is asked again", HANG, || {
            host.guest(&["getent", "ahostsv4", "again.up0.test"]).stdout.contains(OUTSIDE)
        });
    });
}
