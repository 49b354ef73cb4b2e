//! Who may use a daemon, and what its VM processes may do.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use catalyst_tests::world::{long_enough, programs, ran};
use catalyst_tests::{Answer, Checks, World, skip};

use crate::common::{create, healthy, power, quiet, try_power, vm};

/// `nobody`: an owner must be in the user database.
const OWNER: u32 = 65534;
const STRANGER: u32 = 54322;

/// The group.
pub fn access(checks: &mut Checks) {
    let mut world = quiet();
    world.give_to(OWNER);
    world.start_daemon();
    callers(checks, &world);
    pages(checks, &world);
    processes(checks, &world);
    planted(checks, &world);
    checks.check("the daemon is well", || healthy(&world));
    checks.check("the tests of access hold under Debian's kernel", under_debians_kernel);
}

fn as_user(world: &World, uid: u32, options: &[&str], path: &str) -> Answer {
    let uid = uid.to_string();
    let mut command = world.command("setpriv");
    command.args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "--", "curl", "-s"]);
    command.args(["--max-time", &long_enough(), "-w", "\n%{http_code}"]).args(options);
    let ran = ran({
        command.arg(format!("http://localhost:8080{path}"));
        command
    });
    let (body, status) = ran.stdout.rsplit_once('\n').unwrap_or(("", "0"));
    Answer { status: status.parse().unwrap_or(0), body: body.to_owned() }
}

#[track_caller]
fn refused(answer: &Answer) -> String {
    assert_eq!(answer.status, 403, "{answer:?}");
    let body = answer.json();
    let message = body["message"].as_str().expect("a message");
    assert!(!message.is_empty() && !message.contains('\n'), "{message}");
    message.to_owned()
}

fn callers(checks: &mut Checks, world: &World) {
    checks.check("the owner uses the CLI without root", || {
        world.catalyst(&["vm", "create", "web1", "--memory", "128"]).ok();
        assert_eq!(world.catalyst(&["vm", "list"]).ok(), "web1");
        world.catalyst(&["vmpower", "on", "web1"]).ok();
        world.catalyst(&["vmpower", "off", "web1"]).ok();
    });
    checks.check("root and the owner are served, another user is not", || {
        assert_eq!(as_user(world, 0, &[], "/api/vms").body, "[\"web1\"]");
        assert_eq!(as_user(world, OWNER, &[], "/api/vms").body, "[\"web1\"]");
        for path in ["/api/vms", "/v1/vms", "/v1/version", "/", "/ui", "/ui/app.js", "/nothing"] {
            let text = refused(&as_user(world, STRANGER, &[], path));
            assert!(text.contains(&STRANGER.to_string()), "{text}");
        }
        refused(&as_user(world, STRANGER, &["-X", "DELETE"], "/api/vms/web1"));
        refused(&as_user(world, STRANGER, &["-X", "PATCH", "-d", "on"], "/api/vms/power/web1"));
        refused(&as_user(world, STRANGER, &["-d", "{\"id\":\"theirs\"}"], "/api/vms"));
        assert_eq!(as_user(world, 0, &[], "/api/vms").body, "[\"web1\"]");
        assert_eq!(vm(world, "web1")["state"], "powered off");
    });
    checks.check("a stranger's CLI is told in one line", || {
        let uid = STRANGER.to_string();
        let mut command = world.command("setpriv");
        command.args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "--"]);
        command.arg(programs().join("catalyst")).args(["vm", "list"]);
        let ran = ran(command);
        let text = ran.error(1);
        assert!(text.contains(&uid), "{text}");
    });
    checks.check("the Unix socket is the owner's and root's alone", || {
        let socket = world.state_dir().join("catalyst.sock");
        let found = socket.metadata().unwrap();
        assert_eq!(found.uid(), OWNER);
        assert_eq!(found.mode() & 0o077, 0, "{:o}", found.mode());
        assert_eq!(world.state_dir().metadata().unwrap().uid(), OWNER);
        let unix = ["--unix-socket", socket.to_str().unwrap()];
        assert_eq!(as_user(world, OWNER, &unix, "/api/vms").status, 200);
        assert_ne!(as_user(world, STRANGER, &unix, "/api/vms").status, 200);
    });
}

