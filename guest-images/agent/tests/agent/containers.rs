//! Containers over the real agent, made of a folder with busybox. They are made by root alone.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::support::{Host, Outcome};
use catalyst_agent_protocol::container::{
    Capabilities, Container, DOCUMENT, JOINED_TREES, Mount, Network, Process, Rlimit,
};
use catalyst_agent_protocol::{Channel, Control, ExecExit, Problem, ProblemKind, Reply, Request, Terminal};

/// What Docker gives a container: chown, dac_override, kill, net_raw and so on, without sys_admin.
const USUAL: u64 = 0xa804_25fb;
const BUSYBOX: &str = "/bin/busybox";

/// A runtime, whose container's root has busybox in it; none where that cannot be.
fn runtime() -> Option<Host> {
    // SAFETY: geteuid only returns a number.
    if unsafe { libc::geteuid() } != 0 {
        println!("SKIPPED: only root can make containers");
        return None;
    }
    if !Path::new(BUSYBOX).exists() {
        println!("SKIPPED: there is no {BUSYBOX}");
        return None;
    }
    let host = Host::runtime();
    let bin = root(&host).join("bin");
    fs::create_dir_all(&bin).unwrap();
    fs::copy(BUSYBOX, bin.join("busybox")).unwrap();
    for name in
        ["sh", "cat", "id", "sleep", "true", "tty", "stty", "ls", "ps", "kill", "hostname", "umask", "touch"]
    {
        symlink("busybox", bin.join(name)).unwrap();
    }
    fs::create_dir_all(root(&host).join("etc")).unwrap();
    fs::write(root(&host).join("etc/passwd"), "u:x:1234:1235::/home/u:/bin/sh\n").unwrap();
    fs::write(root(&host).join("etc/group"), "g:x:1236:u\n").unwrap();
    Some(host)
}

fn root(host: &Host) -> PathBuf {
    host.folder.join("trees/root")
}

fn mount(kind: &str, destination: &str, options: &[&str]) -> Mount {
    let options = options.iter().map(ToString::to_string).collect();
    Mount { destination: destination.into(), kind: kind.into(), source: String::new(), options }
}

fn process(args: &[&str]) -> Process {
    let capabilities =
        Capabilities { bounding: USUAL, effective: USUAL, permitted: USUAL, ..Capabilities::default() };
    Process {
        args: args.iter().map(ToString::to_string).collect(),
        env: vec!["PATH=/bin".into(), "A=b c".into()],
        cwd: "/".into(),
        capabilities,
        ..Process::default()
    }
}

