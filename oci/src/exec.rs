//! The command `exec`, and the process that stands for its program on the host.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;

use catalyst_agent_protocol::container::Process;
use liboci_cli::Exec;
use oci_spec::runtime;
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::bundle::Bundle;
use crate::console;
use crate::failure::{Failure, Outcome, Tried, chain, said};
use crate::launch::{self, Report, take_orders};
use crate::process;
use crate::state::Folder;
use crate::wire::{self, Answer, Request, Status};

/// What a program ends with whose container ends.
pub const CONTAINER_ENDED: i32 = 137;
/// Signals that are passed on.
pub const PASSED_ON: [i32; 6] =
    [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2, libc::SIGTERM];

/// What the process is to do.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    root: PathBuf,
    id: String,
    process: Process,
    console_socket: Option<PathBuf>,
}

/// Runs another program; its exit code, once it has ended or, detached, started.
pub fn exec(arguments: &Exec, root: &Path) -> Outcome<i32> {
    let folder = Folder::of(root, &arguments.container_id)?;
    let kept = folder.load()?;
    match folder.status(&kept).0 {
        Status::Running => {}
        Status::Stopped => return said(format!("cannot exec in a stopped container: {}", kept.id)),
        status => return said(format!("cannot exec in a container that is {status}: {}", kept.id)),
    }
    if arguments.preserve_fds > 0 {
        return said("--preserve-fds is not supported: open files of the host cannot be given to a VM");
    }
    let spec = specified(arguments, || Bundle::kept(&folder, &kept))?;
    let stdin = console::inherited(0).tried(|| "look at stdin".to_owned())?;
    let process = process::convert(&spec, !console::is_null(&stdin) || spec.terminal() == Some(true))?;
    let terminal = process.terminal.is_some();
    if terminal && arguments.console_socket.is_none() && arguments.detach {
        return said(
            "A program with a terminal that is to be detached needs --console-socket, to which it is sent",
        );
    }
    let console_socket = arguments.console_socket.as_deref().map(std::path::absolute).transpose();
    let console_socket = console_socket.tried(|| "find --console-socket".to_owned())?;
    let args = process.args.clone();
    let order = Order { root: root.to_owned(), id: kept.id.clone(), process, console_socket };
    let raw = (terminal && order.console_socket.is_none()).then(|| console::make_raw(&stdin).ok()).flatten();
    let done = run(arguments, &order, &args, &kept.cgroup);
    if let Some(before) = raw {
        console::restore(&stdin, &before);
    }
    done
}

fn run(arguments: &Exec, order: &Order, args: &[String], cgroup: &[PathBuf]) -> Outcome<i32> {
    let (mut child, orders) = launch::spawn("exec", args, &[])?;
    let started = (|| {
        // It is counted with the container; where it cannot be, it takes next to nothing.
        let _ = crate::cgroup::Cgroup::with(cgroup.to_vec()).join(child.id());
        let speak = || "speak with the program's shim".to_owned();
        wire::send(&orders, order, &[]).tried(speak)?;
        match wire::receive(&orders).tried(speak)? {
            Some((Report::Ready, _)) => {}
            Some((Report::Failed(why), _)) => return said(why),
            _ => return said("The program's shim has ended before the program was started"),
        }
        arguments.pid_file.as_deref().map_or(Ok(()), |path| launch::write_pid(path, child.id()))
    })();
    if let Err(failure) = started {
        // It may have ended already.
        let _ = child.kill();
        let _ = child.wait();
        return Err(failure);
    }
    if arguments.detach { Ok(0) } else { wait_for(child) }
}

/// Waits for a process that stands for a program, and passes signals on to it.
pub fn wait_for(mut child: Child) -> Outcome<i32> {
    let what = || "wait for the program".to_owned();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().tried(what)?;
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    runtime.block_on(async {
        for number in PASSED_ON.into_iter().chain([libc::SIGWINCH]) {
            let mut signals = signal(SignalKind::from_raw(number)).tried(what)?;
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    if let Ok(number) = nix::sys::signal::Signal::try_from(number) {
                        // It may have ended by now.
                        let _ = nix::sys::signal::kill(pid, number);
                    }
                }
            });
        }
        let ended = tokio::task::spawn_blocking(move || child.wait()).await;
        let status = ended.map_err(std::io::Error::other).tried(what)?.tried(what)?;
        Ok(status.code().unwrap_or(CONTAINER_ENDED))
    })
}

