//! Who is let in and who is not: a real server, and clients of several users.

// Helper functions of tests are tests.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::routing::{get, post};
use catalyst_daemon::access::guard::protect;
use catalyst_daemon::access::listen::ListenOptions;
use catalyst_daemon::access::listener::LocalListener;
use catalyst_daemon::access::owner::Owner;
use catalyst_daemon::access::peer::{Peer, PeerError, Policy};
use tokio::runtime::Runtime;

const OWNER: u32 = 4242;
const STRANGER: u32 = 65534;
/// Long for an answer on one machine, short for a test that hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server for [`OWNER`] with one thing to do, `POST /act`, and a count of how often it was done.
struct Server {
    runtime: Runtime,
    listener: Option<LocalListener>,
    acted: Arc<AtomicUsize>,
    addresses: Vec<SocketAddr>,
    _folder: tempfile::TempDir,
    unix: PathBuf,
}

impl Server {
    /// Listens, and accepts nothing yet.
    fn listening(owner: u32) -> Self {
        let runtime = Runtime::new().unwrap();
        let folder = tempfile::tempdir().unwrap();
        // mkdtemp makes it the maker's alone; the Unix socket's own mode is what is tested.
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let unix = folder.path().join("daemon.sock");
        let address = "localhost:0".parse().unwrap();
        let owner =
            Owner { uid: owner, gid: owner, name: "owner".into(), home: "/".into(), groups: vec![owner] };
        let options = ListenOptions { tcp: &address, unix: Some(&unix), owner: &owner };
        let listener = runtime.block_on(async { options.bind() }).unwrap();
        let addresses = listener.tcp_addresses();
        let acted = Arc::default();
        Self { runtime, listener: Some(listener), acted, addresses, _folder: folder, unix }
    }

    fn serving(owner: u32) -> Self {
        let mut server = Self::listening(owner);
        server.serve();
        server
    }

    fn serve(&mut self) {
        let listener = self.listener.take().unwrap();
        let act = |State(acted): State<Arc<AtomicUsize>>| async move {
            acted.fetch_add(1, Ordering::SeqCst);
            "done"
        };
        let app = Router::new().route("/act", post(act)).route("/", get(|| async { "hello" }));
        let app = protect(app, listener.policy()).with_state(Arc::clone(&self.acted));
        let served = axum::serve(listener, app.into_make_service_with_connect_info::<Peer>());
        self.runtime.spawn(async move { served.await.unwrap() });
    }

    fn acted(&self) -> usize {
        self.acted.load(Ordering::SeqCst)
    }

    /// IPv4: the first that is bound.
    fn address(&self) -> SocketAddr {
        self.addresses[0]
    }
}

/// Runs `work` on a thread of user `uid`: on Linux credentials belong to a thread, and what it opens is that user's.
/// `None`, aloud, where this process may not do that.
fn as_user<T: Send>(uid: u32, work: impl FnOnce() -> T + Send) -> Option<T> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: only root can act as another user");
        return None;
    }
    let run = || {
        // SAFETY: the bare system call changes the credentials of this thread alone, which ends after `work`.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) }, 0);
        work()
    };
    Some(thread::scope(|scope| scope.spawn(run).join().unwrap()))
}

fn request(method: &str, path: &str, headers: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\n{headers}connection: close\r\ncontent-length: 0\r\n\r\n")
}

