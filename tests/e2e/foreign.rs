//! VMs that are registered in place: boxes of others, with disks, controllers and loaders of others
//! (AppCatalyst reference sections 1.3 and 3.3).

pub mod boxes;
mod hostile;
mod kvm;
mod vagrant;

use std::fs;
use std::path::Path;

use catalyst_tests::world::{HANG, engine, ran};
use catalyst_tests::{Checks, World};

use crate::common::{
    healthy, legacy_error, lives, power, running, try_power, v1_error, vm, vm_processes, wait_until,
};
use boxes::{Kind, Started};

/// The group.
pub fn foreign(checks: &mut Checks) {
    let mut world = running();
    kept(checks, &mut world);
    hostile::hostile(checks, &world);
    hostile::owner(checks);
    if engine() == "kvm" {
        kvm::kvm(checks, &mut world);
        return checks.check("the daemon is well", || healthy(&world));
    }
    starts(checks, &world);
    checks.check("a box with a qcow2 disk, as libvirt has them: SATA, vmxnet3, UEFI", || qcow2(&mut world));
    checks.check("a box of old: its disk in parts on lsilogic, vlance, a BIOS", || old(&world));
    checks.check("Vagrant's plugin: a box from `up` to `destroy`", || vagrant::up_to_destroy(&world));
    checks.check("the daemon is well", || healthy(&world));
}

/// What needs no guest: what is registered is there, is changed, and goes with its files.
fn kept(checks: &mut Checks, world: &mut World) {
    checks.check("a registered VM is listed, shown and changed, also by the next daemon", || {
        let folder = world.path("boxes/web1");
        let vmx = boxes::small(&folder, Kind::Sparse, Started::PVSCSI);
        let ran = world.catalyst(&["vm", "create", "web1", "--from", vmx.to_str().unwrap(), "--tag", "box"]);
        ran.ok();
        assert!(ran.stderr.contains("Registered VM 'web1'"), "{}", ran.stderr);
        assert_eq!(world.catalyst(&["vm", "list"]).ok(), "web1");
        let shown = vm(world, "web1");
        assert_eq!(
            (&shown["cpus"], &shown["memory_mib"], &shown["disk_gib"]),
            (&1.into(), &128.into(), &3.into())
        );
        assert_eq!(
            (&shown["source"], &shown["name"]),
            (&vmx.to_str().unwrap().into(), &"A small box".into())
        );
        assert_eq!((&shown["mac"], &shown["template"]), (&"00:0c:29:00:00:01".into(), &"".into()));
        let text = world.catalyst(&["vm", "show", "web1"]).ok().to_owned();
        assert!(text.contains("Registered") && !text.contains("Template"), "{text}");
        let before = fs::read(&vmx).unwrap();
        let link = world.vm_dir("web1").join("web1.vmx");
        assert_eq!(fs::read(&link).unwrap(), before, "clients find the VMX where VMs have it");
        world.catalyst(&["vm", "set", "web1", "--memory", "256M", "--name", "Web", "--tag", "x"]).ok();
        assert!(fs::read_to_string(&vmx).unwrap().contains("memsize = \"256\""));
        world.kill_daemon();
        world.start_daemon();
        let again = vm(world, "web1");
        assert_eq!(
            (&again["memory_mib"], &again["name"], &again["tags"][0]),
            (&256.into(), &"Web".into(), &"x".into())
        );
        assert_eq!((&again["mac"], &again["address"]), (&shown["mac"], &shown["address"]));
    });
    checks.check("a VMX that is gone blocks the VM, and one that is back unblocks it", || {
        let vmx = world.path("boxes/web1/box.vmx");
        let good = fs::read(&vmx).unwrap();
        fs::remove_file(&vmx).unwrap();
        let blocked = vm(world, "web1");
        assert_eq!(blocked["state"], "blocked");
        assert!(blocked["reason"].as_str().unwrap().contains("box.vmx"), "{blocked}");
        assert_eq!(world.curl("GET", "/api/vms/power/web1", None).json()["message"], "blocked on msg");
        fs::write(&vmx, good).unwrap();
        assert_eq!(vm(world, "web1")["state"], "powered off");
    });
    checks.check("two boxes with one MAC have two addresses, and each its own MAC", || {
        let vmx = boxes::small(&world.path("boxes/web2"), Kind::Sparse, Started::PVSCSI);
        world.catalyst(&["vm", "create", "web2", "--from", vmx.to_str().unwrap()]).ok();
        let (one, two) = (vm(world, "web1"), vm(world, "web2"));
        assert_ne!(one["mac"], two["mac"]);
        assert_ne!(one["address"], two["address"]);
    });
    checks.check("delete takes the VM's files in their folder, and what else lies there stays", || {
        fs::write(world.path("boxes/web2/thesis.doc"), "years of work").unwrap();
        world.catalyst(&["vm", "delete", "web1", "web2"]).ok();
        assert!(!world.path("boxes/web1").exists() && !world.vm_dir("web1").exists());
        let left: Vec<_> = fs::read_dir(world.path("boxes/web2")).unwrap().flatten().collect();
        assert_eq!(left.len(), 1, "{left:?}");
        assert_eq!(world.catalyst(&["vm", "list"]).ok(), "");
    });
}

