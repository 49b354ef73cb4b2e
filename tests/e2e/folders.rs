//! Folders of the host in guests: seen from both sides, hot-added, kept over suspend, snapshots, clones and killed processes; not
//! left by a guest.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use catalyst_tests::world::HANG;
use catalyst_tests::{Checks, World, skip};
use nix::sys::signal::Signal;

use crate::common::{healthy, legacy_error, lives, signal, v1_error, vm, wait_until};

const VM: &str = "web1";
/// Against hanging.
const SOON: Duration = HANG;

/// The group.
pub fn folders(checks: &mut Checks) {
    let mut world = World::new();
    let shared = world.path("shared");
    fs::create_dir_all(shared.join("sub")).unwrap();
    fs::write(shared.join("a"), "of the host\n").unwrap();
    seen(checks, &world, &shared);
    archive(checks, &world, &shared);
    repository(checks, &world, &shared);
    saved(checks, &world, &shared);
    kept_in(checks, &world, &shared);
    killed(checks, &mut world, &shared);
    wrong(checks, &world, &shared);
    legacy(checks, &world, &shared);
    checks.check("a VM that is deleted leaves nothing that serves, and the folder as it is", || {
        let pid = server(&world, VM).expect("it is served");
        world.catalyst(&["vm", "delete", "--force", VM]).ok();
        wait_until("the process that served ends", SOON, || !lives(pid));
        assert!(shared.join("a").exists());
        healthy(&world);
    });
    of_a_user(checks);
}

fn guest(world: &World, vm: &str, script: &str) -> String {
    world.catalyst(&["guest", "exec", vm, "--", "sh", "-c", script]).ok().to_owned()
}

/// An owner who is not root.
fn of_a_user(checks: &mut Checks) {
    /// A user that every machine has: nobody.
    const OWNER: u32 = 65534;
    checks.check("what a guest makes is the owner's who is not root, who shares what he may enter", || {
        let world = World::owned_by(OWNER);
        let (shared, secret) = (world.path("home/shared"), world.path("secret"));
        fs::create_dir(&shared).unwrap();
        std::os::unix::fs::chown(&shared, Some(OWNER), Some(OWNER)).unwrap();
        fs::create_dir(&secret).unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o700)).unwrap();
        world.catalyst(&["vm", "create", VM]).ok();
        let refused = world.catalyst(&["folder", "add", VM, secret.to_str().unwrap(), "/secret"]);
        assert!(refused.error(1).to_lowercase().contains("permission denied"), "{refused:?}");
        add(&world, &shared, &["/vagrant"]);
        add(&world, &shared, &["/roots", "--name", "roots", "--uid", "0", "--gid", "0"]);
        world.catalyst(&["vmpower", "on", VM, "--wait", "--timeout", "280"]).ok();
        let all = || world.curl("GET", "/v1/vms/web1/folders", None).json();
        wait_until("both are mounted", SOON, || (0..2).all(|at| all()[at]["mounted"] == true));
        let script = "touch /vagrant/root; su catalyst -c 'umask 077; echo x >/vagrant/user; ln -s x /vagrant/link'; \
            stat -c %u /vagrant/root /vagrant/user /roots/user";
        assert_eq!(guest(&world, VM, script), "1000\n1000\n0");
        for name in ["root", "user", "link"] {
            let made = shared.join(name).symlink_metadata().unwrap();
            assert_eq!((made.uid(), made.gid()), (OWNER, OWNER), "{name}");
        }
        world.catalyst(&["vm", "delete", "--force", VM]).ok();
    });
}

/// The process that serves a VM's folders.
fn server(world: &World, vm: &str) -> Option<u32> {
    let lock = world.vm_dir(vm).join("run/folders/lock");
    fs::read_to_string(lock).ok()?.trim().parse().ok().filter(|pid| lives(*pid))
}

fn add(world: &World, path: &Path, more: &[&str]) {
    let path = path.to_str().unwrap();
    world.catalyst(&[&["folder", "add", VM, path], more].concat()).ok();
}

