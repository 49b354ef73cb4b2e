//! The container of a Kubernetes pod that but holds its namespaces (CRI: the sandbox), and with them the pod's VM, which is made when
//! the first of its containers is: they join it ([`super::host`]), come and go.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use catalyst_agent_link::ExecExit;
use catalyst_agent_protocol::container::Container;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Mutex, mpsc};

use super::control::{Peer, peers};
use super::guest::is_deadly;
use super::host::{self, Host, Joining};
use super::machine::{Machine, Prepared, Trees, make_vm};
use super::resolver::Outside;
use crate::bundle::Bundle;
use crate::daemon::{Daemon, Vm};
use crate::document::sysctls;
use crate::failure::{Outcome, Tried, chain};
use crate::launch::Order;
use crate::state::Folder;
use crate::stdio::Ended;
use crate::wire::{self, Answer, Join, Request, Status};

/// Memory in MiB of the VM of a pod of which no limit is known: what of it nobody writes to takes none of the host's.
const POD_MEMORY: u64 = 512;
/// As much of its limit a VM's kernel takes for itself, in MiB, and what runs beside a pod's first container.
const BESIDE: u64 = 128;
/// The pod's limit of memory in bytes, as containerd tells it.
const LIMIT: &str = "io.kubernetes.cri.sandbox-memory";

/// A pod.
pub struct Pod {
    order: Order,
    bundle: Bundle,
    folder: Folder,
    outside: Arc<Outside>,
    /// Its VM, while there is one.
    host: Mutex<Option<Arc<Host>>>,
    /// How many it has had. All have one name, so whoever deletes one holds this meanwhile, and sees that there is no other.
    made: Mutex<u64>,
}

impl Pod {
    /// A pod without a VM.
    pub fn new(order: Order, bundle: Bundle, folder: Folder, outside: Arc<Outside>) -> Arc<Self> {
        Arc::new(Self { order, bundle, folder, outside, host: Mutex::default(), made: Mutex::default() })
    }

    /// Serves one of its containers.
    async fn serve(self: Arc<Self>, peer: Peer) {
        let Some((mut joining, trees)) = Joining::of(peer) else { return };
        let admitted = self.admit(&mut joining.join, trees).await;
        joining.serve(admitted).await;
    }

    /// Makes a container ready, and the VM before it if there is none.
    async fn admit(self: &Arc<Self>, join: &mut Join, trees: Trees) -> Outcome<(Arc<Host>, String)> {
        let mut slot = self.host.lock().await;
        if let Some(host) = slot.as_ref().filter(|host| host.link.status().borrow().connected) {
            let name = host.admit(&mut join.container, trees).await?;
            return Ok((Arc::clone(host), name));
        }
        *slot = None;
        let name = host::name(0);
        let host = self.begin(join, &name, trees).await?;
        *slot = Some(Arc::clone(&host));
        Ok((host, name))
    }

    /// Makes the VM, with a first container in it.
    async fn begin(self: &Arc<Self>, join: &mut Join, name: &str, trees: Trees) -> Outcome<Arc<Host>> {
        let daemon = Daemon::at(self.order.socket.clone());
        self.bring_settings(&mut join.container)?;
        let mut made = self.made.lock().await;
        // One of before has ended by itself.
        let before = self.folder.load()?.vm;
        self.delete_vm(&daemon, before).await;
        let prepared = Prepared::make(&self.folder, Vec::new()).await?;
        let vm = self.start_vm(&daemon, join, prepared.address()).await?;
        *made += 1;
        let number = *made;
        drop(made);
        name.clone_into(&mut join.container.name);
        let joined = Some((name, trees));
        let outside = Arc::clone(&self.outside);
        let begun = Machine::begin(prepared, &vm, &mut join.container, joined, outside).await;
        let (mut machine, shelf) = match begun {
            Ok(begun) => begun,
            Err(failure) => {
                self.delete_vm(&daemon, vm.id).await;
                return Err(failure);
            }
        };
        let (link, short) = (machine.link.clone(), Arc::clone(&machine.short));
        let host = Host::new(link, daemon.clone(), vm.id.clone(), shelf, short, 1);
        let pod = Arc::clone(self);
        tokio::spawn(async move {
            let (alive, events) = mpsc::unbounded_channel();
            let _ = machine.attend(events).await;
            drop(alive);
            machine.end().await;
            // It may be its files alone that have ended: without it, its containers end too.
            let made = pod.made.lock().await;
            if *made == number {
                pod.delete_vm(&daemon, vm.id).await;
            }
        });
        Ok(host)
    }

