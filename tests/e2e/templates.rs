//! Templates that users make: of VMs that are off or run, and of disks of others; disks written out of VMs.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use catalyst_tests::world::{engine, ran, run};
use catalyst_tests::{Checks, World};
use nix::unistd::{Whence, lseek};
use serde_json::json;

use super::common::{Room, guest, v1_error, vm, wait_until};
use super::foreign::boxes::{self, Kind};

const LIMIT: Duration = Duration::from_mins(4);
/// What tells a guest's keys from another's.
const KEYS: &str = "cat /etc/ssh/ssh_host_ed25519_key.pub; cat /etc/machine-id";

/// The images are everybody's: names of this run alone.
fn name(what: &str) -> String {
    format!("test-{}-{what}", std::process::id())
}

/// Takes away what a check that failed has left.
struct Leftovers(PathBuf);

impl Drop for Leftovers {
    fn drop(&mut self) {
        for what in ["tried", "still", "deb", "again", "new"] {
            let _ = fs::remove_dir_all(self.0.join(name(what)));
        }
    }
}

fn own(world: &World) -> PathBuf {
    world.images.join(".of-0")
}

pub fn templates(checks: &mut Checks) {
    let mut world = World::empty();
    // Before the daemon, which does not see what is mounted later.
    let small = world.path("small");
    fs::create_dir(&small).unwrap();
    let _room = Room::in_memory(&small, "20M");
    world.start_daemon();
    let _leftovers = Leftovers(own(&world));
    world.warm();
    let source = running(checks, &world);
    off(checks, &world, &source);
    exported(checks, &world);
    imported(checks, &world);
    deleted(checks, &world);
    of_a_user(checks);
}

/// Whether a sparse file has those bytes anywhere.
fn holds(path: &Path, wanted: &[u8]) -> bool {
    let file = File::open(path).unwrap();
    let end = i64::try_from(file.metadata().unwrap().len()).unwrap();
    let mut at = 0;
    while let Ok(data) = lseek(&file, at, Whence::SeekData) {
        let hole = lseek(&file, data, Whence::SeekHole).unwrap_or(end);
        let mut bytes = vec![0; usize::try_from(hole - data).unwrap()];
        file.read_exact_at(&mut bytes, u64::try_from(data).unwrap()).unwrap();
        let begins = |at: usize| bytes[at] == wanted[0] && bytes[at..].starts_with(wanted);
        if (0..bytes.len()).any(begins) {
            return true;
        }
        at = hole;
    }
    false
}

fn running(checks: &mut Checks, world: &World) -> String {
    let mut source = String::new();
    checks.check("a template of a VM that runs has its memory: new VMs go on from there, as themselves", || {
        world.catalyst(&["vm", "create", "source"]).ok();
        world.catalyst(&["vmpower", "on", "source"]).ok();
        guest(world, "source", "echo kept >/root/kept; echo here >/dev/shm/here; echo 'SECRET-KEY x' >>/home/catalyst/.ssh/authorized_keys2");
        source = guest(world, "source", KEYS);
        world.catalyst(&["template", "create", "source", &name("tried")]).ok();
        assert_eq!(guest(world, "source", "cat /root/kept"), "kept", "the source goes on");
        world.catalyst(&["vm", "create", "one", "--template", &name("tried")]).ok();
        world.catalyst(&["vmpower", "on", "one"]).ok();
        assert_eq!(vm(world, "one")["start_mode"], "warm");
        assert_eq!(guest(world, "one", "hostname; cat /root/kept /dev/shm/here"), "one\nkept\nhere");
        let own = guest(world, "one", KEYS);
        assert!(own.lines().all(|line| !source.contains(line)), "{own}");
        assert_eq!(world.catalyst(&["ssh", "one", "--", "docker run --rm busybox echo hello"]).ok(), "hello");
    });
    checks.check("who could log in to its source, and that one's host keys, are not in it, nor in free blocks of its disk", || {
        assert_eq!(guest(world, "one", "ls /home/catalyst/.ssh"), "authorized_keys");
        let shown = world.curl("GET", &format!("/v1/templates/{}", name("tried")), None).json();
        let disk = own(world).join(name("tried")).join(shown["version"].as_str().unwrap()).join("disk.raw");
        let host = source.split_whitespace().nth(1).unwrap();
        // What is looked for is found where it is.
        assert!(holds(&world.vm_dir("source").join("identity.json"), host.as_bytes()));
        for secret in ["SECRET-KEY x", host] {
            assert!(!holds(&disk, secret.as_bytes()), "{secret}");
        }
        assert_eq!(own(world).metadata().unwrap().mode() & 0o777, 0o700);
        assert_eq!(shown["made_from"], "VM 'source'");
    });
    source
}

