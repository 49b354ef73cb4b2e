//! Bringing the network up, taking it down, and saying how it is.

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use nix::unistd::geteuid;

use super::address::Subnet;
use super::dnsmasq::{self, Server};
use super::error::NetworkError;
use super::lease::{LeaseTable, gateway};
use super::netlink::{Link, Netlink};
use super::program::{self, Programs};
use super::state::{RunDir, Settings};
use super::subnet::collision;
use super::{Network, NetworkStatus, beside, choose_subnet, forwarding, manager, nat, publish, tap};
use crate::privilege::{as_root, as_root_blocking};

/// How long another daemon may change the network of this machine, which it does in fractions of a second.
const LOCK_PATIENCE: Duration = Duration::from_secs(30);

impl Network {
    /// Brings the network up, or makes whole what is there: may be called at every power-on.
    ///
    /// What fails leaves nothing behind that was not there before. Once begun it goes on, also when the future is
    /// dropped.
    pub async fn up(&self) -> Result<(), NetworkError> {
        let network = self.clone();
        to_its_end(async move { network.bring_up().await }).await
    }

    /// Takes away everything that [`Network::up`] made, also what a daemon that crashed left. What there is not is
    /// no error. The leases and the choice of bridge and subnet stay. Once begun it goes on, also when the future is
    /// dropped.
    ///
    /// # Errors
    /// [`NetworkError::InUse`] with the interfaces of the virtual machines that are on; nothing is changed then.
    pub async fn down(&self) -> Result<(), NetworkError> {
        let network = self.clone();
        to_its_end(async move {
            require_root("take the network down")?;
            let _changing = network.inner.changing.lock().await;
            let lock = lock(&network.inner.run).await?;
            let copy = copy_of(lock.as_ref());
            network.tear_down(&Netlink::open()?, copy).await
        })
        .await
    }

    async fn bring_up(&self) -> Result<(), NetworkError> {
        require_root("set up the network")?;
        let programs = Programs::find()?;
        let _changing = self.inner.changing.lock().await;
        let lock = lock(&self.inner.run).await?;
        let netlink = Netlink::open()?;
        let found = self.own_bridge(&netlink).await?;
        let is_new = found.is_none();
        if is_new {
            self.avoid_collision(&netlink).await?;
        }
        self.claim()?;
        let done = self.build(&netlink, found, programs, copy_of(lock.as_ref())).await;
        if is_new
            && done.is_err()
            && let Err(error) = self.tear_down(&netlink, copy_of(lock.as_ref())).await
        {
            tracing::warn!(%error, "a network that did not come up could not be taken away");
        }
        done
    }

    /// What there is of the network at the moment.
    pub async fn status(&self) -> NetworkStatus {
        let (subnet, leases) = {
            let table = self.leases();
            (table.subnet(), table.all())
        };
        let mut status = NetworkStatus {
            bridge: self.inner.bridge.clone(),
            subnet,
            gateway: gateway(subnet),
            up: false,
            dnsmasq_pid: None,
            dnsmasq_log: self.files().log(),
            ports: Vec::new(),
            leases,
            forwarding_set_by_us: as_root(|| forwarding::set_by_us(&self.inner.run.forwarding())),
            admitted_by: Vec::new(),
            unmanaged: false,
            warnings: Vec::new(),
        };
        if let Err(error) = self.look(&mut status).await {
            status.warnings.push(error.to_string());
        }
        status
    }

    async fn look(&self, status: &mut NetworkStatus) -> Result<(), NetworkError> {
        let netlink = Netlink::open()?;
        let bridge = self.own_bridge(&netlink).await?;
        let ranges = netlink.host_ranges(bridge.as_ref().map(|link| link.index)).await?;
        if let Some(range) = collision(status.subnet, &ranges) {
            let error = NetworkError::Collision { subnet: status.subnet, user: range.user.clone() };
            status.warnings.push(error.to_string());
        }
        let Some(bridge) = bridge else { return Ok(()) };
        status.ports = netlink.ports(bridge.index).await?;
        let files = self.files();
        status.dnsmasq_pid = as_root_blocking(move || Server::find(&files)).await.map(|server| server.pid());
        status.up = bridge.is_up && status.dnsmasq_pid.is_some();
        if geteuid().is_root() {
            let (nft, name) = (program::nft()?, bridge.name);
            let (found, obstacles, unmanaged) = as_root_blocking(move || {
                let found = beside::found(&name);
                let obstacles = nat::obstacles(&nft, &name, &found);
                (found, obstacles, manager::is_kept_away(&name))
            })
            .await;
            status.unmanaged = unmanaged;
            let admitting = found.iter().filter(|found| found.admits);
            status.admitted_by = admitting.map(|found| found.firewall.place().to_owned()).collect();
            status.warnings.extend(obstacles?);
        }
        Ok(())
    }

