//! Boxes that lie, and what clients do wrong with those that do not.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use catalyst_tests::{Checks, World};
use serde_json::json;

use super::boxes::{self, Kind, Started};
use crate::common::{legacy_error, power, quiet, try_power, v1_error, vm};

pub fn hostile(checks: &mut Checks, world: &World) {
    paths(checks, world);
    boxed(checks, world);
    checks.check("nothing of it has become a VM", || {
        assert_eq!(world.curl("GET", "/api/vms", None).body, "[]");
        assert_eq!(fs::read_dir(world.state_dir().join("vms")).unwrap().count(), 0);
        assert_eq!(world.curl("GET", "/v1/network", None).json()["leases"], 0);
    });
}

/// Tries to register, by either API, and gives the message.
fn refused(world: &World, path: &str) -> String {
    let body = json!({"id": "bad", "name": "", "tag": "", "sourceReference": path}).to_string();
    let text = legacy_error(&world.curl("POST", "/api/vms", Some(&body)), &[400, 409, 500]);
    let body = json!({"id": "bad", "source": path}).to_string();
    let answer = world.curl("POST", "/v1/vms", Some(&body));
    assert!((400..600).contains(&answer.status), "{answer:?}");
    text
}

fn paths(checks: &mut Checks, world: &World) {
    checks.check("what is no VMX of the owner's is not registered", || {
        let vmx = boxes::small(&world.path("boxes/good"), Kind::Sparse, Started::PVSCSI);
        let folder = world.path("boxes/bad");
        fs::create_dir_all(&folder).unwrap();
        symlink(&vmx, folder.join("link.vmx")).unwrap();
        fs::create_dir(folder.join("folder.vmx")).unwrap();
        nix::unistd::mkfifo(&folder.join("pipe.vmx"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::write(folder.join("long.vmx"), vec![b'#'; 1 << 20]).unwrap();
        fs::write(folder.join("binary.vmx"), [0xff, 0xfe, 0]).unwrap();
        fs::write(folder.join("empty.vmx"), "").unwrap();
        let inside = |name: &str| folder.join(name).to_str().unwrap().to_owned();
        for path in [
            "relative.vmx".to_owned(),
            "/etc/passwd".to_owned(),
            "/".to_owned(),
            "/nowhere/box.vmx".to_owned(),
            "/a\u{0}b.vmx".to_owned(),
            format!("/{}.vmx", "a".repeat(5000)),
            inside("link.vmx"),
            inside("folder.vmx"),
            inside("pipe.vmx"),
            inside("long.vmx"),
            inside("binary.vmx"),
            inside("empty.vmx"),
        ] {
            let text = refused(world, &path);
            assert!(text.len() < 6000, "{text}");
        }
        assert!(refused(world, &inside("empty.vmx")).contains("no disk"));
        let text = world.catalyst(&["vm", "create", "bad", "--from", "/nowhere/box.vmx"]).error(1).to_owned();
        assert!(text.contains("/nowhere/box.vmx"), "{text}");
        world.catalyst(&["vm", "create", "bad", "--from", vmx.to_str().unwrap(), "--cpus", "2"]).error(2);
        let body = json!({"id": "bad", "source": vmx, "cpus": 2}).to_string();
        v1_error(&world.curl("POST", "/v1/vms", Some(&body)), "invalid_request");
        let body = json!({"id": "bad", "parentId": "x", "sourceReference": vmx}).to_string();
        legacy_error(&world.curl("POST", "/api/vms", Some(&body)), &[400]);
    });
    checks.check("one VMX is one VM, and a VM's own file is none to register", || {
        let vmx = world.path("boxes/good/box.vmx");
        world.catalyst(&["vm", "create", "good", "--from", vmx.to_str().unwrap()]).ok();
        assert!(refused(world, vmx.to_str().unwrap()).contains("'good'"));
        world.catalyst(&["vm", "create", "web1"]).ok();
        let own = world.vm_dir("web1").join("web1.vmx");
        assert!(refused(world, own.to_str().unwrap()).contains("clone"));
        let body = json!({"id": "good", "sourceReference": vmx}).to_string();
        legacy_error(&world.curl("POST", "/api/vms", Some(&body)), &[409]);
        world.catalyst(&["vm", "delete", "good", "web1"]).ok();
        assert!(!vmx.exists());
    });
}

/// The daemon is root, and does to files what their owner may.
pub fn owner(checks: &mut Checks) {
    /// A user that every Debian has (`backup`).
    const UID: u32 = 34;
    let mut world = quiet();
    world.give_to(UID);
    world.start_daemon();
    checks.check("an owner registers what it may read, and deletes what it may delete", || {
        let secret = world.path("secret");
        let vmx = boxes::small(&secret, Kind::Sparse, Started::PVSCSI);
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o700)).unwrap();
        let create =
            |id: &str, vmx: &Path| world.catalyst(&["vm", "create", id, "--from", vmx.to_str().unwrap()]);
        assert!(create("bad", &vmx).error(1).contains("Cannot open"));
        let folder = world.path("shared");
        let vmx = boxes::small(&folder, Kind::Sparse, Started::PVSCSI);
        create("web1", &vmx).ok();
        let overlay = world.vm_dir("web1").join("disk.qcow2").metadata().unwrap();
        assert_eq!((overlay.uid(), overlay.mode() & 0o777), (UID, 0o600));
        let text = world.catalyst(&["vm", "delete", "web1"]).error(1).to_owned();
        assert!(text.contains("shared"), "{text}");
        assert_eq!(world.catalyst(&["vm", "list"]).ok(), "web1", "what is left of it can be deleted later");
        assert!(vmx.exists());
        for path in [&folder, &vmx] {
            chown(path, Some(UID), Some(UID)).unwrap();
        }
        world.catalyst(&["vm", "delete", "web1"]).ok();
        assert!(!vmx.exists());
    });
}