fn off(checks: &mut Checks, world: &World, source: &str) {
    checks.check("a template of a VM that is off has its disk; both lie beside lumen", || {
        world.catalyst(&["vmpower", "off", "source"]).ok();
        world.catalyst(&["template", "create", "source", &name("still")]).ok();
        let list = world.catalyst(&["template", "list"]).ok().to_owned();
        assert!(["lumen", &name("still"), &name("tried")].iter().all(|name| list.contains(*name)), "{list}");
        world.catalyst(&["vm", "create", "two", "--template", &name("still")]).ok();
        world.catalyst(&["vmpower", "on", "two"]).ok();
        assert_eq!(guest(world, "two", "hostname; ls /home/catalyst/.ssh"), "two\nauthorized_keys");
        let own = guest(world, "two", KEYS);
        assert!(own.lines().all(|line| !source.contains(line)), "{own}");
        assert_eq!(vm(world, "two")["start_mode"], "cold");
        world.catalyst(&["vm", "delete", "--force", "two"]).ok();
    });
    checks.check(
        "names that are taken or none, VMs that are not there or have folders are refused, and leave nothing",
        || {
            let error =
                |vm: &str, name: &str| world.catalyst(&["template", "create", vm, name]).error(1).to_owned();
            assert!(error("source", &name("tried")).contains("already"));
            assert!(error("source", "lumen").contains("already"));
            assert!(error("source", "Bad_name").contains("a-z"));
            assert!(error("nosuch", &name("new")).contains("no VM 'nosuch'"));
            world.catalyst(&["folder", "add", "source", "/srv"]).ok();
            assert!(error("source", &name("new")).contains("folders"));
            world.catalyst(&["folder", "remove", "source", "srv"]).ok();
            assert!(!own(world).join(name("new")).exists());
        },
    );
}

fn exported(checks: &mut Checks, world: &World) {
    let target = world.path("out.qcow2");
    let file = target.to_str().unwrap();
    checks.check("the disk of a VM that is off becomes one qcow2 that stands on nothing", || {
        world.catalyst(&["image", "export", "source", file]).ok();
        let mut info = Command::new("qemu-img");
        info.args(["info", "--output=json", file]);
        let info: serde_json::Value = serde_json::from_str(ran(info).ok()).unwrap();
        assert_eq!((&info["format"], info.get("backing-filename")), (&json!("qcow2"), None));
        assert_eq!(info["virtual-size"], 64_u64 << 30);
        run(Command::new("qemu-img").args(["check", "-q", file]));
    });
    checks.check("a file that is there is kept, unless --force; a VM that runs is refused", || {
        let before = fs::metadata(&target).unwrap().ino();
        let error = world.catalyst(&["image", "export", "source", file]).error(1).to_owned();
        assert!(error.contains("--force"), "{error}");
        assert_eq!(fs::metadata(&target).unwrap().ino(), before);
        world.catalyst(&["image", "export", "source", file, "--force"]).ok();
        assert_ne!(fs::metadata(&target).unwrap().ino(), before);
        let error = world.catalyst(&["image", "export", "one", file, "--force"]).error(1).to_owned();
        assert!(error.contains("powered on"), "{error}");
        let body = json!({"path": "out.qcow2"}).to_string();
        let answer = world.curl("POST", "/v1/vms/source/export", Some(&body));
        assert!(v1_error(&answer, "invalid_request").contains("absolute"));
    });
    checks.check("where there is no room, nothing is left", || {
        let small = world.path("small");
        let error = world
            .catalyst(&["image", "export", "source", small.join("a.qcow2").to_str().unwrap()])
            .error(1)
            .to_owned();
        assert!(error.contains("no space left"), "{error}");
        assert_eq!(fs::read_dir(&small).unwrap().count(), 0);
    });
}

