//! The files of Docker's daemon: what lasts is in the state folder, what root reads and runs below `/run/catalyst`.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom};
use std::net::Ipv4Addr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::error::DockerError;
use crate::network::Lease;
use crate::network::program::last_lines;
use crate::network::state::{absent_is_fine, make_folder, read_small, write_public};
use crate::settings::sibling;

/// Where things lie in the mount namespace of Docker's daemon, on a file system of its own: sockets' paths are to be short.
const INSIDE: &str = "/run/catalyst/docker";
/// What is overlaid in that namespace, and so must be there.
const OVERLAID: [&str; 3] = [INSIDE, "/run/containerd", "/etc/docker"];
/// Bytes of log after which the next start begins a new one.
const LOG_KEPT: u64 = 4 << 20;

/// Where they are.
#[derive(Debug, Clone)]
pub(super) struct Files {
    state: PathBuf,
    run: PathBuf,
}

impl Files {
    /// Those of a state folder, with root's folder for what lasts until the next boot.
    pub fn new(state: &Path, run: PathBuf) -> Self {
        Self { state: state.to_owned(), run }
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.state.join("docker.sock")
    }

    /// What it says.
    pub fn log(&self) -> PathBuf {
        self.state.join("docker.log")
    }

    /// Its images, containers and volumes.
    pub fn data(&self) -> PathBuf {
        self.state.join("docker")
    }

    /// Root's folder.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// The host's network namespace, mounted there by those alone who belong to Docker's daemon.
    pub fn mark(&self) -> PathBuf {
        self.run.join("host-net")
    }

    /// Where it writes its process id.
    pub fn pid(&self) -> PathBuf {
        self.run.join("docker.pid")
    }

    /// Where it says that it is ready.
    pub fn notify(&self) -> PathBuf {
        self.run.join("notify")
    }

    /// The option that only it is run with.
    pub fn pid_option(&self) -> OsString {
        let mut option = OsString::from("--pidfile=");
        option.push(self.pid());
        option
    }

    /// Its settings.
    pub fn config(&self) -> PathBuf {
        self.run.join("daemon.json")
    }

    /// The name of its cable's end on the bridge, if it has one.
    pub fn cable(&self) -> Option<String> {
        let name = read_small(&self.run.join("cable")).ok()??;
        Some(name.trim().to_owned())
    }

    fn lease(&self) -> PathBuf {
        self.run.join("lease.json")
    }

    /// The address that it has, if it is up.
    pub fn noted_lease(&self) -> Option<Lease> {
        serde_json::from_str(&read_small(&self.lease()).ok()??).ok()
    }

    /// Settings of the owner's, which are added to ours. With the owner's rights.
    pub fn owners_settings(&self) -> Result<Map<String, Value>, DockerError> {
        let path = self.state.join("docker.json");
        let bad = |reason: String| DockerError::Settings { path: path.clone(), reason };
        let text = read_small(&path).map_err(|error| bad(error.to_string()))?;
        let parsed = text.map(|text| serde_json::from_str(&text)).transpose();
        Ok(parsed.map_err(|error| bad(error.to_string()))?.unwrap_or_default())
    }

    /// Makes all that a start needs. As root.
    pub fn prepare(&self, lease: &Lease, config: &Map<String, Value>) -> Result<(), DockerError> {
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| DockerError::File { what, path, source }
        };
        for folder in OVERLAID.map(Path::new).into_iter().chain(self.above()).chain([self.run()]) {
            make_missing(folder).map_err(failed("make the folder", folder))?;
        }
        // Of one whose folder could not be removed: a socket in its place cannot be made, a pid file refuses a start.
        for path in [self.pid(), self.notify(), self.run.join("cable")] {
            absent_is_fine(fs::remove_file(&path)).map_err(failed("remove", &path))?;
        }
        let lease_text = serde_json::to_string(lease).unwrap_or_default();
        for (path, text) in [
            (self.lease(), lease_text),
            (self.mark(), String::new()),
            (self.run.join("resolv.conf"), resolver(lease.gateway)),
            (self.config(), Value::Object(config.clone()).to_string()),
            (self.proxy(), self.proxy_script()),
        ] {
            write_public(&path, &text).map_err(failed("write", &path))?;
        }
        fs::set_permissions(self.proxy(), Permissions::from_mode(0o755))
            .map_err(failed("make executable", &self.proxy()))
    }

    fn above(&self) -> impl Iterator<Item = &Path> {
        let mut above: Vec<&Path> = self.run.ancestors().skip(1).take(2).collect();
        above.reverse();
        above.into_iter()
    }

    /// What it runs for each published port.
    fn proxy(&self) -> PathBuf {
        self.run.join("port")
    }

    fn proxy_script(&self) -> String {
        let (program, host) = (sibling("catalyst-oci"), self.mark());
        format!(
            "#!/bin/sh\nCATALYST_OCI_ROLE=port CATALYST_OCI_HOST_NET={} exec {} \"$@\"\n",
            quoted(&host),
            quoted(&program)
        )
    }

    /// Our settings over those of the owner.
    pub fn settings(
        &self,
        mut config: Map<String, Value>,
        lease: &Lease,
        cgroup: &str,
    ) -> Map<String, Value> {
        let runtime = json!({
            "path": sibling("catalyst-oci"),
            "runtimeArgs": ["--socket", self.state.join("catalyst.sock")],
        });
        let runtimes = config.entry("runtimes").or_insert_with(|| json!({}));
        if let Some(runtimes) = runtimes.as_object_mut() {
            runtimes.insert("catalyst".to_owned(), runtime);
        }
        for (name, value) in [("log-level", json!("warn")), ("default-runtime", json!("catalyst"))] {
            config.entry(name).or_insert(value);
        }
        let ours = [
            ("hosts", json!(["fd://"])),
            ("data-root", json!(self.data())),
            ("exec-root", json!(Path::new(INSIDE).join("exec"))),
            ("exec-opts", json!(["native.cgroupdriver=cgroupfs"])),
            ("cgroup-parent", json!(cgroup)),
            ("host-gateway-ip", json!(lease.gateway)),
            ("userland-proxy-path", json!(self.proxy())),
        ];
        config.extend(ours.map(|(name, value)| (name.to_owned(), value)));
        config
    }

    /// Opens the log, with where it ends now. With the owner's rights.
    pub fn open_log(&self) -> Result<(File, u64), DockerError> {
        let path = self.log();
        let work = || {
            let mut options = OpenOptions::new();
            options.read(true).append(true).create(true).mode(0o600);
            let log = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path)?;
            if log.metadata()?.len() > LOG_KEPT {
                log.set_len(0)?;
            }
            let length = log.metadata()?.len();
            Ok((log, length))
        };
        work().map_err(|source| DockerError::File { what: "open", path, source })
    }

    /// What the log from there on says of a failure, in one line. With the owner's rights.
    pub fn said(&self, from: u64) -> String {
        const LONGEST: u64 = 64 << 10;
        let read = || {
            let mut options = OpenOptions::new();
            let mut log =
                options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(self.log())?;
            let end = log.metadata()?.len();
            log.seek(SeekFrom::Start(from.max(end.saturating_sub(LONGEST))))?;
            let mut said = Vec::new();
            log.take(LONGEST).read_to_end(&mut said)?;
            Ok::<_, io::Error>(said)
        };
        telling(&String::from_utf8_lossy(&read().unwrap_or_default()))
    }
}

