//! A bundle: its specification, checked for what is supported (OCI runtime specification, "Filesystem Bundle").

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxDeviceType, LinuxNamespaceType, Spec};
use serde_json::Value;

use crate::failure::{Failure, Outcome, Tried, said};
use crate::state::{Folder, Kept};

/// Longest specification that is read, in bytes.
const LONGEST: u64 = 8 << 20;
/// Devices that every container has (OCI runtime specification, "Default Devices"), and that guests have of their own.
const OWN_DEVICES: [&str; 9] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
    "/dev/console",
    "/dev/ptmx",
    "/dev/pts/ptmx",
];

/// What a container is in a pod of Kubernetes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodPart {
    /// It is in none.
    None,
    /// It holds the pod's namespaces.
    Sandbox,
    /// It runs something.
    Container,
}

/// A bundle.
#[derive(Debug)]
pub struct Bundle {
    /// Its folder, absolute.
    pub path: PathBuf,
    /// Its specification.
    pub spec: Spec,
    /// Its root file system, absolute.
    pub rootfs: PathBuf,
}

impl Bundle {
    /// Reads the bundle in a folder and refuses what is not supported.
    pub fn load(folder: &Path) -> Outcome<Self> {
        let bundle = Self::read(folder)?;
        check(&bundle.spec)?;
        Ok(bundle)
    }

    /// Reads the bundle of a container that is made already, or by this process, which may be in its namespaces by now.
    pub fn read(folder: &Path) -> Outcome<Self> {
        let path = folder.canonicalize().tried(|| format!("find the bundle {}", folder.display()))?;
        let document = path.join("config.json");
        let found = document.metadata().tried(|| format!("read {}", document.display()))?;
        if found.len() > LONGEST {
            return said(format!(
                "{} has {} bytes; at most {LONGEST} are read",
                document.display(),
                found.len()
            ));
        }
        let text = std::fs::read(&document).tried(|| format!("read {}", document.display()))?;
        let spec = parse(&text)
            .map_err(|source| Failure::Document { what: document.display().to_string(), source })?;
        let Some(root) = spec.root() else {
            return said(format!("{} names no root file system", document.display()));
        };
        let rootfs = path.join(root.path());
        let rootfs =
            rootfs.canonicalize().tried(|| format!("find the root file system {}", rootfs.display()))?;
        Ok(Self { path, spec, rootfs })
    }

    /// The bundle of a container that is made already, as it was then: what its engine changes in it later is nothing to the container
    /// (OCI runtime specification, "Lifecycle", step 2).
    pub fn kept(folder: &Folder, kept: &Kept) -> Outcome<Self> {
        Ok(Self { path: kept.bundle.clone(), spec: folder.load_spec()?, rootfs: kept.rootfs.clone() })
    }

    /// What it is in a pod.
    pub fn pod_part(&self) -> PodPart {
        pod_part(&self.spec)
    }

    /// The process namespace of another process that it is to have, if it is to.
    pub fn shared_processes(&self) -> Option<&Path> {
        let namespaces = self.spec.linux().as_ref()?.namespaces().as_deref()?;
        let own = namespaces.iter().find(|namespace| namespace.typ() == LinuxNamespaceType::Pid)?;
        own.path().as_deref().filter(|path| !path.as_os_str().is_empty())
    }

    /// What is special to Linux.
    pub fn linux(&self) -> Outcome<&Linux> {
        linux(&self.spec)
    }
}

/// Filters of system calls are not applied, so that ones of a later version are none of our business.
fn parse(text: &[u8]) -> serde_json::Result<Spec> {
    let mut document: Value = serde_json::from_slice(text)?;
    if let Some(Value::Object(linux)) = document.get_mut("linux") {
        linux.remove("seccomp");
    }
    serde_json::from_value(document)
}

/// Annotations by which containerd's part for Kubernetes and CRI-O say what a container is in its pod.
const POD_PARTS: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];

/// Whether the annotations are those of a container that holds a pod's namespaces.
pub fn is_sandbox(annotations: &BTreeMap<String, String>) -> bool {
    POD_PARTS.iter().find_map(|name| annotations.get(*name)).is_some_and(|part| part == "sandbox")
}

fn pod_part(spec: &Spec) -> PodPart {
    let annotations = spec.annotations().as_ref();
    let part = annotations.and_then(|annotations| POD_PARTS.iter().find_map(|name| annotations.get(*name)));
    match part.map(String::as_str) {
        Some("sandbox") => PodPart::Sandbox,
        Some("container") => PodPart::Container,
        _ => PodPart::None,
    }
}

fn linux(spec: &Spec) -> Outcome<&Linux> {
    spec.linux().as_ref().map_or_else(|| said("The specification has no part 'linux'"), Ok)
}

