//! The shim: what a container is to its engine. It has the container's network namespace, cgroup and stdio, makes the VM, speaks with
//! its agent, and ends with the exit code of the container's program.
//!
//! - `network`: the interfaces, and their way to the VM.
//! - `resolver`: names.
//! - `trees`: files.
//! - `memory`: that it was short.
//! - `sandbox`: a pod's container without a program.
//! - `guest`: what is running in the guest.
//! - `control`: what the other commands ask.

mod control;
mod guest;
mod memory;
mod network;
mod resolver;
mod sandbox;
mod trees;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use catalyst_agent_link::{AgentError, AgentLink, ProblemKind, sockets};
use catalyst_agent_protocol::container::{Container, Network, ROOT_TREE};
use nix::sched::{CloneFlags, setns, unshare};
use tokio::sync::mpsc;

use crate::bundle::{Bundle, PodPart};
use crate::console;
use crate::daemon::{Daemon, Vm, Wanted, WantedContainer};
use crate::document::{self, Tree};
use crate::failure::{Failure, Outcome, Tried, chain, said};
use crate::launch::{Go, Order, Report, take_orders};
use crate::metadata;
use crate::state::Folder;
use crate::stdio::Ended;
use crate::wire;
use guest::{Guest, Stdio};
use network::Wires;
use resolver::Outside;

/// How long a guest may take to come up, cold on a software CPU too.
const UP_LIMIT: Duration = Duration::from_mins(4);
/// What a container ends with whose VM has ended by itself: as if by SIGSEGV.
const CRASHED: i32 = 139;
/// What it ends with whose VM was deleted, or whose program by the kernel since memory was short: as if by SIGKILL.
const DELETED: i32 = 137;

/// Is the shim, until the container has ended; its exit code.
pub fn run() -> i32 {
    let Ok(orders) = take_orders() else { return 1 };
    match prepare(&orders) {
        Ok(code) => code,
        Err(failure) => {
            // Whoever waited may be gone; then nobody is interested.
            let _ = wire::send(&orders, &Report::Failed(chain(&failure)), &[]);
            1
        }
    }
}

fn prepare(orders: &UnixStream) -> Outcome<i32> {
    let speak = || "speak with whoever started this shim".to_owned();
    let Some((order, _)) = wire::receive::<Order>(orders).tried(speak)? else {
        return said("This shim was given no orders");
    };
    let outside = Outside::here().tried(|| "look at the host's network".to_owned())?;
    enter(std::env::var_os("CATALYST_OCI_NETWORK").as_deref().map(Path::new))?;
    wire::send(orders, &Report::Entered, &[]).tried(speak)?;
    if wire::receive::<Go>(orders).tried(speak)?.is_none() {
        return said("A hook failed");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.tried(|| "start the shim's runtime".to_owned())?.block_on(be(&order, orders, outside))
}

/// Enters the network namespace that is named, or makes one.
fn enter(path: Option<&Path>) -> Outcome {
    let Some(path) = path else {
        unshare(CloneFlags::CLONE_NEWNET).tried(|| "make a network namespace".to_owned())?;
        return loopback_up().tried(|| "set the loopback interface up".to_owned());
    };
    let what = || format!("enter the network namespace {}", path.display());
    setns(File::open(path).tried(what)?, CloneFlags::CLONE_NEWNET).tried(what)
}

/// netdevice(7).
fn loopback_up() -> std::io::Result<()> {
    // SAFETY: all zeros is an ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(b"lo") {
        *place = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or_default();
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: the kernel reads the struct.
    let done = unsafe {
        libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&socket), libc::SIOCSIFFLAGS, &raw const request)
    };
    if done == -1 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes the container ready, and stays until it has ended.
