//! The Vagrant provider of drivers/vagrant: the real Vagrant, with real VMs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use catalyst_tests::world::{Ran, long_enough, ran, run};
use catalyst_tests::{Checks, World, skip};
use serde_json::Value;

use crate::common::vm;
use crate::foreign::boxes;

const DRIVER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../drivers/vagrant");
/// Two machines that come up by themselves, and one that is a clone of the first.
const VAGRANTFILE: &str = r#"
Vagrant.configure("2") do |config|
  config.vm.synced_folder ".", "/vagrant", disabled: true
  config.vm.provision "shell", inline: "echo by $(id -un) on $(hostname) >>/etc/made"
  %w[web db].each { |name| config.vm.define(name) { |machine| machine.vm.hostname = name } }
  config.vm.define "copy", autostart: false do |machine|
    machine.vm.hostname = "copy"
    machine.vm.provider("catalyst") { |catalyst| catalyst.clone_from = "web" }
  end
end
"#;

/// One machine, with the folder that Vagrant shares by itself.
const FOLDER: &str = r#"
Vagrant.configure("2") do |config|
  config.vm.define("files") { |machine| machine.vm.hostname = "files" }
end
"#;
/// Three machines that want one port; the last takes no other.
const PORT: &str = r#"
Vagrant.configure("2") do |config|
  config.vm.synced_folder ".", "/vagrant", disabled: true
  config.vm.network :forwarded_port, guest: 8000, host: 8000, auto_correct: true
  %w[one two].each { |name| config.vm.define(name) { |machine| machine.vm.hostname = name } }
  config.vm.define "three", autostart: false do |machine|
    machine.vm.network :forwarded_port, guest: 8000, host: 8000, auto_correct: false
  end
end
"#;

/// A machine of a box whose key is not Vagrant's own.
const BOX: &str = r#"
Vagrant.configure("2") do |config|
  config.vm.box = "small"
  config.vm.boot_timeout = 280
  config.vm.synced_folder ".", "/vagrant", disabled: true
  config.ssh.private_key_path = "KEY"
  config.ssh.insert_key = false
end
"#;

/// A folder with a Vagrantfile in a world, and a Vagrant that has nothing but the gem.
struct Project {
    world: World,
    folder: PathBuf,
}

impl Project {
    fn new() -> Self {
        let world = World::empty();
        if Command::new("vagrant").arg("--version").output().is_err() {
            skip("Vagrant is not installed: make setup-tests");
        }
        let folder = world.path("shop");
        fs::create_dir(&folder).unwrap();
        let project = Self { world, folder };
        project.vagrantfile(VAGRANTFILE);
        project
    }

    /// Writes the Vagrantfile, with a line for all machines.
    fn with(&self, line: &str) {
        self.vagrantfile(&VAGRANTFILE.replace("  %w[web", &format!("  {line}\n  %w[web")));
    }

    fn vagrantfile(&self, text: &str) {
        fs::write(self.folder.join("Vagrantfile"), text).unwrap();
    }

    fn vagrant(&self, args: &[&str]) -> Ran {
        let mut command = self.world.command("vagrant");
        command.args(args).current_dir(&self.folder);
        command.env("VAGRANT_HOME", self.world.path("vagrant")).env("VAGRANT_CHECKPOINT_DISABLE", "1");
        ran(command)
    }

    /// What a command prints in a machine, by Vagrant's SSH.
    #[track_caller]
    fn ssh(&self, machine: &str, script: &str) -> String {
        self.vagrant(&["ssh", machine, "-c", script]).ok().replace('\r', "")
    }

    /// What a command prints in a machine, without Vagrant.
    #[track_caller]
    fn guest(&self, machine: &str, script: &str) -> String {
        self.world.catalyst(&["guest", "exec", machine, "--", "sh", "-c", script]).ok().to_owned()
    }

    fn state(&self, machine: &str) -> Value {
        vm(&self.world, machine)["state"].clone()
    }
}

/// The group.
pub fn vagrant(checks: &mut Checks) {
    let mut project = Project::new();
    begin(checks, &mut project);
    go_on(checks, &project);
    go_back(checks, &project);
    folder(checks, &project);
    port(checks, &project);
    of_a_box(checks, &project);
    end(checks, &project);
}

