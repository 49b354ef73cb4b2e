//! The real binary where no daemon is involved: wrong use, a daemon that does not answer,
//! another program on the port, completion. What it does with a daemon is tested end to end.

// Also the helpers beside the test functions are tests.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, getsockname, socket};

/// The binary with a clean environment.
fn catalyst() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_catalyst"));
    command.env_remove("CATALYST_HOST").stdin(Stdio::null());
    command
}

fn run(words: &[&str]) -> Output {
    catalyst().args(words).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// One line that begins with `Error: ` and shows nothing of the program's inside.
fn assert_one_error_line(output: &Output) {
    let text = stderr(output);
    assert!(text.starts_with("Error: ") && text.ends_with('\n') && text.lines().count() == 1, "{text:?}");
    for inside in ["os error", "panicked", "Some(", "Err(", "invalid digit"] {
        assert!(!text.contains(inside), "{text:?}");
    }
    assert!(output.stdout.is_empty(), "{output:?}");
}

/// An address where nobody listens, and nobody will: the port is taken by a socket that does not.
struct Deserted {
    address: String,
    _socket: OwnedFd,
}

fn deserted() -> Deserted {
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let any_port = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0));
    bind(socket.as_raw_fd(), &any_port).unwrap();
    let address = getsockname::<SockaddrIn>(socket.as_raw_fd()).unwrap().to_string();
    Deserted { address, _socket: socket }
}

#[test]
fn wrong_use_is_code_2_and_one_line() {
    let long = "x".repeat(300);
    for words in [
        &["vm", "create"][..],
        &["vm", "create", ""],
        &["vm", "create", ".."],
        &["vm", "create", "a/b"],
        &["vm", "show", &long],
        &["vm", "delete"],
        &["vm", "set", "web1"],
        &["vm", "create", "web1", "--cpus", "two"],
        &["vm", "create", "web1", "--memory", "lots"],
        &["vm", "create", "web1", "--disk", "1.5G"],
        &["vm", "list", "--timeout", "soon"],
        &["vm", "list", "--host", "https://example.test"],
        &["vm", "list", "--host", "a:b:c"],
        &["vmpower", "explode", "web1"],
        &["guest", "exec", "web1"],
        &["guest", "exec", "web1", "-e", "NOVALUE", "true"],
        &["image", "build", "../lumen"],
        &["vm", "snapshot", "create", "web1", ""],
        &["vm", "snapshot", "restore", "web1", ".."],
        &["vm", "snapshot", "delete", "web1"],
        &["vm", "snapshot", "list", "web1", "-l", "-q"],
        &["--no-such-option"],
    ] {
        let output = run(words);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {output:?}");
        assert_one_error_line(&output);
    }
}

#[test]
fn a_bad_id_is_refused_with_the_rule() {
    assert!(stderr(&run(&["vm", "create", "a b"])).contains("letters (a to z), digits, '-', '_' and '.'"));
    assert!(stderr(&run(&["ssh", ".."])).contains("starts with a letter"));
}

#[test]
fn no_command_is_help_and_code_2() {
    let output = run(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("Usage: catalyst"));
}

#[test]
fn help_and_version_are_no_errors() {
    for words in [&["--help"][..], &["vm", "create", "--help"], &["vm", "snapshot", "--help"], &["--version"]]
    {
        let output = run(words);
        assert_eq!(output.status.code(), Some(0));
        assert!(!output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
    }
}

#[test]
fn a_host_that_does_not_answer_is_named_and_nothing_is_started() {
    let deserted = deserted();
    let host = &deserted.address;
    for words in [
        &["vm", "list"][..],
        &["vmpower", "on", "web1", "--wait"],
        &["guest", "getip", "web1"],
        &["guest", "exec", "web1", "true"],
        &["ssh", "web1", "--", "true"],
        &["console", "web1"],
        &["image", "build"],
        &["doctor", "--json"],
        &["daemon", "status"],
        &["daemon", "stop"],
        &["events"],
    ] {
        let output = catalyst().env("CATALYST_HOST", host).args(words).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{words:?}: {output:?}");
        assert_one_error_line(&output);
        let line = stderr(&output);
        assert!(line.contains(host) && line.contains("connection refused"), "{line}");
        assert!(!line.contains("sudo"), "{line}");
    }
}

#[test]
fn a_proxy_is_never_asked() {
    let deserted = deserted();
    let proxy = TcpListener::bind("127.0.0.1:0").unwrap();
    proxy.set_nonblocking(true).unwrap();
    let address = format!("http://{}", proxy.local_addr().unwrap());
    let mut command = catalyst();
    for name in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
        command.env(name, &address);
    }
    let output = command.args(["--host", &deserted.address, "vm", "list"]).output().unwrap();
    assert!(stderr(&output).contains("connection refused"), "{output:?}");
    assert_eq!(proxy.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn the_option_outranks_the_environment() {
    let (option, variable) = (deserted(), deserted());
    let output = catalyst()
        .env("CATALYST_HOST", &variable.address)
        .args(["--host", &option.address, "vm", "list"])
        .output()
        .unwrap();
    assert!(stderr(&output).contains(&option.address), "{output:?}");
}

/// A program that is not Catalyst: answers each connection with `reply`.
fn stranger(reply: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(reply);
        }
    });
    address
}

