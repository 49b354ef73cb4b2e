//! Ports of guests that are published on the host.
//!
//! For each of them the daemon listens, and passes what comes to the guest's address and back ([`tcp`], [`udp`]). It
//! listens while the VM has the port, whether the VM is on or not: a client that comes while there is no guest is reset
//! at once. Nothing here leads the other way: a guest gets what its clients send, and no connection of its own.
//!
//! What a VM publishes stands in its VMX; this is what of it can be had. A port that cannot, since a program took it
//! while no daemon ran, waits, and is tried again by [`Ports::open`].

mod bind;
pub mod error;
mod guest;
mod tcp;
mod udp;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use catalyst_api::{HostAddress, Port, PortName, PortState, PublishPort};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::privilege::as_root;
use crate::store::VmId;
use crate::store::config::{ConfigError, MAX_PORTS};
use bind::Sockets;
use error::PortError;
use guest::{Guest, Target};

/// Which ports users may listen on (ip-sysctl.rst of the kernel).
const UNPRIVILEGED: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";

/// The published ports of all VMs; copies are the same.
#[derive(Clone, Debug)]
pub struct Ports(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// The interface that guests are behind.
    device: String,
    /// The VMs' owner is root, who may have any port.
    any_port: bool,
    descriptors: Arc<Semaphore>,
    vms: Mutex<BTreeMap<VmId, Entry>>,
    /// Held by whoever opens or closes ports, so that one that is being closed is nobody's.
    changing: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Entry {
    guest: Arc<Guest>,
    ports: Vec<Published>,
}

#[derive(Debug)]
struct Published {
    port: PublishPort,
    /// What serves it, or why nothing does.
    serving: Result<Serving, String>,
}

/// The tasks that have a port's sockets.
#[derive(Debug)]
struct Serving {
    target: Arc<Target>,
    tasks: Vec<JoinHandle<()>>,
}

impl Serving {
    fn new(sockets: Sockets, target: Target) -> Self {
        let target = Arc::new(target);
        let tasks = match sockets {
            Sockets::Tcp(all) => {
                all.into_iter().map(|one| tokio::spawn(tcp::serve(one, Arc::clone(&target)))).collect()
            }
            Sockets::Udp(all) => {
                all.into_iter().map(|one| tokio::spawn(udp::serve(one, Arc::clone(&target)))).collect()
            }
        };
        Self { target, tasks }
    }

    /// Ends what goes through the port, and returns when it is free.
    async fn close(self) {
        self.target.end();
        for task in self.tasks {
            task.abort();
            // It has ended when its socket is closed; that it was aborted is what was wanted.
            let _ = task.await;
        }
    }
}

impl Ports {
    /// For guests behind the interface `device`, of which `owner` is the user; they may take half of `descriptors`.
    pub fn new(device: &str, owner: u32, descriptors: usize) -> Self {
        Self(Arc::new(Inner {
            device: device.to_owned(),
            any_port: owner == 0,
            descriptors: Arc::new(Semaphore::new((descriptors / 2).min(Semaphore::MAX_PERMITS))),
            vms: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        }))
    }

    fn vms(&self) -> MutexGuard<'_, BTreeMap<VmId, Entry>> {
        // Nothing panics while it holds the lock; if it did, the map would still be whole.
        self.0.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ports of a VM that was just found or made, or that is to be on: those that `wanted` does not name are
    /// closed, those that are not open are tried.
    pub async fn open(&self, vm: &VmId, address: Ipv4Addr, wanted: &[PublishPort]) {
        let _changing = self.0.changing.lock().await;
        self.meet(vm, address);
        let surplus = |port: &PublishPort| !wanted.contains(port);
        self.close(vm, surplus).await;
        for port in wanted {
            if self.is_open(vm, port) {
                continue;
            }
            let serving = self.serve(vm, *port).map(|(_, serving)| serving);
            let serving = serving.map_err(|error| crate::http::error::chain(&error).join(": "));
            if let Err(reason) = &serving {
                tracing::warn!(vm = %vm, %port, reason, "a published port cannot be had");
            }
            let mut vms = self.vms();
            let Some(entry) = vms.get_mut(vm) else { return };
            entry.ports.retain(|known| known.port != *port);
            entry.ports.push(Published { port: *port, serving });
        }
    }

    /// Tries those ports of a VM again that could not be had.
    pub async fn retry(&self, vm: &VmId) {
        let (address, wanted) = {
            let vms = self.vms();
            let Some(entry) = vms.get(vm) else { return };
            if entry.ports.iter().all(|port| port.serving.is_ok()) {
                return;
            }
            (entry.guest.address(), entry.ports.iter().map(|port| port.port).collect::<Vec<_>>())
        };
        self.open(vm, address, &wanted).await;
    }

    /// Publishes ports of a VM, all or none, and tells them with what was chosen for port 0.
    pub async fn publish(
        &self,
        vm: &VmId,
        address: Ipv4Addr,
        wanted: &[PublishPort],
    ) -> Result<Vec<PublishPort>, PortError> {
        let _changing = self.0.changing.lock().await;
        self.meet(vm, address);
        let mut made = Vec::new();
        for port in wanted {
            match self.publish_one(vm, *port) {
                Ok(port) => made.push(port),
                Err(error) => {
                    self.close(vm, |port| made.contains(port)).await;
                    return Err(error);
                }
            }
        }
        Ok(made)
    }

    fn publish_one(&self, vm: &VmId, port: PublishPort) -> Result<PublishPort, PortError> {
        if port.guest_port == 0 {
            return Err(PortError::GuestPort);
        }
        {
            let vms = self.vms();
            let own = vms.get(vm).map(|entry| entry.ports.as_slice()).unwrap_or_default();
            if own.len() >= MAX_PORTS {
                return Err(ConfigError::TooManyPorts(own.len() + 1).into());
            }
            if let Some(known) = own.iter().find(|known| collide(&known.port, &port)) {
                return Err(PortError::published(vm, &known.port));
            }
        }
        let (port, serving) = self.serve(vm, port)?;
        if let Some(entry) = self.vms().get_mut(vm) {
            entry.ports.push(Published { port, serving: Ok(serving) });
        }
        Ok(port)
    }

    /// Closes a port of a VM, and ends what goes through it.
    pub async fn unpublish(&self, vm: &VmId, port: &PublishPort) {
        let _changing = self.0.changing.lock().await;
        self.close(vm, |known| known == port).await;
    }

    /// Forgets a VM that is gone; its ports are free when this returns.
    pub async fn forget(&self, vm: &VmId) {
        let _changing = self.0.changing.lock().await;
        self.close(vm, |_| true).await;
        self.vms().remove(vm);
    }

    /// The published ports of a VM, by number.
    pub fn list(&self, vm: &VmId) -> Vec<Port> {
        let vms = self.vms();
        let mut ports: Vec<Port> = vms.get(vm).into_iter().flat_map(|entry| &entry.ports).map(told).collect();
        ports.sort_by_key(|port| (port.host_port, port.protocol, port.host_address));
        ports
    }

    /// The port of a VM that `name` means.
    pub fn find(&self, vm: &VmId, name: &PortName) -> Result<PublishPort, PortError> {
        let vms = self.vms();
        let ports = vms.get(vm).into_iter().flat_map(|entry| &entry.ports).map(|known| known.port);
        let fitting = ports.filter(|port| {
            (port.host_port, port.protocol) == (name.host_port, name.protocol)
                && name.host_address.is_none_or(|address| address == port.host_address)
        });
        let mut fitting = fitting.fuse();
        match (fitting.next(), fitting.next()) {
            (Some(port), None) => Ok(port),
            (None, _) => Err(PortError::NotPublished { vm: vm.clone(), name: name.to_string() }),
            (Some(first), Some(_)) => Err(PortError::Ambiguous {
                vm: vm.clone(),
                name: name.to_string(),
                first: name_of(&first).to_string(),
            }),
        }
    }

    /// Whether the VM has a guest that connections are tried to.
    pub fn set_open(&self, vm: &VmId, open: bool) {
        if let Some(entry) = self.vms().get(vm) {
            entry.guest.set_open(open);
        }
    }

    /// Ends all connections of a VM whose guest is another now, or gone.
    pub fn cut(&self, vm: &VmId) {
        if let Some(entry) = self.vms().get(vm) {
            entry.guest.cut();
        }
    }

    fn meet(&self, vm: &VmId, address: Ipv4Addr) {
        let guest = || Arc::new(Guest::new(address, &self.0.device, &self.0.descriptors));
        self.vms().entry(vm.clone()).or_insert_with(|| Entry { guest: guest(), ports: Vec::new() });
    }

    fn is_open(&self, vm: &VmId, port: &PublishPort) -> bool {
        let vms = self.vms();
        let mut ports = vms.get(vm).into_iter().flat_map(|entry| &entry.ports);
        ports.any(|known| known.port == *port && known.serving.is_ok())
    }

    async fn close(&self, vm: &VmId, which: impl Fn(&PublishPort) -> bool) {
        let closed: Vec<Published> = {
            let mut vms = self.vms();
            let Some(entry) = vms.get_mut(vm) else { return };
            entry.ports.extract_if(.., |known| which(&known.port)).collect()
        };
        for serving in closed.into_iter().filter_map(|published| published.serving.ok()) {
            serving.close().await;
        }
    }

    /// Listens for a port.
    fn serve(&self, vm: &VmId, mut port: PublishPort) -> Result<(PublishPort, Serving), PortError> {
        self.permit(port.host_port)?;
        let guest = {
            let vms = self.vms();
            let taken = vms.iter().filter(|(id, _)| *id != vm).find_map(|(id, entry)| {
                let open = entry.ports.iter().filter(|known| known.serving.is_ok());
                open.map(|known| &known.port).find(|known| collide(known, &port)).map(|known| (id, known))
            });
            if let Some((id, known)) = taken {
                return Err(PortError::published(id, known));
            }
            vms.get(vm).map(|entry| Arc::clone(&entry.guest)).ok_or(PortError::Stopping)?
        };
        let (chosen, sockets) = bind::bind(port.host_address, port.host_port, port.protocol)?;
        port.host_port = chosen;
        Ok((port, Serving::new(sockets, Target::new(&guest, port.guest_port))))
    }

    /// The daemon is root, but listens for its owner.
    fn permit(&self, port: u16) -> Result<(), PortError> {
        if self.0.any_port || port == 0 {
            return Ok(());
        }
        let least = as_root(|| std::fs::read_to_string(UNPRIVILEGED));
        let least = least.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(1024);
        if port < least { Err(PortError::Privileged { port, least }) } else { Ok(()) }
    }
}

/// What a published port is removed by.
fn name_of(port: &PublishPort) -> PortName {
    PortName {
        host_address: Some(port.host_address).filter(|address| *address != HostAddress::Localhost),
        host_port: port.host_port,
        protocol: port.protocol,
    }
}

fn told(published: &Published) -> Port {
    let PublishPort { host_port, guest_port, protocol, host_address } = published.port;
    let (state, reason) = match &published.serving {
        Ok(_) => (PortState::Listening, None),
        Err(reason) => (PortState::Waiting, Some(reason.clone())),
    };
    Port { host_address, host_port, guest_port, protocol, state, reason }
}

/// Whether the two cannot be had both.
fn collide(one: &PublishPort, other: &PublishPort) -> bool {
    let same = (one.host_port, one.protocol) == (other.host_port, other.protocol);
    let overlap = |a: IpAddr, b: IpAddr| {
        a.is_ipv4() == b.is_ipv4() && (a == b || a.is_unspecified() || b.is_unspecified())
    };
    let (ones, others) = (addresses(one.host_address), addresses(other.host_address));
    same && one.host_port != 0 && ones.iter().any(|a| others.iter().any(|b| overlap(*a, *b)))
}

fn addresses(address: HostAddress) -> Vec<IpAddr> {
    match address {
        HostAddress::Localhost => vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
        HostAddress::Ip(ip) => vec![ip],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(text: &str) -> PublishPort {
        text.parse().unwrap()
    }

    fn id(text: &str) -> VmId {
        VmId::parse(text).unwrap()
    }

    const GUEST: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

    fn ports() -> Ports {
        Ports::new("lo", 0, 4096)
    }

    #[test]
    fn ports_collide_where_an_address_is_the_same() {
        for (one, other, collides) in [
            ("80:80", "80:81", true),
            ("80:80", "81:80", false),
            ("80:80", "80:80/udp", false),
            ("80:80", "127.0.0.1:80:80", true),
            ("80:80", "[::1]:80:80", true),
            ("80:80", "127.0.0.2:80:80", false),
            ("80:80", "0.0.0.0:80:80", true),
            ("127.0.0.2:80:80", "0.0.0.0:80:80", true),
            ("127.0.0.2:80:80", "[::]:80:80", false),
            ("0:80", "0:80", false),
        ] {
            assert_eq!(collide(&port(one), &port(other)), collides, "{one} {other}");
            assert_eq!(collide(&port(other), &port(one)), collides, "{other} {one}");
        }
    }

    #[tokio::test]
    async fn of_several_ports_all_are_published_or_none() {
        let ports = ports();
        let (a, b) = (id("a"), id("b"));
        let made = ports.publish(&a, GUEST, &[port("0:80"), port("0:53/udp")]).await.unwrap();
        assert!(made.iter().all(|port| port.host_port != 0), "{made:?}");
        let taken = made[0];
        let error = ports.publish(&b, GUEST, &[port("0:80"), taken]).await.unwrap_err();
        assert!(error.to_string().contains("VM 'a'"), "{error}");
        assert!(ports.list(&b).is_empty());
        ports.forget(&a).await;
        ports.publish(&b, GUEST, &[taken]).await.unwrap();
    }

    #[tokio::test]
    async fn a_port_is_free_at_once_when_it_is_removed() {
        let ports = ports();
        let a = id("a");
        for protocol in ["tcp", "udp"] {
            let made = ports.publish(&a, GUEST, &[port(&format!("0:80/{protocol}"))]).await.unwrap();
            for _ in 0..50 {
                ports.unpublish(&a, &made[0]).await;
                assert_eq!(ports.publish(&a, GUEST, &made).await.unwrap(), made);
            }
        }
    }

    #[tokio::test]
    async fn a_port_that_is_taken_at_first_waits_and_names_who_has_it() {
        let ports = ports();
        let a = id("a");
        let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let number = other.local_addr().unwrap().port();
        let wanted = [port(&format!("{number}:80"))];
        ports.open(&a, GUEST, &wanted).await;
        assert_eq!(ports.list(&a)[0].state, PortState::Waiting);
        assert!(ports.publish(&a, GUEST, &wanted).await.unwrap_err().to_string().contains("'a' already"));
        drop(other);
        ports.retry(&a).await;
        assert_eq!(ports.list(&a)[0].state, PortState::Listening);
        assert!(ports.list(&a)[0].reason.is_none());
        ports.open(&a, GUEST, &[]).await;
        assert!(ports.list(&a).is_empty());
        std::net::TcpListener::bind(("127.0.0.1", number)).unwrap();
    }

    #[tokio::test]
    async fn a_user_publishes_no_port_that_is_roots() {
        let ports = Ports::new("lo", 1000, 4096);
        let a = id("a");
        let error = ports.publish(&a, GUEST, &[port("80:80")]).await.unwrap_err();
        let least: u16 = std::fs::read_to_string(UNPRIVILEGED).unwrap().trim().parse().unwrap();
        if least <= 80 {
            eprintln!("SKIPPED: users may have port 80 here");
        } else {
            assert!(error.to_string().contains("ip_unprivileged_port_start=80"), "{error}");
        }
        let many: Vec<PublishPort> = (0..=MAX_PORTS).map(|_| port("0:80")).collect();
        assert!(matches!(ports.publish(&a, GUEST, &many).await, Err(PortError::TooMany(_))));
        assert!(ports.list(&a).is_empty());
        let zero = PublishPort { guest_port: 0, ..port("0:80") };
        assert!(matches!(ports.publish(&a, GUEST, &[zero]).await, Err(PortError::GuestPort)));
    }

    #[tokio::test]
    async fn a_port_is_found_by_number_protocol_and_where_need_be_address() {
        let ports = ports();
        let a = id("a");
        let made = ports.publish(&a, GUEST, &[port("127.0.0.1:0:80")]).await.unwrap();
        let number = made[0].host_port;
        let find = |name: String| ports.find(&a, &name.parse().unwrap());
        assert_eq!(find(number.to_string()).unwrap(), made[0]);
        assert!(matches!(find(format!("{number}-udp")), Err(PortError::NotPublished { .. })));
        let second = ports.publish(&a, GUEST, &[port(&format!("127.0.0.3:{number}:81"))]).await.unwrap();
        assert!(matches!(find(number.to_string()), Err(PortError::Ambiguous { .. })));
        assert_eq!(find(format!("127.0.0.3:{number}")).unwrap(), second[0]);
    }
}
