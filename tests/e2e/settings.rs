//! What a user has set in files, and AppCatalyst's command line under its own name.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use catalyst_tests::world::{HANG, engine, programs, ran};
use catalyst_tests::{Checks, Ran, World};

use crate::common::{power, quiet, running, vm, wait_until};

/// The group.
pub fn settings(checks: &mut Checks) {
    files(checks);
    idioms(checks);
}

/// A daemon whose owner's home is `home`, whatever the machine has in root's.
struct Daemon(Child);

impl Daemon {
    fn start(world: &World, home: &Path, settings: &[(&str, &str)], args: &[&str]) -> Self {
        Self(command(world, home, settings, args).spawn().unwrap())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command(world: &World, home: &Path, settings: &[(&str, &str)], args: &[&str]) -> Command {
    let mut command = world.command("unshare");
    let script = "mount --bind \"$1\" /root && shift && exec \"$@\"";
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(home).arg(programs().join("catalyst-daemon"));
    command.arg("--image-dir").arg(&world.images).arg("--no-warming").args(args);
    command.envs(settings.iter().copied()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn listens(world: &mut World, port: u16) {
    world.host = Some(format!("localhost:{port}"));
    wait_until("the daemon listens", HANG, || world.curl("GET", "/v1/version", None).status == 200);
}

fn by_home(world: &World, home: &Path, words: &[&str]) -> Ran {
    let mut command = world.catalyst_command(words);
    ran({
        command.env_remove("CATALYST_HOST").env("HOME", home);
        command
    })
}

fn files(checks: &mut Checks) {
    let mut world = quiet();
    let home = world.path("home");
    let own = home.join(".config/catalyst/config.toml");
    fs::create_dir_all(own.parent().unwrap()).unwrap();
    let legacy = home.join(".appcatalyst.conf");
    let vms = home.join("Documents/AppCatalyst");
    checks.check("~/.appcatalyst.conf says port and VM folder, for the daemon and the command line", || {
        fs::write(&legacy, "DEFAULT_VM_PATH=~/Documents/AppCatalyst\nPORT=8181\n").unwrap();
        // The plugin's users were told to start it by that word.
        let _daemon = Daemon::start(&world, &home, &[], &["start", "--engine", &engine()]);
        listens(&mut world, 8181);
        let made = by_home(&world, &home, &["vm", "create", "web1"]);
        made.ok();
        // The daemon sees its owner's home as /root.
        let path = "/root/Documents/AppCatalyst/web1/web1.vmx";
        assert!(made.stderr.contains(path) && vms.join("web1/web1.vmx").exists(), "{}", made.stderr);
        let list = by_home(&world, &home, &["vm", "list"]);
        assert_eq!(list.ok(), "web1");
        assert!(list.stderr.contains("'/root/Documents/AppCatalyst'"), "{}", list.stderr);
        by_home(&world, &home, &["vm", "set", "web1", "--cpus", "3"]).ok();
    });
    checks.check("the usual parent is cloned where it is there, and the template where it is not", || {
        let set = |path: &str| {
            let text = format!(
                "DEFAULT_VM_PATH=~/Documents/AppCatalyst\nPORT=8181\nDEFAULT_PARENT_VM_PATH={path}\n"
            );
            fs::write(&legacy, text).unwrap();
        };
        for (path, id, cpus) in [
            ("/root/Documents/AppCatalyst/web1/web1.vmx", "web2", 3),
            ("/opt/vmware/appcatalyst/photonvm/photon.vmx", "web3", 1),
        ] {
            set(path);
            let _daemon = Daemon::start(&world, &home, &[], &["--engine", &engine()]);
            listens(&mut world, 8181);
            assert_eq!(world.curl("POST", "/api/vms", Some(&format!("{{\"id\":\"{id}\"}}"))).status, 200);
            assert_eq!(vm(&world, id)["cpus"], cpus);
        }
    });
    checks.check("our own file leads, the environment comes before it, and flags before that", || {
        fs::write(&own, format!("listen = \"localhost:8282\"\nengine = \"{}\"\n", engine())).unwrap();
        let variable: &[(&str, &str)] = &[("CATALYST_LISTEN", "localhost:8383")];
        for (settings, args, port) in [
            (&[][..], &[][..], 8282),
            (variable, &[], 8383),
            (variable, &["--listen", "localhost:8484"], 8484),
        ] {
            let _daemon = Daemon::start(&world, &home, settings, args);
            listens(&mut world, port);
            assert_eq!(world.curl("GET", "/v1/version", None).json()["engine"], engine().as_str());
            if port == 8282 {
                assert_eq!(by_home(&world, &home, &["vm", "list"]).ok(), "web1\nweb2\nweb3");
            }
            fs::write(
                &own,
                format!(
                    "listen = \"localhost:8282\"\nengine = \"{}\"\nurl = \"http://localhost:8484\"\n",
                    engine()
                ),
            )
            .unwrap();
            if port == 8484 {
                assert_eq!(by_home(&world, &home, &["vm", "list"]).ok(), "web1\nweb2\nweb3");
            }
        }
    });
    checks.check(
        "the log of a daemon in the background lies where it is set, and a link there is not followed",
        || {
            let logs = home.join("logs");
            fs::write(
                &own,
                format!("listen = \"localhost:8282\"\nlog_dir = \"~/logs\"\nengine = \"{}\"\n", engine()),
            )
            .unwrap();
            let background = |world: &World| command(world, &home, &[], &["--background"]).output().unwrap();
            let output = background(&world);
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            world.host = Some("localhost:8282".to_owned());
            world.catalyst(&["daemon", "stop"]).ok();
            let log = logs.join("catalyst-daemon.log");
            assert!(fs::read_to_string(&log).unwrap().contains("ready"));
            fs::remove_file(&log).unwrap();
            std::os::unix::fs::symlink("/etc/passwd", &log).unwrap();
            let output = background(&world);
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(!output.status.success() && text.contains("Cannot open the log"), "{text}");
        },
    );
    checks.check("a file that cannot be understood is named by both, and nothing is started", || {
        for (file, text, word) in [
            (&own, "nonsense = \"1\"", "nonsense"),
            (&own, "listen", "config.toml"),
            (&own, "engine = \"vmware\"", "vmware"),
            (&legacy, "PORT=many", "PORT"),
        ] {
            let _ = fs::remove_file(&own);
            fs::write(&legacy, "").unwrap();
            fs::write(file, text).unwrap();
            let output = command(&world, &home, &[], &[]).output().unwrap();
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.code() == Some(1) && error.starts_with("Error:"), "{error}");
            assert!(error.contains(word), "{error}");
            if !text.starts_with("engine") {
                assert!(by_home(&world, &home, &["vm", "list"]).error(2).contains(word), "{text}");
            }
        }
    });
}

/// The command line by the name of AppCatalyst's.
fn appcatalyst(world: &World) {
    let _ = std::os::unix::fs::symlink(programs().join("catalyst"), world.path("appcatalyst"));
}

fn idioms(checks: &mut Checks) {
    let world = running();
    let run = |script: &str| {
        let mut command = world.command("bash");
        command.arg("-c").arg(script);
        command.env(
            "PATH",
            format!("{}:{}", world.path("").display(), std::env::var("PATH").unwrap_or_default()),
        );
        ran(command)
    };
    appcatalyst(&world);
    checks.check("AppCatalyst's shell idioms run as they are, with its exit codes", || {
        run("appcatalyst vm create web1 && appcatalyst vmpower on web1").ok();
        run("appcatalyst vm list 2>/dev/null | grep -q web1").ok();
        assert_eq!(run("appcatalyst vmpower list 2>/dev/null").ok(), "web1");
        // Its guest has no address; where one has, `foreign` asks the same way.
        let tries = run("n=0; until appcatalyst guest getip web1 2>/dev/null; do n=$((n + 1)); [ $n -lt 3 ] || exit 9; sleep 0.1; done");
        assert_eq!((tries.code(), tries.stdout.as_str()), (9, ""));
        assert_eq!(run("IP=$(appcatalyst guest getip web1); echo \"$? [$IP]\"").ok(), "255 []");
        assert_eq!(run("appcatalyst vm clone web1 web2 2>&1 >/dev/null | head -1").ok().split(' ').next(), Some("Info:"));
    });
    checks.check("any failure of it is 255 with one line", || {
        for words in [
            "vm create web1",
            "vmpower on nobody",
            "vmpower explode web1",
            "vm create",
            "guest getip nobody",
            "vmpower pause nobody web1x",
            "--host localhost:1 vm list",
        ] {
            let ran = run(&format!("appcatalyst {words}"));
            ran.error(255);
        }
        // By our own name they are what they were.
        world.catalyst(&["vm", "create", "web1"]).error(1);
        world.catalyst(&["vm", "create"]).error(2);
        assert!(run("appcatalyst --help").ok().contains("vmpower"));
    });
    power(&world, "web1", "off");
}
