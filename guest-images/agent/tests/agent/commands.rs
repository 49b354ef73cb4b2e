//! Commands over the real agent.

use std::path::Path;
use std::time::{Duration, Instant};

use super::support::{Host, spec};
use catalyst_agent_protocol::{
    Channel, Control, ExecExit, ExecSpec, INITIAL_CREDIT, Problem, ProblemKind, Reply, Request, Terminal,
};

fn terminal(rows: u16, cols: u16) -> Terminal {
    Terminal { rows, cols, term: None }
}

fn gone(pid: u32) -> bool {
    let until = Instant::now() + Duration::from_secs(10);
    while Path::new(&format!("/proc/{pid}")).exists() {
        if Instant::now() > until {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

#[test]
fn output_errors_and_code_come_apart() {
    let mut host = Host::greeted();
    let outcome = host.run(spec(&["sh", "-c", "echo out; echo err >&2; exit 7"]), b"");
    assert_eq!(outcome.output, b"out\n");
    assert_eq!(outcome.errors, b"err\n");
    assert_eq!(outcome.exit, Some(ExecExit::Code(7)));
}

#[test]
fn input_comes_back_whole_while_another_command_stalls() {
    let mut host = Host::greeted();
    let (stalled, _) = host.exec(spec(&["yes"]));
    let bytes: Vec<u8> = (0..5_000_000_u32).flat_map(u32::to_le_bytes).take(5_000_000).collect();
    let outcome = host.run(ExecSpec { stdin: true, ..spec(&["cat"]) }, &bytes);
    assert!(outcome.output == bytes, "{} bytes came back", outcome.output.len());
    assert_eq!(outcome.exit, Some(ExecExit::Code(0)));
    // The other sent what its credit allowed, to the byte.
    let mut sent = 0;
    while sent < INITIAL_CREDIT as usize {
        sent += host.next(|frame| frame.stream == stalled && frame.channel == Channel::Output).payload.len();
    }
    assert_eq!(sent, INITIAL_CREDIT as usize);
    assert_eq!(host.request(Request::Close { stream: stalled }), Reply::Done);
    let outcome = host.finish(stalled, b"");
    // The hang-up, or its output pipe that closes at the same time, whichever it meets first.
    let ends = [libc::SIGHUP, libc::SIGPIPE].map(|signal| Some(ExecExit::Signal(signal)));
    assert!(ends.contains(&outcome.exit), "{:?}", outcome.exit);
    assert!(outcome.output.is_empty());
}

#[test]
fn a_terminal_has_its_size_and_takes_another() {
    let mut host = Host::greeted();
    let script = "stty size; read x; stty size; echo $TERM; tty";
    let (stream, _) =
        host.exec(ExecSpec { terminal: Some(terminal(33, 101)), ..spec(&["sh", "-c", script]) });
    let first = host.next(|frame| frame.stream == stream && frame.channel == Channel::Output);
    assert_eq!(first.payload, b"33 101\r\n");
    assert_eq!(host.request(Request::Resize { stream, terminal: terminal(50, 132) }), Reply::Done);
    let outcome = host.finish(stream, b"\n");
    let text = String::from_utf8(outcome.output).unwrap();
    assert!(text.contains("50 132\r\nxterm-256color\r\n/dev/pts/"), "{text:?}");
    assert_eq!(outcome.exit, Some(ExecExit::Code(0)));
}

#[test]
fn the_end_of_input_is_the_end_of_file_on_a_terminal() {
    let mut host = Host::greeted();
    let outcome = host.run(ExecSpec { terminal: Some(terminal(24, 80)), ..spec(&["wc", "-c"]) }, b"ab");
    assert!(outcome.output.ends_with(b"2\r\n"), "{:?}", String::from_utf8_lossy(&outcome.output));
}

#[test]
fn signals_and_timeouts_are_told() {
    let mut host = Host::greeted();
    let (stream, _) = host.exec(spec(&["sleep", "60"]));
    assert_eq!(host.request(Request::Signal { stream, signal: libc::SIGUSR1 }), Reply::Done);
    assert_eq!(host.finish(stream, b"").exit, Some(ExecExit::Signal(libc::SIGUSR1)));
    let outcome = host.run(ExecSpec { timeout_ms: Some(100), ..spec(&["sleep", "60"]) }, b"");
    assert_eq!(outcome.exit, Some(ExecExit::Signal(libc::SIGTERM)));
    let stubborn = spec(&["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]);
    let outcome = host.run(ExecSpec { timeout_ms: Some(100), ..stubborn }, b"");
    assert_eq!(outcome.exit, Some(ExecExit::Signal(libc::SIGKILL)));
    let reply = host.request(Request::Signal { stream, signal: 0 });
    assert!(matches!(reply, Reply::Failed(Problem { kind: ProblemKind::NotFound, .. })), "{reply:?}");
}

#[test]
fn a_child_in_the_background_does_not_hold_the_end_up() {
    let mut host = Host::greeted();
    let begun = Instant::now();
    let outcome = host.run(spec(&["sh", "-c", "sleep 5 & echo done"]), b"");
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    assert_eq!(outcome.output, b"done\n");
    let outcome = host.run(spec(&["sh", "-c", "timeout 5 yes & exit 3"]), b"");
    assert_eq!(outcome.exit, Some(ExecExit::Code(3)));
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
}

#[test]
fn output_that_waits_for_credit_at_the_exit_is_not_lost() {
    let mut host = Host::greeted();
    let size = INITIAL_CREDIT as usize + 60_000;
    let (stream, _) = host.exec(spec(&["head", "-c", &size.to_string(), "/dev/zero"]));
    // Longer than a background child would be given.
    std::thread::sleep(Duration::from_millis(600));
    let outcome = host.finish(stream, b"");
    assert_eq!(outcome.output.len(), size);
}

#[test]
fn a_second_hello_ends_what_was_running() {
    let mut host = Host::greeted();
    let (_, pid) = host.exec(spec(&["sleep", "60"]));
    let (_, deaf) = host.exec(spec(&["sh", "-c", "trap '' HUP; sleep 60; sleep 60"]));
    host.hello(8);
    assert!(gone(pid));
    assert!(gone(deaf));
    assert_eq!(host.run(spec(&["true"]), b"").exit, Some(ExecExit::Code(0)));
}

#[test]
fn what_cannot_be_started_is_said() {
    let mut host = Host::greeted();
    let user = |user: &str| ExecSpec { user: Some(user.into()), ..spec(&["true"]) };
    for (spec, kind) in [
        (spec(&["no-such-program"]), ProblemKind::NotFound),
        (spec(&["/no/such/program"]), ProblemKind::NotFound),
        (user("no-such-user"), ProblemKind::NotFound),
        (ExecSpec { cwd: Some("/no/such".into()), ..spec(&["true"]) }, ProblemKind::NotFound),
        (spec(&["/etc"]), ProblemKind::Failed),
        (spec(&[]), ProblemKind::Invalid),
        (spec(&["true", "\0"]), ProblemKind::Invalid),
        (ExecSpec { env: vec![("A=".into(), String::new())], ..spec(&["true"]) }, ProblemKind::Invalid),
    ] {
        let reply = host.request(Request::Exec(spec.clone()));
        assert!(matches!(&reply, Reply::Failed(problem) if problem.kind == kind), "{spec:?}: {reply:?}");
    }
}

#[test]
fn a_command_has_its_users_ids_groups_and_environment() {
    // SAFETY: geteuid only returns a number.
    if unsafe { libc::geteuid() } != 0 {
        println!("SKIPPED: only root can run commands as another user");
        return;
    }
    let mut host = Host::greeted();
    let etc = host.folder.join("root/etc");
    std::fs::create_dir_all(&etc).unwrap();
    std::fs::write(etc.join("passwd"), "u:x:12345:12346::/tmp:/bin/sh\n").unwrap();
    std::fs::write(etc.join("group"), "g:x:12347:u\n").unwrap();
    let script = "id -u; id -g; id -G; pwd; echo $HOME $USER $LOGNAME $SHELL $A";
    let mut spec = spec(&["sh", "-c", script]);
    spec.user = Some("u".into());
    spec.env = vec![("A".into(), "b".into())];
    let outcome = host.run(spec, b"");
    let text = String::from_utf8(outcome.output).unwrap();
    assert_eq!(text, "12345\n12346\n12346 12347\n/tmp\n/tmp u u /bin/sh b\n");
}

#[test]
fn there_are_only_so_many_streams() {
    let mut host = Host::greeted();
    // Files that are begun: the cheapest streams.
    for number in 0..catalyst_agent_protocol::MAX_STREAMS {
        let path = host.folder.join(format!("f{number}")).display().to_string();
        host.ask(Request::PutFile(catalyst_agent_protocol::FileSpec {
            path,
            mode: 0o600,
            owner: None,
            size: 1,
        }));
    }
    let reply = host.request(Request::Exec(spec(&["true"])));
    assert!(matches!(&reply, Reply::Failed(problem) if problem.kind == ProblemKind::Busy), "{reply:?}");
    assert_eq!(host.request(Request::Close { stream: 1 }), Reply::Done);
    let given_up = host.reply(1);
    assert!(matches!(given_up, Reply::Failed(_)), "{given_up:?}");
    assert_eq!(host.run(spec(&["true"]), b"").exit, Some(ExecExit::Code(0)));
}

#[test]
fn input_beyond_its_credit_ends_the_command() {
    let mut host = Host::greeted();
    let (stream, _) = host.exec(ExecSpec { stdin: true, ..spec(&["sleep", "60"]) });
    for _ in 0..10 {
        host.send_frame(stream, Channel::Input, &vec![0; 60_000]);
    }
    // By the hangup; on a machine that stands still for a second, by what comes after it.
    let exit = host.finish(stream, b"").exit;
    assert!(matches!(exit, Some(ExecExit::Signal(libc::SIGHUP | libc::SIGKILL))), "{exit:?}");
    assert_eq!(host.request(Request::Ping), Reply::Done);
    host.send(&Control::Up);
    assert_eq!(host.request(Request::Ping), Reply::Done);
}
