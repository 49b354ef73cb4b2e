//! Greeting, files and identity over the real agent.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

use super::support::Host;
use catalyst_agent_protocol::{
    Channel, Control, FileSpec, HostKey, Identity, Problem, ProblemKind, Reply, Request, ShutdownKind,
    Status, VERSION, encode,
};

fn failed_as(reply: &Reply, wanted: ProblemKind) -> bool {
    matches!(reply, Reply::Failed(Problem { kind, message }) if *kind == wanted && !message.contains('\n'))
}

#[test]
fn garbage_before_frames_and_frames_of_other_epochs_are_passed_over() {
    let mut host = Host::start();
    host.port.write_all(b"login: CATf\0\0rubbish").unwrap();
    host.hello(0xdead_beef);
    let text = serde_json::to_vec(&Control::Request { id: 900, request: Request::Ping }).unwrap();
    host.port.write_all(&encode(5, 0, Channel::Control, &text).unwrap()).unwrap();
    host.port.write_all(&[0x43; 100]).unwrap();
    let id = host.ask(Request::Ping);
    assert!(matches!(host.control(), Control::Reply { id: answered, reply: Reply::Done } if answered == id));
}

#[test]
fn another_version_is_answered_and_no_more() {
    let mut host = Host::start();
    host.epoch = 3;
    host.send(&Control::Hello { version: VERSION + 1, agent: String::new() });
    assert!(matches!(host.control(), Control::Hello { version: VERSION, .. }));
    host.ask(Request::Ping);
    host.hello(4);
    assert_eq!(host.request(Request::Ping), Reply::Done);
}

