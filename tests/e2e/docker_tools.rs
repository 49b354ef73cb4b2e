//! The Docker tools of the host work in a VM through `ssh`: clients, docker-compose 1.29, Docker's Python SDK by paramiko.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use catalyst_tests::world::{HANG, long_enough, programs, ran};
use catalyst_tests::{Checks, Ran, World, skip};
use serde_json::json;

use crate::common::{vm, wait_until};

/// What a user may have: options before the first host, other ends of line, no end of the last one.
const OWN_CONFIG: &str =
    "ServerAliveInterval 7\r\n# mine\r\nHost *\n  User me\n  ProxyJump bastion\n\tIdentityFile /none";
const OWN_KEYS: &str =
    "bastion ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMlX1DRvZJ2uIstHjNw/rxq5UB4PUtbGIbbJuCwWGpKe";
const DOCKERFILE: &str = "FROM busybox\nRUN echo made by the build >/made\n";
const COMPOSE: &str = r#"
version: "3"
services:
  web:
    build: .
    image: site
    ports: ["8000:80"]
    command: sh -c 'mkdir /www && cp /made /www/index.html && exec httpd -f -h /www'
  ask:
    image: site
    depends_on: [web]
    command: sh -c 'until wget -qO- http://web/; do sleep 1; done; exec sleep 10000'
"#;
const SDK: &str = "import docker; client = docker.from_env(timeout=280); \
    print(sorted(each.labels['com.docker.compose.service'] for each in client.containers.list())); \
    print(client.info()['Name'])";

pub fn docker_tools(checks: &mut Checks) {
    let world = World::new();
    let home = Home::new(&world);
    refused(checks, &home);
    reached(checks, &home);
    used(checks, &home);
    composed(checks, &home);
    changed(checks, &home);
    gone(checks, &home);
}

/// A world whose root has a home of its own, where ssh and all others look: ssh goes by the user database, not by HOME.
struct Home<'a> {
    world: &'a World,
    folder: PathBuf,
    clients: Vec<PathBuf>,
}

impl<'a> Home<'a> {
    fn new(world: &'a World) -> Self {
        let folder = world.path("home");
        let ssh = folder.join(".ssh");
        fs::create_dir_all(&ssh).unwrap();
        fs::create_dir(folder.join("site")).unwrap();
        for (name, text) in [
            (".ssh/config", OWN_CONFIG),
            (".ssh/known_hosts", OWN_KEYS),
            ("site/Dockerfile", DOCKERFILE),
            ("site/docker-compose.yml", COMPOSE),
        ] {
            fs::write(folder.join(name), text).unwrap();
        }
        fs::set_permissions(ssh.join("config"), fs::Permissions::from_mode(0o640)).unwrap();
        Self { world, folder, clients: clients() }
    }

    /// A command of root's in that home, in the folder `site`; Docker's client is Debian's.
    fn command(&self, program: &str) -> Command {
        const ENTER: &str = r#"mount --bind "$0" "$HOME"; cd "$HOME/site"; exec "$@""#;
        let root = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(0)).unwrap().unwrap();
        // `ip netns exec` has made a mount namespace.
        let mut command = self.world.command("sh");
        command.args(["-ec", ENTER]).arg(&self.folder).arg(program).env("HOME", &root.dir);
        let mut path = vec![programs()];
        path.extend(self.clients.first().and_then(|client| client.parent()).map(Path::to_owned));
        path.extend(["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from));
        command.env("PATH", std::env::join_paths(path).unwrap());
        for (name, _) in std::env::vars() {
            if ["DOCKER_", "COMPOSE_", "CATALYST_", "SSH_"].iter().any(|prefix| name.starts_with(prefix)) {
                command.env_remove(name);
            }
        }
        command.env("COMPOSE_HTTP_TIMEOUT", long_enough());
        command
    }

    fn run(&self, words: &[&str]) -> Ran {
        let mut command = self.command(words[0]);
        command.args(&words[1..]);
        ran(command)
    }

    /// A script with what `docker env` prints, as a user has it in a shell.
    fn in_shell(&self, script: &str) -> Ran {
        self.run(&["sh", "-ec", &format!("eval \"$(catalyst docker env web1)\"; {script}")])
    }

    /// ssh that may not ask.
    fn ssh(&self, host: &str) -> Ran {
        self.run(&["ssh", "-o", "BatchMode=yes", host, "id -un; hostname"])
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.folder.join(".ssh").join(name)).unwrap()
    }
}

