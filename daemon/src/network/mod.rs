//! The network of the virtual machines: one bridge with address translation, DHCP and names.
//!
//! Each virtual machine gets a MAC and an address when it is created and keeps them for life ([`Network::lease_for`]).
//! The first power-on brings the network up ([`Network::up`]): a bridge, its address, an nftables table, IPv4
//! forwarding and a dnsmasq that serves that bridge alone. All of it outlives the daemon, because running guests need
//! it, and is taken over by the next one. [`Network::down`] takes away exactly that. What is ours is told by marks,
//! never by names alone: the bridge by its hardware address, which is derived from the state folder; dnsmasq by the
//! file it has open; the table and the files by the bridge's name once that is known to be ours.
//!
//! IPv6 is off on the bridge: guests have link-local addresses among themselves, and the host hears none of it.
//!
//! The daemon lives in one network namespace; everything here happens in that of the calling thread.

mod acknowledged;
mod address;
mod arp;
mod beside;
mod dnsmasq;
mod error;
mod firewalld;
mod forwarding;
mod lease;
mod lifecycle;
mod manager;
mod nat;
mod netlink;
pub(crate) mod process;
pub(crate) mod program;
mod publish;
pub(crate) mod state;
mod subnet;
mod supervision;
pub(crate) mod tap;
mod watch;

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use self::acknowledged::Acknowledgements;
pub use self::address::{Mac, Subnet};
pub use self::error::{AddressError, NetworkError};
pub use self::lease::{DOMAIN, Lease};
pub use self::tap::Tap;

use self::dnsmasq::{Files, Server};
use self::lease::LeaseTable;
use self::netlink::{Link, Netlink};
use self::process::Process;
use self::state::{Claim, RunDir, Settings, is_bridge_name};
use self::subnet::{HostRange, choose, unfit};
use crate::privilege::as_root;

/// Where a network belongs and what the user wants of it.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// The daemon's state folder; the choice of bridge and subnet is kept in its `network.json`.
    pub state_dir: PathBuf,
    /// The bridge's name; else the one of before, else the first free of `catalyst0`, `catalyst1`...
    pub bridge: Option<String>,
    /// The guests' subnet; else the one of before, else the first of a list that collides with nothing here.
    pub subnet: Option<Subnet>,
    /// Root's folder for what lasts until the next boot.
    pub run_dir: PathBuf,
}

impl NetworkConfig {
    /// The network of that state folder, everything else chosen.
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        Self {
            state_dir: state_dir.into(),
            bridge: None,
            subnet: None,
            run_dir: PathBuf::from("/run/catalyst"),
        }
    }
}

/// What there is of the network at the moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkStatus {
    /// The bridge's name.
    pub bridge: String,
    /// The guests' subnet.
    pub subnet: Subnet,
    /// The bridge's address, which guests use as router and name server.
    pub gateway: Ipv4Addr,
    /// Whether the bridge is there and up, and dnsmasq serves it.
    pub up: bool,
    /// dnsmasq's process.
    pub dnsmasq_pid: Option<i32>,
    /// Where dnsmasq writes what it has to say.
    pub dnsmasq_log: PathBuf,
    /// Interfaces on the bridge, one for each virtual machine that is on.
    pub ports: Vec<String>,
    /// Every lease, in the order of addresses.
    pub leases: Vec<Lease>,
    /// Whether IPv4 forwarding was off on this host and is on because of Catalyst's networks.
    pub forwarding_set_by_us: bool,
    /// Firewalls of others on this host that let the bridge through, since it was put there.
    pub admitted_by: Vec<String>,
    /// Whether NetworkManager is there and told to leave bridge and taps alone.
    pub unmanaged: bool,
    /// What may keep guests from the network, each with what to do about it.
    pub warnings: Vec<String>,
}

/// A handle on the network of one state folder; copies are the same network.
#[derive(Debug, Clone)]
pub struct Network {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Canonical: it identifies the network.
    state_dir: PathBuf,
    run: RunDir,
    /// Whether the user named the subnet, which then is never replaced.
    subnet_is_fixed: bool,
    bridge: String,
    /// The bridge's hardware address, by which we know it.
    bridge_mac: Mac,
    leases: Mutex<LeaseTable>,
    /// The generation of the namespace's nftables rules that our table was loaded in, if nothing came between.
    loaded: Mutex<Option<u32>>,
    /// The dnsmasq that serves and knows the leases, from `up` to `down`.
    serving: tokio::sync::watch::Sender<Option<Arc<Process>>>,
    /// Held while the network changes.
    changing: tokio::sync::Mutex<()>,
}

