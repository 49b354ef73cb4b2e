//! What users and programs send that cannot be done: each answered in one line, nothing broken.

use std::fs;
use std::time::{Duration, Instant};

use catalyst_tests::world::HANG;
use catalyst_tests::{Checks, World};

use crate::common::{create, healthy, legacy_error, power, running, try_power, v1_error, vm, wait_until};

/// The group.
pub fn bad_input(checks: &mut Checks) {
    let world = running();
    create(&world, "web1");
    ids(checks, &world);
    values(checks, &world);
    bodies(checks, &world);
    paths(checks, &world);
    files(checks, &world);
    pictures(checks, &world);
    checks.check("after all of it the daemon answers and the VM starts", || {
        healthy(&world);
        power(&world, "web1", "on");
        power(&world, "web1", "off");
        assert_eq!(world.catalyst(&["vm", "list"]).ok(), "web1");
    });
}

fn ids(checks: &mut Checks, world: &World) {
    checks.check("an unknown VM is named by every command", || {
        for words in [
            &["vm", "show", "nobody"][..],
            &["vm", "delete", "nobody"],
            &["vm", "set", "nobody", "--cpus", "2"],
            &["vm", "clone", "nobody", "web2"],
            &["vmpower", "on", "nobody"],
            &["vmpower", "off", "nobody"],
            &["vm", "power", "shutdown", "nobody"],
            &["guest", "getip", "nobody"],
            &["vm", "getip", "nobody"],
            &["guest", "exec", "nobody", "true"],
            &["ssh", "nobody", "--", "true"],
            &["console", "nobody"],
            &["logs", "nobody"],
        ] {
            let ran = world.catalyst(words);
            let code = if words[0] == "ssh" || words[1] == "exec" { ran.code() } else { 1 };
            assert_ne!(code, 0, "{words:?}");
            let text = ran.error(code);
            assert!(text.contains("nobody"), "{words:?}: {text}");
        }
    });
    checks.check("an unknown VM is not found by either API", || {
        for (method, path, body) in [
            ("GET", "/api/vms/nobody", None),
            ("DELETE", "/api/vms/nobody", None),
            ("DELETE", "/api/vms/nobody", Some("{\"id\":\"nobody\"}")),
            ("GET", "/api/vms/power/nobody", None),
            ("PATCH", "/api/vms/power/nobody", Some("on")),
            ("GET", "/api/vms/nobody/ipaddress", None),
            ("POST", "/api/vms", Some("{\"id\":\"web2\",\"parentId\":\"nobody\"}")),
        ] {
            let text = legacy_error(&world.curl(method, path, body), &[404]);
            assert!(text.contains("nobody"), "{path}: {text}");
        }
        for (method, path, body) in [
            ("GET", "/v1/vms/nobody", None),
            ("DELETE", "/v1/vms/nobody", None),
            ("PATCH", "/v1/vms/nobody", Some("{}")),
            ("POST", "/v1/vms/nobody/power", Some("{\"op\":\"on\"}")),
            ("GET", "/v1/vms/nobody/address", None),
            ("GET", "/v1/vms/nobody/ssh", None),
            ("POST", "/v1/vms/nobody/exec", Some("{\"argv\":[\"true\"]}")),
            ("GET", "/v1/vms/nobody/console", None),
            ("GET", "/v1/vms/nobody/log", None),
        ] {
            let text = v1_error(&world.curl(method, path, body), "vm_not_found");
            assert!(text.contains("nobody"), "{path}: {text}");
        }
    });
    checks.check("an id that cannot be one is refused before anything is made", || {
        let long = "a".repeat(300);
        for id in
            ["", "..", ".", "/", "a/b", "../../etc", &long, "power", "a b", "-x", "é", "a\u{7}b", "a\nb"]
        {
            let ran = world.catalyst(&["vm", "create", "--", id]);
            let text = ran.error(if id == "power" { 1 } else { 2 });
            assert!(text.len() < 600, "{text}");
            let body = serde_json::json!({ "id": id }).to_string();
            v1_error(&world.curl("POST", "/v1/vms", Some(&body)), "invalid_request");
            legacy_error(&world.curl("POST", "/api/vms", Some(&body)), &[400]);
        }
        for segment in ["..", "%2e%2e", "%2F", "a%2Fb", "%00", "power", &long, "%ff", "%0a"] {
            let answer = world.curl("GET", &format!("/api/vms/{segment}"), None);
            legacy_error(&answer, &[400, 404]);
            let answer = world.curl("GET", &format!("/v1/vms/{segment}"), None);
            assert!([400, 404].contains(&answer.status), "{segment}: {answer:?}");
            assert!(answer.json()["message"].is_string(), "{segment}: {answer:?}");
        }
        let names: Vec<_> = fs::read_dir(world.state_dir().join("vms")).unwrap().flatten().collect();
        assert_eq!(names.len(), 1, "{names:?}");
    });
    checks.check("an id that is taken is a conflict", || {
        let text = world.catalyst(&["vm", "create", "web1"]).error(1).to_owned();
        assert!(text.contains("web1") && text.contains("exists"), "{text}");
        v1_error(&world.curl("POST", "/v1/vms", Some("{\"id\":\"web1\"}")), "vm_exists");
        legacy_error(&world.curl("POST", "/api/vms", Some("{\"id\":\"web1\"}")), &[409]);
        let text = world.catalyst(&["vm", "clone", "web1", "web1"]).error(1).to_owned();
        assert!(text.contains("web1"), "{text}");
    });
}