/// Refuses what is not supported.
pub fn check(spec: &Spec) -> Outcome {
    let major = spec.version().split('.').next().unwrap_or_default();
    if major != "1" {
        return said(format!("Specifications of version {} are not known, those of 1 are", spec.version()));
    }
    let linux = linux(spec)?;
    check_namespaces(linux, pod_part(spec))?;
    check_devices(linux)?;
    if let Some(hooks) = spec.hooks() {
        let inside =
            [(hooks.create_container(), "createContainer"), (hooks.start_container(), "startContainer")];
        for (hooks, name) in inside {
            if hooks.as_ref().is_some_and(|hooks| !hooks.is_empty()) {
                return said(format!(
                    "Hooks of the kind {name} run in namespaces of the host that a VM does not have: use createRuntime"
                ));
            }
        }
    }
    Ok(())
}

fn check_namespaces(linux: &Linux, part: PodPart) -> Outcome {
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    let of = |kind| namespaces.iter().find(|namespace| namespace.typ() == kind);
    for (kind, name, option) in [
        (LinuxNamespaceType::Network, "network", "--network host"),
        (LinuxNamespaceType::Pid, "process", "--pid host"),
        (LinuxNamespaceType::Ipc, "IPC", "--ipc host"),
        (LinuxNamespaceType::Uts, "UTS", "--uts host"),
        (LinuxNamespaceType::Mount, "mount", "none"),
    ] {
        let Some(namespace) = of(kind) else {
            return said(format!("The host's {name} namespace cannot be had in a VM ({option})"));
        };
        // A pod's containers have them together in the VM.
        let of_pod = part == PodPart::Container && kind != LinuxNamespaceType::Mount;
        let shared = namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty());
        if let Some(path) = shared.filter(|_| kind != LinuxNamespaceType::Network && !of_pod) {
            return said(format!(
                "The {name} namespace of another process ({}) cannot be had in a VM",
                path.display()
            ));
        }
    }
    for kind in [LinuxNamespaceType::Cgroup, LinuxNamespaceType::Time] {
        let path = of(kind).and_then(|namespace| namespace.path().as_deref());
        if let Some(path) = path.filter(|path| !path.as_os_str().is_empty()) {
            return said(format!(
                "The {kind} namespace of another process ({}) cannot be had in a VM",
                path.display()
            ));
        }
    }
    let network = of(LinuxNamespaceType::Network).and_then(|namespace| namespace.path().as_deref());
    if network.is_some_and(is_own_network) {
        // Docker names it by a path.
        return said("The host's network namespace cannot be had in a VM (--network host)");
    }
    let mapped = linux.uid_mappings().as_ref().is_some_and(|mappings| !mappings.is_empty());
    if of(LinuxNamespaceType::User).is_some() || mapped {
        return said("User namespaces are not supported: a VM's users are its own already");
    }
    Ok(())
}

/// Whether it is the network namespace that this process is in. One that cannot be looked at cannot be entered either, which is told then.
fn is_own_network(path: &Path) -> bool {
    let identity = |path: &Path| path.metadata().map(|found| (found.dev(), found.ino())).ok();
    identity(path).is_some_and(|other| identity(Path::new("/proc/self/ns/net")) == Some(other))
}

fn check_devices(linux: &Linux) -> Outcome {
    let rules =
        linux.resources().as_ref().and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    let all = rules.iter().any(|rule| {
        rule.allow()
            && rule.typ().is_none_or(|kind| kind == LinuxDeviceType::A)
            && rule.major().is_none_or(|number| number < 0)
            && rule.minor().is_none_or(|number| number < 0)
            && rule.access().as_deref().is_none_or(|access| access.contains('r') || access.contains('w'))
    });
    if all {
        return said("Access to all devices of the host (--privileged) cannot be given to a VM");
    }
    for device in linux.devices().as_deref().unwrap_or_default() {
        if !OWN_DEVICES.iter().any(|own| device.path() == Path::new(own)) {
            return said(format!("The host's device {} cannot be given to a VM", device.path().display()));
        }
    }
    Ok(())
}

#[cfg(test)]
pub mod tests {
    use serde_json::json;

    use super::*;

