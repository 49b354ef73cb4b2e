//! Commands about one container that is there.

use std::io::Write;
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, Instant};

use liboci_cli::{Create, Delete, Events, Kill, Ps, Run, Update};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use oci_spec::runtime::LinuxResources;
use serde_json::json;

use crate::bundle::Bundle;
use crate::cgroup::Cgroup;
use crate::daemon::Daemon;
use crate::exec;
use crate::failure::{Failure, Outcome, Tried, said};
use crate::hooks::{self, Step};
use crate::launch::{self, Creation};
use crate::state::{self, Folder, Kept};
use crate::wire::{Request, Status};

/// How long the shim may take for what the guest has to do.
const GUEST_LIMIT: Duration = Duration::from_mins(2);
/// How long a shim that is ended may take.
const END_LIMIT: Duration = Duration::from_secs(10);

fn known(root: &Path, id: &str) -> Outcome<(Folder, Kept)> {
    let folder = Folder::of(root, id)?;
    let kept = folder.load()?;
    Ok((folder, kept))
}

/// Prints a line.
pub fn print(text: &str) -> Outcome {
    writeln!(std::io::stdout().lock(), "{text}").tried(|| "write to stdout".to_owned())
}

/// Starts the program of a container.
pub fn start(root: &Path, id: &str) -> Outcome {
    let (folder, kept) = known(root, id)?;
    let _lock = folder.lock()?;
    match folder.status(&kept).0 {
        Status::Created => {}
        Status::Stopped => return said(format!("cannot start a container that has stopped: {id}")),
        status => return said(format!("cannot start a container that is {status}: {id}")),
    }
    folder.ask(&Request::Start, Some(GUEST_LIMIT))?;
    let bundle = Bundle::kept(&folder, &kept)?;
    if let Err(failure) = hooks::run(&bundle.spec, Step::Started, &kept, Status::Running) {
        // As the specification has it ("Lifecycle", step 9), it is but told.
        eprintln!("catalyst-oci: {}", crate::failure::chain(&failure));
    }
    Ok(())
}

/// Tells how a container is.
pub fn state(root: &Path, id: &str) -> Outcome {
    let (folder, kept) = known(root, id)?;
    let (status, _) = folder.status(&kept);
    let text = serde_json::to_string_pretty(&kept.told(status)).map_err(std::io::Error::from);
    print(&text.tried(|| "write down the state".to_owned())?)
}

/// A signal by its number or name.
pub fn signal_number(text: &str) -> Outcome<i32> {
    if let Ok(number) = text.parse::<i32>() {
        if (1..=64).contains(&number) {
            return Ok(number);
        }
        return said(format!("{number} is no signal: they are 1 to 64"));
    }
    let upper = text.to_uppercase();
    let name = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    match Signal::from_str(&name) {
        Ok(signal) => Ok(signal as i32),
        Err(_) => said(format!("{text} is no signal")),
    }
}

/// Sends a signal. With `--all` it is the same: what else runs in the VM ends with the container's program.
pub fn kill(root: &Path, arguments: &Kill) -> Outcome {
    let signal = signal_number(&arguments.signal)?;
    let (folder, kept) = known(root, &arguments.container_id)?;
    if folder.status(&kept).0 == Status::Stopped {
        // Its processes are ended with it, whatever the signal is.
        return if arguments.all { Ok(()) } else { said(format!("container not running: {}", kept.id)) };
    }
    folder.ask(&Request::Kill { signal }, Some(GUEST_LIMIT)).map(|_| ())
}