async fn be(order: &Order, orders: &UnixStream, outside: Outside) -> Outcome<i32> {
    let bundle = Bundle::read(&order.bundle)?;
    let folder = Folder::of(&order.root, &order.id)?;
    let listener = folder.listen()?;
    if bundle.pod_part() == PodPart::Sandbox {
        let ready = || wire::send(orders, &Report::Ready, &[]);
        let ended = sandbox::stay(listener, ready).await.tried(|| "hold the pod's namespaces".to_owned())?;
        return Ok(ended.code().unwrap_or(DELETED));
    }
    let input = console::inherited(0).tried(|| "take over stdin".to_owned())?;
    let (mut container, trees) = document::convert(&bundle, !console::is_null(&input))?;
    let trees = open_trees(&container, &trees)?;
    let log =
        File::create(folder.path().join("folders.log")).tried(|| "make the log of folders".to_owned())?;
    let mut files = trees::serve(&trees, log)?;
    drop(trees);
    let stdio = Stdio::of(input, order.console_socket.as_deref(), container.process.terminal.as_ref())?;
    let mut wires = Wires::open().await?;

    let daemon = Daemon::at(order.socket.clone());
    let vm = make_vm(order, &bundle, &daemon, wires.seen().first_address())?;
    wire::send(orders, &Report::Making(vm.id.clone()), &[]).tried(|| "tell of the VM".to_owned())?;
    daemon.power(&vm.id, "on")?;

    container.network = wires.wanted();
    let leads_out = Arc::new(AtomicBool::new(wires.seen().leads_out()));
    let out_of_memory = Arc::new(AtomicBool::new(false));
    let made = async {
        serve_trees(&vm, &files).await?;
        let made = async {
            let link = reach(&vm).await?;
            let heard = (Arc::new(outside), Arc::clone(&leads_out), Arc::clone(&out_of_memory));
            tokio::spawn(resolver::serve(link.clone(), link.notices(), heard.0, heard.1, heard.2));
            create_container(&link, &container).await?;
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

    let (guest, events) = Guest::new(link.clone(), daemon.clone(), vm.id.clone(), stdio);
    control::listen(listener, Arc::clone(&guest)).tried(|| "listen for commands".to_owned())?;
    guest.forward_signals().tried(|| "listen for signals".to_owned())?;
    wire::send(orders, &Report::Ready, &[]).tried(|| "tell that the container is ready".to_owned())?;

    let ended = attend(&link, events, &mut files.process, wires, container.network, &leads_out).await;
    drop(files.process.start_kill());
    let short = out_of_memory.load(Ordering::Relaxed);
    let code = last_code(&ended, &guest, &daemon, &vm, short);
    if short && code == DELETED {
        // The exit code says it too.
        let _ = memory::tell(&order.cgroup);
    }
    Ok(code)
}

fn open_trees(container: &Container, trees: &[Tree]) -> Outcome<Vec<(String, OwnedFd)>> {
    let places = trees::places(&container.mounts, trees);
    let open = |tree: &Tree| {
        let is_root = tree.name == ROOT_TREE;
        Ok((tree.name.clone(), trees::open(tree, if is_root { &places } else { &[] })?))
    };
    trees.iter().map(open).collect()
}

fn make_vm(order: &Order, bundle: &Bundle, daemon: &Daemon, address: Option<String>) -> Outcome<Vm> {
    let metadata = metadata::of(bundle, &order.id);
    let ids = metadata::vm_ids(&metadata, &order.id);
    let container = WantedContainer { pid: std::process::id(), id: order.id.clone(), metadata, address };
    daemon.create(&ids, &Wanted { cpus: order.cpus, memory_mib: order.memory_mib, container })
}

/// Stays until the container has ended, and tells the guest of changes in its network.
async fn attend(
    link: &AgentLink,
    mut events: mpsc::UnboundedReceiver<Ended>,
    files: &mut tokio::process::Child,
    mut wires: Wires,
    mut told: Network,
    leads_out: &AtomicBool,
) -> Ended {
    let mut status = link.status();
    loop {
        tokio::select! {
            biased;
            ended = events.recv() => return ended.unwrap_or(Ended::Lost("nobody waits for it".to_owned())),
            _ = files.wait() => return Ended::Lost("the process that serves its files has ended".to_owned()),
            // A program that runs has its own end; before it there is but this.
            _ = status.wait_for(|status| !status.connected) => {
                tokio::time::sleep(Duration::from_millis(200)).await;
                return events.try_recv().unwrap_or(Ended::Lost("its agent is gone".to_owned()));
            }
            () = wires.changed() => {
                // What cannot be joined now is tried again at the next change.
                let Ok(network) = wires.join_again().await else { continue };
                leads_out.store(wires.seen().leads_out(), Ordering::Relaxed);
                if network != told && link.set_network(network.clone()).await.is_ok() {
                    told = network;
                }
            }
        }
    }
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
    files.begin(&port)
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

async fn create_container(link: &AgentLink, container: &Container) -> Outcome {
    let made = link.create_container(container).await;
    made.map_err(|error| refused("make the container", &container.process.args, error))
}

/// The agent's refusal; of a program in the words by which engines know exit codes 127 and 126.
fn refused(what: &'static str, args: &[String], error: AgentError) -> Failure {
    let name = args.first().map_or("", String::as_str);
    let (words, message) = match error {
        AgentError::Refused { kind: ProblemKind::NotFound, message } => {
            ("executable file not found in $PATH", message)
        }
        AgentError::Refused { kind: ProblemKind::Denied, message } => ("permission denied", message),
        source => return Failure::Agent { what, source },
    };
    if message.contains(words) && message.contains(name) {
        return Failure::Said(message);
    }
    Failure::Said(format!("exec: {name:?}: {words}: {message}"))
}

/// The exit code of the container.
fn last_code(ended: &Ended, guest: &Guest, daemon: &Daemon, vm: &Vm, out_of_memory: bool) -> i32 {
    if let Some(code) = ended.code() {
        return code;
    }
    let Ended::Lost(why) = ended else { return CRASHED };
    // A VM that was deleted is soon not known any more.
    for _ in 0..15 {
        match daemon.has(&vm.id) {
            Ok(false) => return DELETED,
            Ok(true) => std::thread::sleep(Duration::from_millis(100)),
            Err(_) => break,
        }
    }
    let memory = if out_of_memory { "; its memory was short" } else { "" };
    guest.complain(&format!(
        "catalyst-oci: the VM {} of this container ended by itself ({why}{memory})",
        vm.id
    ));
    CRASHED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_cannot_be_run_is_told_as_engines_know_it() {
        let refusal = |kind, message: &str| {
            let error = AgentError::Refused { kind, message: message.into() };
            chain(&refused("make the container", &["foo".into()], error))
        };
        let said = |kind| refusal(kind, "no such file");
        let whole = "exec: \"foo\": executable file not found in $PATH";
        assert_eq!(refusal(ProblemKind::NotFound, whole), whole);
        assert!(said(ProblemKind::NotFound).starts_with("exec: \"foo\": executable file not found in $PATH"));
        assert!(said(ProblemKind::Denied).starts_with("exec: \"foo\": permission denied"));
        assert!(said(ProblemKind::Failed).contains("did not make the container: no such file"));
    }

    #[test]
    fn loopback_goes_up_in_a_new_namespace() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: namespaces are root's");
            return;
        }
        let entered = std::thread::spawn(|| {
            enter(None).unwrap();
            std::net::UdpSocket::bind("127.0.0.1:0").unwrap().connect("127.0.0.1:9").is_ok()
        });
        assert!(entered.join().unwrap());
        let missing = enter(Some(Path::new("/nowhere/ns"))).unwrap_err();
        assert!(chain(&missing).contains("/nowhere/ns"));
    }
}