#[test]
fn another_program_on_the_port_is_called_by_its_name() {
    for reply in [
        &b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"[..],
        b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 302 Found\r\nLocation: http://example.test/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 19\r\n\r\n{\"product\":\"other\"}",
        b"SSH-2.0-OpenSSH_9.2\r\n",
    ] {
        let host = stranger(reply);
        let output = run(&["--host", &host, "vm", "delete", "web1"]);
        assert_eq!(output.status.code(), Some(1));
        assert_one_error_line(&output);
        let line = stderr(&output);
        let own_pid = format!("(pid {})", std::process::id());
        assert!(line.contains("not by a Catalyst daemon") && line.contains(&own_pid), "{line}");
    }
}

#[test]
fn the_daemon_of_another_user_says_whose_it_is() {
    let host = stranger(
        b"HTTP/1.1 403 Forbidden\r\nContent-Length: 58\r\n\r\n\
          {\"code\":403,\"message\":\"this daemon serves uid 1 and root\"}",
    );
    let output = run(&["--host", &host, "vm", "list"]);
    assert_eq!(output.status.code(), Some(1));
    assert_one_error_line(&output);
    assert!(stderr(&output).contains("refuses this user: this daemon serves uid 1 and root"), "{output:?}");
}

#[test]
fn an_endless_answer_ends() {
    const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n";
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 4096]);
        let _ = stream.write_all(HEAD);
        while stream.write_all(&[b'x'; 4096]).is_ok() {}
    });
    let output = run(&["--host", &host, "vm", "list"]);
    assert_eq!(output.status.code(), Some(1));
    assert_one_error_line(&output);
}

#[test]
fn completion_knows_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let output = run(&["completion", shell]);
        assert_eq!(output.status.code(), Some(0));
        let script = String::from_utf8(output.stdout).unwrap();
        for word in ["vmpower", "getip", "snapshot"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
}

#[test]
fn a_full_disk_is_told_and_a_reader_that_left_is_not() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = catalyst().args(["completion", "bash"]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("no space left"), "{output:?}");

    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = catalyst().args(["completion", "bash"]).stdout(writer).output().unwrap();
    assert_eq!((output.status.code(), output.stderr.is_empty()), (Some(0), true), "{output:?}");
}

/// Copies the binary to a folder of its own, with a daemon beside it. Another process writes
/// them: a program cannot be run while anybody, a child just forked too, has it open for writing.
fn with_daemon(folder: &Path, script: &str) -> std::path::PathBuf {
    let draft = folder.join("draft");
    std::fs::write(&draft, script).unwrap();
    let own = folder.join("catalyst");
    for (from, to) in
        [(Path::new(env!("CARGO_BIN_EXE_catalyst")), &own), (&draft, &folder.join("catalyst-daemon"))]
    {
        let done = Command::new("install").arg("-m755").args([from, to]).status().unwrap();
        assert!(done.success());
    }
    assert!(Command::new("chmod").arg("755").arg(folder).status().unwrap().success());
    own
}

#[test]
fn a_host_that_was_chosen_starts_no_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let mark = folder.path().join("started");
    let own = with_daemon(folder.path(), &format!("#!/bin/sh\ntouch '{}'\n", mark.display()));
    let output = Command::new(own).args(["--host", &deserted().address, "vm", "list"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(!mark.exists());
}

#[test]
fn without_root_daemon_start_prints_the_one_command() {
    if !nix::unistd::geteuid().is_root() {
        return start_as_this_user();
    }
    // Root can be anybody: nobody's uid stands for a user without rights.
    let folder = tempfile::tempdir().unwrap();
    let own = with_daemon(folder.path(), "#!/bin/sh\nexit 99\n");
    let listen = deserted();
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&own)
        .args(["daemon", "start", "--listen", &listen.address])
        .output()
        .unwrap();
    assert_sudo_line(&output, folder.path(), &listen.address);
}

fn start_as_this_user() {
    let folder = tempfile::tempdir().unwrap();
    let own = with_daemon(folder.path(), "#!/bin/sh\nexit 99\n");
    let listen = deserted();
    let output = Command::new(own).args(["daemon", "start", "--listen", &listen.address]).output().unwrap();
    assert_sudo_line(&output, folder.path(), &listen.address);
}

fn assert_sudo_line(output: &Output, folder: &Path, listen: &str) {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_one_error_line(output);
    let line = stderr(output);
    let command = format!("sudo {}/catalyst-daemon --background --owner ", folder.display());
    assert!(line.contains(&command) && line.contains(listen), "{line}");
}
