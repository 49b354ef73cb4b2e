//! The VM that a container is, or that a pod has: made, given its files and its network, and attended until it ends.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use catalyst_agent_link::{AgentLink, AgentStatus, sockets};
use catalyst_agent_protocol::container::{Container, JOINED_TREES, Network};
use tokio::sync::{mpsc, watch};

use super::memory::Short;
use super::network::Wires;
use super::refused;
use super::resolver::{self, Outside};
use super::shelf::Shelf;
use super::trees;
use crate::bundle::Bundle;
use crate::daemon::{Daemon, Vm, Wanted, WantedContainer};
use crate::failure::{Failure, Outcome, Tried, said};
use crate::launch::Order;
use crate::metadata;
use crate::state::Folder;
use crate::stdio::Ended;

/// How long a guest may take to come up, cold on a software CPU too.
const UP_LIMIT: Duration = Duration::from_mins(4);
/// How long after the agent's end that of a program may come that it has told.
pub const LAST_WORDS: Duration = Duration::from_millis(200);

/// A container's trees, by their names.
pub type Trees = Vec<(String, OwnedFd)>;

/// What is made ready before there is a VM.
pub struct Prepared {
    files: trees::Server,
    shelf: Shelf,
    wires: Wires,
}

impl Prepared {
    /// Has the trees served, and looks at the network.
    pub async fn make(folder: &Folder, mut own: Trees) -> Outcome<Self> {
        let log = File::create(folder.path().join("folders.log"));
        let log = log.tried(|| "make the log of folders".to_owned())?;
        let (shelf, joined) = Shelf::make()?;
        own.push((JOINED_TREES.to_owned(), joined));
        let files = trees::serve(&own, log)?;
        drop(own);
        Ok(Self { files, shelf, wires: Wires::open().await? })
    }

    /// The container's first address.
    pub fn address(&self) -> Option<String> {
        self.wires.seen().first_address()
    }
}

/// Has the daemon make a VM for the container of this process.
pub fn make_vm(order: &Order, bundle: &Bundle, daemon: &Daemon, address: Option<String>) -> Outcome<Vm> {
    let metadata = metadata::of(bundle, &order.id);
    let ids = metadata::vm_ids(&metadata, &order.id);
    let container = WantedContainer { pid: std::process::id(), id: order.id.clone(), metadata, address };
    daemon.create(&ids, &Wanted { cpus: order.cpus, memory_mib: order.memory_mib, container })
}

/// A VM whose first container is ready.
pub struct Machine {
    /// Its agent.
    pub link: AgentLink,
    /// Containers for which memory was short.
    pub short: Arc<Short>,
    files: trees::Server,
    wires: Wires,
    told: Network,
    leads_out: Arc<AtomicBool>,
}

impl Machine {
    /// Brings the VM, which has just been powered on, to its first container; `joined` are its trees if they go in a folder. The shelf
    /// is for those that come later.
    pub async fn begin(
        prepared: Prepared,
        vm: &Vm,
        container: &mut Container,
        joined: Option<(&str, Trees)>,
        outside: Arc<Outside>,
    ) -> Outcome<(Self, Shelf)> {
        let Prepared { mut files, shelf, mut wires } = prepared;
        container.network = wires.wanted();
        let leads_out = Arc::new(AtomicBool::new(wires.seen().leads_out()));
        let short = Arc::new(Short::default());
        let made = async {
            serve_trees(vm, &files).await?;
            if let Some((name, trees)) = joined {
                shelf.put(name, trees).await?;
            }
            let made = async {
                let link = reach(vm).await?;
                let (leads_out, short) = (Arc::clone(&leads_out), Arc::clone(&short));
                tokio::spawn(resolver::serve(link.clone(), link.notices(), outside, leads_out, short));
                create_container(&link, container).await?;
                Ok(link)
            };
            tokio::select! {
                link = made => link,
                // The guest would wait for it for long.
                _ = files.process.wait() => said("The process that serves the container's files has ended"),
            }
        };
        // Neither needs the other before a program runs.
        let (link, _) = tokio::try_join!(made, wires.join())?;
        let told = std::mem::take(&mut container.network);
        Ok((Self { link, short, files, wires, told, leads_out }, shelf))
    }

    /// Stays until the container has ended, or the VM, and tells the guest of changes in its network.
    pub async fn attend(&mut self, mut events: mpsc::UnboundedReceiver<Ended>) -> Ended {
        let mut status = self.link.status();
        let ended = loop {
            tokio::select! {
                biased;
                ended = events.recv() => break ended.unwrap_or(Ended::Lost("nobody waits for it".to_owned())),
                _ = self.files.process.wait() => {
                    break Ended::Lost("the process that serves its files has ended".to_owned());
                }
                // A program that runs has its own end; before it there is but this.
                () = gone(&mut status) => {
                    tokio::time::sleep(LAST_WORDS).await;
                    break events.try_recv().unwrap_or(Ended::Lost("its agent is gone".to_owned()));
                }
                () = self.wires.changed() => {
                    // What cannot be joined now is tried again at the next change.
                    let Ok(network) = self.wires.join_again().await else { continue };
                    self.leads_out.store(self.wires.seen().leads_out(), Ordering::Relaxed);
                    if network != self.told && self.link.set_network(network.clone()).await.is_ok() {
                        self.told = network;
                    }
                }
            }
        };
        drop(self.files.process.start_kill());
        ended
    }

    /// Ends what it has on the host, all but the VM itself, and leaves no process that nobody waits for.
    pub async fn end(mut self) {
        let _ = self.files.process.kill().await;
    }
}

/// Waits until the agent is no longer there.
pub async fn gone(status: &mut watch::Receiver<AgentStatus>) {
    // One that is not told of any more is gone, too.
    drop(status.wait_for(|status| !status.connected).await);
}

/// Connects to a port of the VM's.
async fn connect(vm: &Vm, name: &str) -> Outcome<tokio::net::UnixStream> {
    sockets::connect(&vm.run, name).await.tried(|| format!("connect to {}/{name}", vm.run.display()))
}

/// Serves the guest the container's files.
async fn serve_trees(vm: &Vm, files: &trees::Server) -> Outcome {
    let port = connect(vm, sockets::FOLDERS).await?;
    let port = port.into_std().tried(|| "take the port of folders".to_owned())?;
    // Whoever serves it waits for it.
    port.set_nonblocking(false).tried(|| "take the port of folders".to_owned())?;
    files.begin(&port).await
}

/// Connects to the agent.
async fn reach(vm: &Vm) -> Outcome<AgentLink> {
    let agent = |source| Failure::Agent { what: "answer", source };
    let link = AgentLink::connect_first(connect(vm, sockets::CONTAINER).await?).await.map_err(agent)?;
    let mut status = link.status();
    let up = status.wait_for(|status| status.hello.is_some() || !status.connected);
    match tokio::time::timeout(UP_LIMIT, up).await {
        Ok(Ok(status)) if status.hello.is_some() => {}
        Ok(_) => return said(format!("The VM {} ended while it started", vm.id)),
        Err(_) => return said(format!("The VM {} did not come up within {} s", vm.id, UP_LIMIT.as_secs())),
    }
    Ok(link)
}

/// Has the agent make a container ready.
pub async fn create_container(link: &AgentLink, container: &Container) -> Outcome {
    let made = link.create_container(container).await;
    made.map_err(|error| refused("make the container", &container.process.args, error))
}