/// The program: as its own document says, or the container's with what the arguments change.
fn specified(arguments: &Exec, bundle: impl FnOnce() -> Outcome<Bundle>) -> Outcome<runtime::Process> {
    if let Some(path) = &arguments.process {
        let text = std::fs::read(path).tried(|| format!("read {}", path.display()))?;
        return serde_json::from_slice(&text)
            .map_err(|source| Failure::Document { what: path.display().to_string(), source });
    }
    let Some(mut process) = bundle()?.spec.process().clone() else {
        return said("The container's specification has no part 'process'");
    };
    change(&mut process, arguments)?;
    Ok(process)
}

fn change(process: &mut runtime::Process, arguments: &Exec) -> Outcome {
    if arguments.command.is_empty() {
        return said("exec needs a program: catalyst-oci exec ID PROGRAM [ARGUMENT…]");
    }
    process.set_args(Some(arguments.command.clone()));
    process.set_terminal(Some(arguments.tty));
    if let Some(cwd) = &arguments.cwd {
        process.set_cwd(cwd.clone());
    }
    if arguments.no_new_privs {
        process.set_no_new_privileges(Some(true));
    }
    let mut env = process.env().clone().unwrap_or_default();
    for (name, value) in &arguments.env {
        env.retain(|variable| variable.split_once('=').is_none_or(|(known, _)| known != name));
        env.push(format!("{name}={value}"));
    }
    process.set_env(Some(env));
    let mut user = process.user().clone();
    if let Some((uid, gid)) = arguments.user {
        user.set_uid(uid).set_gid(gid.unwrap_or_default());
    }
    if !arguments.additional_gids.is_empty() {
        user.set_additional_gids(Some(arguments.additional_gids.clone()));
    }
    process.set_user(user);
    if arguments.cap.is_empty() {
        return Ok(());
    }
    let mut sets = process.capabilities().clone().unwrap_or_else(no_capabilities);
    let with = |set: Option<runtime::Capabilities>| {
        let mut set = set.unwrap_or_default();
        for name in &arguments.cap {
            process::capability_named(name)?;
            let upper = name.to_uppercase();
            set.extend(upper.strip_prefix("CAP_").unwrap_or(&upper).parse::<runtime::Capability>().ok());
        }
        Ok::<_, Failure>(Some(set))
    };
    let bounding = with(sets.bounding().clone())?;
    let effective = with(sets.effective().clone())?;
    let permitted = with(sets.permitted().clone())?;
    sets.set_bounding(bounding).set_effective(effective).set_permitted(permitted);
    process.set_capabilities(Some(sets));
    Ok(())
}

/// The type's own default has some.
fn no_capabilities() -> runtime::LinuxCapabilities {
    let mut none = runtime::LinuxCapabilities::default();
    none.set_bounding(None).set_effective(None).set_permitted(None).set_inheritable(None).set_ambient(None);
    none
}

/// Stands for the program on the host until it has ended; its exit code.
pub fn stand_in() -> i32 {
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
    let terminal = order.process.terminal.as_ref();
    let own = |number| console::inherited(number).tried(|| format!("take over descriptor {number}"));
    let files = match (&order.console_socket, terminal) {
        (Some(socket), Some(_)) => {
            let slave = console::open(socket, terminal)?;
            vec![slave.try_clone().tried(|| "take over the terminal".to_owned())?, slave]
        }
        (None, Some(_)) => vec![own(0)?, own(1)?],
        (_, None) => vec![own(0)?, own(1)?, own(2)?],
    };
    let folder = Folder::of(&order.root, &order.id)?;
    let reach = || format!("ask the shim of container {}", order.id);
    let shim = folder.connect().tried(reach)?;
    let terminal = terminal.is_some().then(|| files[1].try_clone()).transpose().tried(reach)?;
    let numbers: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let request = Request::Exec { process: Box::new(order.process), pid: std::process::id() };
    wire::send(&shim, &request, &numbers).tried(reach)?;
    drop(files);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().tried(reach)?;
    // Signals are heard before anybody knows whom to send them to.
    runtime.block_on(async {
        let signals = hear_signals().tried(reach)?;
        match wire::receive(&shim).tried(reach)? {
            Some((Answer::Done, _)) => {}
            Some((Answer::Failed(why), _)) => return said(why),
            _ => return said(format!("container not running: {}", order.id)),
        }
        wire::send(orders, &Report::Ready, &[]).tried(speak)?;
        Ok(attend(shim, signals, terminal).await.tried(reach)?.map_or(CONTAINER_ENDED, |(code, _)| code))
    })
}