fn pages(checks: &mut Checks, world: &World) {
    checks.check("requests of foreign web pages are refused", || {
        for header in [
            "Host: evil.example",
            "Host: evil.example:8080",
            "Host: localhost.evil.example:8080",
            "Host: 10.0.0.1:8080",
            "Host: localhost@evil.example",
            "Origin: http://evil.example",
            "Origin: http://localhost:9999",
            "Origin: https://localhost:8080",
            "Origin: null",
            "Sec-Fetch-Site: cross-site",
            "Sec-Fetch-Site: same-site",
        ] {
            for path in ["/api/vms", "/v1/vms", "/ui", "/v1/events"] {
                refused(&as_user(world, 0, &["-H", header], path));
                refused(&as_user(world, OWNER, &["-H", header, "-d", "{\"id\":\"evil\"}"], path));
            }
        }
        assert_eq!(as_user(world, 0, &[], "/api/vms").body, "[\"web1\"]");
    });
    checks.check("WebSockets of foreign pages are refused before they are one, and a stranger's", || {
        power(world, "web1", "on");
        let upgrade = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"];
        let mut options = vec!["-H", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="];
        options.extend(upgrade.iter().flat_map(|header| ["-H", header]));
        // The one that is let in stays.
        options.extend(["--max-time", "10"]);
        for path in ["/v1/vms/web1/console/attach", "/v1/vms/web1/exec/stream"] {
            for header in ["Origin: http://localhost:9999", "Origin: null", "Host: evil.example:8080"] {
                refused(&as_user(world, OWNER, &[&options[..], &["-H", header]].concat(), path));
            }
            refused(&as_user(world, STRANGER, &options, path));
        }
        let own = [&options[..], &["-H", "Origin: http://localhost:8080"]].concat();
        assert_eq!(as_user(world, OWNER, &own, "/v1/vms/web1/console/attach").status, 101);
        power(world, "web1", "off");
    });
    checks.check("requests of the daemon's own pages are served", || {
        for header in [
            "Host: localhost:8080",
            "Host: 127.0.0.1:8080",
            "Host: [::1]:8080",
            "Origin: http://localhost:8080",
            "Sec-Fetch-Site: same-origin",
            "Sec-Fetch-Site: none",
        ] {
            assert_eq!(as_user(world, OWNER, &["-H", header], "/api/vms").status, 200, "{header}");
        }
        for path in ["/", "/ui", "/ui/"] {
            assert_eq!(as_user(world, OWNER, &["-L"], path).status, 200, "{path}");
        }
    });
}

fn processes(checks: &mut Checks, world: &World) {
    checks.check("a VM's files belong to the owner, its secrets to nobody else", || {
        let folder = world.vm_dir("web1");
        power(world, "web1", "on");
        power(world, "web1", "off");
        for name in [".", "web1.vmx", "disk.qcow2", "identity.json", "console.log", "vm.log", "run"] {
            let found = folder.join(name).symlink_metadata().unwrap();
            assert_eq!((found.uid(), found.gid()), (OWNER, OWNER), "{name}");
            if name != "web1.vmx" && name != "run" {
                assert_eq!(found.mode() & 0o077, 0, "{name}: {:o}", found.mode());
            }
        }
    });
    checks.check("a VM process is nobody's: own user, no capability, no new privileges, seccomp", || {
        create(world, "web2");
        let status = |id: &str| {
            power(world, id, "on");
            let pid = world.vm_pid(id).unwrap();
            let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            move |key: &str| {
                let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
                line.unwrap_or_else(|| panic!("no {key}: {text}"))
                    .split_whitespace()
                    .map(str::to_owned)
                    .collect()
            }
        };
        let mut users = Vec::new();
        for id in ["web1", "web2"] {
            let field = status(id);
            let uids: Vec<String> = field("Uid");
            assert!(uids.iter().all(|uid| *uid == uids[0]), "{uids:?}");
            assert!(!["0".to_owned(), OWNER.to_string()].contains(&uids[0]), "{uids:?}");
            let gids: Vec<String> = field("Gid");
            assert!(gids.iter().all(|gid| gid != "0" && *gid != OWNER.to_string()), "{gids:?}");
            assert!(field("Groups").is_empty());
            for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
                assert_eq!(field(set), ["0000000000000000"], "{set}");
            }
            assert_eq!(field("NoNewPrivs"), ["1"]);
            assert_eq!(field("Seccomp"), ["2"]);
            users.push(uids[0].clone());
        }
        assert_ne!(users[0], users[1], "each VM has a user of its own");
        world.catalyst(&["vmpower", "off", "web1", "web2"]).ok();
    });
}

