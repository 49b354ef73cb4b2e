//! A container in the VM of another one: of the pod that it is in, or of the one whose network it is to have.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use catalyst_agent_protocol::container::Container;

use super::guest::Stdio;
use super::machine::Trees;
use super::memory;
use crate::bundle::{Bundle, PodPart, is_sandbox};
use crate::exec;
use crate::failure::{Outcome, Tried, said};
use crate::launch::{self, Order, Report};
use crate::state::{self, Folder};
use crate::wire::{self, Answer, Join, Request};

/// The container, made ready by this process.
pub struct Ready {
    /// What the agent is to make.
    pub container: Container,
    /// Its files.
    pub trees: Trees,
    /// Where its bytes come from and go.
    pub stdio: Stdio,
    /// Where it is asked things.
    pub listener: UnixListener,
}

/// The container whose VM has the network that this process is in, if there is one.
pub fn host(order: &Order) -> Outcome<Option<Folder>> {
    let identity = |path: &str| Path::new(path).metadata().map(|found| (found.dev(), found.ino())).ok();
    let own = identity("/proc/thread-self/ns/net");
    let what = || format!("list {}", order.root.display());
    for entry in fs::read_dir(&order.root).tried(what)? {
        let name = entry.tried(what)?.file_name();
        let Some(name) = name.to_str().filter(|name| *name != order.id) else { continue };
        // What is being made or removed is none.
        let Ok(folder) = Folder::of(&order.root, name) else { continue };
        let Ok(kept) = folder.load() else { continue };
        if (kept.vm.is_empty() && !is_sandbox(&kept.annotations)) || !state::lives(kept.pid, kept.start_time)
        {
            continue;
        }
        if own.is_some() && identity(&format!("/proc/{}/ns/net", kept.pid)) == own {
            return Ok(Some(folder));
        }
    }
    Ok(None)
}

/// Whether it has its processes together with others of its pod, whose own container has that number.
fn shares_processes(bundle: &Bundle, pod: u32) -> Outcome<bool> {
    match bundle.shared_processes() {
        None => Ok(false),
        Some(path) if path == Path::new(&format!("/proc/{pod}/ns/pid")) => Ok(true),
        Some(path) => said(format!(
            "The process namespace of one container of a pod ({}) cannot be had by another: that of all can (shareProcessNamespace)",
            path.display()
        )),
    }
}

/// Runs the container in that one's VM; its exit code.
pub async fn run(
    host: &Folder,
    order: &Order,
    bundle: &Bundle,
    orders: &UnixStream,
    ready: Ready,
) -> Outcome<i32> {
    let what = || "join the VM of the container whose network this one has".to_owned();
    let Ready { mut container, trees, stdio, listener } = ready;
    container.shares = bundle.pod_part() == PodPart::Container;
    container.shares_processes = shares_processes(bundle, host.load()?.pid)?;
    let resources = bundle.linux()?.resources().clone().unwrap_or_default();
    container.memory_limit = launch::memory_bytes(&resources).unwrap_or_default();
    let terminal = container.process.terminal.is_some().then(|| stdio.output.try_clone());
    let terminal = terminal.transpose().tried(what)?;
    let input = match stdio.input {
        Some(input) => input,
        None => File::open("/dev/null").tried(what)?,
    };
    let (names, files): (Vec<String>, Vec<OwnedFd>) = trees.into_iter().unzip();
    let join = Join {
        pid: std::process::id(),
        cpus: order.cpus,
        memory_mib: order.memory_mib,
        container,
        trees: names,
    };
    let mut descriptors = vec![listener.as_raw_fd()];
    descriptors.extend(files.iter().map(AsRawFd::as_raw_fd));
    descriptors.extend([input.as_raw_fd(), stdio.output.as_raw_fd()]);
    descriptors.extend(stdio.errors.as_ref().map(AsRawFd::as_raw_fd));
    let complaints = stdio.errors.as_ref().unwrap_or(&stdio.output).try_clone().tried(what)?;
    let shim = host.connect().tried(what)?;
    wire::send(&shim, &Request::Join(Box::new(join)), &descriptors).tried(what)?;
    // They are held by the other side from now on, so that their ends are seen.
    drop((listener, files, input, stdio.output, stdio.errors));

    let signals = exec::hear_signals().tried(what)?;
    match wire::receive(&shim).tried(what)? {
        Some((Answer::Done, _)) => {}
        Some((Answer::Failed(why), _)) => return said(why),
        _ => return said("The container whose network this one is to have has ended"),
    }
    wire::send(orders, &Report::Ready, &[]).tried(|| "tell that the container is ready".to_owned())?;
    let Some((code, out_of_memory)) = exec::attend(shim, signals, terminal).await.tried(what)? else {
        use std::io::Write;
        // Nobody may read it.
        let _ = (&complaints)
            .write_all(b"catalyst-oci: the container ended with the one whose VM and network it had\r\n");
        return Ok(exec::CONTAINER_ENDED);
    };
    if out_of_memory && code == exec::CONTAINER_ENDED {
        // The exit code says it too.
        let _ = memory::tell(&order.cgroup);
    }
    Ok(code)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::bundle::tests::with;

    #[test]
    fn processes_are_had_together_with_the_whole_pod_alone() {
        let of = |namespace| {
            let spec = with("/linux/namespaces", json!([{"type": "mount"}, namespace]));
            shares_processes(&Bundle { path: "/".into(), spec, rootfs: "/".into() }, 7)
        };
        assert!(!of(json!({"type": "pid"})).unwrap());
        assert!(of(json!({"type": "pid", "path": "/proc/7/ns/pid"})).unwrap());
        let other = of(json!({"type": "pid", "path": "/proc/8/ns/pid"})).unwrap_err().to_string();
        assert!(other.contains("/proc/8/ns/pid"), "{other}");
    }
}