/// Signals that come to this process for the program that it stands for, from now on.
pub fn hear_signals() -> std::io::Result<mpsc::UnboundedReceiver<i32>> {
    let (sender, heard) = mpsc::unbounded_channel();
    for number in PASSED_ON.into_iter().chain([libc::SIGWINCH]) {
        let mut signals = signal(SignalKind::from_raw(number))?;
        let sender = sender.clone();
        tokio::spawn(async move { while signals.recv().await.is_some() && sender.send(number).is_ok() {} });
    }
    Ok(heard)
}

/// Stays until the program has ended that runs on the other side: its exit code, and whether memory was short. None if the other
/// side has ended.
pub async fn attend(
    shim: UnixStream,
    mut signals: mpsc::UnboundedReceiver<i32>,
    terminal: Option<std::fs::File>,
) -> std::io::Result<Option<(i32, bool)>> {
    let (sender, mut answers) = mpsc::unbounded_channel();
    let reading = shim.try_clone()?;
    std::thread::Builder::new().name("answers".to_owned()).spawn(move || {
        while let Ok(Some((answer, _))) = wire::receive::<Answer>(&reading) {
            if sender.send(answer).is_err() {
                return;
            }
        }
    })?;
    let resize =
        || terminal.as_ref().and_then(console::size).map(|(rows, cols)| Request::Resize { rows, cols });
    let mut wanted = resize();
    loop {
        if let Some(request) = wanted.take() {
            // Its end is seen below.
            let _ = wire::send(&shim, &request, &[]);
        }
        tokio::select! {
            answer = answers.recv() => match answer {
                Some(Answer::Exited { code, out_of_memory }) => return Ok(Some((code, out_of_memory))),
                Some(_) => {}
                None => return Ok(None),
            },
            Some(signal) = signals.recv() => {
                wanted = if signal == libc::SIGWINCH { resize() } else { Some(Request::Kill { signal }) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Arguments, Command};

    fn arguments(words: &[&str]) -> Exec {
        let parsed = Arguments::try_parse_from([&["catalyst-oci", "exec"], words].concat()).unwrap();
        let Command::Exec(exec) = parsed.command else { panic!() };
        exec
    }

    #[test]
    fn arguments_change_the_container_s_own_program() {
        let mut process: runtime::Process = serde_json::from_value(serde_json::json!({
            "user": {"uid": 1, "gid": 1}, "args": ["old"], "env": ["A=1", "B=2"], "cwd": "/",
        }))
        .unwrap();
        let words = [
            "-t", "--cwd", "/w", "-e", "A=3", "-u", "5:6", "-g", "7", "--cap", "CAP_KILL", "c1", "sh", "-c",
            "x",
        ];
        change(&mut process, &arguments(&words)).unwrap();
        assert_eq!(process.args().as_deref().unwrap(), ["sh", "-c", "x"]);
        assert_eq!(process.env().as_deref().unwrap(), ["B=2", "A=3"]);
        assert_eq!((process.user().uid(), process.user().gid(), process.terminal()), (5, 6, Some(true)));
        let converted = process::convert(&process, true).unwrap();
        assert_eq!((converted.capabilities.effective, converted.cwd.as_str()), (1 << 5, "/w"));
        assert_eq!(converted.additional_gids, [7]);
        assert!(change(&mut process, &arguments(&["c1"])).is_err());
        assert!(change(&mut process, &arguments(&["--cap", "fly", "c1", "x"])).is_err());
    }
}