/// Docker's clients: Debian's first, then others of the machine.
fn clients() -> Vec<PathBuf> {
    let debians = [programs().join("docker-tools/docker"), "/usr/bin/docker".into()];
    let mut found: Vec<PathBuf> = debians.into_iter().find(|path| path.exists()).into_iter().collect();
    let path = std::env::var_os("PATH").unwrap_or_default();
    for client in std::env::split_paths(&path).map(|folder| folder.join("docker")) {
        if client.exists() && !found.contains(&client) && client != Path::new("/usr/bin/docker") {
            found.push(client);
        }
    }
    found
}

fn refused(checks: &mut Checks, home: &Home) {
    checks.check("what cannot be is refused in one line, and no file is changed", || {
        home.world.catalyst(&["vm", "create", "web1"]).ok();
        for (words, code, wanted) in [
            (&["docker", "env", "nosuch"][..], 1, "no VM 'nosuch'"),
            (&["docker", "env", "web1"], 1, "catalyst vmpower on web1"),
            (&["ssh-config", "web1"], 1, "catalyst vmpower on web1"),
            (&["docker", "context", "create", "web1"], 1, "catalyst vmpower on web1"),
            (&["docker", "env"], 1, "catalyst docker up"),
            (&["docker", "env", "web1", "--shell", "nosuch"], 2, "nosuch"),
            (&["ssh-config", "../x"], 2, "id"),
        ] {
            let ran = home.run(&[&["catalyst"], words].concat());
            let text = ran.error(code);
            assert!(text.contains(wanted), "{text}");
        }
        assert_eq!(home.run(&["catalyst", "ssh-config"]).ok(), "", "it is off");
        assert_eq!((home.read("config").as_str(), home.read("known_hosts").as_str()), (OWN_CONFIG, OWN_KEYS));
    });
    checks.check("--unset needs neither VM nor daemon, and each shell has its own words", || {
        let unset = |shell: &str| {
            let host = ["--host", "localhost:9"];
            home.run(&[&["catalyst"][..], &host, &["docker", "env", "--unset", "--shell", shell]].concat())
        };
        for (shell, wanted) in [
            ("bash", "unset DOCKER_HOST\n"),
            ("fish", "set -e DOCKER_HOST;\n"),
            ("csh", "unsetenv DOCKER_HOST;\n"),
            ("powershell", "Remove-Item Env:\\DOCKER_HOST"),
            ("cmd", "SET DOCKER_HOST=\n"),
            ("emacs", "(setenv \"DOCKER_HOST\" nil)\n"),
        ] {
            assert!(unset(shell).stdout.starts_with(wanted), "{:?}", unset(shell));
        }
    });
}

fn reached(checks: &mut Checks, home: &Home) {
    checks.check("ssh-config lets plain ssh in, by name and by address, without a question", || {
        home.world.catalyst(&["vmpower", "on", "web1", "--wait", "--timeout", "280"]).ok();
        assert_eq!(home.run(&["catalyst", "ssh-config"]).ok(), "web1.catalyst");
        let address = home.world.catalyst(&["guest", "getip", "web1"]).ok().to_owned();
        for host in ["web1.catalyst", &address] {
            assert_eq!(home.ssh(host).ok(), "catalyst\nweb1");
        }
        let again = home.run(&["catalyst", "ssh-config", "web1"]);
        assert!(!again.stderr.contains("Wrote"), "{}", again.stderr);
    });
    checks.check("what the user has in these files holds as before, byte for byte", || {
        assert!(home.read("config").ends_with(OWN_CONFIG) && home.read("known_hosts").ends_with(OWN_KEYS));
        let mode = home.folder.join(".ssh/config").metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o640);
        let elsewhere = home.run(&["ssh", "-G", "elsewhere"]);
        for line in ["user me\n", "proxyjump bastion\n", "serveraliveinterval 7\n"] {
            assert!(elsewhere.stdout.contains(line), "{line}: {}", elsewhere.stdout);
        }
    });
    checks.check("many that write and remove at once leave whole files", || {
        std::thread::scope(|scope| {
            for number in 0..8 {
                scope.spawn(move || {
                    let remove = if number % 2 == 0 { &["--remove"][..] } else { &[] };
                    home.run(&[&["catalyst", "ssh-config"], remove].concat()).ok();
                });
            }
        });
        home.run(&["catalyst", "ssh-config", "--remove"]).ok();
        assert_eq!((home.read("config").as_str(), home.read("known_hosts").as_str()), (OWN_CONFIG, OWN_KEYS));
        assert_eq!(fs::read_dir(home.folder.join(".ssh")).unwrap().count(), 2);
    });
}

