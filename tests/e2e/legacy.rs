//! The AppCatalyst contract as its clients use it, without a booted guest (AppCatalyst reference sections 1.1 to 1.5), and
//! with one as docker-machine's driver of 2015 uses it (section 4.1).

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use catalyst_tests::world::{HANG, engine};
use catalyst_tests::{Checks, World};
use serde_json::json;

use crate::common::{arguments, healthy, legacy_error, lives, running, vm, vm_processes, wait_until};

/// The group.
pub fn legacy(checks: &mut Checks) {
    let world = running();
    vms(checks, &world);
    powers(checks, &world);
    rewritten(checks, &world);
    later(checks, &world);
    deleted(checks, &world);
    checks.check("the daemon is well", || healthy(&world));
}

/// The group of docker-machine's driver of 2015.
pub fn driver_2015(checks: &mut Checks) {
    let world = World::new();
    driver_creates(checks, &world);
    driver_shares(checks, &world);
    driver_stops(checks, &world);
}

/// A request as Go sends it: no content type. The answer is one of success, and an object with the keys.
#[track_caller]
fn go(world: &World, method: &str, path: &str, body: Option<&str>, keys: &[&str]) -> serde_json::Value {
    let options = ["-X", method, "-H", "Content-Type:", "-H", "User-Agent: Go-http-client/1.1"];
    let answer = world.curl_with(&options, path, body.map(str::as_bytes));
    assert!([200, 201, 202, 204].contains(&answer.status), "{method} {path}: {answer:?}");
    if keys.is_empty() {
        return serde_json::Value::Null;
    }
    let object = answer.json();
    assert!(keys.iter().all(|key| object.get(key).is_some()), "{method} {path}: {answer:?}");
    object
}

/// Its rewriting of one value of a VMX: keys in lower case and in order, and only what has the form `key = "value"`.
fn set_vmx_value(world: &World, id: &str, key: &str, value: &str) {
    let path = world.vm_dir(id).join(format!("{id}.vmx"));
    let text = fs::read_to_string(&path).unwrap();
    let pairs = text.lines().filter_map(|line| {
        let (key, value) = line.split_once('=')?;
        Some((key.trim().to_lowercase(), value.trim().strip_prefix('"')?.strip_suffix('"')?.to_owned()))
    });
    let mut values: BTreeMap<String, String> = pairs.collect();
    values.insert(key.to_owned(), value.to_owned());
    let lines: String = values.iter().map(|(key, value)| format!("{key} = \"{value}\"\n")).collect();
    fs::write(&path, lines).unwrap();
}