fn boxed(checks: &mut Checks, world: &World) {
    checks.check("a box whose disks lead out of its folder is not registered", || {
        let folder = world.path("boxes/evil");
        let secret = world.path("secret.vmdk");
        fs::write(&secret, vec![b's'; 1 << 20]).unwrap();
        for name in [
            "../../secret.vmdk",
            "/etc/shadow",
            secret.to_str().unwrap(),
            "link.vmdk",
            "box.vmx",
            "thesis.doc",
        ] {
            let vmx = boxes::small(&folder, Kind::Flat, Started::PVSCSI);
            let _ = symlink(&secret, folder.join("link.vmdk"));
            fs::write(folder.join("thesis.doc"), vec![b't'; 1 << 20]).unwrap();
            // The VMX names it, or the descriptor of a disk does.
            let text = fs::read_to_string(&vmx).unwrap();
            fs::write(&vmx, text.replace("Small disk.vmdk", name)).unwrap();
            refused(world, vmx.to_str().unwrap());
            fs::write(&vmx, &text).unwrap();
            let extent = format!(
                "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\nRW 2048 FLAT \"{name}\" 0\n"
            );
            fs::write(folder.join("Small disk.vmdk"), extent).unwrap();
            refused(world, vmx.to_str().unwrap());
            fs::remove_dir_all(&folder).unwrap();
        }
        assert!(secret.exists());
    });
    checks.check("machines and disks that there are not are named", || {
        let folder = world.path("boxes/odd");
        let vmx = boxes::small(&folder, Kind::Sparse, Started::PVSCSI);
        let good = fs::read_to_string(&vmx).unwrap();
        for (line, word) in [
            ("firmware = \"coreboot\"", "efi"),
            ("scsi0.virtualdev = \"buslogic\"", "pvscsi"),
            ("ethernet0.virtualdev = \"token ring\"", "vmxnet3"),
            ("numvcpus = \"1000\"", "CPU"),
            ("memsize = \"1\"", "emory"),
            ("memsize = \"much\"", "number"),
            ("scsi0:1.present = \"TRUE\"\nscsi0:1.filename = \"gone.vmdk\"", "gone.vmdk"),
        ] {
            fs::write(&vmx, format!("{good}{line}\n")).unwrap();
            let text = refused(world, vmx.to_str().unwrap());
            assert!(text.contains(word), "{line}: {text}");
        }
        fs::remove_dir_all(&folder).unwrap();
    });
    checks.check("what becomes of a box later is named at power-on", || {
        let folder = world.path("boxes/later");
        let vmx = boxes::small(&folder, Kind::Sparse, Started::PVSCSI);
        world.catalyst(&["vm", "create", "later", "--from", vmx.to_str().unwrap()]).ok();
        let disk = folder.join("Small disk.vmdk");
        let good = fs::read(&disk).unwrap();
        fs::remove_file(&disk).unwrap();
        symlink("/etc/shadow", &disk).unwrap();
        let text = v1_error(&try_power(world, "later", "on"), "internal");
        assert!(text.contains("Small disk.vmdk") && !text.contains("root:"), "{text}");
        fs::remove_file(&disk).unwrap();
        assert!(v1_error(&try_power(world, "later", "on"), "internal").contains("missing"));
        fs::write(&disk, "no disk").unwrap();
        assert!(v1_error(&try_power(world, "later", "on"), "internal").contains("neither a VMDK"));
        fs::write(&disk, good).unwrap();
        if catalyst_tests::world::engine() == "qemu" {
            power(world, "later", "on");
            power(world, "later", "off");
        }
        let damaged = world.vm_dir("later").join("registered.json");
        fs::write(&damaged, "{").unwrap();
        assert_eq!(vm(world, "later")["state"], "blocked");
        assert_eq!(world.curl("DELETE", "/api/vms/later", None).status, 204);
        assert!(disk.exists(), "what it stood for is not known any more");
        fs::remove_dir_all(&folder).unwrap();
    });
}