    /// The pod's kernel settings are of namespaces that its containers have together, so that the first sets them for all.
    fn bring_settings(&self, container: &mut Container) -> Outcome {
        let of_pod = sysctls(self.bundle.linux()?);
        container.sysctls.splice(..0, of_pod);
        Ok(())
    }

    async fn start_vm(
        self: &Arc<Self>,
        daemon: &Daemon,
        join: &Join,
        address: Option<String>,
    ) -> Outcome<Vm> {
        let (pod, daemon) = (Arc::clone(self), daemon.clone());
        let size = (join.cpus.max(self.order.cpus), self.memory(join.memory_mib));
        let made = tokio::task::spawn_blocking(move || -> Outcome<Vm> {
            let order = Order { cpus: size.0, memory_mib: size.1, ..pod.order.clone() };
            let vm = make_vm(&order, &pod.bundle, &daemon, address)?;
            // Whoever deletes what this process leaves knows it by this.
            let mut kept = pod.folder.load()?;
            kept.vm.clone_from(&vm.id);
            pod.folder.save(&kept)?;
            let on = daemon.power(&vm.id, "on");
            if on.is_err() {
                // The first failure is the one that is told.
                let _ = pod.delete(&daemon, &vm.id);
            }
            on.map(|()| vm)
        });
        made.await.map_err(io::Error::other).tried(|| "make the pod's VM".to_owned())?
    }

    /// In MiB, for a first container that asks for so much.
    fn memory(&self, first: u64) -> u64 {
        let annotations = self.bundle.spec.annotations().as_ref();
        let told = annotations.and_then(|all| all.get(LIMIT)?.parse::<u64>().ok()).filter(|limit| *limit > 0);
        told.map_or(POD_MEMORY.max(first + BESIDE), |limit| limit.div_ceil(1 << 20).max(first) + BESIDE)
    }

    /// Deletes a VM of this pod.
    async fn delete_vm(self: &Arc<Self>, daemon: &Daemon, vm: String) {
        let (pod, daemon) = (Arc::clone(self), daemon.clone());
        if let Ok(Err(failure)) = tokio::task::spawn_blocking(move || pod.delete(&daemon, &vm)).await {
            eprintln!("catalyst-oci: {}", chain(&failure));
        }
    }

    fn delete(&self, daemon: &Daemon, vm: &str) -> Outcome {
        if vm.is_empty() {
            return Ok(());
        }
        daemon.delete(vm)?;
        let mut kept = self.folder.load()?;
        // There may be another by now.
        if kept.vm == vm {
            kept.vm.clear();
            self.folder.save(&kept)?;
        }
        Ok(())
    }
}

/// Answers commands until a signal ends it.
pub async fn stay(
    listener: UnixListener,
    pod: Arc<Pod>,
    ready: impl FnOnce() -> io::Result<()>,
) -> io::Result<Ended> {
    let mut peers = peers(listener)?;
    let mut terminated = signal(SignalKind::terminate())?;
    let mut interrupted = signal(SignalKind::interrupt())?;
    ready()?;
    let mut status = Status::Created;
    loop {
        let peer = tokio::select! {
            _ = terminated.recv() => return Ok(Ended::Exit(ExecExit::Signal(libc::SIGTERM))),
            _ = interrupted.recv() => return Ok(Ended::Exit(ExecExit::Signal(libc::SIGINT))),
            Some(peer) = peers.recv() => peer,
        };
        if matches!(peer.request, Request::Join(_)) {
            tokio::spawn(Arc::clone(&pod).serve(peer));
            continue;
        }
        let Peer { stream, request, .. } = peer;
        let (answer, end) = answer(&request, &mut status);
        // Whoever asked may not have waited.
        let _ = wire::send(&stream, &answer, &[]);
        if let Some(signal) = end {
            return Ok(Ended::Exit(ExecExit::Signal(signal)));
        }
    }
}

