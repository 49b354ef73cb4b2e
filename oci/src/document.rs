//! A specification in the words of the guest's agent, and which trees of the host's it takes.

use std::path::{Path, PathBuf};

use catalyst_agent_protocol::container::{Container, Mount};
use oci_spec::runtime;

use crate::bundle::{Bundle, PodPart};
use crate::failure::{Outcome, said};
use crate::process;

/// Most trees of the host's in one container; the process that serves them takes one more.
const MOST_TREES: usize = 199;
/// What the guest's kernel mounts.
const KINDS: [&str; 6] = ["proc", "tmpfs", "sysfs", "devpts", "mqueue", "cgroup"];
/// Options that say how the host mounts, which a guest does not see.
const PROPAGATION: [&str; 10] = [
    "private",
    "rprivate",
    "shared",
    "rshared",
    "slave",
    "rslave",
    "unbindable",
    "runbindable",
    "bind",
    "rbind",
];

/// A tree of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// With what is mounted below it.
    pub recursive: bool,
    /// Nothing is written to it.
    pub read_only: bool,
}

/// The document for the agent, without the network, and the trees.
pub fn convert(bundle: &Bundle, stdin: bool) -> Outcome<(Container, Vec<Tree>)> {
    let spec = &bundle.spec;
    let linux = bundle.linux()?;
    let Some(process) = spec.process() else {
        return said("The specification has no part 'process'");
    };
    let read_only = spec.root().as_ref().and_then(runtime::Root::readonly).unwrap_or_default();
    let root = catalyst_agent_protocol::container::ROOT_TREE.to_owned();
    let mut trees = vec![Tree { name: root, path: bundle.rootfs.clone(), recursive: true, read_only }];
    let mut mounts = Vec::new();
    for mount in spec.mounts().as_deref().unwrap_or_default() {
        mounts.push(convert_mount(mount, &bundle.path, &mut trees)?);
    }
    if trees.len() > MOST_TREES {
        return said(format!(
            "{} folders of the host are to be mounted; at most {MOST_TREES} are possible",
            trees.len()
        ));
    }
    let limit = linux.resources().as_ref().and_then(|resources| resources.pids().as_ref());
    let container = Container {
        hostname: spec
            .hostname()
            .clone()
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| pod_hostname(bundle)),
        domainname: spec.domainname().clone().unwrap_or_default(),
        read_only,
        mounts,
        sysctls: sysctls(linux),
        masked_paths: linux.masked_paths().clone().unwrap_or_default(),
        readonly_paths: linux.readonly_paths().clone().unwrap_or_default(),
        resolver: uses_resolver(spec, &bundle.path),
        pids_limit: limit.map_or(0, |pids| u64::try_from(pids.limit()).unwrap_or_default()),
        process: process::convert(process, stdin)?,
        ..Container::default()
    };
    Ok((container, trees))
}

/// The kernel settings of a specification, in the order of their names.
pub fn sysctls(linux: &runtime::Linux) -> Vec<(String, String)> {
    let mut sysctls: Vec<_> = linux.sysctl().clone().unwrap_or_default().into_iter().collect();
    sysctls.sort();
    sysctls
}

fn convert_mount(mount: &runtime::Mount, bundle: &Path, trees: &mut Vec<Tree>) -> Outcome<Mount> {
    let destination = mount.destination().to_string_lossy().into_owned();
    if !destination.starts_with('/') {
        return said(format!("The mount's destination {destination:?} is not absolute"));
    }
    let options = mount.options().clone().unwrap_or_default();
    let has = |word: &str| options.iter().any(|option| option == word);
    let kind = mount.typ().clone().unwrap_or_default();
    let passed: Vec<String> =
        options.iter().filter(|option| !PROPAGATION.contains(&option.as_str())).cloned().collect();
    if kind == "bind" || has("bind") || has("rbind") {
        if has("idmap") || has("ridmap") {
            return said(format!("The mount at {destination} maps users, which is not supported"));
        }
        let Some(source) = mount.source().as_ref().filter(|source| !source.as_os_str().is_empty()) else {
            return said(format!("The mount at {destination} names no source"));
        };
        let name = format!("m{}", trees.len());
        let read_only = has("ro") || has("rro");
        trees.push(Tree {
            name: name.clone(),
            path: bundle.join(source),
            recursive: has("rbind"),
            read_only,
        });
        let kind = "tree".to_owned();
        return Ok(Mount { destination, kind, source: name, options: passed });
    }
    let kind = if kind == "cgroup2" { "cgroup".to_owned() } else { kind };
    if !KINDS.contains(&kind.as_str()) {
        return said(format!(
            "The mount at {destination} is of the type {kind:?}, which is not supported in a VM"
        ));
    }
    let source = mount.source().as_ref().map(|source| source.to_string_lossy().into_owned());
    Ok(Mount { destination, kind, source: source.unwrap_or_default(), options: passed })
}

/// In a pod it is that of a UTS namespace of the host's, where the VM has its own; the file that comes along says the same.
fn pod_hostname(bundle: &Bundle) -> String {
    let file = Some("/etc/hostname").filter(|_| bundle.pod_part() == PodPart::Container);
    let file = file.and_then(|path| mount_source(&bundle.spec, path, &bundle.path));
    let text = file.and_then(|path| std::fs::read_to_string(path).ok()).unwrap_or_default();
    let name = text.trim();
    // What the kernel takes (sethostname(2)).
    if name.len() <= 64 && !name.contains(char::is_whitespace) { name.to_owned() } else { String::new() }
}

