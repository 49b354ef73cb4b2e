//! Catalyst below systemd, in a VM, which has one. That VM is the host here, and its VMs are of the tiny image: what is shown
//! are units, processes and files, not guests.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use catalyst_tests::world::{HANG, ran};
use catalyst_tests::{Checks, World};

use crate::common::{deb, tiny_store, wait_until};

/// What the package depends on, of which this machine has the same.
const TOOLS: [&str; 4] =
    ["/usr/bin/qemu-system-x86_64", "/usr/bin/qemu-img", "/usr/sbin/dnsmasq", "/usr/sbin/nft"];
/// What QEMU looks for by name.
const FIRMWARE: [&str; 4] = [
    "/usr/share/qemu/qboot.rom",
    "/usr/share/qemu/pvh.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
    "/usr/share/qemu/kvmvapic.bin",
];
/// Its software CPU, which is a module.
const ACCELERATOR: &str = "/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so";
/// Settings of the unit in the host.
const SETTINGS: &str = "[Service]\\nEnvironment=CATALYST_ENGINE=qemu CATALYST_NO_WARMING=true \
                        CATALYST_LOG=info,catalyst_daemon::systemd=debug\\n";

/// The group.
pub fn systemd(checks: &mut Checks) {
    let world = World::new();
    world.warm();
    let host = Host(&world);
    checks.check("the package is installed in a VM, and its unit starts", || host.install());
    if checks.any_failed() {
        return;
    }
    checks.check("each VM is in a scope of its own, soon after it runs", || scopes(&host));
    checks.check("a restart of the unit and an upgrade of the package leave VMs running", || upgrade(&host));
    checks
        .check("what runs when the host is shut down is shut down, or ended and told so", || shutdown(&host));
    checks.check("VMs with autostart are on when the host has started, and only then", || autostart(&host));
}

/// The VM that is the host.
struct Host<'a>(&'a World);

impl Host<'_> {
    /// Runs a line of the shell in it, as root.
    #[track_caller]
    fn ok(&self, line: &str) -> String {
        self.0.catalyst(&["guest", "exec", "host", "--", "sh", "-c", line]).ok().to_owned()
    }

    /// Puts files of the list into it, below `from` here.
    fn put(&self, from: &Path, list: &str, dereference: bool) {
        let archive = self.0.path("archive");
        let mut tar = Command::new("tar");
        tar.args(["--create", "--format=posix", "--no-recursion", "--owner=0", "--group=0"]);
        if dereference {
            tar.arg("--dereference");
        }
        let names = self.0.path("names");
        fs::write(&names, list).unwrap();
        ran(tar_of(tar, from, &names, &archive)).ok();
        let unpack = ["guest", "exec", "-i", "host", "--", "tar", "--extract", "--skip-old-files", "-C", "/"];
        self.0.catalyst_with_input(&unpack, &fs::read(&archive).unwrap()).ok();
    }

    fn install(&self) {
        let world = self.0;
        world.catalyst(&["vm", "create", "host", "--on"]).ok();
        self.put(Path::new("/"), &closure(), true);
        let stage = world.path("stage");
        tiny_store(&stage.join("var/lib/catalyst/images"));
        for (folder, version) in [("one", "0.1.0"), ("two", "0.1.1")] {
            let mut deb = deb(&stage.join("root").join(folder), "catalyst");
            ran({
                deb.env("CATALYST_VERSION", version);
                deb
            })
            .ok();
        }
        let mut find = Command::new("find");
        find.arg(&stage).args(["!", "-type", "d", "-printf", "%P\\n"]);
        self.put(&stage, ran(find).ok(), false);
        self.ok("useradd --system --no-create-home dnsmasq && ldconfig");
        self.ok(&format!("mkdir /etc/systemd/system/catalyst@.service.d && printf '{SETTINGS}' >/etc/systemd/system/catalyst@.service.d/test.conf"));
        // What it depends on is there, and dpkg does not know.
        self.ok(
            "dpkg --force-depends -i /root/one/catalyst_*.deb && systemctl enable --now catalyst@catalyst",
        );
        assert_eq!(self.ok("systemctl is-active catalyst@catalyst"), "active");
        for id in ["inner", "other"] {
            self.ok(&format!("catalyst vm create {id} --memory 128 && catalyst vmpower on {id}"));
        }
    }

    fn pid(&self, id: &str) -> String {
        let mut pid = serde_json::Value::Null;
        // A daemon that has just started may still be looking for it.
        wait_until("its process is known", HANG, || {
            let shown = self.ok(&format!("catalyst vm show {id} --json"));
            let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
            pid = shown["pid"].clone();
            !pid.is_null()
        });
        pid.to_string()
    }

    fn main_pid(&self) -> String {
        self.ok("systemctl show --property MainPID --value catalyst@catalyst")
    }
}