fn imported(checks: &mut Checks, world: &World) {
    checks.check(
        "a disk of others becomes a template, whatever its form, and VMs of it start by its own loader",
        || {
            let folder = world.path("disks");
            fs::create_dir(&folder).unwrap();
            for (file, kind) in
                [("one.qcow2", Kind::Qcow2), ("two.vmdk", Kind::Split), ("three.vmdk", Kind::Stream)]
            {
                boxes::disk(&folder, file, kind);
                let (path, template) = (folder.join(file), name("deb"));
                world.catalyst(&["image", "import", path.to_str().unwrap(), "--name", &template]).ok();
                world.catalyst(&["vm", "create", "deb1", "--template", &template, "--memory", "128M"]).ok();
                if engine() == "kvm" {
                    // Group `foreign` has one with a kernel.
                    let error = world.catalyst(&["vmpower", "on", "deb1"]).error(1).to_owned();
                    assert!(error.contains("no kernel") && error.contains("--engine qemu"), "{error}");
                    world.catalyst(&["vm", "delete", "deb1"]).ok();
                    world.catalyst(&["template", "delete", &template]).ok();
                    continue;
                }
                world.catalyst(&["vmpower", "on", "deb1"]).ok();
                let log = world.vm_dir("deb1").join("console.log");
                wait_until("its loader speaks", LIMIT, || {
                    fs::read_to_string(&log).unwrap_or_default().contains(boxes::WORD)
                });
                let shown = vm(world, "deb1");
                assert_eq!(
                    (&shown["foreign"], &shown["disk_gib"], &shown["template"]),
                    (&json!(true), &json!(3), &json!(template))
                );
                if matches!(kind, Kind::Qcow2) {
                    for words in [
                        &["vmpower", "suspend", "deb1"][..],
                        &["vm", "clone", "deb1", "deb2"],
                        &["vm", "snapshot", "create", "deb1"],
                    ] {
                        let error = world.catalyst(words).error(1).to_owned();
                        assert!(error.contains("imported image"), "{error}");
                    }
                    let refused = ["vm", "create", "deb3", "--template", &template, "--disk", "2"];
                    assert!(world.catalyst(&refused).error(1).contains("has 3 GiB"));
                    assert!(world.catalyst(&["template", "warm", &template]).error(1).contains("own loader"));
                    let out = world.path("deb.qcow2");
                    world.catalyst(&["vmpower", "off", "deb1"]).ok();
                    world.catalyst(&["image", "export", "deb1", out.to_str().unwrap()]).ok();
                    // What was exported is imported again.
                    world
                        .catalyst(&["image", "import", out.to_str().unwrap(), "--name", &name("again")])
                        .ok();
                    world.catalyst(&["template", "delete", &name("again")]).ok();
                }
                world.catalyst(&["vm", "delete", "--force", "deb1"]).ok();
                world.catalyst(&["template", "delete", &template]).ok();
            }
        },
    );
    checks.check("what has no loader, is no disk or leads elsewhere is refused, and leaves nothing", || {
        let import = |file: &str| {
            world
                .catalyst(&["image", "import", world.path(file).to_str().unwrap(), "--name", &name("new")])
                .error(1)
                .to_owned()
        };
        fs::write(world.path("empty.raw"), vec![0; 1 << 20]).unwrap();
        assert!(import("empty.raw").contains("no boot sector"));
        // An exported lumen has no loader: its kernel comes from its template.
        assert!(import("out.qcow2").contains("no boot sector"));
        fs::write(world.path("text.qcow2"), "hello").unwrap();
        assert!(import("text.qcow2").contains("neither a VMDK nor a qcow2"));
        let child = world.path("child.qcow2");
        run(Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow"])
            .arg(&child)
            .arg("1M"));
        assert!(import("child.qcow2").contains("never followed"));
        assert!(import("nowhere.qcow2").contains("missing"));
        assert!(!own(world).join(name("new")).exists());
    });
}