/// A loader of a few bytes tells that it was started, and that the disk's end is where it should be.
fn starts(checks: &mut Checks, world: &World) {
    for (kind, started) in [
        (Kind::Sparse, Started::PVSCSI),
        (Kind::Stream, Started::LSI),
        (Kind::Split, Started::SAS),
        (Kind::Flat, Started::SATA),
        (Kind::SplitFlat, Started::IDE),
        (Kind::Qcow2, Started::NVME),
    ] {
        checks.check(&format!("a disk of kind {} on {} starts", kind.name(), started.name), || {
            let folder = world.path("boxes/first");
            let vmx = boxes::small(&folder, kind, started);
            let before = boxes::digests(&folder);
            world.catalyst(&["vm", "create", "first", "--from", vmx.to_str().unwrap(), "--on"]).ok();
            let log = world.vm_dir("first").join("console.log");
            let told = || fs::read_to_string(&log).unwrap_or_default().contains(boxes::WORD);
            wait_until("its loader speaks", HANG, told);
            assert_eq!(vm(world, "first")["start_mode"], "cold");
            assert_eq!(boxes::digests(&folder), before, "the box's own disk is not written");
            world.catalyst(&["vm", "delete", "--force", "first"]).ok();
            assert!(!folder.exists() && vm_processes(world).is_empty());
        });
    }
    checks.check(
        "what a client changes in the VMX counts at the next power-on, also a disk that is new",
        || {
            let folder = world.path("boxes/first");
            let vmx = boxes::small(&folder, Kind::Sparse, Started::PVSCSI);
            world.catalyst(&["vm", "create", "first", "--from", vmx.to_str().unwrap()]).ok();
            boxes::disk(&folder, "more.vmdk", Kind::Sparse);
            let text = fs::read_to_string(&vmx).unwrap().replace("numvcpus = \"1\"", "numvcpus = \"2\"");
            let text =
                text + "scsi0:1.present = \"TRUE\"\nscsi0:1.filename = \"more.vmdk\"\nfirmware = \"bios\"\n";
            fs::write(&vmx, text).unwrap();
            power(world, "first", "on");
            let words = crate::common::arguments(world.vm_pid("first").unwrap()).join(" ");
            assert!(words.contains("-smp 2") && words.contains("scsi-id=1,drive=disk1"), "{words}");
            power(world, "first", "off");
            assert!(world.vm_dir("first").join("disk-2.qcow2").exists());
            world.catalyst(&["vm", "delete", "first"]).ok();
            assert!(!folder.exists());
        },
    );
}

/// The insecure way in that boxes have, from outside.
fn ssh(world: &World, address: &str, words: &str) -> catalyst_tests::Ran {
    let mut ssh = world.command("ssh");
    ssh.args(["-i", boxes::key().to_str().unwrap(), "-o", "UserKnownHostsFile=/dev/null"]);
    ssh.args([
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "BatchMode=yes",
        "-o",
        "ConnectTimeout=60",
        "-o",
        "LogLevel=ERROR",
    ]);
    ssh.arg(format!("vagrant@{address}")).arg(words);
    ran(ssh)
}

/// Until sshd listens.
fn wait_for_ssh(world: &World, address: &str) {
    wait_until("sshd answers", HANG, || ssh(world, address, "true").status.success());
}

