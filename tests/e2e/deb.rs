//! The Debian packages, in a clean Debian that has no network.

mod debian;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use catalyst_tests::world::{HANG, engine, image_dir, programs, ran};
use catalyst_tests::{Checks, World, skip};

use self::debian::Debian;
use crate::common::{self, SOURCE, kept, wait_until};

/// The group.
pub fn deb(checks: &mut Checks) {
    checks.check("make install and make uninstall leave nothing behind", installed_and_uninstalled);
    let world = World::empty();
    let mut debs = None;
    checks.check("the packages are built, twice to the same bytes", || debs = Some(built(&world)));
    let Some(debs) = debs else { return };
    checks.check("lintian has nothing against them", || checked(&debs));
    let debian = Debian::new(&world, &debs);
    let before = debian.files();
    lives(checks, &debian, &debs);
    removed(checks, &debian, &debs, &before);
}

fn installed_and_uninstalled() {
    let folder = tempfile::tempdir().unwrap();
    let make = |target: &str| {
        let mut make = Command::new("make");
        make.args(["-s", "-C", SOURCE, target, "SUDO=", "PREFIX=/opt/catalyst"]);
        make.arg(format!("DESTDIR={}", folder.path().display()));
        make.arg(format!("RELEASE={}", programs().display()));
        ran(make).ok().to_owned()
    };
    make("install-files");
    let prefix = folder.path().join("opt/catalyst");
    let mut version = Command::new(prefix.join("bin/catalyst"));
    version.arg("--version");
    assert!(ran(version).ok().starts_with("catalyst "));
    for file in [
        "share/man/man1/catalyst-vm-create.1",
        "share/man/man8/catalyst-daemon.8",
        "lib/catalyst/catalyst-vmm",
    ] {
        assert!(prefix.join(file).is_file(), "{file}");
    }
    let unit = fs::read_to_string(folder.path().join("etc/systemd/system/catalyst@.service")).unwrap();
    assert!(unit.contains("ExecStart=/opt/catalyst/bin/catalyst-daemon --owner %i"), "{unit}");
    make("uninstall");
    assert_eq!(files_below(folder.path()), BTreeSet::new());
    assert!(!prefix.join("bin").exists() && !prefix.join("share").exists(), "folders are left");
}

/// Both packages. That of the image takes long and is kept, by what it is made from.
fn built(world: &World) -> Vec<PathBuf> {
    let build = |out: &Path, package: &str| -> PathBuf { ran(common::deb(out, package)).ok().into() };
    let twice = |name: &str, package: &str| {
        let one = build(&world.path(name), package);
        let other = build(&world.path("again"), package);
        assert!(fs::read(&one).unwrap() == fs::read(&other).unwrap(), "{package} differs");
        one
    };
    let manifest = image_dir().join("lumen/current/manifest.json");
    let mut key = fs::read_to_string(&manifest).unwrap_or_else(|_| skip("there is no image: make image"));
    key += &fs::read_to_string(image_dir().join("micro/current/manifest.json")).unwrap();
    for file in ["deb", "catalyst-lumen/control", "catalyst-lumen/postinst", "catalyst-lumen/prerm"] {
        key += &fs::read_to_string(format!("{SOURCE}/packaging/{file}")).unwrap();
    }
    let lumen = kept("deb-lumen", &key, |folder| {
        fs::copy(twice("lumen", "catalyst-lumen"), folder.join("catalyst-lumen.deb")).unwrap();
    });
    vec![twice("debs", "catalyst"), lumen.join("catalyst-lumen.deb")]
}

fn checked(debs: &[PathBuf]) {
    if Command::new("lintian").arg("--version").output().is_err() {
        skip("lintian is not installed: make setup-tests");
    }
    let mut lintian = Command::new("lintian");
    // It formats each of the manual pages, which takes a minute; they are written by one program.
    lintian.args(["--fail-on", "error,warning", "--allow-root", "-X", "documentation/manual"]).args(debs);
    let ran = ran(lintian);
    assert!(ran.status.success(), "{}{}", ran.stdout, ran.stderr);
}