fn container(process: Process) -> Container {
    Container {
        hostname: "box".into(),
        mounts: vec![
            mount("proc", "/proc", &["nosuid", "noexec", "nodev"]),
            mount("tmpfs", "/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("devpts", "/dev/pts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
            Mount {
                source: "shm".into(),
                ..mount("tmpfs", "/dev/shm", &["nosuid", "noexec", "nodev", "mode=1777"])
            },
            mount("mqueue", "/dev/mqueue", &["nosuid", "noexec", "nodev"]),
        ],
        process,
        ..Container::default()
    }
}

fn create(host: &mut Host, container: &Container) -> Reply {
    host.request(Request::CreateContainer { document: Some(serde_json::to_string(container).unwrap()) })
}

fn begin() -> Request {
    Request::StartContainer { name: String::new() }
}

fn exec(process: Process) -> Request {
    Request::ExecContainer { name: String::new(), process: Box::new(process) }
}

fn start(host: &mut Host, request: Request) -> u32 {
    let id = host.ask(request);
    match host.reply(id) {
        Reply::Started { .. } => id,
        other => panic!("{other:?}"),
    }
}

fn run(container: &Container, input: &[u8]) -> Option<Outcome> {
    let mut host = runtime()?;
    assert_eq!(create(&mut host, container), Reply::Done);
    let stream = start(&mut host, begin());
    Some(host.finish(stream, input))
}

fn shell(script: &str) -> Process {
    process(&["sh", "-c", script])
}

fn text(outcome: &Outcome) -> String {
    assert!(outcome.errors.is_empty(), "{}", String::from_utf8_lossy(&outcome.errors));
    String::from_utf8_lossy(&outcome.output).into_owned()
}

fn failed_as(reply: &Reply, wanted: ProblemKind, part: &str) -> bool {
    matches!(reply, Reply::Failed(Problem { kind, message }) if *kind == wanted && message.contains(part))
}

#[test]
fn a_program_is_the_first_of_its_own_processes_and_its_code_is_told() {
    let script =
        "echo $$; hostname; echo $A; echo $HOME; pwd; umask; ls /; ls -d /proc/[0-9]*; echo err >&2; exit 7";
    let Some(outcome) = run(&container(shell(script)), b"") else { return };
    assert_eq!(outcome.exit, Some(ExecExit::Code(7)));
    assert_eq!(outcome.errors, b"err\n");
    let output = String::from_utf8(outcome.output).unwrap();
    let first = "1\nbox\nb c\n/\n/\n0022\nbin\ndev\netc\nproc\n/proc/1\n";
    assert!(output.starts_with(first), "{output}");
}

#[test]
fn a_program_has_its_user_groups_limits_and_rights() {
    let nothing_new = Process {
        uid: 1234,
        gid: 1235,
        additional_gids: vec![1236, 4000],
        umask: Some(0o077),
        cwd: "/made/here".into(),
        rlimits: vec![Rlimit { resource: libc::RLIMIT_NOFILE, soft: 100, hard: 200 }],
        no_new_privileges: true,
        oom_score_adj: Some(500),
        ..shell(
            "id -u; id -g; id -G; umask; pwd; ulimit -n; ulimit -Hn; echo $HOME; cat /proc/self/oom_score_adj; \
             echo out >/dev/stdout; while read line; do case $line in Cap*|NoNew*) echo $line;; esac; done </proc/self/status",
        )
    };
    let Some(outcome) = run(&container(nothing_new), b"") else { return };
    let expected = format!(
        "1234\n1235\n1235 1236 4000\n0077\n/made/here\n100\n200\n/home/u\n500\nout\nCapInh: {0:016x}\n\
         CapPrm: {0:016x}\nCapEff: {0:016x}\nCapBnd: {USUAL:016x}\nCapAmb: {0:016x}\nNoNewPrivs: 1\n",
        0
    );
    assert_eq!(text(&outcome), expected);
}

#[test]
fn root_in_a_container_has_no_more_than_it_was_given_and_ambient_rights_stay() {
    let net_bind = 1 << 10;
    let capabilities = Capabilities {
        bounding: USUAL,
        effective: net_bind,
        permitted: net_bind,
        inheritable: net_bind,
        ambient: net_bind,
    };
    let script = "while read line; do case $line in CapE*|CapA*) echo $line;; esac; done </proc/self/status";
    let user = Process { uid: 1234, gid: 1235, capabilities, ..shell(script) };
    let Some(outcome) = run(&container(user), b"") else { return };
    assert_eq!(text(&outcome), format!("CapEff: {net_bind:016x}\nCapAmb: {net_bind:016x}\n"));
    let outcome = run(&container(shell(script)), b"").unwrap();
    assert_eq!(text(&outcome), format!("CapEff: {USUAL:016x}\nCapAmb: {:016x}\n", 0));
}

#[test]
fn trees_are_mounted_as_they_are_asked_for() {
    let Some(mut host) = runtime() else { return };
    let trees = host.folder.join("trees");
    fs::create_dir(trees.join("volume")).unwrap();
    fs::write(trees.join("volume/there"), "kept").unwrap();
    fs::write(trees.join("hosts"), "127.0.0.1 box\n").unwrap();
    // What the image says lies elsewhere is not elsewhere on the machine.
    let beyond = host.folder.join("beyond");
    fs::create_dir(&beyond).unwrap();
    symlink(&beyond, root(&host).join("data")).unwrap();
    let tree = |source: &str, destination: &str, options: &[&str]| Mount {
        source: source.into(),
        ..mount("tree", destination, options)
    };
    let script = "cat /etc/hosts; busybox grep -c '^shm /dev/shm tmpfs' /proc/mounts; cat /data/there; echo new >/data/new; echo no >/ro/new; echo $?; touch /x; echo $?";
    let mut container = container(shell(&format!(
        "exec 2>&1; {script}; echo '#!/bin/sh' >/data/run; busybox chmod 755 /data/run; /data/run; echo $?"
    )));
    container.read_only = true;
    container.mounts.extend([
        tree("hosts", "/etc/hosts", &["rbind", "rprivate"]),
        tree("volume", "/data", &["rbind", "noexec"]),
        tree("volume", "/ro", &["bind", "ro"]),
    ]);
    assert_eq!(create(&mut host, &container), Reply::Done);
    let stream = start(&mut host, begin());
    let outcome = host.finish(stream, b"");
    let text = text(&outcome);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..2], ["127.0.0.1 box", "1"], "{text}");
    assert!(lines[2].starts_with("kept") && lines[2].contains("Read-only file system"), "{text}");
    assert_eq!(lines[3], "1", "{text}");
    assert!(lines[4].contains("Read-only file system") && lines[5] == "1", "{text}");
    assert!(lines[6].contains("Permission denied") && lines[7] == "126", "{text}");
    assert_eq!(fs::read_to_string(trees.join("volume/new")).unwrap(), "new\n");
    assert_eq!(fs::read_dir(&beyond).unwrap().count(), 0);
    let missing = tree("none", "/none", &[]);
    let mut host = runtime().unwrap();
    container.mounts = vec![missing];
    assert!(failed_as(&create(&mut host, &container), ProblemKind::Failed, "/none"));
}