fn begin(checks: &mut Checks, project: &mut Project) {
    checks.check("the gem is installed by one command, without a network", || {
        let gem = project.world.path("vagrant-catalyst.gem");
        let mut build = Command::new("gem");
        build.args(["build", "vagrant-catalyst.gemspec", "-o"]).arg(&gem).current_dir(DRIVER);
        run(&mut build);
        project.vagrant(&["plugin", "install", "--plugin-clean-sources", gem.to_str().unwrap()]).ok();
    });
    checks.check("without a daemon it says how to start one", || {
        let ran = project.vagrant(&["up"]);
        assert_eq!(ran.code(), 1, "{}{}", ran.stdout, ran.stderr);
        assert!(ran.stderr.contains("sudo catalyst-daemon --background --owner"), "{}", ran.stderr);
    });
    project.world.start_daemon();
    checks.check("two machines come up at the same time, and are provisioned", || {
        project.world.warm();
        let ran = project.vagrant(&["up"]);
        let at = |words: &str| ran.ok().find(words).unwrap_or_else(|| panic!("no {words}: {}", ran.stdout));
        assert!(at("db: Creating") < at("web: Machine booted"), "{}", ran.stdout);
        assert!(at("web: Creating") < at("db: Machine booted"), "{}", ran.stdout);
        for name in ["web", "db"] {
            assert_eq!(project.guest(name, "cat /etc/made"), format!("by root on {name}"));
        }
    });
    checks.check("ssh logs in, and has the command's output and exit code", || {
        let script = "id -un; hostname; getent hosts db | tr -s ' ' | cut -d' ' -f2";
        assert_eq!(project.ssh("web", script), "catalyst\nweb\ndb.catalyst");
        assert_eq!(project.vagrant(&["ssh", "web", "-c", "exit 7"]).code(), 7);
    });
}

fn go_on(checks: &mut Checks, project: &Project) {
    checks.check(
        "a machine is shut down by its guest; up starts it, and only provision provisions it again",
        || {
            project.vagrant(&["halt", "web"]).ok();
            assert_eq!(project.state("web"), "powered off");
            assert!(vm(&project.world, "web")["reason"].as_str().unwrap().contains("guest"));
            project.vagrant(&["up", "web"]).ok();
            assert_eq!(project.guest("web", "wc -l </etc/made"), "1");
            project.vagrant(&["provision", "web"]).ok();
            assert_eq!(project.guest("web", "wc -l </etc/made"), "2");
        },
    );
    checks.check("suspend and resume: it goes on where it was", || {
        let random = "head -c16 /dev/urandom | od -An -tx1 | tr -d ' ' | tee /dev/shm/nonce";
        let nonce = project.guest("web", random);
        project.vagrant(&["suspend", "web"]).ok();
        assert_eq!(project.state("web"), "suspended");
        project.vagrant(&["resume", "web"]).ok();
        assert_eq!(project.guest("web", "cat /dev/shm/nonce"), nonce);
    });
    checks.check("a machine that runs is cloned with its memory, and is itself", || {
        let nonce = project.guest("web", "cat /dev/shm/nonce");
        project.vagrant(&["up", "copy"]).ok();
        assert_eq!(project.ssh("copy", "cat /dev/shm/nonce; hostname"), format!("{nonce}\ncopy"));
    });
    checks.check("a VM that is deleted behind Vagrant's back is not created, and nothing worse", || {
        project.world.catalyst(&["vm", "delete", "--force", "copy"]).ok();
        let ran = project.vagrant(&["status", "copy"]);
        assert!(ran.ok().contains("not created"), "{}", ran.stdout);
    });
}

fn go_back(checks: &mut Checks, project: &Project) {
    checks.check("a snapshot brings back memory and disk", || {
        project.guest("web", "echo one >/dev/shm/at; echo one >/root/at; sync");
        project.vagrant(&["snapshot", "save", "web", "one"]).ok();
        project.guest("web", "echo two >/dev/shm/at; echo two >/root/at; sync");
        assert!(project.vagrant(&["snapshot", "list", "web"]).ok().contains("one"));
        project.vagrant(&["snapshot", "restore", "web", "one"]).ok();
        assert_eq!(project.ssh("web", "cat /dev/shm/at; sudo cat /root/at"), "one\none");
    });
    checks.check("reload takes what the Vagrantfile says now", || {
        project.with("config.vm.provider(:catalyst) { |catalyst| catalyst.cpus = 99 }");
        let ran = project.vagrant(&["reload", "db"]);
        assert!(ran.code() == 1 && ran.stderr.contains("from 1 to 32"), "{}{}", ran.stdout, ran.stderr);
        project.with("config.vm.provider(:catalyst) { |catalyst| catalyst.cpus = 2 }");
        project.vagrant(&["reload", "db"]).ok();
        assert_eq!(project.guest("db", "nproc"), "2");
    });
}