/// Whether names are asked of Docker's resolver: the container's resolv.conf says so.
fn uses_resolver(spec: &runtime::Spec, bundle: &Path) -> bool {
    let source = mount_source(spec, "/etc/resolv.conf", bundle);
    let text = source.and_then(|path| std::fs::read_to_string(path).ok()).unwrap_or_default();
    names_resolver(&text)
}

/// resolv.conf(5).
fn names_resolver(text: &str) -> bool {
    text.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.next() == Some("nameserver") && words.next() == Some("127.0.0.11")
    })
}

/// The host's path of what is bind-mounted there.
pub fn mount_source(spec: &runtime::Spec, destination: &str, bundle: &Path) -> Option<PathBuf> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let mount = mounts.iter().find(|mount| mount.destination() == Path::new(destination))?;
    Some(bundle.join(mount.source().as_ref()?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::bundle::tests::with;

    fn bundle(pointer: &str, value: serde_json::Value) -> Bundle {
        Bundle { path: "/b".into(), spec: with(pointer, value), rootfs: "/b/rootfs".into() }
    }

    #[test]
    fn mounts_of_the_host_become_trees_and_others_stay() {
        let mounts = json!([
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
            {"destination": "/v", "type": "bind", "source": "/srv/v", "options": ["rbind", "rprivate", "ro", "nodev"]},
            {"destination": "/w", "source": "w", "options": ["bind"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup2", "source": "cgroup", "options": ["ro", "nsdelegate"]},
        ]);
        let (container, trees) = convert(&bundle("/mounts", mounts), true).unwrap();
        let tree = |name: &str, path: &str, recursive, read_only| Tree {
            name: name.into(),
            path: path.into(),
            recursive,
            read_only,
        };
        let expected = [
            tree("root", "/b/rootfs", true, false),
            tree("m1", "/srv/v", true, true),
            tree("m2", "/b/w", false, false),
        ];
        assert_eq!(trees, expected);
        let kinds: Vec<_> =
            container.mounts.iter().map(|mount| (mount.kind.as_str(), mount.source.as_str())).collect();
        assert_eq!(kinds, [("proc", "proc"), ("tree", "m1"), ("tree", "m2"), ("cgroup", "cgroup")]);
        assert_eq!(container.mounts[1].options, ["ro", "nodev"]);
        assert_eq!((container.hostname.as_str(), container.process.stdin), ("box", true));
    }

    #[test]
    fn mounts_that_a_vm_cannot_have_are_refused() {
        for mount in [
            json!({"destination": "/x", "type": "nfs", "source": "s:/"}),
            json!({"destination": "x", "type": "tmpfs"}),
            json!({"destination": "/x", "type": "bind"}),
            json!({"destination": "/x", "type": "bind", "source": "/y", "options": ["bind", "idmap"]}),
        ] {
            assert!(convert(&bundle("/mounts", json!([mount])), false).is_err(), "{mount}");
        }
    }

    #[test]
    fn limits_and_a_root_that_is_only_read_come_over() {
        let (container, trees) = convert(&bundle("/root/readonly", json!(true)), false).unwrap();
        assert!(container.read_only && trees[0].read_only);
        let resources = json!({"pids": {"limit": 12}});
        assert_eq!(convert(&bundle("/linux/resources", resources), false).unwrap().0.pids_limit, 12);
        let resources = json!({"pids": {"limit": -1}});
        assert_eq!(convert(&bundle("/linux/resources", resources), false).unwrap().0.pids_limit, 0);
    }

    #[test]
    fn a_pod_s_container_has_the_name_that_its_file_says() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("hostname");
        std::fs::write(&file, "web-1\n").unwrap();
        let mounts =
            json!([{"destination": "/etc/hostname", "type": "bind", "source": file, "options": ["rbind"]}]);
        let named = |annotations: serde_json::Value| {
            let mut document = crate::bundle::tests::example();
            document["mounts"] = mounts.clone();
            document["hostname"] = json!("");
            document["annotations"] = annotations;
            document["linux"].as_object_mut().unwrap().remove("seccomp");
            let spec = serde_json::from_value(document).unwrap();
            let bundle = Bundle { path: "/b".into(), spec, rootfs: "/b/rootfs".into() };
            convert(&bundle, false).unwrap().0.hostname
        };
        assert_eq!(named(json!({"io.kubernetes.cri.container-type": "container"})), "web-1");
        assert_eq!(named(json!({})), "");
    }

    #[test]
    fn docker_s_resolver_is_known_by_its_address() {
        assert!(names_resolver("search x\nnameserver 127.0.0.11\noptions ndots:0\n"));
        assert!(!names_resolver("# nameserver 127.0.0.11\nnameserver 127.0.0.110\n"));
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("resolv.conf");
        std::fs::write(&file, "nameserver 127.0.0.11\n").unwrap();
        let mounts = json!([{"destination": "/etc/resolv.conf", "type": "bind", "source": file, "options": ["rbind"]}]);
        assert!(convert(&bundle("/mounts", mounts), false).unwrap().0.resolver);
    }
}