impl Network {
    /// Reads the network of `config.state_dir`, or chooses bridge and subnet and keeps the choice there.
    ///
    /// Looks at the host's links, addresses and routes, and changes none. As root, the choice is also noted below
    /// `run_dir`, so that no other daemon chooses the same before this network is up.
    pub async fn load(config: NetworkConfig) -> Result<Self, NetworkError> {
        if let Some(bridge) = config.bridge.as_ref().filter(|bridge| !is_bridge_name(bridge)) {
            return Err(NetworkError::BadBridge(bridge.clone()));
        }
        if let Some((subnet, reason)) = config.subnet.and_then(|subnet| Some((subnet, unfit(subnet)?))) {
            return Err(NetworkError::BadSubnet { subnet, reason });
        }
        let state_dir = fs::create_dir_all(&config.state_dir).and_then(|()| config.state_dir.canonicalize());
        let state_dir = state_dir.map_err(NetworkError::file("make", &config.state_dir))?;
        let run = RunDir::of_this_namespace(&config.run_dir);
        let run = run.map_err(NetworkError::file("look into", "/proc/thread-self/ns/net"))?;
        let stored = Settings::read(&state_dir)?;
        let _lock = lifecycle::lock(&run).await?;
        let settings = settle(&config, stored.as_ref(), &state_dir, &run).await?;
        if stored.as_ref() != Some(&settings) {
            settings.write(&state_dir)?;
        }
        let bridge_mac = bridge_mac(&state_dir);
        let network = Self {
            inner: Arc::new(Inner {
                run,
                subnet_is_fixed: config.subnet.is_some(),
                bridge: settings.bridge,
                bridge_mac,
                leases: Mutex::new(LeaseTable::new(settings.subnet, bridge_mac)),
                loaded: Mutex::new(None),
                serving: tokio::sync::watch::Sender::new(None),
                changing: tokio::sync::Mutex::new(()),
                state_dir,
            }),
        };
        if nix::unistd::geteuid().is_root() {
            // A bridge that another daemon has is an error only where it is needed.
            let _ = network.claim();
        }
        Ok(network)
    }

    /// The lease of the virtual machine `id`: the one it has, else the `wanted` one, else a new one with a random MAC
    /// and the lowest free address. In memory only: the caller keeps MAC and address in the machine's own file, and
    /// at its next start asks for them by `wanted`. If they cannot be had, the lease says why in `changed`, and is to
    /// be kept anew. Takes microseconds.
    ///
    /// # Errors
    /// [`NetworkError::Full`].
    pub fn lease_for(&self, id: &str, wanted: Option<(Mac, Ipv4Addr)>) -> Result<Lease, NetworkError> {
        self.leases().lease_for(id, wanted)
    }

    /// The same where only one of both may be wanted.
    ///
    /// # Errors
    /// [`NetworkError::Full`].
    pub fn lease_with(
        &self,
        id: &str,
        mac: Option<Mac>,
        address: Option<Ipv4Addr>,
    ) -> Result<Lease, NetworkError> {
        self.leases().lease_with(id, mac, address)
    }

    /// Takes the lease of `id` back: its address is free for others, and its name is not known any more.
    pub fn release(&self, id: &str) {
        let mut leases = self.leases();
        let Some(address) = leases.get(id).map(|lease| lease.address) else { return };
        // First the files, then the lease: they are named by the address, which the next one may get at once.
        let files = self.files();
        let withdrawn = as_root(|| match publish::withdraw(&files, address) {
            Ok(true) => Server::find(&files).map_or(Ok(()), |server| {
                server.reload();
                Ok(())
            }),
            Ok(false) => Ok(()),
            Err(error) => Err(error),
        });
        if let Err(error) = withdrawn {
            tracing::warn!(%error, id, "a name of a deleted virtual machine stays known until the next start");
        }
        leases.release(id);
    }

    /// Makes a tap for the virtual machine with that lease, on the bridge and up. It vanishes with its descriptor.
    ///
    /// # Errors
    /// [`NetworkError::NoBridge`] before [`Network::up`], [`NetworkError::NoTun`], [`NetworkError::NotRoot`], and
    /// [`NetworkError::NoLease`] for a lease that was released.
    pub async fn open_tap(&self, lease: &Lease) -> Result<Tap, NetworkError> {
        let tap = self.loose_tap(lease)?;
        self.plug(lease, &tap.name).await?;
        Ok(tap)
    }

    /// Makes a tap that is down and on no bridge, for a guest that is to reach nobody, or not yet.
    ///
    /// # Errors
    /// [`NetworkError::NoTun`], [`NetworkError::NotRoot`].
    pub fn loose_tap(&self, lease: &Lease) -> Result<Tap, NetworkError> {
        tap::create(lease)
    }