#[test]
fn what_is_not_understood_is_answered_if_it_can_be() {
    let mut host = Host::greeted();
    let unknown = br#"{"type":"request","id":70,"request":{"do":"teleport","where":"mars"}}"#;
    host.send_frame(0, Channel::Control, unknown);
    assert!(failed_as(&host.reply(70), ProblemKind::Unsupported));
    host.send_frame(0, Channel::Control, br#"{"type":"request","id":71,"request":{"do":"exec","argv":5}}"#);
    assert!(failed_as(&host.reply(71), ProblemKind::Invalid));
    host.send_frame(0, Channel::Control, b"{\"type\":");
    host.send_frame(0, Channel::Control, b"[]");
    host.send(&Control::Request { id: 0, request: Request::Ping });
    assert!(failed_as(&host.reply(0), ProblemKind::Invalid));
    assert!(failed_as(&host.request(Request::Close { stream: 12345 }), ProblemKind::NotFound));
    assert_eq!(host.request(Request::SetClock { unix_ns: 1, seed: String::new() }), Reply::Done);
    assert_eq!(host.request(Request::Shutdown { kind: ShutdownKind::PowerOff }), Reply::Done);
}

fn put(host: &mut Host, path: &Path, size: u64, pieces: &[&[u8]]) -> Reply {
    let path = path.display().to_string();
    let id = host.ask(Request::PutFile(FileSpec { path, mode: 0o640, owner: None, size }));
    for piece in pieces {
        host.send_frame(id, Channel::Input, piece);
    }
    host.send_frame(id, Channel::Input, &[]);
    host.reply(id)
}

#[test]
fn a_file_goes_there_and_comes_back() {
    let mut host = Host::greeted();
    let path = host.folder.join("file");
    std::fs::write(&path, "old").unwrap();
    assert!(failed_as(&put(&mut host, &path, 5, &[b"four"]), ProblemKind::Invalid));
    assert!(failed_as(&put(&mut host, &path, 3, &[b"four"]), ProblemKind::Invalid));
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    let bytes: Vec<u8> = (0..200_000_u32).map(|number| number.to_le_bytes()[1]).collect();
    let pieces: Vec<&[u8]> = bytes.chunks(65536).collect();
    assert_eq!(put(&mut host, &path, bytes.len() as u64, &pieces), Reply::Done);
    let id = host.ask(Request::GetFile { path: path.display().to_string() });
    assert_eq!(host.reply(id), Reply::File { size: bytes.len() as u64, mode: 0o640 });
    let mut got = Vec::new();
    loop {
        let frame = host.next(|frame| frame.stream == id && frame.channel == Channel::Output);
        if frame.payload.is_empty() {
            break;
        }
        got.extend(frame.payload);
    }
    assert!(got == bytes);
    let left = std::fs::read_dir(&host.folder).unwrap().count();
    assert_eq!(left, 4, "two ports, root and the file; nothing temporary");
}

#[test]
fn what_is_no_file_is_refused() {
    let mut host = Host::greeted();
    let folder = host.folder.clone();
    for (path, kind) in [
        ("/no/such".to_owned(), ProblemKind::NotFound),
        ("relative".to_owned(), ProblemKind::Invalid),
        (folder.display().to_string(), ProblemKind::Invalid),
        ("/dev/zero".to_owned(), ProblemKind::Invalid),
        ("/etc/pass\0wd".to_owned(), ProblemKind::Invalid),
    ] {
        let reply = host.request(Request::GetFile { path: path.clone() });
        assert!(failed_as(&reply, kind), "{path}: {reply:?}");
    }
    assert!(failed_as(&put(&mut host, Path::new("/no/such/file"), 0, &[]), ProblemKind::NotFound));
    assert!(failed_as(&put(&mut host, &folder.join("root"), 0, &[]), ProblemKind::Failed));
}

fn identity() -> Identity {
    let key = |kind: &str| HostKey {
        kind: kind.into(),
        private: format!("PRIVATE {kind}"),
        public: "pub\n".into(),
    };
    Identity {
        hostname: "photon-1".into(),
        domain: "catalyst.internal".into(),
        mac: "52:54:00:00:00:01".into(),
        address: [192, 168, 77, 5].into(),
        prefix: 24,
        gateway: [192, 168, 77, 1].into(),
        gateway_mac: "52:54:00:00:00:02".into(),
        dns: [192, 168, 77, 1].into(),
        machine_id: "0123456789abcdef0123456789abcdef".into(),
        host_keys: vec![key("ed25519"), key("rsa")],
        authorized_keys: vec!["ssh-ed25519 AAAA one".into(), "ssh-ed25519 BBBB two".into()],
        unix_ns: 1_700_000_000_000_000_000,
        seed: "ab".repeat(32),
        clone: true,
    }
}

#[test]
fn a_clone_is_nobody_before_its_hooks_are_done() {
    let mut host = Host::greeted();
    let root = host.folder.join("root");
    let folder = root.join("etc/catalyst/clone.d");
    std::fs::create_dir_all(&folder).unwrap();
    let hook = |name: &str, mode: u32, text: &str| {
        std::fs::write(folder.join(name), format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(folder.join(name), PermissionsExt::from_mode(mode)).unwrap();
    };
    let told = root.join("told");
    let tell = format!("echo $0 $CATALYST_NAME $CATALYST_ADDRESS $CATALYST_MAC >>{}", told.display());
    hook("20-second", 0o755, &tell);
    hook("10-first", 0o700, &tell);
    hook("15-no-program", 0o644, &tell);
    hook("15-left~", 0o755, &tell);
    assert_eq!(host.request(Request::Identify(Box::new(identity()))), Reply::Done);
    let lines = std::fs::read_to_string(&told).unwrap();
    let who = "photon-1 192.168.77.5 52:54:00:00:00:01";
    let [first, second] = ["10-first", "20-second"].map(|name| folder.join(name).display().to_string());
    assert_eq!(lines, format!("{first} {who}\n{second} {who}\n"));

    hook("30-fails", 0o755, "exit 3");
    hook("40-never", 0o755, &tell);
    let reply = host.request(Request::Identify(Box::new(identity())));
    assert!(
        matches!(&reply, Reply::Failed(problem) if problem.message.contains("30-fails failed")),
        "{reply:?}"
    );
    assert!(!std::fs::read_to_string(&told).unwrap().contains("40-never"));
    // Only a clone has any of it done.
    assert_eq!(
        host.request(Request::Identify(Box::new(Identity { clone: false, ..identity() }))),
        Reply::Done
    );
}

#[test]
fn an_identity_is_written_and_told() {
    let notified = std::env::temp_dir().join(format!("catalyst-agent-notify-{}", std::process::id()));
    let _ = std::fs::remove_file(&notified);
    let manager = UnixDatagram::bind(&notified).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut host = Host::start_with(&[("NOTIFY_SOCKET", notified.to_str().unwrap())]);
    host.hello(7);
    let root = host.folder.join("root");
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
    let mode = |path: &str| std::fs::metadata(root.join(path)).unwrap().permissions().mode() & 0o7777;
    for folder in ["etc/docker", "var/lib/docker", "var/lib/dbus", "home/catalyst"] {
        std::fs::create_dir_all(root.join(folder)).unwrap();
    }
    std::fs::write(root.join("etc/docker/key.json"), "{}").unwrap();
    std::fs::write(root.join("var/lib/dbus/machine-id"), "old").unwrap();
    // SAFETY: these only return numbers.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    let user = format!("catalyst:x:{uid}:{gid}::/home/catalyst:/bin/bash\n");
    std::fs::write(root.join("etc/passwd"), user).unwrap();

    let id = host.ask(Request::Identify(Box::new(identity())));
    assert!(matches!(host.control(), Control::Status(Status { identity: true, ssh: false, docker: false })));
    assert_eq!(host.reply(id), Reply::Done);
    let mut text = [0; 64];
    let count = manager.recv(&mut text).unwrap();
    assert_eq!(&text[..count], b"READY=1\n");
    std::fs::remove_file(&notified).unwrap();

    assert_eq!(read("etc/hostname"), "photon-1\n");
    assert!(read("etc/hosts").contains("127.0.1.1 photon-1.catalyst.internal photon-1\n"));
    assert_eq!(read("etc/resolv.conf"), "nameserver 192.168.77.1\nsearch catalyst.internal\n");
    assert_eq!(read("etc/machine-id"), "0123456789abcdef0123456789abcdef\n");
    assert_eq!(read("var/lib/dbus/machine-id"), read("etc/machine-id"));
    assert_eq!(read("etc/ssh/ssh_host_rsa_key"), "PRIVATE rsa\n");
    assert_eq!(read("etc/ssh/ssh_host_ed25519_key.pub"), "pub\n");
    assert_eq!((mode("etc/ssh/ssh_host_rsa_key"), mode("etc/ssh/ssh_host_rsa_key.pub")), (0o600, 0o644));
    assert_eq!(read("home/catalyst/.ssh/authorized_keys"), "ssh-ed25519 AAAA one\nssh-ed25519 BBBB two\n");
    assert_eq!((mode("home/catalyst/.ssh"), mode("home/catalyst/.ssh/authorized_keys")), (0o700, 0o600));
    assert_eq!(read("var/lib/docker/engine-id").len(), 36);
    assert!(!root.join("etc/docker/key.json").exists());

    let written = |path: &str| std::fs::metadata(root.join(path)).unwrap().modified().unwrap();
    let before = written("etc/hostname");
    let again = Identity { clone: false, ..identity() };
    assert_eq!(host.request(Request::Identify(Box::new(again))), Reply::Done);
    assert_eq!(written("etc/hostname"), before, "a file that is so already is left alone");
}

#[test]
fn an_identity_that_is_wrong_somewhere_changes_nothing() {
    let mut host = Host::greeted();
    let wrong: [fn(&mut Identity); 8] = [
        |identity| identity.hostname = "a b".into(),
        |identity| identity.domain = "a\nb".into(),
        |identity| identity.mac = "52:54:00".into(),
        |identity| identity.prefix = 33,
        |identity| identity.machine_id = "x".repeat(32),
        |identity| identity.host_keys[0].kind = "../../x".into(),
        |identity| identity.authorized_keys[0] = "a\nb".into(),
        |identity| identity.seed = "ab".into(),
    ];
    for make_wrong in wrong {
        let mut identity = identity();
        make_wrong(&mut identity);
        let reply = host.request(Request::Identify(Box::new(identity.clone())));
        assert!(failed_as(&reply, ProblemKind::Invalid), "{identity:?}: {reply:?}");
    }
    assert_eq!(std::fs::read_dir(host.folder.join("root")).unwrap().count(), 0);
}