fn seen(checks: &mut Checks, world: &World, shared: &Path) {
    checks.check("a folder is added to a VM that runs, and both sides see what the other writes", || {
        world.warm();
        world.catalyst(&["vm", "create", VM]).ok();
        world.catalyst(&["vmpower", "on", VM, "--wait"]).ok();
        assert_eq!(server(world, VM), None, "nothing serves where there is no folder");
        add(world, shared, &["/vagrant"]);
        assert_eq!(guest(world, VM, "cat /vagrant/a /mnt/hgfs/shared/a"), "of the host\nof the host");
        guest(world, VM, "echo of the guest >/vagrant/b; mkdir /vagrant/d; chown catalyst: /vagrant/b");
        assert_eq!(fs::read_to_string(shared.join("b")).unwrap(), "of the guest\n");
        fs::write(shared.join("a"), "changed\n").unwrap();
        fs::write(shared.join("sub/new"), "").unwrap();
        assert_eq!(guest(world, VM, "cat /vagrant/a; ls /vagrant/sub"), "changed\nnew");
        let listed = world.catalyst(&["--json", "folder", "list", VM]);
        let listed: serde_json::Value = serde_json::from_str(listed.ok()).unwrap();
        assert_eq!(listed[0]["mounted"], true, "{listed}");
        assert_eq!(world.catalyst(&["folder", "list", VM]).ok(), "shared");
    });
    checks.check(
        "files are the owner's on the host and the guest's user's in the guest, who writes them",
        || {
            let owner = fs::metadata(shared).unwrap().uid();
            assert_eq!(fs::metadata(shared.join("b")).unwrap().uid(), owner);
            assert_eq!(
                guest(world, VM, "stat -c %U:%G /vagrant /vagrant/b"),
                "catalyst:catalyst\ncatalyst:catalyst"
            );
            guest(world, VM, "su catalyst -c 'echo x >/vagrant/theirs && chmod 600 /vagrant/theirs'");
            let theirs = fs::metadata(shared.join("theirs")).unwrap();
            assert_eq!((theirs.uid(), theirs.mode() & 0o777), (owner, 0o600));
        },
    );
    checks.check("a container works in it", || {
        let script = "docker run --rm -v /vagrant:/w busybox sh -c 'cat /w/a; echo c >/w/container'";
        assert_eq!(guest(world, VM, script), "changed");
        assert_eq!(fs::read_to_string(shared.join("container")).unwrap(), "c\n");
    });
}

/// Names in any encoding, links, holes and modes.
fn archive(checks: &mut Checks, world: &World, shared: &Path) {
    checks.check("what tar unpacks there is what was packed: modes, links, holes, names in any encoding", || {
        let make = "set -e; rm -rf /root/t; mkdir -p /root/t/dir/empty; cd /root/t; echo one >plain; ln plain hard; \
            ln -s plain soft; ln -s /nowhere dangling; printf x >run; chmod 751 run; chmod 700 dir; chmod 444 hard; \
            printf y >\"$(printf 'lat\\351in')\"; printf z >'ü ☃'; printf w >\"$(printf 'new\\nline')\"; \
            truncate -s 8M hole; printf end >>hole; mkfifo pipe; \
            cd /root; tar cSf t.tar t; mkdir -p /vagrant/out; cd /vagrant/out; tar xSf /root/t.tar";
        guest(world, VM, make);
        let list = "find . -printf '%P %y %m %n %l\\n' | sort; find . -type f -exec md5sum {} + | sort";
        let of = |folder: &str| guest(world, VM, &format!("cd {folder} && {list}"));
        // Numbers of names of folders differ between file systems.
        let plain = |text: String| -> Vec<String> {
            text.lines().filter(|line| !line.contains(" d ")).map(str::to_owned).collect()
        };
        assert_eq!(plain(of("/vagrant/out/t")), plain(of("/root/t")));
        let hole = fs::metadata(shared.join("out/t/hole")).unwrap();
        assert!(hole.blocks() * 512 < 1 << 20 && hole.len() == (8 << 20) + 3, "{hole:?}");
        let modes = |name: &str| fs::metadata(shared.join("out/t").join(name)).unwrap().permissions().mode();
        assert_eq!((modes("run") & 0o777, modes("dir") & 0o777), (0o751, 0o700));
    });
}