fn values(checks: &mut Checks, world: &World) {
    checks.check("CPUs, memory and disks that cannot be are refused with what can", || {
        for (flag, value, word) in [
            ("--cpus", "0", "CPU"),
            ("--cpus", "10000", "CPU"),
            ("--cpus", "-1", "-1"),
            ("--cpus", "many", "--cpus"),
            ("--memory", "1", "emory"),
            ("--memory", "999T", "emory"),
            ("--memory", "99999999999999999999", "--memory"),
            ("--disk", "1", "isk"),
            ("--disk", "999999T", "isk"),
            ("--disk", "big", "--disk"),
            ("--template", "../x", "--template"),
            ("--template", "nothing", "nothing"),
            ("--tag", "a,b", "tag"),
            ("--name", "a\nb", "name"),
        ] {
            let ran = world.catalyst(&["vm", "create", "bad", flag, value]);
            assert!([1, 2].contains(&ran.code()), "{flag} {value}: {ran:?}");
            let text = ran.error(ran.code());
            assert!(text.contains(word), "{flag} {value}: {text}");
        }
        for body in [
            r#"{"id":"bad","cpus":0}"#,
            r#"{"id":"bad","cpus":10000}"#,
            r#"{"id":"bad","cpus":-1}"#,
            r#"{"id":"bad","cpus":99999999999999999999}"#,
            r#"{"id":"bad","memory_mib":1}"#,
            r#"{"id":"bad","memory_mib":99999999999}"#,
            r#"{"id":"bad","memory_mib":18446744073709551615}"#,
            r#"{"id":"bad","disk_gib":1}"#,
            r#"{"id":"bad","disk_gib":18446744073709551615}"#,
            r#"{"id":"bad","template":"../../etc"}"#,
            r#"{"id":"bad","tags":["a,b"]}"#,
        ] {
            v1_error(&world.curl("POST", "/v1/vms", Some(body)), "invalid_request");
        }
        assert_eq!(world.catalyst(&["vm", "list"]).ok(), "web1");
    });
    checks.check("vm set refuses the same and changes nothing", || {
        let before = vm(world, "web1");
        for words in [["--cpus", "0"], ["--cpus", "10000"], ["--memory", "1"], ["--memory", "999T"]] {
            let ran = world.catalyst(&["vm", "set", "web1", words[0], words[1]]);
            assert!([1, 2].contains(&ran.code()), "{ran:?}");
            ran.error(ran.code());
        }
        v1_error(&world.curl("PATCH", "/v1/vms/web1", Some(r#"{"cpus":0}"#)), "invalid_request");
        v1_error(&world.curl("PATCH", "/v1/vms/web1", Some(r#"{"disk_gib":128}"#)), "invalid_request");
        assert_eq!(vm(world, "web1"), before);
    });
    checks.check("a word that is no power operation is refused", || {
        for word in ["", "On", "reboot", "on off", "{\"op\":\"on\"}", "\u{0}"] {
            legacy_error(&world.curl("PATCH", "/api/vms/power/web1", Some(word)), &[400]);
        }
        v1_error(&try_power(world, "web1", "reboot"), "invalid_request");
        world.catalyst(&["vmpower", "reboot", "web1"]).error(2);
    });
    checks.check("an operation that the state does not allow says the state", || {
        for op in ["pause", "unpause"] {
            let text = v1_error(&try_power(world, "web1", op), "wrong_state");
            assert!(text.contains("powered off"), "{text}");
            world.catalyst(&["vmpower", op, "web1"]).error(1);
            legacy_error(&world.curl("PATCH", "/api/vms/power/web1", Some(op)), &[500]);
        }
        let text = world.catalyst(&["guest", "getip", "web1"]).error(1).to_owned();
        assert!(text.contains("powered off"), "{text}");
    });
}

fn bodies(checks: &mut Checks, world: &World) {
    checks.check("bodies that are no JSON, or not what is asked for, are refused", || {
        for body in ["", "{", "nonsense", "[]", "null", "{\"id\":1}", "{}", "\u{0}", "{\"id\":\"x\"}}"] {
            legacy_error(&world.curl("POST", "/api/vms", Some(body)), &[400]);
            v1_error(&world.curl("POST", "/v1/vms", Some(body)), "invalid_request");
        }
        v1_error(&world.curl("POST", "/v1/vms", Some(r#"{"id":"x","nonsense":1}"#)), "invalid_request");
        v1_error(&world.curl("PATCH", "/v1/vms/web1", Some(r#"{"nonsense":1}"#)), "invalid_request");
        v1_error(&world.curl("POST", "/v1/vms/web1/power", Some("on")), "invalid_request");
        v1_error(&world.curl("POST", "/v1/vms/web1/exec", Some(r#"{"argv":[]}"#)), "invalid_request");
        legacy_error(&world.curl("POST", "/api/vms", None), &[400]);
        let deep = "[".repeat(100_000);
        v1_error(&world.curl("POST", "/v1/vms", Some(&deep)), "invalid_request");
        let binary = world.curl_with(&["-X", "POST"], "/api/vms", Some(&[0xff; 1000]));
        legacy_error(&binary, &[400]);
    });
    checks.check("a body of 10 MiB is answered, at once", || {
        let large = vec![b'a'; 10 << 20];
        for (method, path) in [
            ("POST", "/api/vms"),
            ("PATCH", "/api/vms/power/web1"),
            ("POST", "/v1/vms"),
            ("POST", "/v1/vms/web1/power"),
            ("PATCH", "/v1/vms/web1"),
            ("POST", "/v1/vms/web1/exec"),
        ] {
            let started = Instant::now();
            let answer = world.curl_with(&["-X", method], path, Some(&large));
            assert!(started.elapsed() < Duration::from_secs(10), "{path}: {:?}", started.elapsed());
            if path.starts_with("/api") {
                legacy_error(&answer, &[400]);
            } else {
                v1_error(&answer, "body_too_large");
            }
        }
        healthy(world);
    });
    checks.check("a DELETE with a large body does what it says", || {
        create(world, "doomed");
        let large = vec![b'a'; 10 << 20];
        let answer = world.curl_with(&["-X", "DELETE"], "/api/vms/doomed", Some(&large));
        assert!([0, 204].contains(&answer.status), "{answer:?}");
        wait_until("it is gone", HANG, || world.curl("GET", "/api/vms/doomed", None).status == 404);
    });
}

fn paths(checks: &mut Checks, world: &World) {
    checks.check("unknown paths and methods are told in each API's form", || {
        legacy_error(&world.curl("GET", "/api/nothing", None), &[404]);
        legacy_error(&world.curl("GET", "/api/vms/a/b/c/d/e", None), &[404]);
        legacy_error(&world.curl("PUT", "/api/vms", Some("{}")), &[405]);
        legacy_error(&world.curl("POST", "/api/vms/web1", Some("{}")), &[405]);
        legacy_error(&world.curl("DELETE", "/api/vms/power/web1", None), &[405]);
        v1_error(&world.curl("GET", "/v1/nothing", None), "path_not_found");
        v1_error(&world.curl("GET", "/nothing", None), "path_not_found");
        v1_error(&world.curl("PUT", "/v1/vms", Some("{}")), "method_not_allowed");
        v1_error(&world.curl("DELETE", "/v1/vms/web1?force=perhaps", None), "invalid_request");
        v1_error(&world.curl("GET", "/v1/tasks/lots", None), "invalid_request");
        v1_error(&world.curl("GET", "/v1/tasks/99", None), "task_not_found");
        v1_error(&world.curl("GET", "/v1/images/nothing", None), "image_not_found");
        for (method, path) in [("GET", ""), ("DELETE", ""), ("POST", "/build"), ("POST", "/verify")] {
            let answer = world.curl(method, &format!("/v1/images/a%0Ab{path}"), None);
            assert!([400, 404].contains(&answer.status), "{answer:?}");
            assert!(!answer.json()["message"].as_str().unwrap().contains('\n'), "{answer:?}");
        }
        let long = format!("/v1/{}", "x".repeat(60_000));
        assert!((400..500).contains(&world.curl("GET", &long, None).status));
    });
    checks.check("bytes that are no HTTP end the connection and nothing else", || {
        use std::io::Write as _;
        for bytes in
            [&b"\x16\x03\x01\x02\x00\x01\x00\x01"[..], b"GET / HTTP/9.9\r\n\r\n", b"\0\0\0\0\r\n\r\n"]
        {
            let mut command = world.command("curl");
            command.args(["-s", "--max-time", "10", "telnet://localhost:8080"]);
            command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
            let mut child = command.spawn().unwrap();
            // The daemon may have closed it by then.
            let _ = child.stdin.take().unwrap().write_all(bytes);
            child.wait_with_output().unwrap();
        }
        healthy(world);
    });
    checks.check("wrong use of the CLI is one line and exit code 2", || {
        for words in [
            &["nonsense"][..],
            &["vm", "create"],
            &["vm", "create", "a", "b"],
            &["vm", "set", "web1"],
            &["vm", "list", "--nonsense"],
            &["vm", "create", "x", "--wait"],
            &["--host", "a/b", "vm", "list"],
            &["--host", "https://x", "vm", "list"],
            &["--timeout", "soon", "vm", "list"],
            &["completion", "nosuchshell"],
        ] {
            world.catalyst(words).error(2);
        }
    });
}

/// Files of a VM that somebody damaged.
fn files(checks: &mut Checks, world: &World) {
    checks.check("a VMX of garbage blocks its VM alone, and mending it unblocks", || {
        create(world, "torn");
        let path = world.vm_dir("torn").join("torn.vmx");
        let good = fs::read(&path).unwrap();
        let long = vec![b'x'; 100_000];
        for (garbage, word) in [
            (&b"\xff\xfe\x00garbage\x01"[..], "UTF-8"),
            (b"memsize = \"lots\"\n", "lots"),
            (b"numvcpus = \"0\"\n", "CPUs"),
            (b"numvcpus = \"10000\"\n", "CPUs"),
            (b"memsize = \"1\"\n", "emory"),
            (b"a = \"b\"\n\x07\n", "control"),
            (&long, "bytes"),
            (b"catalyst.template = \"../../../etc\"\n", "template"),
            (b"ethernet0.address = \"ff:ff:ff:ff:ff:ff\"\n", "MAC"),
        ] {
            fs::write(&path, garbage).unwrap();
            let torn = vm(world, "torn");
            assert_eq!(torn["state"], "blocked", "{torn}");
            let reason = torn["reason"].as_str().unwrap();
            assert!(reason.contains(word) && reason.contains("torn.vmx"), "{reason}");
            let shown = world.catalyst(&["vm", "show", "torn"]).ok().to_owned();
            assert!(shown.contains("blocked") && shown.contains("torn.vmx"), "{shown}");
            let text = world.catalyst(&["vmpower", "on", "torn"]).error(1).to_owned();
            assert!(text.contains("torn.vmx"), "{text}");
            let power = world.curl("GET", "/api/vms/power/torn", None).json();
            assert_eq!(power["message"], "blocked on msg");
            assert_eq!(vm(world, "web1")["state"], "powered off");
        }
        fs::write(&path, &good).unwrap();
        assert_eq!(vm(world, "torn")["state"], "powered off");
        power(world, "torn", "on");
        power(world, "torn", "off");
    });
    checks.check("a VM whose VMX is a link, a folder or gone is blocked and can be deleted", || {
        let path = world.vm_dir("torn").join("torn.vmx");
        fs::remove_file(&path).unwrap();
        assert_eq!(vm(world, "torn")["state"], "blocked");
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert_eq!(vm(world, "torn")["state"], "blocked");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert_eq!(vm(world, "torn")["state"], "blocked");
        assert!(!v1_error(&try_power(world, "torn", "on"), "internal").contains("root:"));
        assert_eq!(world.catalyst(&["vm", "delete", "torn"]).code(), 0);
        assert!(!world.vm_dir("torn").exists());
    });
    checks.check("a disk that is gone or no disk is named at power-on", || {
        create(world, "torn");
        let disk = world.vm_dir("torn").join("disk.qcow2");
        fs::write(&disk, "no disk").unwrap();
        let text = world.catalyst(&["vmpower", "on", "torn"]).error(1).to_owned();
        assert!(text.contains("disk.qcow2"), "{text}");
        fs::remove_file(&disk).unwrap();
        let text = world.catalyst(&["vmpower", "on", "torn"]).error(1).to_owned();
        assert!(text.contains("disk.qcow2") && text.contains("missing"), "{text}");
        let torn = vm(world, "torn");
        assert_eq!(torn["state"], "powered off");
        assert!(torn["reason"].as_str().unwrap().contains("disk.qcow2"), "{torn}");
        world.catalyst(&["vm", "delete", "torn"]).ok();
    });
}

/// Images that cannot be used.
fn pictures(checks: &mut Checks, world: &World) {
    let lumen = world.images.join("lumen");
    let aside = world.path("aside");
    let refused = |word: &str, code: &str| {
        let text = world.catalyst(&["vm", "create", "web2"]).error(1).to_owned();
        assert!(text.contains(word), "{text}");
        v1_error(&world.curl("POST", "/v1/vms", Some("{\"id\":\"web2\"}")), code);
        legacy_error(&world.curl("POST", "/api/vms", Some("{\"id\":\"web2\"}")), &[404, 409, 500]);
        let text = world.catalyst(&["vmpower", "on", "web1"]).error(1).to_owned();
        assert!(text.contains("image"), "{text}");
        assert_eq!(vm(world, "web1")["state"], "powered off");
        assert_eq!(world.catalyst(&["vm", "list"]).ok(), "web1");
    };
    checks.check("without an image, create and power-on say how to build it", || {
        fs::rename(&lumen, &aside).unwrap();
        refused("catalyst image build", "image_not_found");
        assert_eq!(world.catalyst(&["image", "list", "--json"]).ok(), "[]");
        world.catalyst(&["image", "show"]).error(1);
        world.catalyst(&["image", "verify"]).error(1);
        fs::rename(&aside, &lumen).unwrap();
    });
    checks.check("a half-built image is named so and not used", || {
        fs::rename(&lumen, &aside).unwrap();
        fs::create_dir_all(lumen.join(".build-0123456789ab")).unwrap();
        refused("half built", "image_unusable");
        let list = world.catalyst(&["image", "list"]).ok().to_owned();
        assert!(list.contains("incomplete"), "{list}");
        fs::remove_dir_all(&lumen).unwrap();
        fs::rename(&aside, &lumen).unwrap();
    });
    checks.check("an image with a file cut short is named so and not used", || {
        let initrd = lumen.join("current/initrd");
        let whole = fs::read(&initrd).unwrap();
        fs::write(&initrd, &whole[..100]).unwrap();
        refused("damaged", "image_unusable");
        let list = world.catalyst(&["image", "list"]).ok().to_owned();
        assert!(list.contains("damaged"), "{list}");
        fs::write(&initrd, &whole).unwrap();
        // The content is right again, which only reading it can tell.
        fs::remove_dir_all(&lumen).unwrap();
        crate::common::tiny_store(&world.images);
    });
}