#[test]
fn paths_are_hidden_or_read_only() {
    let Some(mut host) = runtime() else { return };
    fs::write(root(&host).join("bin/hidden"), "secret").unwrap();
    let script = "exec 2>&1; cat /proc/timer_list; ls /etc | busybox wc -l; cat /bin/hidden; echo x >/proc/sys/kernel/domainname; echo end";
    let mut container = container(shell(script));
    let hidden = ["/proc/timer_list", "/etc", "/bin/hidden", "/no/such"];
    container.masked_paths = hidden.map(str::to_owned).to_vec();
    container.readonly_paths = ["/proc/sys", "/no/such"].map(str::to_owned).to_vec();
    assert_eq!(create(&mut host, &container), Reply::Done);
    let stream = start(&mut host, begin());
    let text = text(&host.finish(stream, b""));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!((lines.len(), lines[0], lines[2]), (3, "0", "end"), "{text}");
    assert!(lines[1].contains("Read-only file system"), "{text}");
}

#[test]
fn devices_are_those_that_every_container_has() {
    let script = "for name in null zero full random urandom tty ptmx fd stdin stdout stderr shm mqueue; do \
         [ -e /dev/$name ] || echo no $name; done; [ -c /dev/null ] && echo gone >/dev/null; \
         busybox stat -c %a:%t:%T /dev/null /dev/urandom; busybox readlink /dev/ptmx; [ -e /dev/console ] || echo none";
    let Some(outcome) = run(&container(shell(script)), b"") else { return };
    // Nobody reads a terminal that is not there.
    assert_eq!(text(&outcome), "666:1:3\n666:1:9\npts/ptmx\nnone\n");
}

#[test]
fn what_cannot_be_run_is_said_before_it_is_started() {
    let Some(mut host) = runtime() else { return };
    let program = root(&host).join("bin/text");
    fs::write(&program, "#!/bin/none\n").unwrap();
    let mode = |mode| fs::set_permissions(&program, PermissionsExt::from_mode(mode)).unwrap();
    mode(0o644);
    let not_found = "exec: \"nope\": executable file not found in $PATH";
    for (args, kind, part) in [
        ("nope", ProblemKind::NotFound, not_found),
        (
            "/bin/nope",
            ProblemKind::NotFound,
            "exec: \"/bin/nope\": stat /bin/nope: no such file or directory",
        ),
        ("/bin/text", ProblemKind::Denied, "exec: \"/bin/text\": permission denied"),
        ("/etc", ProblemKind::Denied, "permission denied"),
        ("", ProblemKind::Invalid, "args is empty"),
    ] {
        let reply = create(&mut host, &container(process(&[args])));
        assert!(failed_as(&reply, kind, part), "{args}: {reply:?}");
    }
    let at = |cwd: &str| Process { cwd: cwd.into(), ..process(&["true"]) };
    for (cwd, kind) in [("/etc/passwd", ProblemKind::Failed), ("relative", ProblemKind::Invalid)] {
        let reply = create(&mut host, &container(at(cwd)));
        assert!(failed_as(&reply, kind, cwd), "{cwd}: {reply:?}");
    }
    assert!(failed_as(&host.request(begin()), ProblemKind::Invalid, "ready"));
    // A program whose interpreter is not there is found, and then it is not one.
    mode(0o755);
    assert_eq!(create(&mut host, &container(process(&["text"]))), Reply::Done);
    let reply = host.request(begin());
    assert!(failed_as(&reply, ProblemKind::NotFound, "exec /bin/text: no such file"), "{reply:?}");
    let reply = create(&mut host, &container(process(&["true"])));
    assert!(failed_as(&reply, ProblemKind::Invalid, "already"), "{reply:?}");
}