/// Makes a repository and an archive of it.
const REPOSITORY: &str = r#"
    umask 022; git init -q repository; cd repository
    for folder in $(seq "$0"); do
        mkdir $folder; ln -s ../1/run $folder/soft; echo 'echo ran' >$folder/run; chmod 755 $folder/run
        for file in $(seq 98); do echo "line $folder $file" >"$folder/file $file"; done
    done
    git add .; git -c user.name=a -c user.email=a@b commit -qm all; git gc -q; cd ..
    tar --exclude .git -cf repository.tar repository"#;
/// Writes the machine's git, with what it is linked with, as an archive.
const GIT: &str = "git=$(command -v git); tar -chPf - $git $(ldd $git | grep -o '/[^ ]*')";

/// A script here, in a folder.
fn here(folder: &Path, script: &str, argument: &str) -> std::process::Output {
    let mut sh = Command::new("sh");
    sh.args(["-ec", script, argument]).current_dir(folder).env("GIT_CONFIG_GLOBAL", "/dev/null");
    let output = sh.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

fn repository(checks: &mut Checks, world: &World, shared: &Path) {
    checks.check(
        "git clones a repository of many files there, and tar unpacks one, without a difference",
        || {
            if Command::new("git").arg("--version").output().is_err() {
                skip("git is not installed: apt-get install git");
            }
            // 100 files each.
            here(
                shared,
                REPOSITORY,
                if std::env::var_os("CATALYST_TEST_FULL").is_some() { "100" } else { "10" },
            );
            let unpack = ["guest", "exec", "-i", VM, "--", "tar", "-xPf", "-", "--skip-old-files"];
            world.catalyst_with_input(&unpack, &here(shared, GIT, "").stdout).ok();
            guest(world, VM, "ln -sf git /usr/bin/git-upload-pack");
            let timed = |script: &str| {
                let began = Instant::now();
                world.catalyst(&["ssh", VM, "--", &format!("cd /vagrant && {script}")]).ok();
                println!("    {script}: {:.0} s", began.elapsed().as_secs_f32());
            };
            timed("git clone -q repository clone");
            timed("mkdir unpacked && tar -xf repository.tar -C unpacked");
            let compare = "[ -z \"$(git -C clone status --porcelain)\" ]; git -C clone fsck --strict; \
            diff -r --no-dereference -x .git repository clone; tar -df repository.tar -C unpacked";
            here(shared, compare, "");
            // Its index is what git has seen of the files; the guest finds them so, too.
            assert_eq!(
                guest(world, VM, "cd /vagrant/clone && su catalyst -c 'git status --porcelain' && 7/run"),
                "ran"
            );
            fs::remove_dir_all(shared.join("clone")).unwrap();
        },
    );
}

fn saved(checks: &mut Checks, world: &World, shared: &Path) {
    checks.check("a VM is suspended and goes on with files open there, which lose nothing", || {
        let script = "setsid sh -c 'exec 7>>/vagrant/log; i=0; while sleep 0.1; do i=$((i+1)); echo $i >&7; done' \
            >/dev/null 2>&1 & cd /vagrant/d; setsid sleep 100000 >/dev/null 2>&1 &";
        guest(world, VM, script);
        let lines = || fs::read_to_string(shared.join("log")).unwrap_or_default();
        wait_until("the guest writes", SOON, || lines().lines().count() > 3);
        for _ in 0..3 {
            world.catalyst(&["vmpower", "suspend", VM]).ok();
            wait_until("what serves ends", SOON, || server(world, VM).is_none());
            let before = lines().lines().count();
            world.catalyst(&["vmpower", "on", VM]).ok();
            assert_eq!(vm(world, VM)["start_mode"], "resume");
            wait_until("the guest writes on", SOON, || lines().lines().count() > before + 3);
        }
        let text = lines();
        let whole = &text[..text.rfind('\n').unwrap()];
        let numbers: Vec<usize> = whole.lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(numbers, (1..=numbers.len()).collect::<Vec<_>>(), "none is lost, none comes twice");
        assert_eq!(guest(world, VM, "readlink /proc/$(pgrep -of '[s]leep 100000')/cwd"), "/vagrant/d");
    });
    checks.check("a clone of a running VM has the folder, and files open there, of its own", || {
        world.catalyst(&["vm", "clone", VM, "copy"]).ok();
        assert_eq!(
            guest(world, "copy", "cat /vagrant/a; readlink /proc/$(pgrep -of '[s]leep 100000')/cwd"),
            "changed\n/vagrant/d"
        );
        guest(world, "copy", "hostname >/vagrant/who");
        assert_eq!(fs::read_to_string(shared.join("who")).unwrap(), "copy\n");
        let (one, other) = (server(world, VM).unwrap(), server(world, "copy").unwrap());
        assert_ne!(one, other);
        world.catalyst(&["vm", "delete", "--force", "copy"]).ok();
        assert_eq!(guest(world, VM, "cat /vagrant/a"), "changed");
    });
    checks.check("a snapshot is gone back to with files open there", || {
        guest(world, VM, "pkill -f '[v]agrant/log'; true");
        world.catalyst(&["vm", "snapshot", "create", VM, "one"]).ok();
        guest(world, VM, "echo later >/dev/shm/at");
        world.catalyst(&["vm", "snapshot", "restore", VM, "one"]).ok();
        assert_eq!(guest(world, VM, "test -e /dev/shm/at || cat /vagrant/a"), "changed");
        assert_eq!(guest(world, VM, "readlink /proc/$(pgrep -of '[s]leep 100000')/cwd"), "/vagrant/d");
    });
    checks.check("a folder that a program uses stays, and the program is named", || {
        let error = world.curl("DELETE", "/v1/vms/web1/folders/shared", None);
        let message = v1_error(&error, "busy");
        assert!(message.contains("sleep (pid"), "{message}");
        assert_eq!(guest(world, VM, "cat /vagrant/a"), "changed");
        guest(world, VM, "pkill -f '[s]leep 100000'; while pgrep -f '[s]leep 100000'; do sleep 0.1; done");
        world.catalyst(&["folder", "remove", VM, "shared"]).ok();
        assert_eq!(guest(world, VM, "ls /vagrant /mnt/hgfs | grep -v :"), "");
        add(world, shared, &["/vagrant"]);
    });
}

/// What a guest may not do.
fn kept_in(checks: &mut Checks, world: &World, shared: &Path) {
    checks.check("a folder for reading only is not written, whatever its guest does", || {
        let folder = world.path("only");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("a"), "x").unwrap();
        add(world, &folder, &["/only", "--read-only"]);
        let script = "mount -o remount,rw,bind /only; for at in /only /run/catalyst/folders/only; do \
            echo y >$at/a; echo y >$at/b; rm $at/a; chmod 777 $at/a; done 2>&1 | grep -c 'Read-only file system'";
        assert_eq!(guest(world, VM, script), "8");
        assert_eq!(fs::read_to_string(folder.join("a")).unwrap(), "x");
        world.catalyst(&["folder", "remove", VM, "only"]).ok();
    });
    checks.check("no link, no '..' and no race leads out of a folder", || {
        let secret = world.path("secret");
        fs::create_dir(&secret).unwrap();
        fs::write(secret.join("key"), "of the host").unwrap();
        symlink(&secret, shared.join("out-link")).unwrap();
        symlink("../../secret/key", shared.join("up-link")).unwrap();
        for path in ["/vagrant/out-link/key", "/vagrant/up-link", "/vagrant/../secret/key", "/run/catalyst/folders/../../secret"] {
            assert_ne!(world.catalyst(&["guest", "exec", VM, "--", "cat", path]).code(), 0, "{path}");
        }
        // While the guest looks below it, a folder becomes a link to elsewhere, and a folder again.
        fs::create_dir_all(shared.join("race")).unwrap();
        fs::write(shared.join("race/key"), "of the folder").unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let seen = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    fs::rename(shared.join("race"), shared.join("race.folder")).unwrap();
                    symlink(&secret, shared.join("race")).unwrap();
                    fs::remove_file(shared.join("race")).unwrap();
                    fs::rename(shared.join("race.folder"), shared.join("race")).unwrap();
                }
            });
            let script = "i=0; while [ $i -lt 300 ]; do i=$((i+1)); cat /vagrant/race/key 2>/dev/null; echo; done | sort -u";
            let seen = world.catalyst(&["guest", "exec", VM, "--", "sh", "-c", script]);
            // Before anything can fail here: the other thread goes on until then.
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            seen.ok().to_owned()
        });
        assert!(!seen.contains("of the host"), "{seen}");
    });
    checks.check("what serves sees nothing of the host but the folder, and may do nothing", || {
        let pid = server(world, VM).unwrap();
        let root: Vec<_> =
            fs::read_dir(format!("/proc/{pid}/root")).unwrap().flatten().map(|one| one.file_name()).collect();
        assert_eq!(root, ["shared"]);
        let (open, daemons) = (open_files(pid), open_files(world.daemon_pid()));
        // Some roots may not raise the limit that they have.
        assert!(open >= 500_000 || open == daemons, "a guest remembers many files: {open}");
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        for line in
            ["CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "Seccomp:\t2", "NoNewPrivs:\t1"]
        {
            assert!(status.contains(line), "{line} in {status}");
        }
    });
}