    /// Puts a loose tap on the bridge and sets it up. One that is there already stays.
    ///
    /// # Errors
    /// As [`Network::open_tap`]'s.
    pub async fn plug(&self, lease: &Lease, tap: &str) -> Result<(), NetworkError> {
        // Not while the network goes down: a port that is new then would go with the bridge.
        let _changing = self.inner.changing.lock().await;
        let netlink = Netlink::open()?;
        let bridge = self.own_bridge(&netlink).await?;
        let bridge = bridge.ok_or_else(|| NetworkError::NoBridge { bridge: self.inner.bridge.clone() })?;
        self.publish(lease)?;
        tap::disable_ipv6(tap)?;
        let gone = || NetworkError::Tap {
            address: lease.address,
            source: std::io::Error::from(std::io::ErrorKind::NotFound),
        };
        let link = netlink.link(tap).await?.ok_or_else(gone)?;
        netlink.attach(&link, &bridge).await
    }

    /// Puts the tap that a VM process holds on the bridge, and tells the host where the guest is: what was sent before
    /// waits for an answer by ARP, which is asked for but once a second.
    ///
    /// # Errors
    /// As [`Network::open_tap`]'s, and [`NetworkError::Tap`] if the process has none.
    pub async fn plug_in(&self, lease: &Lease, pid: u32) -> Result<(), NetworkError> {
        let tap = as_root(|| tap::held_by(pid))
            .map_err(|source| NetworkError::Tap { address: lease.address, source })?;
        self.plug(lease, &tap).await?;
        self.introduce(lease, Some(lease.mac)).await;
        Ok(())
    }

    /// Removes an interface of ours; one that is gone already is no error.
    pub(crate) async fn unplug(&self, name: &str) -> Result<(), NetworkError> {
        let netlink = Netlink::open()?;
        match netlink.link(name).await? {
            Some(link) => netlink.remove(&link).await,
            None => Ok(()),
        }
    }

    /// Lets the host forget who had this address before, so that what is sent to the guest from now on waits for it.
    pub async fn forget_neighbour(&self, lease: &Lease) {
        self.introduce(lease, None).await;
    }

    async fn introduce(&self, lease: &Lease, mac: Option<Mac>) {
        let told = async {
            let netlink = Netlink::open()?;
            match self.own_bridge(&netlink).await? {
                Some(bridge) => netlink.introduce(&bridge, lease.address, mac).await,
                None => Ok(()),
            }
        };
        let told: Result<(), NetworkError> = told.await;
        if let Err(error) = told {
            tracing::debug!(id = lease.id, %error, "the host will ask for the guest's hardware address");
        }
    }

    /// Whether the guest with `mac` holds `address` now: it is asked over the bridge by ARP, for at most 0.9 s.
    /// For guests without an agent.
    pub async fn answers_arp(&self, address: Ipv4Addr, mac: Mac) -> bool {
        let gateway = self.leases().gateway();
        let asked = async {
            let Some(bridge) = self.own_bridge(&Netlink::open()?).await? else { return Ok(false) };
            let asker = arp::Asker { index: bridge.index, mac: self.inner.bridge_mac, address: gateway };
            arp::answers(asker, address, mac)
                .await
                .map_err(|source| NetworkError::Netlink { task: format!("ask for {address} by ARP"), source })
        };
        asked.await.unwrap_or_else(|error| {
            tracing::debug!(%error, %address, "no ARP answer");
            false
        })
    }

    /// Root's folder for what belongs to Docker's daemon and lasts until the next boot.
    pub(crate) fn docker_folder(&self) -> PathBuf {
        self.inner.run.docker(&self.inner.bridge)
    }

    /// The host's address in the network.
    pub fn gateway(&self) -> Ipv4Addr {
        self.leases().gateway()
    }

    /// The bridge's name.
    pub fn bridge(&self) -> &str {
        &self.inner.bridge
    }

    /// The guests' subnet.
    pub fn subnet(&self) -> Subnet {
        self.leases().subnet()
    }

    fn leases(&self) -> MutexGuard<'_, LeaseTable> {
        // A panic elsewhere leaves the table as one call had it: each changes it at its end.
        self.inner.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn files(&self) -> Files {
        Files::new(self.inner.run.network(&self.inner.bridge))
    }

    /// The bridge if it is there and ours; an error if the name is somebody else's.
    async fn own_bridge(&self, netlink: &Netlink) -> Result<Option<Link>, NetworkError> {
        let link = netlink.link(&self.inner.bridge).await?;
        match link {
            Some(link) if link.is_bridge && link.mac == Some(self.inner.bridge_mac) => Ok(Some(link)),
            Some(_) => Err(NetworkError::ForeignLink { bridge: self.inner.bridge.clone() }),
            None => Ok(None),
        }
    }