fn qcow2(world: &mut World) {
    let folder = world.path("boxes/deb");
    let machine = Started { nic: "vmxnet3", firmware: boxes::efi(), ..Started::SATA };
    let vmx = boxes::debian(&folder, Kind::Qcow2, machine);
    let vmx = vmx.to_str().unwrap();
    world.catalyst(&["vm", "create", "deb", "--from", vmx, "--on", "--wait", "--timeout", "280"]).ok();
    let address = world.catalyst(&["guest", "getip", "deb"]).ok().to_owned();
    assert_eq!(vm(world, "deb")["address"], address.as_str());
    wait_for_ssh(world, &address);
    let seen =
        ssh(world, &address, "ls /sys/firmware; cat /sys/class/net/eth0/address; nproc").ok().to_owned();
    assert_eq!(seen.contains("efi"), machine.firmware == "efi", "{seen}");
    assert!(seen.contains(vm(world, "deb")["mac"].as_str().unwrap()), "{seen}");
    refused(world, "deb");
    // It outlives the daemon, and the next one finds it and its address.
    let pid = world.vm_pid("deb").unwrap();
    world.kill_daemon();
    world.start_daemon();
    world.wait_for_state("deb", "powered on", HANG);
    assert_eq!(world.vm_pid("deb"), Some(pid));
    world.catalyst(&["guest", "getip", "--wait", "deb"]).ok();
    power(world, "deb", "pause");
    legacy_error(&world.curl("GET", "/api/vms/deb/ipaddress", None), &[408, 500]);
    power(world, "deb", "unpause");
    assert!(ssh(world, &address, "echo written > note; sync").status.success());
    world.catalyst(&["vmpower", "shutdown", "deb"]).ok();
    assert_eq!(vm(world, "deb")["state"], "powered off");
    assert!(!lives(pid));
    assert!(written_to(&world.vm_dir("deb").join("disk.qcow2")), "what it wrote is in its overlay");
    world.catalyst(&["vm", "delete", "deb"]).ok();
    assert!(!folder.exists() && !world.vm_dir("deb").exists());
}

/// What no loader tells: its kernel finds the disk and the card too.
fn old(world: &World) {
    let vmx = boxes::debian(&world.path("boxes/old"), Kind::Split, Started { nic: "vlance", ..Started::LSI });
    let vmx = vmx.to_str().unwrap();
    world.catalyst(&["vm", "create", "old", "--from", vmx, "--on", "--wait", "--timeout", "280"]).ok();
    let address = world.catalyst(&["guest", "getip", "old"]).ok().to_owned();
    wait_for_ssh(world, &address);
    let seen = ssh(world, &address, "grep -l LABEL /etc/fstab; readlink /sys/class/net/eth0/device/driver")
        .ok()
        .to_owned();
    assert!(seen.contains("fstab") && seen.ends_with("/pcnet32"), "{seen}");
    world.catalyst(&["vm", "delete", "--force", "old"]).ok();
    assert!(!world.path("boxes/old").exists());
}

fn written_to(disk: &Path) -> bool {
    disk.metadata().unwrap().len() > 1 << 20
}

/// What such a VM cannot do is refused, and it goes on.
fn refused(world: &World, id: &str) {
    for (words, code) in [
        (&["vmpower", "suspend", id][..], 1),
        (&["vm", "clone", id, "copy"], 1),
        (&["vm", "snapshot", "create", id, "before"], 1),
        (&["guest", "exec", id, "true"], -1),
        (&["ssh", id, "--", "true"], -1),
    ] {
        let ran = world.catalyst(words);
        let code = if code < 0 { ran.code() } else { code };
        assert_ne!(code, 0, "{words:?}");
        let text = ran.error(code);
        assert!(text.contains("registered in place"), "{words:?}: {text}");
    }
    v1_error(&try_power(world, id, "suspend"), "not_yet");
    legacy_error(&world.curl("PATCH", &format!("/api/vms/power/{id}"), Some("suspend")), &[500]);
    legacy_error(
        &world.curl("POST", "/api/vms", Some(&format!(r#"{{"id":"c","parentId":"{id}"}}"#))),
        &[500],
    );
    assert_eq!(vm(world, id)["state"], "powered on");
}