/// How many files a process may have open, at most.
fn open_files(pid: u32) -> u64 {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    line.split_whitespace().nth(4).unwrap().parse().unwrap()
}

fn killed(checks: &mut Checks, world: &mut World, shared: &Path) {
    checks.check("what serves is killed: another does, and the guest mounts anew", || {
        let pid = server(world, VM).unwrap();
        signal(pid, Signal::SIGKILL);
        wait_until("another serves", SOON, || server(world, VM).is_some_and(|other| other != pid));
        let read = || world.catalyst(&["guest", "exec", VM, "--", "cat", "/vagrant/a"]);
        wait_until("the guest reads", SOON, || read().code() == 0);
    });
    checks.check("the daemon is killed: the guest works on, and the next daemon finds what serves", || {
        let pid = server(world, VM).unwrap();
        world.kill_daemon();
        assert!(lives(pid));
        world.start_daemon();
        assert_eq!(guest(world, VM, "cat /vagrant/a"), "changed");
        assert_eq!(server(world, VM), Some(pid));
        add(world, shared, &["/vagrant"]);
        assert_eq!(server(world, VM), Some(pid), "the same folder changes nothing");
    });
    checks.check("a VM that boots has its folders when it is up", || {
        world.catalyst(&["vmpower", "off", VM]).ok();
        world.catalyst(&["vmpower", "on", VM, "--wait", "--timeout", "280"]).ok();
        let mounted = || world.curl("GET", "/v1/vms/web1/folders", None).json()[0]["mounted"] == true;
        wait_until("the folder is mounted", SOON, mounted);
        assert_eq!(guest(world, VM, "cat /vagrant/a"), "changed");
    });
}