/// What an owner without root could put in the way of a daemon with root.
fn planted(checks: &mut Checks, world: &World) {
    checks.check("links that the owner plants are not followed", || {
        let secret = world.path("secret");
        fs::write(&secret, "secret").unwrap();
        let before = fs::metadata(&secret).unwrap();
        for name in ["disk.qcow2", "identity.json", "console.log", "vm.log", "run/lock"] {
            let path = world.vm_dir("web1").join(name);
            let aside = world.path("aside");
            fs::rename(&path, &aside).unwrap();
            std::os::unix::fs::symlink(&secret, &path).unwrap();
            let answer = try_power(world, "web1", "on");
            assert_ne!(answer.status, 200, "{name}: {answer:?}");
            assert!(!answer.body.contains("secret\""), "{answer:?}");
            fs::remove_file(&path).unwrap();
            fs::rename(&aside, &path).unwrap();
        }
        let disk = world.vm_dir("web1").join("disk.qcow2");
        let aside = world.path("aside");
        fs::rename(&disk, &aside).unwrap();
        std::os::unix::fs::symlink("/etc/shadow", &disk).unwrap();
        let text = world.catalyst(&["vmpower", "on", "web1"]).error(1).to_owned();
        assert!(text.contains("disk.qcow2"), "{text}");
        fs::remove_file(&disk).unwrap();
        // A hard link to the same is no better.
        if fs::hard_link("/etc/shadow", &disk).is_ok() {
            assert_ne!(try_power(world, "web1", "on").status, 200);
            fs::remove_file(&disk).unwrap();
        }
        fs::rename(&aside, &disk).unwrap();
        let after = fs::metadata(&secret).unwrap();
        assert_eq!(fs::read_to_string(&secret).unwrap(), "secret");
        assert_eq!((before.uid(), before.mode(), before.mtime()), (after.uid(), after.mode(), after.mtime()));
        power(world, "web1", "on");
        power(world, "web1", "off");
    });
    checks.check("a header that names a host's file as backing does not open it", || {
        let disk = world.vm_dir("web2").join("disk.qcow2");
        let mut command = Command::new("qemu-img");
        command.args(["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow"]).arg(&disk);
        catalyst_tests::world::run(&mut command);
        power(world, "web2", "on");
        let pid = world.vm_pid("web2").unwrap();
        let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        let files: Vec<PathBuf> = open.filter_map(|fd| fs::read_link(fd.path()).ok()).collect();
        assert!(files.iter().all(|file| file != Path::new("/etc/shadow")), "{files:?}");
        power(world, "web2", "off");
    });
    checks.check("a console log that becomes a link is not read for the owner", || {
        let log = world.vm_dir("web1").join("console.log");
        fs::remove_file(&log).unwrap();
        let secret = world.path("roots");
        fs::write(&secret, "only root reads this").unwrap();
        fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        std::os::unix::fs::symlink(&secret, &log).unwrap();
        let answer = world.curl("GET", "/v1/vms/web1/console", None);
        assert!(!answer.body.contains("only root"), "{answer:?}");
        fs::remove_file(&log).unwrap();
    });
}

/// The newest test program of the daemon's access rules, run on an emulated machine with
/// Debian's kernel: there a socket that its sender has closed reads as root's.
fn under_debians_kernel() {
    let folder = programs().join("deps");
    let newest = fs::read_dir(&folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("access-"))
        .filter(|entry| entry.path().extension().is_none())
        .max_by_key(|entry| entry.metadata().and_then(|found| found.modified()).ok());
    let Some(newest) = newest else {
        skip("the daemon's tests are not built: cargo test -p catalyst-daemon --no-run")
    };
    let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("lab/run");
    if !lab.exists() {
        skip(format!("{} is not there", lab.display()));
    }
    let mut command = Command::new(lab);
    command.arg(format!("{} --test-threads=1", newest.path().display())).env("LAB_TIMEOUT", "200");
    command.env("LAB_MEM", "1024");
    let done = ran(command);
    if done.code() == 125 && done.stderr.contains("lab:") {
        skip(format!("the lab does not start: {}", done.stderr.lines().last().unwrap_or_default()));
    }
    assert!(done.stdout.contains("test result: ok"), "{}{}", done.stdout, done.stderr);
}