fn tar_of(mut tar: Command, from: &Path, names: &Path, archive: &Path) -> Command {
    tar.arg("-f").arg(archive).arg("-C").arg(from).arg("-T").arg(names);
    tar
}

/// The tools and the libraries that they are linked with.
fn closure() -> String {
    let mut ldd = Command::new("ldd");
    ldd.args(TOOLS).arg(ACCELERATOR);
    let libraries = ran(ldd);
    let libraries =
        libraries.ok().lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    let mut all: Vec<&str> = libraries
        .filter(|path| !path.ends_with(':'))
        .chain(TOOLS)
        .chain(FIRMWARE)
        .chain([ACCELERATOR])
        .collect();
    all.sort_unstable();
    all.dedup();
    all.iter()
        .filter(|path| Path::new(path).exists())
        .map(|path| path.trim_start_matches('/').to_owned() + "\n")
        .collect()
}

fn scopes(host: &Host<'_>) {
    for id in ["inner", "other"] {
        wait_until("the VM has a scope", HANG, || {
            host.ok(&format!("systemctl is-active catalyst-{id}.scope || true")) == "active"
        });
        let groups = host.ok(&format!("cat /proc/{}/cgroup", host.pid(id)));
        assert!(groups.ends_with(&format!("/machine.slice/catalyst-{id}.scope")), "{groups}");
        let shown = host.ok(&format!("systemctl show --property Description,Before catalyst-{id}.scope"));
        assert!(shown.contains(&format!("Description=Catalyst VM {id}")), "{shown}");
        assert!(shown.contains("catalyst@catalyst.service"), "{shown}");
    }
    println!(
        "    {}",
        host.ok("journalctl --quiet -o cat -u catalyst@catalyst | grep -E 'has a scope|started' | tail -4")
    );
}

fn upgrade(host: &Host<'_>) {
    let (pid, daemon) = (host.pid("inner"), host.main_pid());
    host.ok("systemctl restart catalyst@catalyst");
    let restarted = host.main_pid();
    assert_ne!(daemon, restarted);
    assert_eq!(host.pid("inner"), pid);
    host.ok("dpkg --force-depends -i /root/two/catalyst_*.deb");
    assert_eq!(host.ok("dpkg-query -W -f '${Version}' catalyst"), "0.1.1");
    assert_ne!(host.main_pid(), restarted, "the upgraded daemon does not run");
    assert_eq!(host.pid("inner"), pid);
    assert!(host.ok("catalyst vmpower list").contains("inner"));
    // A unit that is stopped leaves them too.
    host.ok("systemctl stop catalyst@catalyst");
    assert_eq!(host.ok(&format!("cat /proc/{pid}/comm")), "qemu-system-x86");
    host.ok("systemctl start catalyst@catalyst");
    assert_eq!(host.pid("inner"), pid);
}

fn shutdown(host: &Host<'_>) {
    assert!(host.ok("catalyst vm set inner --autostart 2>&1; catalyst vm show inner").contains("Autostart"));
    host.ok("systemctl poweroff --no-block");
    host.0.wait_for_state("host", "powered off", HANG);
    host.0.catalyst(&["vmpower", "on", "host"]).ok();
    // Before it, root would get a daemon of its own.
    wait_until("the unit has started", HANG, || {
        host.ok("systemctl is-active catalyst@catalyst || true") == "active"
    });
    let reason = host.ok("catalyst vm show other");
    assert!(reason.contains("powered off"), "{reason}");
    assert!(reason.contains("the host was shut down, and the guest did not shut down in time"), "{reason}");
}

fn autostart(host: &Host<'_>) {
    wait_until("the VM with autostart is on", HANG, || host.ok("catalyst vmpower list") == "inner");
    host.ok("catalyst vmpower off inner && systemctl restart catalyst@catalyst");
    // Autostart is looked at before the daemon ends, so what it begins shows within that time.
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(host.ok("catalyst vmpower list"), "");
    host.ok("catalyst vm set inner --autostart=false");
    assert!(!host.ok("catalyst vm show inner").contains("Autostart"));
}