#[test]
fn a_long_document_comes_as_a_file_and_does_not_stay() {
    let Some(mut host) = runtime() else { return };
    let mut program = shell("echo ${#LONG}");
    program.env.push(format!("LONG={}", "x".repeat(100_000)));
    let path = host.folder.join("root").join(DOCUMENT.trim_start_matches('/'));
    fs::write(&path, serde_json::to_vec(&container(program)).unwrap()).unwrap();
    assert_eq!(host.request(Request::CreateContainer { document: None }), Reply::Done);
    assert!(!path.exists(), "it may hold secrets");
    let stream = start(&mut host, begin());
    assert_eq!(text(&host.finish(stream, b"")), "100000\n");
}

#[test]
fn input_and_output_go_through_as_they_come() {
    let cat = Process { stdin: true, ..process(&["cat"]) };
    let bytes: Vec<u8> = (0..600_000_u32).flat_map(u32::to_le_bytes).take(2_000_000).collect();
    let Some(outcome) = run(&container(cat), &bytes) else { return };
    assert!(outcome.output == bytes, "{} bytes came back", outcome.output.len());
    assert_eq!(outcome.exit, Some(ExecExit::Code(0)));
    let without = run(&container(process(&["cat"])), b"").unwrap();
    assert_eq!((without.output.len(), without.exit), (0, Some(ExecExit::Code(0))));
}

#[test]
fn a_terminal_is_one_of_the_containers_and_its_console() {
    let terminal = Some(Terminal { rows: 33, cols: 101, term: None });
    let script = "tty; stty size; echo hello >/dev/console; echo tty >/dev/tty; ls /dev/pts";
    let Some(outcome) = run(&container(Process { terminal, ..shell(script) }), b"") else { return };
    let output = String::from_utf8(outcome.output).unwrap();
    let words: Vec<&str> = output.split_whitespace().collect();
    assert_eq!(words, ["/dev/pts/0", "33", "101", "hello", "tty", "0", "ptmx"], "{output}");
    assert!(outcome.errors.is_empty());
}

#[test]
fn other_programs_see_the_container_and_go_with_it() {
    let Some(mut host) = runtime() else { return };
    let main = container(shell("echo up; read line; echo $line"));
    let main = Container { process: Process { stdin: true, ..main.process.clone() }, ..main };
    assert_eq!(create(&mut host, &main), Reply::Done);
    let reply = host.request(exec(process(&["true"])));
    assert!(failed_as(&reply, ProblemKind::Invalid, "not running"), "{reply:?}");
    let first = start(&mut host, begin());
    host.next(|frame| frame.stream == first && frame.channel == Channel::Output);

    let look = Process {
        uid: 1234,
        cwd: "/etc".into(),
        ..shell("hostname; pwd; id -u; set -- /proc/[0-9]*; echo $#; [ -e /proc/1 ] && echo one; exit 3")
    };
    let stream = start(&mut host, exec(look));
    let outcome = host.finish(stream, b"");
    assert_eq!(outcome.exit, Some(ExecExit::Code(3)));
    // The first, and this shell.
    assert_eq!(text(&outcome), "box\n/etc\n1234\n2\none\n");

    let terminal = Some(Terminal { rows: 24, cols: 80, term: None });
    let stream = start(&mut host, exec(Process { terminal, ..process(&["tty"]) }));
    assert_eq!(host.finish(stream, b"").output, b"/dev/pts/0\r\n");
    let reply = host.request(exec(process(&["nope"])));
    assert!(failed_as(&reply, ProblemKind::NotFound, "not found in $PATH"), "{reply:?}");

    // A signal is the program's alone: its shell's child lives on and holds the output for a while.
    let stream = start(&mut host, exec(process(&["sleep", "60"])));
    assert_eq!(host.request(Request::Signal { stream, signal: libc::SIGUSR1 }), Reply::Done);
    assert_eq!(host.finish(stream, b"").exit, Some(ExecExit::Signal(libc::SIGUSR1)));

    // One that is stalled does not keep the container's end from being told.
    let endless = start(&mut host, exec(process(&["busybox", "yes"])));
    let outcome = host.finish(first, b"bye\n");
    assert_eq!((outcome.output.as_slice(), outcome.exit), (&b"bye\n"[..], Some(ExecExit::Code(0))));
    assert_eq!(host.finish(endless, b"").exit, Some(ExecExit::Signal(libc::SIGKILL)));
    let reply = host.request(exec(process(&["true"])));
    assert!(failed_as(&reply, ProblemKind::Invalid, "not running"), "{reply:?}");
}