fn deleted(checks: &mut Checks, world: &World) {
    checks.check("a template is not deleted while VMs need it, and goes whole after", || {
        let (tried, still) = (name("tried"), name("still"));
        let error = world.catalyst(&["template", "delete", &tried]).error(1).to_owned();
        assert!(error.contains("VMs stand on"), "{error}");
        world.catalyst(&["vm", "delete", "--force", "one"]).ok();
        world.catalyst(&["template", "delete", &tried, &still]).ok();
        assert!(world.catalyst(&["template", "delete", &tried]).error(1).contains("no image"));
        let error = world.catalyst(&["template", "delete", "lumen"]).error(1).to_owned();
        assert!(error.contains("image remove"), "{error}");
        let list = world.catalyst(&["template", "list"]).ok().to_owned();
        assert!(!list.contains(&tried) && !list.contains(&still), "{list}");
    });
}

fn of_a_user(checks: &mut Checks) {
    checks.check(
        "a user who is not root has templates of his own, which nobody else sees, and leaves nothing half",
        || {
            const UID: u32 = 65_534;
            let world = World::owned_by(UID);
            let (folder, own) = (world.path("home"), world.images.join(format!(".of-{UID}")));
            let [good, bad] = ["good.qcow2", "bad.raw"].map(|file| folder.join(file));
            boxes::disk(&folder, "good.qcow2", Kind::Qcow2);
            fs::write(&bad, vec![0; 1 << 20]).unwrap();
            for file in [&good, &bad] {
                std::os::unix::fs::chown(file, Some(UID), Some(UID)).unwrap();
            }
            let import = |file: &Path| {
                world.catalyst(&["image", "import", file.to_str().unwrap(), "--name", &name("deb")])
            };
            assert!(import(&bad).error(1).contains("no boot sector"));
            assert_eq!(fs::read_dir(&own).unwrap().count(), 0);
            let secret = world.path("roots.qcow2");
            fs::copy(&good, &secret).unwrap();
            fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
            assert!(import(&secret).error(1).to_lowercase().contains("permission denied"));
            import(&good).ok();
            world.catalyst(&["vm", "create", "deb1", "--template", &name("deb"), "--memory", "128M"]).ok();
            // On engine kvm such a disk has no loader.
            let starts = engine() == "qemu";
            if starts {
                world.catalyst(&["vmpower", "on", "deb1"]).ok();
                let log = world.vm_dir("deb1").join("console.log");
                wait_until("its loader speaks", LIMIT, || {
                    fs::read_to_string(&log).unwrap_or_default().contains(boxes::WORD)
                });
            }
            let other = World::new();
            assert!(!other.catalyst(&["template", "list"]).ok().contains(&name("deb")));
            assert!(
                other
                    .catalyst(&["vm", "create", "x", "--template", &name("deb")])
                    .error(1)
                    .contains("no image")
            );
            if starts {
                world.catalyst(&["vmpower", "off", "deb1"]).ok();
            }
            let out = folder.join("out.qcow2");
            world.catalyst(&["image", "export", "deb1", out.to_str().unwrap()]).ok();
            assert_eq!(out.metadata().unwrap().uid(), UID);
            let error = world.catalyst(&["image", "export", "deb1", "/etc/out.qcow2"]).error(1).to_owned();
            assert!(error.contains("out.qcow2") && !Path::new("/etc/out.qcow2").exists(), "{error}");
            world.catalyst(&["vm", "delete", "deb1"]).ok();
            world.catalyst(&["template", "delete", &name("deb")]).ok();
            fs::remove_dir_all(&own).unwrap();
        },
    );
}
