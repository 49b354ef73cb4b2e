//! The shim: what a container is to its engine. It has the container's network namespace, cgroup and stdio, makes the VM, speaks with
//! its agent, and ends with the exit code of the container's program.
//!
//! - `network`: the interfaces, and their way to the VM.
//! - `resolver`: names.
//! - `trees`: files.
//! - `memory`: that it was short.
//! - `machine`: the VM.
//! - `sandbox`: a pod's container without a program, which has the pod's VM.
//! - `host`: other containers in this one's VM; `shelf`: their files.
//! - `member`: a container in another one's VM.
//! - `guest`: what is running in the guest.
//! - `control`: what the other commands ask.

mod control;
mod guest;
mod host;
mod machine;
mod member;
mod memory;
mod network;
mod resolver;
mod sandbox;
mod shelf;
mod trees;

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use catalyst_agent_link::{AgentError, ProblemKind};
use catalyst_agent_protocol::container::{Container, ROOT_TREE};
use nix::sched::{CloneFlags, setns, unshare};

use crate::bundle::{Bundle, PodPart};
use crate::console;
use crate::daemon::{Daemon, Fate, Vm};
use crate::document::{self, Tree};
use crate::failure::{Failure, Outcome, Tried, chain, said};
use crate::launch::{Go, Order, Report, take_orders};
use crate::state::Folder;
use crate::stdio::Ended;
use crate::wire;
use guest::{Guest, Of, Stdio};
use host::Host;
use machine::{Machine, Prepared, Trees, make_vm};
use resolver::Outside;

/// Names in the environment the network namespace to enter, unless it is to be a new one.
pub const NETWORK: &str = "CATALYST_OCI_NETWORK";
/// What a container ends with whose VM has ended by itself: as if by SIGSEGV.
const CRASHED: i32 = 139;
/// What it ends with whose VM was deleted, or whose program by the kernel since memory was short: as if by SIGKILL.
const DELETED: i32 = 137;

/// How long the daemon may take to notice that a VM's process has ended, where that is what has,
const NOTICE_LIMIT: Duration = Duration::from_millis(1500);
/// and to delete one that it is deleting: its files may lie on a disk that is busy.
const DELETION_LIMIT: Duration = Duration::from_mins(1);

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
    enter(std::env::var_os(NETWORK).as_deref().map(Path::new))?;
    wire::send(orders, &Report::Entered, &[]).tried(speak)?;
    if wire::receive::<Go>(orders).tried(speak)?.is_none() {
        return said("A hook failed");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.tried(|| "start the shim's runtime".to_owned())?.block_on(be(order, orders, outside))
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
async fn be(order: Order, orders: &UnixStream, outside: Outside) -> Outcome<i32> {
    let bundle = Bundle::read(&order.bundle)?;
    let folder = Folder::of(&order.root, &order.id)?;
    let listener = folder.listen()?;
    let outside = Arc::new(outside);
    if bundle.pod_part() == PodPart::Sandbox {
        let ready = || wire::send(orders, &Report::Ready, &[]);
        let ended = sandbox::stay(listener, sandbox::Pod::new(order, bundle, folder, outside), ready).await;
        return Ok(ended.tried(|| "hold the pod's namespaces".to_owned())?.code().unwrap_or(DELETED));
    }
    let input = console::inherited(0).tried(|| "take over stdin".to_owned())?;
    let (mut container, trees) = document::convert(&bundle, !console::is_null(&input))?;
    let trees = open_trees(&container, &trees)?;
    let stdio = || Stdio::of(input, order.console_socket.as_deref(), container.process.terminal.as_ref());
    // One that has a network of its own was given none to enter.
    let host = if std::env::var_os(NETWORK).is_some() { member::host(&order)? } else { None };
    if let Some(host) = host {
        let ready = member::Ready { stdio: stdio()?, container, trees, listener };
        return member::run(&host, &order, &bundle, orders, ready).await;
    }
    let prepared = Prepared::make(&folder, trees).await?;
    let stdio = stdio()?;

    let daemon = Daemon::at(order.socket.clone());
    let vm = make_vm(&order, &bundle, &daemon, prepared.address())?;
    wire::send(orders, &Report::Making(vm.id.clone()), &[]).tried(|| "tell of the VM".to_owned())?;
    daemon.power(&vm.id, "on")?;

    let (mut machine, shelf) = Machine::begin(prepared, &vm, &mut container, None, outside).await?;
    let of = Of { name: String::new(), pid: std::process::id() };
    let (guest, events) = Guest::new(machine.link.clone(), of, daemon.clone(), vm.id.clone(), stdio);
    let short = Arc::clone(&machine.short);
    let host = Host::new(machine.link.clone(), daemon.clone(), vm.id.clone(), shelf, Arc::clone(&short), 0);
    control::listen(listener, Arc::clone(&guest), Some(host)).tried(|| "listen for commands".to_owned())?;
    guest.forward_signals().tried(|| "listen for signals".to_owned())?;
    wire::send(orders, &Report::Ready, &[]).tried(|| "tell that the container is ready".to_owned())?;

    let ended = machine.attend(events).await;
    let short = short.take("");
    let code = last_code(&ended, &guest, &daemon, &vm, short);
    if short && code == DELETED {
        // The exit code says it too.
        let _ = memory::tell(&order.cgroup);
    }
    Ok(code)
}

fn open_trees(container: &Container, trees: &[Tree]) -> Outcome<Trees> {
    let places = trees::places(&container.mounts, trees);
    let open = |tree: &Tree| {
        let is_root = tree.name == ROOT_TREE;
        Ok((tree.name.clone(), trees::open(tree, if is_root { &places } else { &[] })?))
    };
    trees.iter().map(open).collect()
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
    let begun = Instant::now();
    loop {
        let patience = match daemon.fate(&vm.id) {
            Ok(Fate::Deleted) => return DELETED,
            Ok(Fate::BeingDeleted) => DELETION_LIMIT,
            Ok(Fate::Runs) => NOTICE_LIMIT,
            Ok(Fate::Ended) | Err(_) => break,
        };
        if begun.elapsed() > patience {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
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