fn driver_creates(checks: &mut Checks, world: &World) {
    let reply = ["code", "message"];
    checks.check("docker-machine's driver of 2015 creates a machine", || {
        let made = go(
            world,
            "POST",
            "/api/vms",
            Some(r#"{"id":"m1","name":"m1","tag":"photon"}"#),
            &["id", "name", "tag"],
        );
        assert_eq!(
            (&made["id"], &made["name"], &made["tag"]),
            (&json!("m1"), &json!("m1"), &json!("photon"))
        );
        set_vmx_value(world, "m1", "memsize", "512");
        set_vmx_value(world, "m1", "numvcpus", "2");
        go(world, "PATCH", "/api/vms/power/m1", Some("on"), &reply);
        // Anything else than these is an error or a stopped machine to it, at once.
        let state = go(world, "GET", "/api/vms/power/m1", None, &reply);
        assert!(["powering on", "powered on"].contains(&state["message"].as_str().unwrap()), "{state}");
    });
    checks.check("it gets the address in one of its 60 tries, and what it wrote counts in the guest", || {
        let address = (0..60).find_map(|_| {
            let answer = world.curl("GET", "/api/vms/m1/ipaddress", None);
            if answer.status == 200 {
                return Some(answer.json()["message"].as_str().unwrap().to_owned());
            }
            legacy_error(&answer, &[408, 500]);
            std::thread::sleep(Duration::from_secs(2));
            None
        });
        assert_eq!(vm(world, "m1")["address"], json!(address.expect("an address")));
        let script = "nproc; sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo";
        let told = world.catalyst(&["guest", "exec", "m1", "--timeout", "280", "--", "sh", "-c", script]);
        let told: Vec<u64> = told.ok().lines().map(|line| line.parse().unwrap()).collect();
        // The kernel keeps some of the memory for itself.
        assert!(told[0] == 2 && (400 << 10..=512 << 10).contains(&told[1]), "{told:?}");
    });
}

fn driver_shares(checks: &mut Checks, world: &World) {
    checks.check("it shares the users' folder as it does on a Mac, and mounts it by a login", || {
        let users = world.path("Users");
        fs::create_dir(&users).unwrap();
        fs::write(users.join("of-host"), "host").unwrap();
        go(world, "PATCH", "/api/vms/m1/folders", Some("true"), &["code", "message"]);
        let share = json!({"guestPath": "Users", "hostPath": users, "flags": 4});
        let keys = ["guestPath", "hostPath", "flags"];
        assert_eq!(go(world, "POST", "/api/vms/m1/folders", Some(&share.to_string()), &keys), share);
        let script = "sudo mkdir -p /Users && { sudo /usr/bin/vmhgfs-fuse -o allow_other .host:/Users /Users || \
            sudo mount -t vmhgfs .host:/Users /Users; } && cat /Users/of-host && echo guest >/Users/of-guest";
        assert_eq!(world.catalyst(&["ssh", "m1", "--", script]).ok(), "host");
        assert_eq!(fs::read_to_string(users.join("of-guest")).unwrap(), "guest\n");
    });
}

fn driver_stops(checks: &mut Checks, world: &World) {
    let reply = ["code", "message"];
    let message =
        || go(world, "GET", "/api/vms/power/m1", None, &reply)["message"].as_str().unwrap().to_owned();
    checks.check("it stops and starts it: each is done when it is answered", || {
        assert_eq!(message(), "powered on");
        go(world, "PATCH", "/api/vms/power/m1", Some("shutdown"), &reply);
        assert_eq!(message(), "powered off");
        go(world, "PATCH", "/api/vms/power/m1", Some("on"), &reply);
        assert_eq!(message(), "powered on");
        go(world, "PATCH", "/api/vms/power/m1", Some("off"), &reply);
        assert_eq!(message(), "powered off");
    });
    checks.check("it removes it by a DELETE with a body, and hears of it no more", || {
        go(world, "PATCH", "/api/vms/power/m1", Some("on"), &reply);
        go(world, "PATCH", "/api/vms/power/m1", Some("off"), &reply);
        go(world, "DELETE", "/api/vms/m1", Some(r#"{"id":"m1"}"#), &[]);
        legacy_error(&world.curl("GET", "/api/vms/power/m1", None), &[404]);
        assert!(!world.vm_dir("m1").exists());
    });
}

fn post(world: &World, body: &serde_json::Value) -> serde_json::Value {
    let answer = world.curl("POST", "/api/vms", Some(&body.to_string()));
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

fn vms(checks: &mut Checks, world: &World) {
    checks.check("no VMs are an empty array", || {
        let answer = world.curl("GET", "/api/vms", None);
        assert_eq!((answer.status, answer.body.as_str()), (200, "[]"));
    });
    checks.check("create answers all five keys, and the VMX is there at once", || {
        let made = post(world, &json!({"id": "web1", "name": "Web", "tag": "photon"}));
        assert_eq!(
            made,
            json!({"id": "web1", "parentId": "", "name": "Web", "tag": "photon", "sourceReference": ""})
        );
        let vmx = fs::read_to_string(world.vm_dir("web1").join("web1.vmx")).unwrap();
        for key in ["memsize = \"1024\"", "numvcpus = \"1\"", "displayname = \"Web\""] {
            assert!(vmx.contains(key), "{vmx}");
        }
        // Only an id, without a content type as the Go driver sends it, and blanks for what is not given.
        let body = json!({"id": "web2", "parentId": "", "name": "", "tag": "", "sourceReference": ""});
        let body = body.to_string();
        let answer =
            world.curl_with(&["-X", "POST", "-H", "Content-Type:"], "/api/vms", Some(body.as_bytes()));
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(answer.json()["name"], "web2");
    });
    checks.check("a clone by parentId in either spelling", || {
        assert_eq!(post(world, &json!({"id": "web3", "parentId": "web1"}))["parentId"], "web1");
        post(world, &json!({"id": "web4", "parentid": "web1"}));
        assert_eq!(vm(world, "web4")["memory_mib"], vm(world, "web1")["memory_mib"]);
        assert_ne!(vm(world, "web3")["mac"], vm(world, "web1")["mac"]);
        assert_ne!(vm(world, "web3")["address"], vm(world, "web4")["address"]);
    });
    checks.check("get and list, with tags too", || {
        let answer = world.curl("GET", "/api/vms/web1", None);
        assert_eq!(answer.json(), json!({"id": "web1", "name": "Web", "tag": "photon"}));
        let ids = world.curl("GET", "/api/vms", None).json();
        assert_eq!(ids, json!(["web1", "web2", "web3", "web4"]));
        assert_eq!(world.curl("GET", "/api/vms?tags=x,photon", None).json(), json!(["web1"]));
        assert_eq!(world.curl("GET", "/api/vms?tags=none", None).json(), json!([]));
        assert_eq!(world.curl("GET", "/api/vms?tags=", None).json(), ids);
    });
    checks.check("its description is where clients look for it, and the page shows both APIs", || {
        let document = world.curl("GET", "/json/swagger.json", None);
        assert_eq!((document.status, &document.json()["info"]["version"]), (200, &json!("1.0.0")));
        assert_eq!(document.json()["basePath"], "/api");
        let page = world.curl_with(&["-L"], "/", None);
        assert!(page.status == 200 && page.body.contains("swagger-ui"), "{page:?}");
        let start = world.curl("GET", "/swagger/swagger-initializer.js", None).body;
        assert!(start.contains("/json/swagger.json") && start.contains("/v1/openapi.json"), "{start}");
    });
    checks.check(
        "what the page sends when it is tried out is taken, and the same from elsewhere is not",
        || {
            let send = |origin: &str, site: &str, body: &str| {
                let (origin, site) = (format!("Origin: {origin}"), format!("Sec-Fetch-Site: {site}"));
                let options =
                    ["-X", "PATCH", "-H", &origin, "-H", &site, "-H", "Content-Type: application/json"];
                world.curl_with(&options, "/api/vms/power/web1", Some(body.as_bytes())).status
            };
            assert_eq!(send("http://localhost:8080", "same-origin", "\"on\""), 200);
            assert_eq!(send("http://localhost:8080", "same-origin", "off"), 200);
            assert_eq!(send("http://evil.example", "cross-site", "on"), 403);
            assert_eq!(send("http://localhost:9999", "same-site", "on"), 403);
            assert_eq!(state(world, "web1"), "powered off");
        },
    );
    checks.check("both names of the loopback serve it", || {
        for host in ["127.0.0.1", "[::1]"] {
            let mut command = world.command("curl");
            command.args(["-s", "-f", &format!("http://{host}:8080/api/vms")]);
            let output = command.output().unwrap();
            assert!(output.status.success() && output.stdout.starts_with(b"[\"web1\""), "{host}");
        }
    });
}

fn state(world: &World, id: &str) -> String {
    let answer = world.curl("GET", &format!("/api/vms/power/{id}"), None).json();
    assert_eq!(answer["code"], 200);
    answer["message"].as_str().unwrap().to_owned()
}

fn powers(checks: &mut Checks, world: &World) {
    checks.check("power words are taken in every form that clients send", || {
        let forms: [(&[&str], &str); 6] = [
            (&["-H", "Content-Type: application/json"], "on"),
            (&["-H", "Content-Type:"], "on"),
            (&["-H", "Content-Type: application/x-www-form-urlencoded"], "on"),
            (&["-H", "Content-Type: application/json"], "\"on\""),
            (&["-H", "Content-Type: text/plain"], "on\n"),
            (&["-H", "Content-Type: nonsense"], " \"on\" \r\n"),
        ];
        for (options, word) in forms {
            let options: Vec<&str> = ["-X", "PATCH"].iter().chain(options).copied().collect();
            let answer = world.curl_with(&options, "/api/vms/power/web1", Some(word.as_bytes()));
            assert_eq!(answer.status, 200, "{word:?}: {answer:?}");
            assert_eq!(answer.json()["code"], 200);
            assert!(["powering on", "powered on"].contains(&state(world, "web1").as_str()));
            let off = word.replace("on", "off");
            let answer = world.curl_with(&options, "/api/vms/power/web1", Some(off.as_bytes()));
            assert_eq!(answer.status, 200, "{off:?}: {answer:?}");
            assert_eq!(state(world, "web1"), "powered off");
        }
    });
    checks.check("on twice and off twice are fine", || {
        let patch = |word| world.curl("PATCH", "/api/vms/power/web1", Some(word)).status;
        assert_eq!([patch("on"), patch("on")], [200, 200]);
        assert_eq!(vm_processes(world).len(), 1);
        assert_eq!([patch("off"), patch("off"), patch("shutdown")], [200, 200, 200]);
        assert!(vm_processes(world).is_empty());
    });
    checks.check("pause and unpause, and states that clients know", || {
        let patch = |word| world.curl("PATCH", "/api/vms/power/web1", Some(word)).status;
        assert_eq!([patch("on"), patch("pause")], [200, 200]);
        assert_eq!(state(world, "web1"), "paused");
        assert_eq!([patch("pause"), patch("unpause"), patch("unpause")], [200, 200, 200]);
        assert_eq!(state(world, "web1"), "powered on");
        assert_eq!([patch("pause"), patch("on")], [200, 200]);
        assert_eq!(state(world, "web1"), "powered on");
        assert_eq!([patch("pause"), patch("off")], [200, 200]);
        assert_eq!(state(world, "web1"), "powered off");
    });
    checks.check(
        "a guest that does not shut down is told before clients give up, and can be switched off",
        || {
            let patch = |word| world.curl("PATCH", "/api/vms/power/web1", Some(word));
            assert_eq!(patch("on").status, 200);
            let started = Instant::now();
            let text = legacy_error(&patch("shutdown"), &[500, 504]);
            let took = started.elapsed();
            assert!(took < Duration::from_secs(58) && text.contains("web1"), "{took:?}: {text}");
            assert_eq!(state(world, "web1"), "powered on");
            assert_eq!(patch("off").status, 200);
            assert_eq!(state(world, "web1"), "powered off");
        },
    );
    checks.check("who waits for a VM that is deleted meanwhile hears so at once", || {
        let deleted = |waits: &'static str| {
            let started = Instant::now();
            assert_eq!(world.curl("DELETE", "/api/vms/web2", None).status, 204);
            move || assert!(started.elapsed() < Duration::from_secs(10), "{waits}: {:?}", started.elapsed())
        };
        let on = || assert_eq!(world.curl("PATCH", "/api/vms/power/web2", Some("on")).status, 200);
        std::thread::scope(|scope| {
            on();
            let address = scope.spawn(|| world.catalyst(&["guest", "getip", "web2", "--wait"]));
            // It waits by then; if not, it finds no VM.
            std::thread::sleep(Duration::from_secs(1));
            let soon = deleted("getip");
            assert!(address.join().unwrap().error(1).contains("web2"));
            soon();
        });
        post(world, &json!({"id": "web2"}));
        std::thread::scope(|scope| {
            on();
            let shutdown = scope.spawn(|| world.curl("PATCH", "/api/vms/power/web2", Some("shutdown")));
            wait_until("it is shutting down", HANG, || state(world, "web2") == "powering off");
            let soon = deleted("shutdown");
            legacy_error(&shutdown.join().unwrap(), &[404, 409, 500]);
            soon();
        });
        post(world, &json!({"id": "web2"}));
    });
    checks.check("the address is an error until the guest has it, told in less than 5 s", || {
        let ask = || {
            let started = Instant::now();
            let text = legacy_error(&world.curl("GET", "/api/vms/web1/ipaddress", None), &[408, 500]);
            assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
            text
        };
        ask();
        assert_eq!(world.curl("PATCH", "/api/vms/power/web1", Some("on")).status, 200);
        assert!(ask().contains("web1"));
        assert_eq!(world.curl("PATCH", "/api/vms/power/web1", Some("off")).status, 200);
    });
    checks.check("a clone of a VM that runs runs as well", || {
        assert_eq!(world.curl("PATCH", "/api/vms/power/web1", Some("on")).status, 200);
        let answer = world.curl("POST", "/api/vms", Some("{\"id\":\"web9\",\"parentId\":\"web1\"}"));
        assert_eq!((answer.status, answer.json()["parentId"].as_str()), (200, Some("web1")), "{answer:?}");
        assert_eq!((state(world, "web9"), state(world, "web1")), ("powered on".into(), "powered on".into()));
        assert_eq!(vm(world, "web9")["start_mode"], "clone");
        assert_eq!(world.curl("DELETE", "/api/vms/web9", None).status, 204);
        assert_eq!(world.curl("PATCH", "/api/vms/power/web1", Some("off")).status, 200);
    });
}

/// As Vagrant's plugin and the docker-machine driver rewrite a VMX.
fn rewritten(checks: &mut Checks, world: &World) {
    checks.check("a VMX rewritten by a client that loses lines counts at the next power-on", || {
        let path = world.vm_dir("web2").join("web2.vmx");
        let text = fs::read_to_string(&path).unwrap() + "# a remark\nnonsense\nFooBar = \"Baz\"\n";
        let pairs = text.lines().filter_map(|line| line.split_once(" = "));
        let mut lines: Vec<String> = pairs
            .map(|(key, value)| (key.to_lowercase(), value))
            .filter(|(key, _)| !["memsize", "numvcpus"].contains(&key.as_str()))
            .map(|(key, value)| format!("{key} = {value}"))
            .chain(["memsize = \"256\"".into(), "numvcpus = \"3\"".into(), "svga.vgaonly = \"TRUE\"".into()])
            .collect();
        lines.sort();
        fs::write(&path, lines.join("\n")).unwrap();
        let (mac, address) = (vm(world, "web2")["mac"].clone(), vm(world, "web2")["address"].clone());
        assert_eq!(world.curl("PATCH", "/api/vms/power/web2", Some("on")).status, 200);
        let pid = world.vm_pid("web2").expect("it runs");
        // Engine kvm is told by a descriptor, and has nothing of it in its arguments.
        if engine() == "qemu" {
            let words = arguments(pid);
            let follows = |flag: &str| words[words.iter().position(|word| word == flag).unwrap() + 1].clone();
            assert_eq!((follows("-smp").as_str(), follows("-m").as_str()), ("3", "256M"));
            assert!(words.iter().any(|word| word.contains(vm(world, "web2")["mac"].as_str().unwrap())));
        }
        let now = vm(world, "web2");
        assert_eq!((&now["cpus"], &now["memory_mib"]), (&json!(3), &json!(256)));
        assert_eq!((&now["mac"], &now["address"]), (&mac, &address));
        assert_eq!(world.curl("PATCH", "/api/vms/power/web2", Some("off")).status, 200);
        // Its other lines are still there after a change of ours.
        world.catalyst(&["vm", "set", "web2", "--cpus", "2"]).ok();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains("foobar = \"Baz\"") && text.contains("numvcpus = \"2\""), "{text}");
    });
}

fn later(checks: &mut Checks, world: &World) {
    checks.check("suspend takes the process away, and on goes on", || {
        for (word, then) in
            [("on", "powered on"), ("suspend", "suspended"), ("on", "powered on"), ("off", "powered off")]
        {
            assert_eq!(world.curl("PATCH", "/api/vms/power/web1", Some(word)).status, 200, "{word}");
            assert_eq!(state(world, "web1"), then);
            assert_eq!(vm_processes(world).is_empty(), then != "powered on", "{word}");
        }
    });
}

fn deleted(checks: &mut Checks, world: &World) {
    checks.check("delete answers 204 and nothing, with and without a body, and takes all files", || {
        let answer = world.curl("DELETE", "/api/vms/web3", None);
        assert_eq!((answer.status, answer.body.as_str()), (204, ""));
        let answer = world.curl("DELETE", "/api/vms/web4", Some("{\"id\":\"web4\"}"));
        assert_eq!((answer.status, answer.body.as_str()), (204, ""));
        legacy_error(&world.curl("DELETE", "/api/vms/web4", None), &[404]);
        assert!(!world.vm_dir("web3").exists() && !world.vm_dir("web4").exists());
    });
    checks.check("delete of a VM that runs ends its process", || {
        assert_eq!(world.curl("PATCH", "/api/vms/power/web1", Some("on")).status, 200);
        let pid = world.vm_pid("web1").expect("it runs");
        assert_eq!(world.curl("DELETE", "/api/vms/web1", None).status, 204);
        assert!(!lives(pid));
        assert!(!world.vm_dir("web1").exists());
        assert_eq!(world.curl("GET", "/api/vms/power/web1", None).status, 404);
        // Its id and name are free again.
        post(world, &json!({"id": "web1"}));
    });
    checks.check("delete of a paused and of a blocked VM", || {
        assert_eq!(world.curl("PATCH", "/api/vms/power/web1", Some("on")).status, 200);
        assert_eq!(world.curl("PATCH", "/api/vms/power/web1", Some("pause")).status, 200);
        assert_eq!(world.curl("DELETE", "/api/vms/web1", None).status, 204);
        fs::write(world.vm_dir("web2").join("web2.vmx"), "memsize = \"lots\"\n").unwrap();
        assert_eq!(vm(world, "web2")["state"], "blocked");
        assert_eq!(world.curl("DELETE", "/api/vms/web2", None).status, 204);
        assert_eq!(world.curl("GET", "/api/vms", None).body, "[]");
        assert!(vm_processes(world).is_empty());
    });
}