fn used(checks: &mut Checks, home: &Home) {
    checks.check("docker env is what a shell takes, and needs no ssh-config before", || {
        let address = vm(home.world, "web1")["address"].as_str().unwrap().to_owned();
        let env = home.run(&["catalyst", "docker", "env", "web1"]);
        assert!(env.ok().starts_with(&format!("export DOCKER_HOST=ssh://catalyst@{address}\n")), "{env:?}");
        assert_eq!(home.in_shell("echo $DOCKER_HOST").ok(), format!("ssh://catalyst@{address}"));
    });
    let debians = home.clients.first();
    checks.check("Debian's docker builds from a Dockerfile here and runs it there", || {
        let Some(client) = debians else { skip("there is no Docker client: make docker-tools") };
        assert_eq!(works(home, client), "made by the build\nweb1");
    });
    checks.check("a newer docker does", || {
        let Some(client) = home.clients.get(1) else { skip("there is no other docker in PATH") };
        // Of today's clients `build` is BuildKit's, which is a plugin that the machine may not have.
        assert_eq!(works(home, client), "made by the build\nweb1");
    });
}

fn works(home: &Home, client: &Path) -> String {
    let docker = client.display();
    println!("{}", home.run(&[&docker.to_string(), "--version"]).ok());
    let script = format!(
        "DOCKER_BUILDKIT=0 {docker} build -q -t site . >/dev/null 2>&1; \
         {docker} run --rm site cat /made; {docker} info --format '{{{{.Name}}}}'"
    );
    home.in_shell(&script).ok().to_owned()
}

fn composed(checks: &mut Checks, home: &Home) {
    if !Path::new("/usr/bin/docker-compose").exists() {
        return checks.check("docker-compose", || skip("there is no docker-compose: make setup-tests"));
    }
    checks.check(
        "docker-compose 1.29 builds and starts two services that reach each other and are reached",
        || {
            home.in_shell("docker-compose --no-ansi up -d --build").ok();
            let address = vm(home.world, "web1")["address"].as_str().unwrap().to_owned();
            let site = format!("http://{address}:8000/");
            wait_until("the site answers", HANG, || {
                home.run(&["curl", "-s", "--max-time", "20", &site]).stdout == "made by the build\n"
            });
            let asked =
                "until docker-compose logs --no-color ask | grep 'made by the build'; do sleep 1; done";
            assert!(
                home.in_shell(&format!("timeout 280 sh -c {asked:?}")).ok().contains("made by the build")
            );
            assert_eq!(home.in_shell("docker-compose exec -T web cat /made").ok(), "made by the build");
        },
    );
    checks.check("Docker's SDK does by paramiko, which knows the VM's key", || {
        // A key that it does not know is a warning to it.
        let script = format!("exec /usr/bin/python3 -W error::UserWarning -c \"{SDK}\"");
        assert_eq!(home.in_shell(&script).ok(), "['ask', 'web']\nweb1");
    });
    checks.check(
        "a context has the VM by name; docker-compose takes it, and its paramiko many sessions",
        || {
            if home.clients.is_empty() {
                skip("there is no Docker client: make docker-tools");
            }
            let create = ["catalyst", "docker", "context", "create", "web1"];
            assert_eq!(home.run(&create).ok(), "web1");
            assert!(home.run(&create).stderr.contains("there already"));
            let other = home.run(&["catalyst", "docker", "context", "create", "web1", "--name", "a b"]);
            assert!(other.error(1).contains("'a b'"), "{other:?}");
            home.run(&["docker", "context", "use", "web1"]).ok();
            assert_eq!(home.run(&["docker", "info", "--format", "{{.Name}}"]).ok(), "web1");
            home.run(&["env", "COMPOSE_PARAMIKO_SSH=1", "docker-compose", "--no-ansi", "down", "-t", "0"])
                .ok();
            assert_eq!(home.run(&["docker", "ps", "-aq"]).ok(), "");
        },
    );
}