    /// Tells dnsmasq of the guest. Under the lock of the table, so that no release comes between.
    fn publish(&self, lease: &Lease) -> Result<(), NetworkError> {
        let leases = self.leases();
        if leases.get(&lease.id).is_none_or(|own| (own.mac, own.address) != (lease.mac, lease.address)) {
            return Err(NetworkError::NoLease { id: lease.id.clone(), address: lease.address });
        }
        let files = self.files();
        as_root(|| {
            if publish::publish(&files, lease)?
                && let Some(server) = Server::find(&files)
            {
                server.reload();
            }
            Ok(())
        })
    }

    /// Reserves bridge and subnet against other daemons of this namespace.
    fn claim(&self) -> Result<(), NetworkError> {
        let settings = Settings { bridge: self.inner.bridge.clone(), subnet: self.subnet() };
        let state_dir = self.inner.state_dir.clone();
        as_root(|| {
            let others = self.inner.run.claims_of_others(&state_dir);
            if let Some(other) = others.into_iter().find(|other| other.settings.bridge == settings.bridge) {
                return Err(NetworkError::Claimed { bridge: settings.bridge, owner: other.state_dir });
            }
            self.inner.run.claim(&Claim { state_dir, settings })
        })
    }
}

/// The settings to use: what the user names, else what is stored, else a choice.
async fn settle(
    config: &NetworkConfig,
    stored: Option<&Settings>,
    state_dir: &Path,
    run: &RunDir,
) -> Result<Settings, NetworkError> {
    let bridge = config.bridge.clone().or_else(|| stored.map(|stored| stored.bridge.clone()));
    let subnet = config.subnet.or_else(|| stored.map(|stored| stored.subnet));
    if let (Some(bridge), Some(subnet)) = (&bridge, subnet) {
        let settings = Settings { bridge: bridge.clone(), subnet };
        return match stored {
            Some(old) if *old != settings && as_root(|| run.network(&old.bridge).exists()) => {
                Err(NetworkError::ChangeWhileUp { bridge: old.bridge.clone(), subnet: old.subnet })
            }
            _ => Ok(settings),
        };
    }
    let netlink = Netlink::open()?;
    let others = as_root(|| run.claims_of_others(state_dir));
    let bridge = match bridge {
        Some(bridge) => bridge,
        None => free_bridge_name(&netlink.links().await?, &others),
    };
    let subnet = match subnet {
        Some(subnet) => subnet,
        None => choose_subnet(&netlink, &others, None).await?,
    };
    Ok(Settings { bridge, subnet })
}

/// The first of `catalyst0`, `catalyst1`... that no link has and no other daemon wants.
fn free_bridge_name(links: &[Link], others: &[Claim]) -> String {
    let taken = |name: &String| {
        links.iter().any(|link| link.name == *name)
            || others.iter().any(|other| other.settings.bridge == *name)
    };
    // There are fewer links and claims than numbers.
    (0..=links.len() + others.len())
        .map(|n| format!("catalyst{n}"))
        .find(|name| !taken(name))
        .unwrap_or_else(|| "catalyst".to_owned())
}

/// A subnet that collides with no route or address of the host and no other network of Catalyst's.
async fn choose_subnet(
    netlink: &Netlink,
    others: &[Claim],
    own: Option<u32>,
) -> Result<Subnet, NetworkError> {
    let mut used = netlink.host_ranges(own).await?;
    used.extend(others.iter().map(Claim::range));
    used.extend(name_servers());
    choose(&used).ok_or(NetworkError::NoSubnet)
}

/// The host's name servers, which a subnet of ours must not hide, even where only the default route leads to them.
fn name_servers() -> Vec<HostRange> {
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let server = |line: &str| line.trim().strip_prefix("nameserver")?.trim().parse::<Ipv4Addr>().ok();
    text.lines()
        .filter_map(server)
        .map(|address| HostRange {
            subnet: Subnet::containing(address, 32),
            user: format!("name server {address}"),
        })
        .collect()
}

/// The hardware address of the bridge of that state folder. Derived, so that it is known before the bridge is made
/// and set in the same step: no crash leaves a bridge that we would not know for ours.
fn bridge_mac(state_dir: &Path) -> Mac {
    use std::os::unix::ffi::OsStrExt;
    let digest = Sha256::digest([b"catalyst bridge ", state_dir.as_os_str().as_bytes()].concat());
    Mac::with_tail([digest[0], digest[1], digest[2], digest[3]])
}