/// The Vagrantfile's folder is at `/vagrant`, for both sides.
fn folder(checks: &mut Checks, project: &Project) {
    checks.check("the project's folder is the guest's /vagrant", || {
        project.vagrantfile(FOLDER);
        fs::write(project.folder.join("from-host"), "host").unwrap();
        project.vagrant(&["up"]).ok();
        assert_eq!(project.ssh("files", "cat /vagrant/from-host; echo guest >/vagrant/from-guest"), "host");
        assert_eq!(fs::read_to_string(project.folder.join("from-guest")).unwrap(), "guest\n");
        project.vagrant(&["suspend"]).ok();
        fs::write(project.folder.join("from-host"), "later").unwrap();
        project.vagrant(&["resume"]).ok();
        assert_eq!(project.ssh("files", "cat /vagrant/from-host"), "later");
        project.vagrant(&["destroy", "-f"]).ok();
        assert_eq!(fs::read_to_string(project.folder.join("from-host")).unwrap(), "later");
    });
}

/// A port of the host leads to the guest; a machine whose port is taken gets another if it may.
fn port(checks: &mut Checks, project: &Project) {
    checks.check("ports are forwarded, and another is found for one that is taken", || {
        project.vagrantfile(PORT);
        project.vagrant(&["up"]).ok();
        let served = |name: &str| {
            project.guest(name, "hostname >/tmp/index.html; busybox httpd -p 8000 -h /tmp");
            let port = project.vagrant(&["port", name, "--guest", "8000"]).ok().to_owned();
            let mut curl = project.world.command("curl");
            curl.args(["-s", "--max-time", &long_enough(), &format!("http://127.0.0.1:{port}/index.html")]);
            assert_eq!(ran(curl).ok(), name);
            port
        };
        let mut ports = [served("one"), served("two")];
        ports.sort();
        assert_eq!(ports, ["2200", "8000"]);
        let ran = project.vagrant(&["up", "three"]);
        assert!(ran.code() == 1 && ran.stderr.contains("auto_correct: true"), "{}{}", ran.stdout, ran.stderr);
        project.vagrant(&["destroy", "-f"]).ok();
    });
}

/// Boxes of others have a disk that starts by its own loader, and no agent.
fn of_a_box(checks: &mut Checks, project: &Project) {
    checks.check("a box of libvirt's is added, comes up, is shut down by its guest, and goes", || {
        let folder = project.world.path("libvirt");
        boxes::debian(&folder, boxes::Kind::Qcow2, boxes::Started::SATA);
        fs::rename(folder.join("disk.qcow2"), folder.join("box.img")).unwrap();
        let metadata = r#"{"provider": "libvirt", "format": "qcow2", "virtual_size": 2}"#;
        comes_up(project, &folder, metadata, &["box.img"]);
        project.vagrant(&["halt"]).ok();
        assert!(project.vagrant(&["status"]).ok().contains("powered off"));
        goes(project, &folder);
    });
    checks.check("so does one of AppCatalyst's time: a VMX, and a compressed VMDK on pvscsi", || {
        let folder = project.world.path("vmware");
        boxes::debian(&folder, boxes::Kind::Stream, boxes::Started::PVSCSI);
        comes_up(project, &folder, r#"{"provider": "vmware_desktop"}"#, &["box.vmx", "disk.vmdk"]);
        goes(project, &folder);
    });
}

/// Packs the files of a folder as a box, adds it, and brings a machine of it up.
fn comes_up(project: &Project, folder: &Path, metadata: &str, files: &[&str]) {
    fs::write(folder.join("metadata.json"), metadata).unwrap();
    let packed = folder.with_extension("box");
    let mut tar = Command::new("tar");
    run(tar.arg("-C").arg(folder).arg("-cf").arg(&packed).arg("metadata.json").args(files));
    let name = folder.file_name().unwrap().to_str().unwrap();
    project.vagrantfile(&BOX.replace("small", name).replace("KEY", boxes::key().to_str().unwrap()));
    project.vagrant(&["box", "add", "--name", name, packed.to_str().unwrap()]).ok();
    project.vagrant(&["up"]).ok();
    assert_eq!(project.ssh("default", "hostname; id -un"), "box\nvagrant");
}

fn goes(project: &Project, folder: &Path) {
    project.vagrant(&["destroy", "-f"]).ok();
    fs::remove_dir_all(folder).unwrap();
}

fn end(checks: &mut Checks, project: &Project) {
    checks.check("destroy leaves nothing", || {
        project.vagrantfile(VAGRANTFILE);
        project.vagrant(&["destroy", "-f"]).ok();
        assert_eq!(project.world.catalyst(&["vm", "list"]).ok(), "");
        let machines = project.folder.join(".vagrant/machines");
        assert!(!machines.join("web/catalyst/id").exists());
        let ran = project.vagrant(&["destroy", "-f"]);
        assert!(ran.ok().contains("VM not created"), "{}", ran.stdout);
    });
}