fn act() -> String {
    request("POST", "/act", "host: localhost\r\n")
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends a request and reads the whole answer.
fn ask(address: SocketAddr, request: &str) -> String {
    exchange(connect(address), request)
}

fn ask_unix(path: &Path, request: &str) -> String {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    exchange(stream, request)
}

fn exchange(mut stream: impl Read + Write, request: &str) -> String {
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// The message of a refusal, which must be status 403 with a JSON object on one line.
fn refusal(answer: &str) -> String {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    assert!(head.starts_with("HTTP/1.1 403 "), "{answer}");
    assert!(head.to_ascii_lowercase().contains("content-type: application/json"), "{answer}");
    assert!(!body.contains('\n'), "{body}");
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(body["code"], 403);
    body["message"].as_str().unwrap().to_owned()
}

#[test]
fn the_own_user_is_served_on_every_address() {
    let server = Server::serving(nix::unistd::geteuid().as_raw());
    for address in &server.addresses {
        assert!(ask(*address, &act()).ends_with("done"), "{address}");
    }
    assert!(ask_unix(&server.unix, &act()).ends_with("done"));
    assert_eq!(server.acted(), server.addresses.len() + 1);
}

#[test]
fn the_owner_is_served_and_root_too() {
    let server = Server::serving(OWNER);
    let Some(answer) = as_user(OWNER, || ask(server.address(), &act())) else { return };
    assert!(answer.ends_with("done"), "{answer}");
    assert!(as_user(OWNER, || ask_unix(&server.unix, &act())).unwrap().ends_with("done"));
    assert!(ask(server.address(), &act()).ends_with("done"));
    assert_eq!(server.acted(), 3);
}

#[test]
fn another_user_is_refused_on_every_address() {
    let server = Server::serving(OWNER);
    for address in &server.addresses {
        let Some(answer) = as_user(STRANGER, || ask(*address, &act())) else { return };
        let message = refusal(&answer);
        assert!(message.contains("uid 4242") && message.contains("uid 65534"), "{message}");
    }
    assert_eq!(server.acted(), 0);
}

#[test]
fn another_user_is_refused_on_the_unix_socket_twice() {
    let server = Server::serving(OWNER);
    let Some(by_mode) = as_user(STRANGER, || UnixStream::connect(&server.unix)) else { return };
    assert_eq!(by_mode.unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
    // And where somebody opened the mode, by the peer's credentials.
    std::fs::set_permissions(&server.unix, PermissionsExt::from_mode(0o666)).unwrap();
    let answer = as_user(STRANGER, || ask_unix(&server.unix, &act())).unwrap();
    assert!(refusal(&answer).contains("uid 65534"), "{answer}");
    assert_eq!(server.acted(), 0);
}

#[test]
fn a_refused_user_gets_the_answer_with_a_large_request_too() {
    let server = Server::serving(OWNER);
    let body = "x".repeat(30_000);
    let large =
        format!("POST /act HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let Some(answer) = as_user(STRANGER, || ask(server.address(), &large)) else { return };
    refusal(&answer);
    assert_eq!(server.acted(), 0);
}

#[test]
fn refused_connections_do_not_keep_the_owner_out() {
    let server = Server::serving(OWNER);
    let idle = || (0..200).map(|_| connect(server.address())).collect::<Vec<_>>();
    let Some(idle) = as_user(STRANGER, idle) else { return };
    assert!(ask(server.address(), &act()).ends_with("done"));
    drop(idle);
}

/// Connects, sends and closes without waiting: all of it lies in the server's queue.
fn send_and_close(address: SocketAddr) {
    connect(address).write_all(act().as_bytes()).unwrap();
}

#[test]
fn a_connection_closed_before_it_is_accepted_does_nothing() {
    for (who, uid) in [("a stranger", STRANGER), ("the owner", OWNER), ("root", 0)] {
        let mut server = Server::listening(OWNER);
        if as_user(uid, || send_and_close(server.address())).is_none() {
            return;
        }
        server.serve();
        // Connections are accepted in order: when this one is answered, that one was judged.
        assert!(ask(server.address(), &request("GET", "/", "host: localhost\r\n")).ends_with("hello"));
        assert_eq!(server.acted(), 0, "{who}");
    }
}

#[test]
fn a_stranger_who_closes_at_once_does_nothing_whenever_that_is_seen() {
    let server = Server::serving(OWNER);
    let storm = || (0..300).for_each(|_| send_and_close(server.address()));
    if as_user(STRANGER, storm).is_none() {
        return;
    }
    assert!(ask(server.address(), &request("GET", "/", "host: localhost\r\n")).ends_with("hello"));
    assert_eq!(server.acted(), 0);
}

#[test]
fn an_accepted_connection_that_is_closed_or_replaced_is_refused_afterwards() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let client = connect(listener.local_addr().unwrap());
    let (server, remote) = listener.accept().unwrap();
    let policy = Policy::new(nix::unistd::geteuid().as_raw());
    let peer = policy.accept_tcp(server.local_addr().unwrap(), remote).unwrap();
    policy.verify(&peer).unwrap();
    let Peer::Tcp { local, remote, inode } = peer else { panic!("{peer:?}") };
    let other = Peer::Tcp { local, remote, inode: inode + 1 };
    assert!(matches!(policy.verify(&other), Err(PeerError::Changed)));
    drop(client);
    assert!(matches!(policy.verify(&peer), Err(PeerError::Closed)));
}

#[test]
fn foreign_hosts_and_origins_are_refused_by_tcp() {
    let server = Server::serving(nix::unistd::geteuid().as_raw());
    let port = server.address().port();
    let cases = [
        (String::new(), "Host"),
        ("host: evil.example\r\n".to_owned(), "Host"),
        (format!("host: evil.example:{port}\r\n"), "Host"),
        ("host: localhost\r\norigin: http://evil.example\r\n".to_owned(), "Origin"),
        ("host: localhost\r\norigin: null\r\n".to_owned(), "Origin"),
        (format!("host: localhost:{port}\r\norigin: http://localhost:1\r\n"), "Origin"),
        ("host: localhost\r\nsec-fetch-site: cross-site\r\n".to_owned(), "Sec-Fetch-Site"),
    ];
    for (headers, named) in cases {
        let message = refusal(&ask(server.address(), &request("POST", "/act", &headers)));
        assert!(message.contains(named), "{headers:?}: {message}");
    }
    // Paths that do not exist are guarded as well.
    refusal(&ask(server.address(), &request("GET", "/nothing", "host: evil.example\r\n")));
    let old = "POST /act HTTP/1.0\r\ncontent-length: 0\r\n\r\n";
    let answer = ask(server.address(), old).replacen("HTTP/1.0", "HTTP/1.1", 1);
    assert!(refusal(&answer).contains("Host"));
    assert_eq!(server.acted(), 0);

    let own = format!(
        "host: localhost:{port}\r\norigin: http://localhost:{port}\r\nsec-fetch-site: same-origin\r\n"
    );
    assert!(ask(server.address(), &request("POST", "/act", &own)).ends_with("done"));
}

#[test]
fn the_host_is_free_by_the_unix_socket() {
    let server = Server::serving(nix::unistd::geteuid().as_raw());
    for host in ["host: docker\r\n", "host: evil.example\r\n"] {
        assert!(ask_unix(&server.unix, &request("POST", "/act", host)).ends_with("done"), "{host}");
    }
}

#[test]
fn a_router_served_without_its_connections_refuses_everything() {
    let runtime = Runtime::new().unwrap();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    let app = protect(Router::new().route("/", get(|| async { "hello" })), Policy::new(0));
    runtime.spawn(async move { axum::serve(listener, app).await.unwrap() });
    refusal(&ask(address, &request("GET", "/", "host: localhost\r\n")));
}