    /// A specification as Docker writes it, in short.
    pub fn example() -> Value {
        json!({
            "ociVersion": "1.0.2-dev",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["echo", "hi"], "env": ["PATH=/bin"], "cwd": "/"},
            "root": {"path": "rootfs"},
            "hostname": "box",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/etc/hosts", "type": "bind", "source": "/etc/hosts", "options": ["rbind", "rprivate", "ro"]},
            ],
            "linux": {
                "resources": {"devices": [{"allow": false, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 1, "minor": 5, "access": "rwm"}]},
                "cgroupsPath": "/docker/box",
                "namespaces": [{"type": "mount"}, {"type": "network"}, {"type": "uts"}, {"type": "pid"}, {"type": "ipc"}],
                "seccomp": {"defaultAction": "SCMP_ACT_OF_LATER"}
            }
        })
    }

    /// The example with a part of it changed.
    pub fn with(pointer: &str, value: Value) -> Spec {
        let mut document = example();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        document.pointer_mut(parent).unwrap()[name] = value;
        parse(&serde_json::to_vec(&document).unwrap()).unwrap()
    }

    #[test]
    fn a_specification_of_docker_s_is_read_from_its_bundle() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), example().to_string()).unwrap();
        assert!(Bundle::load(folder.path()).is_err(), "it has no root file system");
        std::fs::create_dir(folder.path().join("rootfs")).unwrap();
        let bundle = Bundle::load(folder.path()).unwrap();
        assert!(bundle.rootfs.is_absolute() && bundle.rootfs.ends_with("rootfs"));
        assert_eq!(bundle.spec.hostname().as_deref(), Some("box"));
        // What is changed in it after its creation is nothing to it.
        let state = Folder::of(folder.path(), "c1").unwrap();
        state.make().unwrap();
        state.save_spec(&bundle.spec).unwrap();
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        let kept = Kept { bundle: bundle.path.clone(), rootfs: bundle.rootfs.clone(), ..Kept::default() };
        assert_eq!(Bundle::kept(&state, &kept).unwrap().spec, bundle.spec);
        // As its shim finds it, which is in that network namespace.
        let mut inside = example();
        inside["linux"]["namespaces"][1]["path"] = json!("/proc/self/ns/net");
        std::fs::write(folder.path().join("config.json"), inside.to_string()).unwrap();
        assert!(Bundle::load(folder.path()).is_err() && Bundle::read(folder.path()).is_ok());
    }

    #[test]
    fn what_is_not_supported_is_refused_in_one_sentence() {
        let others = |kind: &str| {
            let kinds = ["mount", "network", "uts", "pid", "ipc"];
            kinds.iter().filter(|other| **other != kind).map(|kind| json!({"type": kind})).collect::<Value>()
        };
        let mut user = others("none");
        user.as_array_mut().unwrap().push(json!({"type": "user"}));
        let mut shared = others("pid");
        shared.as_array_mut().unwrap().push(json!({"type": "pid", "path": "/proc/7/ns/pid"}));
        let namespaces = "/linux/namespaces";
        let mut host = others("network");
        host.as_array_mut().unwrap().push(json!({"type": "network", "path": "/proc/self/ns/net"}));
        let mut cgroup = others("none");
        cgroup.as_array_mut().unwrap().push(json!({"type": "cgroup", "path": "/proc/7/ns/cgroup"}));
        let fuse = json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]);
        let all = json!([{"allow": true, "access": "rwm"}]);
        for (pointer, value, word) in [
            (namespaces, others("network"), "--network host"),
            (namespaces, host, "--network host"),
            (namespaces, others("pid"), "--pid host"),
            (namespaces, others("ipc"), "--ipc host"),
            (namespaces, others("uts"), "--uts host"),
            (namespaces, user, "User namespaces"),
            (namespaces, shared, "/proc/7/ns/pid"),
            (namespaces, cgroup, "/proc/7/ns/cgroup"),
            ("/linux/devices", fuse, "/dev/fuse"),
            ("/linux/resources/devices", all, "--privileged"),
            ("/hooks", json!({"startContainer": [{"path": "/x"}]}), "startContainer"),
            ("/ociVersion", json!("2.0.0"), "2.0.0"),
        ] {
            let refused = check(&with(pointer, value)).unwrap_err().to_string();
            assert!(refused.contains(word) && !refused.contains('\n'), "{word}: {refused}");
        }
        check(&with("/linux/devices", json!([{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}])))
            .unwrap();
        let joined = json!([{"type": "mount"}, {"type": "network", "path": "/run/netns/x"}, {"type": "uts"},
            {"type": "pid"}, {"type": "ipc"}]);
        check(&with(namespaces, joined)).unwrap();
    }

    #[test]
    fn a_pod_s_container_shares_what_its_kernel_has_not() {
        let mut document = example();
        document["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "network", "path": "/run/netns/x"},
            {"type": "uts", "path": "/proc/7/ns/uts"}, {"type": "pid"}, {"type": "ipc", "path": "/proc/7/ns/ipc"}]);
        let read = |document: &Value| parse(&serde_json::to_vec(document).unwrap()).unwrap();
        assert!(check(&read(&document)).is_err());
        document["annotations"] = json!({"io.kubernetes.cri.container-type": "container"});
        check(&read(&document)).unwrap();
        assert_eq!(pod_part(&read(&document)), PodPart::Container);
        document["linux"]["namespaces"][3]["path"] = json!("/proc/7/ns/pid");
        check(&read(&document)).unwrap();
        document["linux"]["namespaces"][0]["path"] = json!("/proc/7/ns/mnt");
        assert!(check(&read(&document)).is_err());
    }
}
