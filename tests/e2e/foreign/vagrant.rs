//! The requests of `vagrant-vmware-appcatalyst` 1.1.1, in its order and its form (AppCatalyst reference section 3.2).

use std::fs;
use std::time::{Duration, Instant};

use catalyst_tests::{Answer, World};
use serde_json::json;

use super::boxes::{self, Kind, Started};
use super::{ssh, wait_for_ssh};
use crate::common::{legacy_error, vm_processes};

/// Its HTTP client gives up after this long.
const PATIENCE: Duration = Duration::from_mins(1);
const ID: &str = "vagrant-6d1f2a0e-3b1c-4c5e-9a7d-0a8d5c1e2f30";

/// A client of the plugin's: before each thing that it does it looks whether the daemon is one that it knows.
struct Plugin<'a>(&'a World);

impl Plugin<'_> {
    fn ask(&self, method: &str, path: &str, body: Option<&str>) -> Answer {
        let description = self.0.curl("GET", "/json/swagger.json", None);
        assert_eq!(description.status, 200);
        assert_eq!(description.json()["info"]["version"], "1.0.0");
        let begun = Instant::now();
        let options = ["-X", method, "-H", "Content-Type: application/json"];
        let answer = self.0.curl_with(&options, path, body.map(str::as_bytes));
        assert!(begun.elapsed() < PATIENCE, "{method} {path} took {:?}", begun.elapsed());
        // Whatever has a body is parsed.
        assert!(
            answer.body.is_empty() && answer.status == 204
                || answer.json().is_object()
                || answer.json().is_array()
        );
        answer
    }

    fn state(&self) -> String {
        let answer = self.ask("GET", &format!("/api/vms/power/{ID}"), None);
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()["message"].as_str().unwrap().to_owned()
    }

    fn power(&self, word: &str) -> Answer {
        self.ask("PATCH", &format!("/api/vms/power/{ID}"), Some(word))
    }

    /// As it waits for a machine that was just switched on: one that does not run fails it at once.
    fn wait_for_address(&self) -> String {
        for _ in 0..60 {
            assert!(["powering on", "powered on", "tools_running"].contains(&self.state().as_str()));
            let answer = self.ask("GET", &format!("/api/vms/{ID}/ipaddress"), None);
            if answer.status == 200 {
                let address = answer.json()["message"].as_str().unwrap().to_owned();
                assert!(!address.is_empty());
                return address;
            }
            legacy_error(&answer, &[408, 500]);
            std::thread::sleep(Duration::from_secs(2));
        }
        panic!("no address after 60 tries");
    }

    fn halt(&self) {
        if ["powering on", "powered on", "tools_running"].contains(&self.state().as_str()) {
            let answer = self.power("shutdown");
            assert_eq!(answer.status, 200, "{answer:?}");
            assert_eq!(self.state(), "powered off");
        }
    }
}

/// What it does with the box's VMX: keys in lower case, sorted, other lines dropped, its own keys set.
fn edit(vmx: &std::path::Path) {
    let text = fs::read_to_string(vmx).unwrap();
    let ours = ["memsize", "numvcpus", "virtualhw.version", "svga.vgaonly"];
    let pairs = text.lines().filter_map(|line| line.split_once(" = "));
    let mut lines: Vec<String> = pairs
        .map(|(key, value)| (key.to_lowercase(), value))
        .filter(|(key, value)| value.starts_with('"') && !ours.contains(&key.as_str()))
        .map(|(key, value)| format!("{key} = {value}"))
        .collect();
    for (key, value) in ours.iter().zip(["400", "2", "11", "TRUE"]) {
        lines.push(format!("{key} = \"{value}\""));
    }
    lines.sort();
    fs::write(vmx, lines.join("\n") + "\n").unwrap();
}

/// Its folders: it takes away what is there, switches sharing on, and is told at once that this guest has no agent to mount any.
fn not_shared(plugin: &Plugin, world: &World) {
    let folders = format!("/api/vms/{ID}/folders");
    assert_eq!(plugin.ask("GET", &folders, None).json(), json!([]));
    assert_eq!(plugin.ask("PATCH", &folders, Some("true")).status, 200);
    let share = json!({"guestPath": "vagrant", "hostPath": world.path("machines"), "flags": 4});
    let text = legacy_error(&plugin.ask("POST", &folders, Some(&share.to_string())), &[500]);
    assert!(text.contains("no agent"), "{text}");
    assert_eq!(plugin.ask("GET", &folders, None).json(), json!([]));
}

/// `up`, `reload`'s halt and start without a word between, `halt`, `destroy`.
pub fn up_to_destroy(world: &World) {
    let plugin = Plugin(world);
    let folder = world.path(&format!("machines/{ID}"));
    let vmx = boxes::debian(&folder, Kind::Stream, Started::PVSCSI);
    for name in ["metadata.json", "box.nvram", "box.vmsd", "box.vmxf", "Vagrantfile"] {
        fs::write(folder.join(name), "{\"provider\":\"vmware_desktop\"}").unwrap();
    }
    edit(&vmx);
    let body = json!({"id": ID, "name": "Vagrant: default", "sourceReference": vmx, "tag": "vagrant"});
    let answer = plugin.ask("POST", "/api/vms", Some(&body.to_string()));
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(
        answer.json(),
        json!({"id": ID, "parentId": "", "name": "Vagrant: default", "tag": "vagrant", "sourceReference": vmx})
    );
    assert!(plugin.ask("GET", "/api/vms", None).json().as_array().unwrap().contains(&json!(ID)));
    assert_eq!(plugin.state(), "powered off");
    assert_eq!(plugin.power("on").status, 200);
    let address = plugin.wait_for_address();
    wait_for_ssh(world, &address);
    let seen = ssh(world, &address, "nproc; cat /proc/meminfo | head -1; cat /sys/class/net/eth0/address")
        .ok()
        .to_owned();
    assert!(seen.starts_with("2\n") && seen.ends_with("00:0c:29:00:00:01"), "{seen}");
    let memory: u32 = seen.lines().nth(1).unwrap().split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!((300_000..400 * 1024).contains(&memory), "{seen}");
    // A guest that names its cards for their slots has ens33, as it had before.
    let seen = ssh(world, &address, "cat /sys/bus/pci/slots/33/address; readlink /sys/class/net/eth0/device");
    let (slot, card) = seen.ok().split_once('\n').unwrap();
    assert!(card.ends_with(&format!("/{slot}.0")), "{slot} {card}");
    not_shared(&plugin, world);
    plugin.halt();
    // `reload` halts and starts, and asks whether it runs with nothing between.
    assert_eq!(plugin.power("on").status, 200);
    assert!(["powering on", "powered on"].contains(&plugin.state().as_str()));
    // What it does where a shutdown fails.
    assert_eq!(plugin.power("off").status, 200);
    assert_eq!(plugin.state(), "powered off");
    assert!(vm_processes(world).is_empty());
    assert_eq!(plugin.ask("DELETE", &format!("/api/vms/{ID}"), None).status, 204);
    assert!(!folder.exists(), "nobody else deletes a box's files");
    legacy_error(&plugin.ask("GET", &format!("/api/vms/power/{ID}"), None), &[404]);
}