    /// Refuses a subnet that something on the host has come to use; or, while nobody has a lease and nobody named
    /// the subnet, takes another.
    async fn avoid_collision(&self, netlink: &Netlink) -> Result<(), NetworkError> {
        let subnet = self.subnet();
        let others = as_root(|| self.inner.run.claims_of_others(&self.inner.state_dir));
        let mut ranges = netlink.host_ranges(None).await?;
        ranges.extend(others.iter().map(super::Claim::range));
        let Some(range) = collision(subnet, &ranges) else { return Ok(()) };
        let error = NetworkError::Collision { subnet, user: range.user.clone() };
        if self.inner.subnet_is_fixed {
            return Err(error);
        }
        let other = choose_subnet(netlink, &others, None).await?;
        let mut leases = self.leases();
        if !leases.is_empty() {
            return Err(error);
        }
        let settings = Settings { bridge: self.inner.bridge.clone(), subnet: other };
        settings.write(&self.inner.state_dir)?;
        *leases = LeaseTable::new(other, self.inner.bridge_mac);
        tracing::info!(old = %subnet, new = %other, because = %range.user, "another subnet for virtual machines");
        Ok(())
    }

    async fn build(
        &self,
        netlink: &Netlink,
        found: Option<Link>,
        programs: Programs,
        lock: Option<File>,
    ) -> Result<(), NetworkError> {
        let name = self.inner.bridge.clone();
        as_root_blocking(move || manager::keep_away(&name)).await;
        let bridge = match found {
            Some(bridge) => bridge,
            None => self.make_bridge(netlink).await?,
        };
        let subnet = self.subnet();
        tap::disable_ipv6(&bridge.name)?;
        netlink.set_address(&bridge, gateway(subnet), subnet.prefix()).await?;
        if !bridge.is_up {
            netlink.set_up(&bridge).await?;
        }
        let network = self.clone();
        as_root_blocking(move || network.serve(&programs, lock)).await
    }

    async fn make_bridge(&self, netlink: &Netlink) -> Result<Link, NetworkError> {
        let name = &self.inner.bridge;
        netlink.add_bridge(name, self.inner.bridge_mac).await?;
        let bridge = self.own_bridge(netlink).await?;
        let bridge = bridge.ok_or_else(|| NetworkError::NoBridge { bridge: name.clone() })?;
        let alias: String = format!("Catalyst {}", self.inner.state_dir.display()).chars().take(60).collect();
        netlink.set_alias(&bridge, &alias).await?;
        Ok(bridge)
    }

    /// Everything but the bridge: table, forwarding, dnsmasq. As root; waits.
    fn serve(&self, programs: &Programs, lock: Option<File>) -> Result<(), NetworkError> {
        let bridge = &self.inner.bridge;
        let subnet = self.subnet();
        self.load_table(&programs.nft, subnet, lock.as_ref())?;
        self.inner.run.make_network(bridge)?;
        forwarding::enable(&self.inner.run.forwarding(), bridge)?;
        let files = self.files();
        let config = dnsmasq::config(&files, bridge, subnet);
        let mut server = Server::find(&files);
        if let Some(old) = server.take_if(|_| !dnsmasq::is_configured_as(&files, &config)) {
            old.stop(bridge)?;
        }
        let server = match server {
            Some(server) => server,
            None => dnsmasq::start(&programs.dnsmasq, &files, &config, lock)?,
        };
        let known = self.inner.serving.borrow().clone();
        if known.is_some_and(|known| known.pid == server.pid() && !known.ended_within(Duration::ZERO)) {
            // Since then every tap and every release has told it what changed.
            return Ok(());
        }
        let leases = self.leases();
        if publish::publish_all(&files, gateway(subnet), &leases.all())? {
            server.reload();
        }
        self.inner.serving.send_replace(Some(Arc::new(server.into_process())));
        Ok(())
    }