fn changed(checks: &mut Checks, home: &Home) {
    checks.check("a power-on writes the address anew where it is another", || {
        let address = vm(home.world, "web1")["address"].as_str().unwrap().to_owned();
        for name in ["config", "known_hosts"] {
            let text = home.read(name).replace(&address, "10.99.99.99");
            fs::write(home.folder.join(".ssh").join(name), text).unwrap();
        }
        home.run(&["catalyst", "vmpower", "suspend", "web1"]).ok();
        let on = home.run(&["catalyst", "vmpower", "on", "web1"]);
        assert!(on.stderr.contains(&format!("web1.catalyst is {address} now")), "{}", on.stderr);
        assert!(
            !home.read("config").contains("10.99.99.99") && !home.read("known_hosts").contains("10.99.99.99")
        );
        home.world.catalyst(&["ssh", "web1", "--", "true"]).ok();
        assert_eq!(home.ssh("web1.catalyst").ok(), "catalyst\nweb1");
    });
    checks.check(
        "a VM that another client made anew is not taken for the old one until it is asked for",
        || {
            let body = json!({"id": "web1"}).to_string();
            for (method, path, body) in
                [("DELETE", "/v1/vms/web1?force=true", None), ("POST", "/v1/vms", Some(body.as_str()))]
            {
                assert!(home.world.curl(method, path, body).status < 300);
            }
            home.world.catalyst(&["vmpower", "on", "web1", "--wait", "--timeout", "280"]).ok();
            let refused = home.ssh("web1.catalyst");
            assert!(
                refused.code() == 255 && refused.stderr.contains("IDENTIFICATION HAS CHANGED"),
                "{refused:?}"
            );
            home.run(&["catalyst", "docker", "env", "web1"]).ok();
            assert_eq!(home.ssh("web1.catalyst").ok(), "catalyst\nweb1");
        },
    );
}

fn gone(checks: &mut Checks, home: &Home) {
    checks.check("marks that were damaged, and files that ssh refuses, are told and left", || {
        let config = home.folder.join(".ssh/config");
        let text = home.read("config");
        fs::write(&config, text.replace("# <<< catalyst <<<", "")).unwrap();
        let damaged = home.run(&["catalyst", "ssh-config", "--remove"]);
        assert!(damaged.error(1).contains("line 1; mend"), "{damaged:?}");
        fs::write(&config, &text).unwrap();
        fs::set_permissions(&config, fs::Permissions::from_mode(0o666)).unwrap();
        let open = home.run(&["catalyst", "ssh-config", "web1", "--remove"]);
        assert!(open.error(1).contains("chmod o-w"), "{open:?}");
        assert_eq!(home.read("config"), text);
        fs::set_permissions(&config, fs::Permissions::from_mode(0o640)).unwrap();
    });
    checks.check("vm delete leaves the files as they were before, through a link too", || {
        let config = home.folder.join(".ssh/config");
        fs::rename(&config, home.folder.join("dotfile")).unwrap();
        std::os::unix::fs::symlink("../dotfile", &config).unwrap();
        home.run(&["catalyst", "vm", "delete", "--force", "web1"]).ok();
        assert_eq!((home.read("config").as_str(), home.read("known_hosts").as_str()), (OWN_CONFIG, OWN_KEYS));
        assert!(config.symlink_metadata().unwrap().is_symlink());
    });
}
