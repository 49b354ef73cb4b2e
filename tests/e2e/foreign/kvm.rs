//! On engine kvm, which has no firmware: a box is started by the kernel in its `/boot`.

use std::fs;
use std::path::Path;
use std::process::Command;

use catalyst_tests::world::{HANG, ran};
use catalyst_tests::{Checks, World};

use super::boxes::{self, Kind, Started};
use super::{refused, ssh, wait_for_ssh};
use crate::common::{lives, power, vm, vm_processes};

/// A card that is named by its slot, as guests do that are not told otherwise.
const NAMED: &str =
    "linux /boot/vmlinuz root=/dev/sda1 ro quiet console=ttyS0 mitigations=off\ninitrd /boot/initrd.img\n";

/// What these show.
pub fn kvm(checks: &mut Checks, world: &mut World) {
    checks.check(
        "a box without a kernel, and one whose kernel lacks virtio, are refused with what to do",
        || refuses(world),
    );
    checks.check(
        "a box with a qcow2 disk starts by its own kernel, is reached, shut down, and keeps what it wrote",
        || {
            qcow2(world);
        },
    );
    checks.check(
        "one with a compressed VMDK does too, which is copied once; its card has the name of its slot",
        || {
            vmdk(world);
        },
    );
    checks.check("a VM of an imported image starts by the kernel on it", || imported(world));
}

fn refuses(world: &World) {
    let small = boxes::small(&world.path("boxes/small"), Kind::Sparse, Started::PVSCSI);
    let bare = boxes::changed(&world.path("boxes/bare"), Kind::Qcow2, Started::PVSCSI, |disk| {
        let listed = debugfs(disk, &["ls -p /usr/lib/modules"]);
        let version = listed.split('/').find(|word| word.ends_with("amd64")).unwrap();
        debugfs(disk, &[&format!("rm /usr/lib/modules/{version}/modules.dep")]);
    });
    for (id, vmx, why) in [("small", small, "no kernel"), ("bare", bare, "virtio_blk")] {
        world.catalyst(&["vm", "create", id, "--from", vmx.to_str().unwrap()]).ok();
        let text = world.catalyst(&["vmpower", "on", id]).error(1).to_owned();
        assert!(text.contains(why) && text.contains("--engine qemu"), "{text}");
        assert_eq!(vm(world, id)["state"], "powered off");
        assert!(vm_processes(world).is_empty(), "nothing is left that looked for its kernel");
        world.catalyst(&["vm", "delete", id]).ok();
    }
}

fn debugfs(disk: &Path, commands: &[&str]) -> String {
    let mut said = String::new();
    for command in commands {
        let mut debugfs = Command::new("debugfs");
        debugfs.args(["-w", "-R", command]).arg(format!("{}?offset=1048576", disk.display()));
        said += ran(debugfs).ok();
    }
    said
}

fn on(world: &World, id: &str) -> String {
    world.catalyst(&["vmpower", "on", "--wait", "--timeout", "280", id]).ok();
    let address = world.catalyst(&["guest", "getip", id]).ok().to_owned();
    wait_for_ssh(world, &address);
    address
}

fn shut_down(world: &World, id: &str) {
    let pid = world.vm_pid(id).unwrap();
    world.catalyst(&["vmpower", "shutdown", id]).ok();
    assert_eq!(vm(world, id)["state"], "powered off");
    assert!(!lives(pid));
}

fn qcow2(world: &mut World) {
    let folder = world.path("boxes/deb");
    let vmx = boxes::debian(&folder, Kind::Qcow2, Started { nic: "vmxnet3", ..Started::SATA });
    let before = boxes::digests(&folder);
    world.catalyst(&["vm", "create", "deb", "--from", vmx.to_str().unwrap()]).ok();
    let address = on(world, "deb");
    assert_eq!(vm(world, "deb")["engine"], "kvm");
    let seen = ssh(world, &address, "cat /sys/class/net/eth0/address; findmnt -no SOURCE /").ok().to_owned();
    assert!(seen.contains(vm(world, "deb")["mac"].as_str().unwrap()) && seen.contains("/dev/vda1"), "{seen}");
    refused(world, "deb");
    let pid = world.vm_pid("deb").unwrap();
    world.kill_daemon();
    world.start_daemon();
    world.wait_for_state("deb", "powered on", HANG);
    assert_eq!(world.vm_pid("deb"), Some(pid));
    power(world, "deb", "pause");
    power(world, "deb", "unpause");
    assert!(ssh(world, &address, "echo written > note; sync").status.success());
    shut_down(world, "deb");
    assert_eq!(boxes::digests(&folder), before, "the box's own disk is not written");
    let address = on(world, "deb");
    assert_eq!(ssh(world, &address, "cat note").ok(), "written");
    world.catalyst(&["vm", "delete", "--force", "deb"]).ok();
    assert!(!folder.exists() && !world.vm_dir("deb").exists() && vm_processes(world).is_empty());
}

fn imported(world: &World) {
    let folder = world.path("boxes/image");
    boxes::debian(&folder, Kind::Qcow2, Started::SATA);
    let (path, template) = (folder.join("disk.qcow2"), format!("foreign-{}", std::process::id()));
    world.catalyst(&["image", "import", path.to_str().unwrap(), "--name", &template]).ok();
    world.catalyst(&["vm", "create", "of-image", "--template", &template]).ok();
    let address = on(world, "of-image");
    assert!(ssh(world, &address, "findmnt -no SOURCE /").ok().contains("/dev/vda1"));
    shut_down(world, "of-image");
    world.catalyst(&["vm", "delete", "of-image"]).ok();
    world.catalyst(&["template", "delete", &template]).ok();
}

fn vmdk(world: &World) {
    let folder = world.path("boxes/packed");
    let vmx = boxes::changed(&folder, Kind::Stream, Started::PVSCSI, |disk| {
        let config = disk.with_extension("cfg");
        fs::write(&config, NAMED).unwrap();
        debugfs(
            disk,
            &["rm /boot/grub/grub.cfg", &format!("write {} /boot/grub/grub.cfg", config.display())],
        );
        fs::remove_file(config).unwrap();
    });
    let before = boxes::digests(&folder);
    world.catalyst(&["vm", "create", "packed", "--from", vmx.to_str().unwrap()]).ok();
    let address = on(world, "packed");
    let seen = ssh(world, &address, "cat /sys/class/net/ens33/address; cat /proc/cmdline").ok().to_owned();
    assert!(seen.contains("00:0c:29:00:00:01") && seen.contains("root=/dev/vda1"), "{seen}");
    assert!(ssh(world, &address, "echo written > note; sync").status.success());
    let copy = world.vm_dir("packed").join("plain-disk.qcow2");
    let log = world.daemon_log();
    assert!(log.contains("copied into a qcow2") && log.contains("its VMDK is copied"), "{log}");
    let copied = copy.metadata().unwrap().modified().unwrap();
    shut_down(world, "packed");
    let address = on(world, "packed");
    assert_eq!(ssh(world, &address, "cat note").ok(), "written");
    assert_eq!(copy.metadata().unwrap().modified().unwrap(), copied, "the VMDK is copied once");
    assert_eq!(boxes::digests(&folder), before, "the box's own disk is not written");
    world.catalyst(&["vm", "delete", "--force", "packed"]).ok();
    assert!(!folder.exists());
}