/// Deletes a container.
pub fn delete(root: &Path, arguments: &Delete) -> Outcome {
    let folder = Folder::of(root, &arguments.container_id)?;
    if !folder.exists() && arguments.force {
        return Ok(());
    }
    let Ok(kept) = folder.load() else {
        // Its creation was cut off before anything was started.
        if folder.exists() && arguments.force {
            return folder.remove();
        }
        return folder.load().map(|_| ());
    };
    let _lock = folder.lock()?;
    let status = folder.status(&kept).0;
    if status != Status::Stopped {
        if !arguments.force && status != Status::Created {
            return said(format!("cannot delete container {} that is not stopped: {status}", kept.id));
        }
        end(&kept);
    }
    clean(&folder, &kept)
}

fn end(kept: &Kept) {
    let started = Instant::now();
    while state::lives(kept.pid, kept.start_time) && started.elapsed() < END_LIMIT {
        // It may have ended by now.
        let _ = nix::sys::signal::kill(Pid::from_raw(kept.pid.cast_signed()), Signal::SIGKILL);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Removes what a container that has ended leaves.
fn clean(folder: &Folder, kept: &Kept) -> Outcome {
    if !kept.vm.is_empty()
        && let Err(failure) = Daemon::at(kept.socket.clone()).delete(&kept.vm)
    {
        // The daemon deletes it by itself, as soon as it runs: the shim has ended.
        eprintln!("catalyst-oci: {}", crate::failure::chain(&failure));
    }
    Cgroup::with(kept.cgroup.clone()).remove()?;
    let bundle = Bundle::kept(folder, kept);
    folder.remove()?;
    // A creation that was cut off early has none.
    if let Ok(bundle) = bundle
        && let Err(failure) = hooks::run(&bundle.spec, Step::Stopped, kept, Status::Stopped)
    {
        eprintln!("catalyst-oci: {}", crate::failure::chain(&failure));
    }
    Ok(())
}

/// Has a container stand still, or go on.
pub fn pause(root: &Path, id: &str, still: bool) -> Outcome {
    let (folder, kept) = known(root, id)?;
    if folder.status(&kept).0 == Status::Stopped {
        return said(format!("container not running: {id}"));
    }
    let request = if still { Request::Pause } else { Request::Resume };
    folder.ask(&request, Some(GUEST_LIMIT)).map(|_| ())
}

/// Lists processes on the host that stand for programs of the container.
pub fn ps(root: &Path, arguments: &Ps) -> Outcome {
    let (folder, kept) = known(root, &arguments.container_id)?;
    let (_, pids) = folder.status(&kept);
    if arguments.format == "json" {
        return print(&json!(pids).to_string());
    }
    if arguments.format != "table" {
        return said(format!("{} is no format: json and table are", arguments.format));
    }
    let usual = ["-ef".to_owned()];
    let options = if arguments.ps_options.is_empty() { &usual[..] } else { &arguments.ps_options };
    let output = std::process::Command::new("ps").args(options).output().tried(|| "run ps".to_owned())?;
    print(&rows(&String::from_utf8_lossy(&output.stdout), &pids)?)
}

/// The head of a table of ps(1), and the rows of these processes.
fn rows(table: &str, pids: &[u32]) -> Outcome<String> {
    let mut lines = table.lines();
    let head = lines.next().unwrap_or_default();
    let Some(column) = head.split_whitespace().position(|name| name == "PID") else {
        return said("ps shows no column PID");
    };
    let ours = |line: &&str| {
        let pid = line.split_whitespace().nth(column).and_then(|word| word.parse().ok());
        pid.is_some_and(|pid: u32| pids.contains(&pid))
    };
    Ok(std::iter::once(head).chain(lines.filter(ours)).collect::<Vec<_>>().join("\n"))
}

/// Changes what a container may use.
pub fn update(root: &Path, arguments: &Update) -> Outcome {
    let (folder, kept) = known(root, &arguments.container_id)?;
    let _lock = folder.lock()?;
    let resources = wanted(arguments)?;
    if launch::memory_limit(&resources).is_some_and(|memory| memory != kept.memory_mib) {
        return said(format!(
            "The memory of a VM, {} MiB, cannot be changed while it runs: create the container anew",
            kept.memory_mib
        ));
    }
    if let Some(limit) = processes_limit(&resources) {
        // It is the guest's own kernel that counts them.
        let before = Bundle::kept(&folder, &kept)?.linux()?.resources().as_ref().and_then(processes_limit);
        if limit != before.unwrap_or_default() {
            return said(
                "The limit of processes in a VM cannot be changed while it runs: create the container anew",
            );
        }
    }
    Cgroup::with(kept.cgroup).apply(&resources, None)
}

/// The limit that is asked for, if it is spoken of; 0 is none.
fn processes_limit(resources: &LinuxResources) -> Option<u64> {
    resources.pids().as_ref().map(|pids| u64::try_from(pids.limit()).unwrap_or_default())
}

fn wanted(arguments: &Update) -> Outcome<LinuxResources> {
    let document = match arguments.resources.as_deref() {
        Some(path) if path == Path::new("-") => {
            std::io::read_to_string(std::io::stdin()).tried(|| "read resources from stdin".to_owned())?
        }
        Some(path) => std::fs::read_to_string(path).tried(|| format!("read {}", path.display()))?,
        None => json!({
            "memory": {"limit": arguments.memory},
            "cpu": {
                "shares": arguments.cpu_share, "quota": arguments.cpu_quota, "period": arguments.cpu_period,
                "cpus": arguments.cpuset_cpus, "mems": arguments.cpuset_mems,
            },
        })
        .to_string(),
    };
    serde_json::from_str(&document)
        .map_err(|source| Failure::Document { what: "the resources".to_owned(), source })
}

/// Shows what a container uses.
pub fn events(root: &Path, arguments: &Events) -> Outcome {
    let (folder, kept) = known(root, &arguments.container_id)?;
    let cgroup = Cgroup::with(kept.cgroup.clone());
    loop {
        if folder.status(&kept).0 == Status::Stopped {
            return said(format!("container not running: {}", kept.id));
        }
        print(&json!({"type": "stats", "id": kept.id, "data": cgroup.stats()}).to_string())?;
        if arguments.stats {
            return Ok(());
        }
        std::thread::sleep(Duration::from_secs(arguments.interval.max(1).into()));
    }
}

/// Creates a container, starts it and, unless it is to be left alone, stays until it has ended; its exit code.
pub fn run(arguments: Run, root: &Path, daemon: &Daemon, systemd: bool) -> Outcome<i32> {
    let (id, detach, keep) = (arguments.container_id.clone(), arguments.detach, arguments.keep);
    let create = Create {
        bundle: arguments.bundle,
        console_socket: arguments.console_socket,
        pid_file: arguments.pid_file,
        no_pivot: arguments.no_pivot,
        no_new_keyring: arguments.no_new_keyring,
        preserve_fds: arguments.preserve_fds,
        container_id: arguments.container_id,
    };
    let creation = Creation { root, daemon, systemd, foreground: !detach };
    let shim = launch::create(&create, &creation)?;
    let force = Delete { container_id: id.clone(), force: true };
    if let Err(failure) = start(root, &id) {
        // The first failure is the one that is told.
        let _ = delete(root, &force);
        return Err(failure);
    }
    if detach {
        return Ok(0);
    }
    let stdin = crate::console::inherited(0).tried(|| "look at stdin".to_owned())?;
    let terminal =
        Bundle::read(&create.bundle)?.spec.process().as_ref().and_then(oci_spec::runtime::Process::terminal);
    let own = terminal == Some(true) && create.console_socket.is_none();
    let raw = own.then(|| crate::console::make_raw(&stdin).ok()).flatten();
    let code = exec::wait_for(shim);
    if let Some(before) = raw {
        crate::console::restore(&stdin, &before);
    }
    if !keep {
        delete(root, &force)?;
    }
    code
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Arguments, Command};

    #[test]
    fn signals_are_known_by_number_and_by_name() {
        for (text, number) in [("9", 9), ("KILL", 9), ("sigterm", 15), ("SIGUSR1", 10), ("37", 37)] {
            assert_eq!(signal_number(text).unwrap(), number, "{text}");
        }
        for text in ["0", "65", "-9", "SIGNAL", ""] {
            assert!(signal_number(text).is_err(), "{text}");
        }
    }

    #[test]
    fn rows_of_other_processes_are_left_out() {
        let table = "UID   PID  PPID CMD\nroot    1     0 init 7\nroot    7     1 sleep\n";
        assert_eq!(rows(table, &[7]).unwrap(), "UID   PID  PPID CMD\nroot    7     1 sleep");
        assert!(rows("CMD\n", &[7]).is_err());
    }

    #[test]
    fn memory_stays_and_other_limits_change() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::of(root.path(), "c1").unwrap();
        folder.make().unwrap();
        std::fs::write(root.path().join("cpu.shares"), "").unwrap();
        let cgroup = vec![root.path().to_owned()];
        folder.save(&Kept { id: "c1".into(), memory_mib: 128, cgroup, ..Kept::default() }).unwrap();
        let update_by = |words: &[&str]| {
            let parsed = Arguments::try_parse_from([&["catalyst-oci", "update"], words].concat()).unwrap();
            let Command::Update(arguments) = parsed.command else { panic!() };
            update(root.path(), &arguments)
        };
        update_by(&["--cpu-share", "512", "--memory", &(128 << 20).to_string(), "c1"]).unwrap();
        assert_eq!(std::fs::read_to_string(root.path().join("cpu.shares")).unwrap(), "512");
        let refused = update_by(&["--memory", &(256 << 20).to_string(), "c1"]).unwrap_err().to_string();
        assert!(refused.contains("128 MiB"), "{refused}");
    }

    #[test]
    fn the_limit_of_processes_stays() {
        let root = tempfile::tempdir().unwrap();
        let bundle = root.path().join("bundle");
        std::fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let spec = crate::bundle::tests::with("/linux/resources/pids", json!({"limit": 7}));
        let folder = Folder::of(root.path(), "c1").unwrap();
        folder.make().unwrap();
        folder.save(&Kept { id: "c1".into(), bundle, ..Kept::default() }).unwrap();
        folder.save_spec(&spec).unwrap();
        let resources = root.path().join("resources.json");
        let update_to = |limit: i64| {
            std::fs::write(&resources, json!({"pids": {"limit": limit}}).to_string()).unwrap();
            let words = ["catalyst-oci", "update", "--resources", resources.to_str().unwrap(), "c1"];
            let Command::Update(arguments) = Arguments::try_parse_from(words).unwrap().command else {
                panic!()
            };
            update(root.path(), &arguments)
        };
        update_to(7).unwrap();
        for other in [8, -1] {
            let refused = update_to(other).unwrap_err().to_string();
            assert!(refused.contains("processes"), "{refused}");
        }
    }

    #[test]
    fn what_has_ended_is_told_so_and_deleted_once() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::of(root.path(), "c1").unwrap();
        folder.make().unwrap();
        folder.save(&Kept { id: "c1".into(), ..Kept::default() }).unwrap();
        let signal = Kill { container_id: "c1".into(), signal: "15".into(), all: false };
        let refused = kill(root.path(), &signal).unwrap_err().to_string();
        assert!(refused.contains("container not running"), "{refused}");
        kill(root.path(), &Kill { all: true, ..signal }).unwrap();
        assert!(start(root.path(), "c1").is_err() && pause(root.path(), "c1", true).is_err());
        let gently = Delete { container_id: "c1".into(), force: false };
        delete(root.path(), &gently).unwrap();
        let refused = delete(root.path(), &gently).unwrap_err().to_string();
        assert!(refused.contains("does not exist"), "{refused}");
        delete(root.path(), &Delete { force: true, ..gently }).unwrap();
    }
}
