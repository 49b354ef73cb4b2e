//! Commands about the runtime: what there is, what it can.

use std::path::Path;

use liboci_cli::{List, Spec};
use serde_json::{Value, json};

use crate::args::OCI_VERSION;
use crate::commands::print;
use crate::failure::{Outcome, Tried, said};
use crate::state::Folder;

/// Lists containers.
pub fn list(root: &Path, arguments: &List) -> Outcome {
    let mut ids: Vec<String> = std::fs::read_dir(root)
        .map(|entries| entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
        .unwrap_or_default();
    ids.sort();
    if arguments.quiet {
        return ids.iter().try_for_each(|id| print(id));
    }
    let known = ids.iter().filter_map(|id| {
        let folder = Folder::of(root, id).ok()?;
        let kept = folder.load().ok()?;
        let (status, _) = folder.status(&kept);
        Some(serde_json::to_value(kept.told(status)).unwrap_or_default())
    });
    let known: Vec<Value> = known.collect();
    match arguments.format.as_str() {
        "json" => print(&Value::Array(known).to_string()),
        "table" => print(&table(&known)),
        format => said(format!("{format} is no format: json and table are")),
    }
}

fn table(known: &[Value]) -> String {
    let head = ["ID", "PID", "STATUS", "BUNDLE", "CREATED"].map(str::to_owned);
    let cell = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let row = |state: &Value| ["id", "pid", "status", "bundle", "created"].map(|name| cell(&state[name]));
    let rows: Vec<_> = std::iter::once(head).chain(known.iter().map(row)).collect();
    let widths: [usize; 5] =
        std::array::from_fn(|at| rows.iter().map(|row| row[at].len()).max().unwrap_or(0));
    let lines = rows.iter().map(|row| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("   ").trim_end().to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// What this runtime can, as "Features Structure" of the runtime specification has it.
pub fn features() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "hooks": ["prestart", "createRuntime", "poststart", "poststop"],
        "mountOptions": ["bind", "rbind", "ro", "rw", "rro", "nosuid", "suid", "nodev", "dev", "noexec", "exec",
            "noatime", "atime", "nodiratime", "diratime", "relatime", "norelatime", "strictatime", "nostrictatime",
            "sync", "async", "private", "rprivate", "shared", "rshared", "slave", "rslave", "unbindable", "runbindable"],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "capabilities": capabilities(),
            "cgroup": {"v1": true, "v2": true, "systemd": false, "systemdUser": false},
            "seccomp": {"enabled": false},
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
        },
        "annotations": {"org.catalyst.version": env!("CARGO_PKG_VERSION")},
    })
}

fn capabilities() -> Vec<String> {
    let known = [
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "FSETID",
        "KILL",
        "SETGID",
        "SETUID",
        "SETPCAP",
        "LINUX_IMMUTABLE",
        "NET_BIND_SERVICE",
        "NET_BROADCAST",
        "NET_ADMIN",
        "NET_RAW",
        "IPC_LOCK",
        "IPC_OWNER",
        "SYS_MODULE",
        "SYS_RAWIO",
        "SYS_CHROOT",
        "SYS_PTRACE",
        "SYS_PACCT",
        "SYS_ADMIN",
        "SYS_BOOT",
        "SYS_NICE",
        "SYS_RESOURCE",
        "SYS_TIME",
        "SYS_TTY_CONFIG",
        "MKNOD",
        "LEASE",
        "AUDIT_WRITE",
        "AUDIT_CONTROL",
        "SETFCAP",
        "MAC_OVERRIDE",
        "MAC_ADMIN",
        "SYSLOG",
        "WAKE_ALARM",
        "BLOCK_SUSPEND",
        "AUDIT_READ",
        "PERFMON",
        "BPF",
        "CHECKPOINT_RESTORE",
    ];
    known.iter().map(|name| format!("CAP_{name}")).collect()
}

/// Writes an example of a specification into a bundle that has none.
pub fn spec(arguments: &Spec) -> Outcome {
    if arguments.rootless {
        return said("A container that is a VM has no need to be rootless: its users are its own");
    }
    let folder = arguments.bundle.as_deref().unwrap_or(Path::new("."));
    let path = folder.join("config.json");
    let what = || format!("write {}", path.display());
    let text = serde_json::to_string_pretty(&example()).map_err(std::io::Error::from).tried(what)?;
    let file = std::fs::OpenOptions::new().write(true).create_new(true).open(&path).tried(what)?;
    std::io::Write::write_all(&mut &file, format!("{text}\n").as_bytes()).tried(what)
}

fn example() -> Value {
    let usual = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    let mount = |place: &str, kind: &str, options: &[&str]| json!({"destination": place, "type": kind, "source": kind, "options": options});
    json!({
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": true, "user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/", "noNewPrivileges": true,
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "capabilities": {"bounding": usual, "effective": usual, "permitted": usual},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "catalyst",
        "mounts": [
            mount("/proc", "proc", &[]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_is_one_that_is_taken_and_is_not_written_over() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("rootfs")).unwrap();
        let arguments = Spec { bundle: Some(folder.path().to_owned()), rootless: false };
        spec(&arguments).unwrap();
        let bundle = crate::bundle::Bundle::load(folder.path()).unwrap();
        assert!(crate::document::convert(&bundle, true).unwrap().0.read_only);
        assert!(spec(&arguments).is_err());
    }

    #[test]
    fn every_capability_that_is_told_is_known() {
        let named = capabilities();
        let all = named
            .iter()
            .map(|name| crate::process::capability_named(name).unwrap())
            .fold(0, |all, one| all | one);
        assert_eq!((named.len(), all), (41, (1 << 41) - 1));
    }

    #[test]
    fn features_are_in_the_form_of_the_specification() {
        let read: oci_spec::runtime::Features = serde_json::from_value(features()).unwrap();
        assert_eq!(read.oci_version_max(), OCI_VERSION);
    }

    #[test]
    fn tables_stand_in_columns() {
        let known =
            [json!({"id": "a-long-one", "pid": 7, "status": "running", "bundle": "/b", "created": "now"})];
        assert_eq!(
            table(&known),
            "ID           PID   STATUS    BUNDLE   CREATED\na-long-one   7     running   /b       now"
        );
    }
}