/// The last line that tells of an error; the last one where none does.
fn telling(log: &str) -> String {
    let tells = |line: &&str| {
        !line.starts_with("time=") || line.contains(" level=error ") || line.contains(" level=fatal ")
    };
    let lines = || log.lines().rev().filter(|line| !line.trim().is_empty());
    last_lines(lines().find(tells).or_else(|| lines().next()).unwrap_or_default(), 1)
}

/// A name as sh(1) takes it for one word.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}

/// Makes a folder that others may read; one that is there stays as it is.
fn make_missing(path: &Path) -> io::Result<()> {
    if path.is_dir() { Ok(()) } else { make_folder(path) }
}

/// What asks the name server of the VMs, in the host's words otherwise.
fn resolver(server: Ipv4Addr) -> String {
    let host = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let kept = host.lines().filter(|line| line.starts_with("search ") || line.starts_with("options "));
    [format!("nameserver {server}").as_str()]
        .into_iter()
        .chain(kept)
        .map(|line| format!("{line}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(folder: &Path) -> Files {
        Files::new(folder, folder.join("run"))
    }

    #[test]
    fn what_keeps_it_apart_is_ours_and_the_rest_the_owners() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(folder.path());
        let text = r#"{"registry-mirrors": ["http://m"], "hosts": ["tcp://0.0.0.0:1"], "log-level": "debug",
            "runtimes": {"other": {"path": "/o"}}}"#;
        fs::write(folder.path().join("docker.json"), text).unwrap();
        let lease = Lease {
            id: "x".to_owned(),
            name: "x".to_owned(),
            mac: "02:ca:00:00:00:01".parse().unwrap(),
            address: Ipv4Addr::new(10, 208, 0, 10),
            prefix: 20,
            gateway: Ipv4Addr::new(10, 208, 0, 1),
            gateway_mac: "02:ca:00:00:00:02".parse().unwrap(),
            dns: Ipv4Addr::new(10, 208, 0, 1),
            domain: "catalyst".to_owned(),
            changed: None,
        };
        let settings = files.settings(files.owners_settings().unwrap(), &lease, "/c");
        assert_eq!(settings["registry-mirrors"], json!(["http://m"]));
        assert_eq!(settings["log-level"], "debug");
        assert_eq!(settings["hosts"], json!(["fd://"]));
        assert_eq!(settings["runtimes"]["other"]["path"], "/o");
        assert_eq!(settings["runtimes"]["catalyst"]["runtimeArgs"][0], "--socket");
        assert_eq!(settings["default-runtime"], "catalyst");
    }

    #[test]
    fn settings_that_are_none_are_named() {
        let folder = tempfile::tempdir().unwrap();
        assert!(files(folder.path()).owners_settings().unwrap().is_empty());
        for text in ["[]", "{", ""] {
            fs::write(folder.path().join("docker.json"), text).unwrap();
            let error = files(folder.path()).owners_settings().unwrap_err().to_string();
            assert!(error.contains("docker.json"), "{error}");
        }
    }

    #[test]
    fn the_log_is_told_from_where_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(folder.path());
        fs::write(files.log(), "old\n").unwrap();
        let (mut log, length) = files.open_log().unwrap();
        io::Write::write_all(&mut log, b"failed to start: no room\n").unwrap();
        io::Write::write_all(&mut log, b"time=\"t\" level=info msg=\"stopped\"\n").unwrap();
        assert_eq!(files.said(length), "failed to start: no room");
        assert_eq!(telling("time=1 level=info msg=a\ntime=2 level=info msg=b\n"), "time=2 level=info msg=b");
        assert_eq!(quoted(Path::new("/a b'c")), r"'/a b'\''c'");
    }
}