/// What a newcomer does, as root and as another user.
fn lives(checks: &mut Checks, debian: &Debian, debs: &[PathBuf]) {
    checks.check("dpkg -i of both, and a VM is created, powered on and reached without a network", || {
        debian.install(debs);
        assert_eq!(debian.ok("ip -brief link").lines().count(), 1, "loopback alone");
        let started = std::time::Instant::now();
        debian.ok(&format!("CATALYST_ENGINE={} catalyst vm create web1", engine()));
        warm(debian);
        println!("    the template is warm {} s after the first start", started.elapsed().as_secs());
        debian.ok("catalyst vmpower on web1");
        let address = debian.ok("catalyst --timeout 280 guest getip --wait web1");
        assert!(address.starts_with("10."), "{address}");
        assert!(debian.ok("catalyst vm show web1").contains(", warm"), "it boots");
        let micro = debian.path("var/lib/catalyst/images/micro/current/vmlinux").metadata().unwrap();
        assert_eq!(micro.nlink(), 2, "the kernel of lumen and micro is there twice");
        assert_eq!(
            debian.ok("catalyst --timeout 280 ssh web1 -- docker run --rm busybox echo hello"),
            "hello"
        );
        debian.ok("catalyst --timeout 280 guest exec web1 -- sh -c 'echo kept >/root/file; sync'");
        debian.ok("catalyst vmpower shutdown web1");
    });
    checks.check("an unprivileged user has VMs of the same warm state by a daemon that root starts", || {
        debian.ok("catalyst daemon stop");
        debian.ok("useradd --create-home me");
        let refused = debian.run("runuser -u me -- catalyst vm create web2");
        assert!(refused.error(1).contains("catalyst-daemon --background --owner me"), "{refused:?}");
        debian.ok(&format!("CATALYST_ENGINE={} catalyst-daemon --background --owner me", engine()));
        debian.ok("runuser -u me -- catalyst vm create web2 --on");
        debian.ok("runuser -u me -- catalyst --timeout 280 guest exec web2 -- true");
        assert!(debian.ok("runuser -u me -- catalyst vm show web2").contains(", warm"), "it boots");
    });
    checks.check("manual pages, completions and the unit are there", || {
        for path in [
            "usr/bin/catalyst-oci",
            "usr/share/man/man1/catalyst-vm-create.1.gz",
            "usr/share/man/man1/catalyst-docker-up.1.gz",
            "usr/share/man/man8/catalyst-daemon.8.gz",
            "usr/share/bash-completion/completions/catalyst",
            "usr/lib/systemd/system/catalyst@.service",
            "usr/share/doc/catalyst/copyright",
        ] {
            assert!(debian.path(path).is_file(), "{path}");
        }
    });
}

/// Waits for the warm states of a daemon's first start: of lumen, and of micro, which containers go on from.
fn warm(debian: &Debian) {
    for (template, cpus, memory_mib) in [("lumen", 1, 1024), ("micro", 1, 128)] {
        wait_until("the template is warm", HANG, || {
            let shown = debian.ok(&format!("catalyst template show {template} --json"));
            let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
            shown["warm"].as_array().is_some_and(|all| {
                all.iter().any(|warm| {
                    warm["fits"] == true && warm["cpus"] == cpus && warm["memory_mib"] == memory_mib
                })
            })
        });
    }
}

fn removed(checks: &mut Checks, debian: &Debian, debs: &[PathBuf], before: &BTreeSet<String>) {
    checks.check(
        "removal ends the daemon, leaves VMs and what they stand on, and they live after another dpkg -i",
        || {
            debian.ok("dpkg --remove catalyst catalyst-lumen");
            let reason = fs::read_to_string(debian.path("home/me/.local/share/catalyst/vms/web2/reason"));
            println!("    the guest that ran: {}", reason.unwrap());
            wait_until("no process is left", HANG, || debian.processes().is_empty());
            assert_eq!(debian.ok("ip -brief link").lines().count(), 1, "the bridge is left");
            let left: BTreeSet<String> = debian.files().difference(before).cloned().collect();
            assert!(!left.iter().any(|file| file.ends_with("/memory")), "memory is left: {left:#?}");
            debian.install(debs);
            debian
                .ok(&format!("CATALYST_NO_WARMING=true CATALYST_ENGINE={} catalyst daemon start", engine()));
            debian.ok("catalyst vmpower on web1");
            assert_eq!(debian.ok("catalyst --timeout 280 guest exec web1 -- cat /root/file"), "kept");
            debian.ok("catalyst vm delete --force web1 && catalyst daemon stop");
            debian.ok("CATALYST_NO_WARMING=true catalyst-daemon --background --owner me");
            debian.ok("runuser -u me -- catalyst vm delete web2");
        },
    );
    checks.check("purging leaves nothing but the owners' folders", || {
        debian.ok("dpkg --purge catalyst-lumen catalyst");
        debian.ok("userdel --remove me");
        assert!(debian.processes().is_empty(), "{:?}", debian.processes());
        let left: Vec<String> = debian.files().difference(before).cloned().collect();
        let allowed = [
            "root/.local/",
            "root/.ssh",
            "etc/.pwd.lock",
            "etc/subuid-",
            "etc/subgid-",
            "etc/passwd-",
            "etc/group-",
            "etc/shadow-",
            "etc/gshadow-",
            "var/lib/dpkg/",
            "var/log/",
        ];
        let foreign: Vec<&String> =
            left.iter().filter(|file| !allowed.iter().any(|name| file.starts_with(name))).collect();
        assert!(foreign.is_empty(), "{foreign:#?}");
        assert!(
            !left.iter().any(|file| file.contains("catalyst") && !file.starts_with("root/.local/")),
            "{left:#?}"
        );
    });
}

/// All files below a folder, by their paths in it.
fn files_below(folder: &Path) -> BTreeSet<String> {
    let mut find = Command::new("find");
    find.arg(folder).args(["-xdev", "!", "-type", "d", "-printf", "%P\\n"]);
    ran(find).ok().lines().map(str::to_owned).collect()
}