/// The answer, and by which signal it ends.
fn answer(request: &Request, status: &mut Status) -> (Answer, Option<i32>) {
    match request {
        Request::State => (Answer::State { status: *status, pids: vec![std::process::id()] }, None),
        Request::Start if *status == Status::Created => {
            *status = Status::Running;
            (Answer::Done, None)
        }
        Request::Kill { signal } => (Answer::Done, Some(*signal).filter(|signal| is_deadly(*signal))),
        _ => (Answer::Failed("The container that holds a pod's namespaces runs nothing".to_owned()), None),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use oci_spec::runtime::Spec;
    use serde_json::json;

    use super::*;
    use crate::bundle::tests::with;

    fn pod(folder: &std::path::Path, spec: Spec) -> Arc<Pod> {
        let order = Order {
            id: "pod".into(),
            root: folder.into(),
            bundle: folder.into(),
            socket: folder.join("none"),
            console_socket: None,
            cpus: 1,
            memory_mib: 128,
            cgroup: Vec::new(),
        };
        let bundle = Bundle { path: folder.into(), spec, rootfs: folder.into() };
        let outside = Arc::new(Outside::here().unwrap());
        Pod::new(order, bundle, Folder::of(folder, "pod").unwrap(), outside)
    }

    #[test]
    fn its_vm_has_the_pod_s_limit_or_room_for_more_than_its_first() {
        let folder = tempfile::tempdir().unwrap();
        let of = |annotations, first| pod(folder.path(), with("/annotations", annotations)).memory(first);
        assert_eq!((of(json!({}), 128), of(json!({}), 2048)), (512, 2176));
        assert_eq!(of(json!({LIMIT: (1_u64 << 30).to_string()}), 128), 1024 + 128);
        assert_eq!((of(json!({LIMIT: "0"}), 128), of(json!({LIMIT: "x"}), 128)), (512, 512));
    }

    #[test]
    fn its_first_container_brings_its_settings_before_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let settings = json!({"kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "100"});
        let pod = pod(folder.path(), with("/linux/sysctl", settings));
        let setting = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let own = setting("fs.mqueue.msg_max", "200");
        let mut container = Container { sysctls: vec![own.clone()], ..Container::default() };
        pod.bring_settings(&mut container).unwrap();
        let expected = [setting("fs.mqueue.msg_max", "100"), setting("kernel.shm_rmid_forced", "1"), own];
        assert_eq!(container.sysctls, expected);
    }

    #[tokio::test]
    async fn it_is_started_and_stays_until_a_signal_ends_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let pod = pod(folder.path(), with("/annotations", json!({})));
        let asking = std::thread::spawn(move || {
            let ask = |request: Request| {
                let stream = UnixStream::connect(&path).unwrap();
                wire::send(&stream, &request, &[]).unwrap();
                wire::receive::<Answer>(&stream).unwrap().unwrap().0
            };
            assert!(matches!(ask(Request::State), Answer::State { status: Status::Created, .. }));
            assert_eq!(ask(Request::Start), Answer::Done);
            assert!(matches!(ask(Request::Start), Answer::Failed(_)));
            assert_eq!(ask(Request::Kill { signal: libc::SIGWINCH }), Answer::Done);
            assert!(matches!(ask(Request::State), Answer::State { status: Status::Running, .. }));
            assert_eq!(ask(Request::Kill { signal: libc::SIGTERM }), Answer::Done);
        });
        let ended = stay(listener, pod, || Ok(())).await.unwrap();
        assert_eq!(ended.code(), Some(143));
        asking.join().unwrap();
    }
}