    /// Loads the nftables table, unless no table of this namespace has changed since it was loaded.
    fn load_table(&self, nft: &Path, subnet: Subnet, lock: Option<&File>) -> Result<(), NetworkError> {
        let mut loaded = self.inner.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let now = nat::generation().ok();
        if now.is_some() && *loaded == now {
            return Ok(());
        }
        *loaded = None;
        beside::admit(&self.inner.bridge);
        let before = nat::generation().ok();
        nat::apply(nft, &self.inner.bridge, subnet, lock)?;
        // One more than before: the change since then is ours and no other.
        let after = nat::generation().ok();
        *loaded = after.filter(|after| before.map(|before| before.wrapping_add(1)) == Some(*after));
        Ok(())
    }

    /// Lets the bridge through firewalls of others that do not let it, and loads our table if it is gone with all rules;
    /// whether there was anything to do. Where all is well nothing is changed: two daemons would take turns for ever.
    pub(super) async fn admit_again(&self) -> Result<bool, NetworkError> {
        let _changing = self.inner.changing.lock().await;
        let lock = lock(&self.inner.run).await?;
        if self.own_bridge(&Netlink::open()?).await?.is_none() {
            return Ok(false);
        }
        let (nft, network) = (program::nft()?, self.clone());
        as_root_blocking(move || {
            let mut loaded = network.inner.loaded.lock().unwrap_or_else(PoisonError::into_inner);
            let now = nat::generation().ok();
            if now.is_some() && *loaded == now {
                return Ok(false);
            }
            *loaded = None;
            let bridge = &network.inner.bridge;
            let admitted = beside::admit(bridge);
            let is_there = nat::is_there(&nft, bridge)?;
            if !is_there {
                tracing::warn!(bridge, "somebody has removed all rules of nftables; ours are loaded again");
                nat::apply(&nft, bridge, network.subnet(), lock.as_ref())?;
            }
            Ok(admitted || !is_there)
        })
        .await
    }

    async fn tear_down(&self, netlink: &Netlink, lock: Option<File>) -> Result<(), NetworkError> {
        let bridge = match self.own_bridge(netlink).await {
            // Not ours, not touched; what else there is of ours goes.
            Err(NetworkError::ForeignLink { .. }) => None,
            other => other?,
        };
        if let Some(bridge) = &bridge {
            let ports = netlink.ports(bridge.index).await?;
            if !ports.is_empty() {
                return Err(NetworkError::InUse { bridge: bridge.name.clone(), ports });
            }
        }
        let nft = program::nft()?;
        self.inner.serving.send_replace(None);
        let network = self.clone();
        as_root_blocking(move || {
            if let Some(server) = Server::find(&network.files()) {
                server.stop(&network.inner.bridge)?;
            }
            beside::withdraw(&network.inner.bridge);
            nat::remove(&nft, &network.inner.bridge, lock.as_ref())
        })
        .await?;
        let needed = as_root_blocking(beside::others_forward).await;
        if let Some(bridge) = &bridge {
            netlink.remove(bridge).await?;
        }
        let name = self.inner.bridge.clone();
        as_root_blocking(move || manager::withdraw(&name)).await;
        let bridges: Vec<String> =
            netlink.links().await?.into_iter().filter(|link| link.is_bridge).map(|link| link.name).collect();
        as_root(|| {
            forwarding::disable(&self.inner.run.forwarding(), &self.inner.bridge, &bridges, needed)?;
            self.inner.run.remove_network(&self.inner.bridge)
        })
    }
}

/// Takes the lock under which the networks of this machine change; `None` where we are not root and so change none.
pub(super) async fn lock(run: &RunDir) -> Result<Option<File>, NetworkError> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    let taking = run.clone();
    let lock = as_root_blocking(move || taking.lock());
    // Who waits in vain goes on waiting on a thread of its own, and lets go as soon as it has the lock.
    match tokio::time::timeout(LOCK_PATIENCE, lock).await {
        Ok(lock) => lock.map(Some),
        Err(_) => Err(NetworkError::Busy { path: run.lock_path() }),
    }
}

/// A copy of the lock's descriptor, for the programs that work under it.
fn copy_of(lock: Option<&File>) -> Option<File> {
    lock.and_then(|lock| lock.try_clone().ok())
}

/// Runs the work on a task of its own, which goes on when nobody waits any more. A panic goes on in the caller.
async fn to_its_end<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    match tokio::spawn(work).await {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is going away, and every task with it: nothing is left to tell.
            Err(_) => std::future::pending().await,
        },
    }
}

fn require_root(task: &str) -> Result<(), NetworkError> {
    if geteuid().is_root() { Ok(()) } else { Err(NetworkError::NotRoot { task: task.to_owned() }) }
}