fn wrong(checks: &mut Checks, world: &World, shared: &Path) {
    let post = |body: &serde_json::Value| world.curl("POST", "/v1/vms/web1/folders", Some(&body.to_string()));
    checks.check("what cannot be a folder is refused with its reason", || {
        let path = shared.to_str().unwrap();
        for body in [
            serde_json::json!({"name": "", "host_path": path}),
            serde_json::json!({"name": "a/b", "host_path": path}),
            serde_json::json!({"name": "..", "host_path": path}),
            serde_json::json!({"name": "x", "host_path": "relative"}),
            serde_json::json!({"name": "x", "host_path": "/no/such/folder"}),
            serde_json::json!({"name": "x", "host_path": shared.join("a")}),
            serde_json::json!({"name": "x", "host_path": path, "guest_path": "relative"}),
            serde_json::json!({"name": "x", "host_path": path, "guest_path": "/"}),
            serde_json::json!({"name": "x", "host_path": path, "unknown": 1}),
            serde_json::json!({"name": "x"}),
        ] {
            v1_error(&post(&body), "invalid_request");
        }
        let other = serde_json::json!({"name": "shared", "host_path": "/"});
        v1_error(&post(&other), "folder_exists");
        v1_error(&world.curl("DELETE", "/v1/vms/web1/folders/none", None), "folder_not_found");
        v1_error(&world.curl("GET", "/v1/vms/nosuch/folders", None), "vm_not_found");
        let at_a_file = serde_json::json!({"name": "x", "host_path": path, "guest_path": "/etc/hostname"});
        v1_error(&post(&at_a_file), "guest_failed");
        assert_eq!(world.catalyst(&["folder", "list", VM]).ok(), "shared", "nothing of it stays");
        let error = world.catalyst(&["folder", "add", VM, "/"]);
        assert!(error.error(2).contains("--name"), "{}", error.stderr);
    });
    checks.check("a folder that is gone when its VM starts is told, and the VM starts", || {
        let gone: PathBuf = world.path("gone");
        fs::create_dir(&gone).unwrap();
        world.catalyst(&["vmpower", "suspend", VM]).ok();
        add(world, &gone, &["/gone"]);
        fs::remove_dir(&gone).unwrap();
        world.catalyst(&["vmpower", "on", VM]).ok();
        let problem = || {
            world.curl("GET", "/v1/vms/web1/folders/gone", None).json()["problem"].as_str().map(str::to_owned)
        };
        wait_until("the problem is told", SOON, || problem().is_some());
        assert!(problem().unwrap().contains("No such file"), "{problem:?}", problem = problem());
        assert_eq!(guest(world, VM, "cat /vagrant/a"), "changed");
        world.catalyst(&["folder", "remove", VM, "gone"]).ok();
    });
}