#[test]
fn a_host_that_goes_ends_nothing() {
    let Some(mut host) = runtime() else { return };
    // More than pipe and credit take: it goes on only if somebody reads.
    let script = "busybox head -c 3000000 /dev/zero; echo done >/mark; read never";
    let main = Process { stdin: true, ..shell(script) };
    assert_eq!(create(&mut host, &container(main)), Reply::Done);
    let id = host.ask(begin());
    let Reply::Started { pid } = host.reply(id) else { panic!("not started") };
    host.hello(8);
    let mark = root(&host).join("mark");
    let until = Instant::now() + Duration::from_secs(20);
    while !mark.exists() {
        assert!(Instant::now() < until, "the program has stopped");
        std::thread::sleep(Duration::from_millis(20));
    }
    let stream = start(&mut host, exec(process(&["kill", "-0", "1"])));
    assert_eq!(host.finish(stream, b"").exit, Some(ExecExit::Code(0)));
    assert!(Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn a_stream_that_is_closed_ends_its_program() {
    let Some(mut host) = runtime() else { return };
    assert_eq!(create(&mut host, &container(process(&["sleep", "60"]))), Reply::Done);
    let stream = start(&mut host, begin());
    assert_eq!(host.request(Request::Close { stream }), Reply::Done);
    // A first process takes no signal that it has no handler for, but this one.
    assert_eq!(host.finish(stream, b"").exit, Some(ExecExit::Signal(libc::SIGKILL)));
}

#[test]
fn only_a_runtime_is_heard_about_containers() {
    let mut host = Host::greeted();
    for request in
        [Request::CreateContainer { document: None }, begin(), Request::SetNetwork(Network::default())]
    {
        assert!(failed_as(&host.request(request), ProblemKind::Unsupported, "port of their own"));
    }
}

#[test]
fn the_daemons_commands_run_in_the_container() {
    let Some(mut host) = runtime() else { return };
    let daemon = host.daemon.accept().unwrap().0;
    let main = Process { stdin: true, ..process(&["cat"]) };
    assert_eq!(create(&mut host, &container(main)), Reply::Done);
    start(&mut host, begin());
    // The same host, at the other port.
    daemon.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    host.port = daemon;
    host.epoch = 0;
    assert_eq!(host.control(), Control::Up);
    host.hello(9);
    let mut spec = super::support::spec(&[
        "sh",
        "-c",
        "hostname; id -u; id -G; echo $HOME $B; [ -d /proc/1 ] && echo one",
    ]);
    spec.env = vec![("B".into(), "c".into())];
    let outcome = host.run(spec.clone(), b"");
    assert_eq!(text(&outcome), "box\n0\n0\n/ c\none\n");
    spec.user = Some("u".into());
    fs::create_dir_all(root(&host).join("home/u")).unwrap();
    assert_eq!(text(&host.run(spec.clone(), b"")), "box\n1234\n1235 1236\n/home/u c\none\n");
    spec.user = Some("nobody-here".into());
    assert!(failed_as(&host.request(Request::Exec(spec)), ProblemKind::NotFound, "nobody-here"));
}

/// A container that joins the first, with busybox in its root.
fn joined(host: &Host, name: &str, shares: bool, process: Process) -> Container {
    let bin = host.folder.join("trees").join(JOINED_TREES).join(name).join("root/bin");
    fs::create_dir_all(&bin).unwrap();
    fs::copy(BUSYBOX, bin.join("busybox")).unwrap();
    for program in ["sh", "ls", "hostname", "sleep", "true", "readlink", "tr", "grep"] {
        symlink("busybox", bin.join(program)).unwrap();
    }
    let hostname = if shares { String::new() } else { format!("box-{name}") };
    Container { name: name.into(), joins: true, shares, hostname, ..container(process) }
}

#[test]
fn a_container_that_joins_has_root_and_processes_of_its_own() {
    let Some(mut host) = runtime() else { return };
    let reply = host.request(Request::StartContainer { name: "c1".into() });
    assert!(failed_as(&reply, ProblemKind::Invalid, "ready"), "{reply:?}");
    assert_eq!(create(&mut host, &container(process(&["sleep", "60"]))), Reply::Done);
    let first = start(&mut host, begin());
    let script = "echo $$; hostname; ls /; ls -d /proc/[0-9]*; exit 3";
    let other = joined(&host, "c1", false, shell(script));
    assert_eq!(create(&mut host, &other), Reply::Done);
    let reply = create(&mut host, &other);
    assert!(failed_as(&reply, ProblemKind::Invalid, "already"), "{reply:?}");
    let stream = start(&mut host, Request::StartContainer { name: "c1".into() });
    let outcome = host.finish(stream, b"");
    assert!(text(&outcome).starts_with("1\nbox-c1\nbin\ndev\nproc\n/proc/1\n"), "{}", text(&outcome));
    assert_eq!(outcome.exit, Some(ExecExit::Code(3)));
    // Its end is not the first one's, whose programs are not its own.
    let stream = start(&mut host, exec(process(&["hostname"])));
    assert_eq!(text(&host.finish(stream, b"")), "box\n");
    let gone = Request::ExecContainer { name: "c1".into(), process: Box::new(process(&["true"])) };
    assert!(failed_as(&host.request(gone), ProblemKind::Invalid, "not running"));
    for _ in 0..2 {
        assert_eq!(host.request(Request::RemoveContainer { name: "c1".into() }), Reply::Done);
    }
    assert_eq!(create(&mut host, &other), Reply::Done, "its name is free again");
    assert_eq!(host.request(Request::RemoveContainer { name: "c1".into() }), Reply::Done);
    assert_eq!(host.request(Request::RemoveContainer { name: String::new() }), Reply::Done);
    assert_eq!(host.finish(first, b"").exit, Some(ExecExit::Signal(libc::SIGKILL)));
}

#[test]
fn those_of_a_pod_have_ipc_and_names_together_after_the_first_has_ended_too() {
    let Some(mut host) = runtime() else { return };
    let spaces = "hostname; readlink /proc/self/ns/ipc; readlink /proc/self/ns/uts";
    let mut told = Vec::new();
    for (name, hostname) in [("c1", "pod"), ("c2", ""), ("c3", "")] {
        let joins = name != "c1";
        let one = Container { hostname: hostname.into(), joins, ..joined(&host, name, true, shell(spaces)) };
        assert_eq!(create(&mut host, &one), Reply::Done);
        let stream = start(&mut host, Request::StartContainer { name: name.into() });
        told.push(text(&host.finish(stream, b"")));
        assert_eq!(host.request(Request::RemoveContainer { name: name.into() }), Reply::Done);
    }
    assert!(told[0].starts_with("pod\nipc:["), "{told:?}");
    assert!(told[1] == told[0] && told[2] == told[0], "{told:?}");
    let alone = joined(&host, "c4", false, shell(spaces));
    assert_eq!(create(&mut host, &alone), Reply::Done);
    let stream = start(&mut host, Request::StartContainer { name: "c4".into() });
    let ipc = |text: &str| text.lines().nth(1).map(str::to_owned);
    assert_ne!(ipc(&text(&host.finish(stream, b""))), ipc(&told[0]));
}

#[test]
fn those_that_have_their_processes_together_see_each_other_s() {
    let Some(mut host) = runtime() else { return };
    let begin = |host: &mut Host, name: &str, joins: bool, process: Process| {
        let shared = Container { joins, shares_processes: true, ..joined(host, name, true, process) };
        assert_eq!(create(host, &shared), Reply::Done);
        start(host, Request::StartContainer { name: name.into() })
    };
    let first = begin(&mut host, "c1", false, process(&["sleep", "60"]));
    let seen = "for p in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$p; echo; done; ls /proc/1/root/ >/dev/null 2>&1; echo $?; \
                (sleep 0.1 & ) ; sleep 1; grep -l '^State:.Z' /proc/[0-9]*/status";
    let second = begin(&mut host, "c2", true, shell(seen));
    let told = text(&host.finish(second, b""));
    let mut lines = told.lines();
    assert!(lines.next().is_some_and(|line| line.ends_with("--container-reaper ")), "{told}");
    assert!(told.contains("\nsleep 60 \n"), "{told}");
    // Its root is nobody's, and who has come to it is reaped.
    assert_eq!(told.lines().last(), Some("1"), "{told}");
    assert_eq!(host.request(Request::RemoveContainer { name: "c2".into() }), Reply::Done);
    assert_eq!(host.request(Request::RemoveContainer { name: "c1".into() }), Reply::Done);
    assert_eq!(host.finish(first, b"").exit, Some(ExecExit::Signal(libc::SIGKILL)));
}