fn legacy(checks: &mut Checks, world: &World, shared: &Path) {
    checks.check("AppCatalyst's clients share folders as they did, and mount them in the guest", || {
        let api = "/api/vms/web1/folders";
        let folder = world.path("old");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("a"), "old").unwrap();
        for word in ["true", "\"true\"\n", "false"] {
            assert_eq!(world.curl("PATCH", api, Some(word)).json()["code"], 200);
        }
        legacy_error(&world.curl("PATCH", api, Some("perhaps")), &[400]);
        let body = serde_json::json!({"guestPath": "old", "hostPath": folder, "flags": 4});
        for _ in 0..2 {
            assert_eq!(world.curl("POST", api, Some(&body.to_string())).json(), body);
        }
        assert_eq!(world.curl("GET", api, None).json(), serde_json::json!(["shared", "old"]));
        for id in ["old", "1"] {
            assert_eq!(world.curl("GET", &format!("{api}/{id}"), None).json(), body);
        }
        let mounts = "mkdir -p /x /y; umount /mnt/hgfs; vmhgfs-fuse -o allow_other,uid=1000,gid=1000 .host:/old /x && \
            mount -t vmhgfs -o uid=1000,gid=1000 .host:/old /y && cat /x/a /y/a; ! mount -t vmhgfs .host:/none /y";
        assert_eq!(guest(world, VM, mounts), "oldold");
        let read_only = serde_json::json!({"guestPath": "old", "hostPath": shared, "flags": 0});
        assert_eq!(world.curl("PATCH", &format!("{api}/old"), Some(&read_only.to_string())).json(), read_only);
        assert_eq!(world.curl("DELETE", &format!("{api}/old"), None).status, 204);
        legacy_error(&world.curl("DELETE", &format!("{api}/old"), None), &[404]);
        legacy_error(&world.curl("POST", api, Some("{}")), &[400]);
        assert_eq!(world.curl("GET", api, None).json(), serde_json::json!(["shared"]));
    });
}
