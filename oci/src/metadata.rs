//! What a container is called and made of, as its engine knows it: for `catalyst vm list`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::bundle::Bundle;
use crate::document::mount_source;

/// Longest file of an engine's that is read, in bytes.
const LONGEST: u64 = 4 << 20;
/// As much of an ID is shown, as engines show it.
const SHORT: usize = 12;
/// Longest ID of a VM (the daemon's `store/id.rs`).
const LONGEST_NAME: usize = 63;

/// A container as its engine knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Metadata {
    /// Its name.
    pub name: String,
    /// Its image, if that is known.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub image: String,
    /// Its program with its arguments.
    pub command: Vec<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// `config.v2.json` of Docker's daemon, of which this much is read.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Docker {
    #[serde(rename = "ID")]
    id: String,
    name: String,
    config: DockerConfig,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct DockerConfig {
    image: String,
    labels: Option<BTreeMap<String, String>>,
}

/// What is known of the container `id`.
pub fn of(bundle: &Bundle, id: &str) -> Metadata {
    let process = bundle.spec.process().as_ref();
    let command = process.and_then(|process| process.args().clone()).unwrap_or_default();
    let known = docker(bundle, id).or_else(|| by_annotations(bundle)).unwrap_or_default();
    let name = if known.name.is_empty() { short(id) } else { known.name };
    Metadata { name, command, ..known }
}

/// Docker keeps a container's file of hosts, and others, beside what it knows of it.
fn docker(bundle: &Bundle, id: &str) -> Option<Metadata> {
    let files = ["/etc/hostname", "/etc/resolv.conf", "/etc/hosts"];
    files.iter().find_map(|file| {
        let source = mount_source(&bundle.spec, file, &bundle.path)?;
        read_docker(source.parent()?, id)
    })
}

fn read_docker(folder: &Path, id: &str) -> Option<Metadata> {
    let path = folder.join("config.v2.json");
    path.metadata().ok().filter(|found| found.is_file() && found.len() <= LONGEST)?;
    let known: Docker = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    if known.id != id {
        return None;
    }
    Some(Metadata {
        name: known.name.trim_start_matches('/').to_owned(),
        image: known.config.image,
        command: Vec::new(),
        labels: known.config.labels.unwrap_or_default(),
    })
}

/// containerd's part for Kubernetes, CRI-O and nerdctl say it by annotations.
fn by_annotations(bundle: &Bundle) -> Option<Metadata> {
    let annotations = bundle.spec.annotations().as_ref()?;
    let first =
        |names: &[&str]| names.iter().find_map(|name| annotations.get(*name).cloned()).unwrap_or_default();
    let container =
        first(&["io.kubernetes.cri.container-name", "io.kubernetes.container.name", "nerdctl/name"]);
    let pod = first(&["io.kubernetes.cri.sandbox-name", "io.kubernetes.pod.name"]);
    let image = first(&["io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName"]);
    let parts: Vec<&str> =
        [pod.as_str(), container.as_str()].into_iter().filter(|part| !part.is_empty()).collect();
    if parts.is_empty() {
        return None;
    }
    let labels = annotations.iter().filter(|(name, _)| name.starts_with("io.kubernetes."));
    let labels = labels.map(|(name, value)| (name.clone(), value.clone())).collect();
    Some(Metadata { name: parts.join("-"), image, command: Vec::new(), labels })
}

/// The first characters of an ID.
pub fn short(id: &str) -> String {
    id.chars().take(SHORT).collect()
}

/// IDs that the VM may have, the one that is wished first.
pub fn vm_ids(metadata: &Metadata, id: &str) -> Vec<String> {
    let mut ids = Vec::new();
    if may_be_vm(&metadata.name) {
        ids.push(metadata.name.clone());
    }
    let by_id: String = id.chars().filter(char::is_ascii_alphanumeric).collect();
    ids.push(short(&by_id));
    ids.push(by_id.chars().take(LONGEST_NAME).collect());
    ids.retain(|id| may_be_vm(id));
    ids.dedup();
    ids
}

fn may_be_vm(name: &str) -> bool {
    let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = name.as_bytes();
    let inner = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
    bytes.len() <= LONGEST_NAME
        && bytes.iter().all(inner)
        && ends(bytes.first())
        && ends(bytes.last())
        && !name.eq_ignore_ascii_case("power")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::bundle::tests::with;

    #[test]
    fn docker_s_file_beside_the_container_s_files_tells_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let known =
            json!({"ID": "abc", "Name": "/web", "Config": {"Image": "nginx:1", "Labels": {"a": "b"}}});
        std::fs::write(folder.path().join("config.v2.json"), known.to_string()).unwrap();
        let source = folder.path().join("hostname");
        let mounts = json!([{"destination": "/etc/hostname", "type": "bind", "source": source}]);
        let bundle = Bundle { path: "/".into(), spec: with("/mounts", mounts), rootfs: "/".into() };
        let found = of(&bundle, "abc");
        assert_eq!((found.name.as_str(), found.image.as_str()), ("web", "nginx:1"));
        assert_eq!((found.command, found.labels["a"].as_str()), (vec!["echo".into(), "hi".into()], "b"));
        assert_eq!(of(&bundle, "another-one-of-which-it-does-not-speak").name, "another-one-");
    }

    #[test]
    fn kubernetes_says_it_by_annotations() {
        let annotations = json!({"io.kubernetes.cri.container-name": "app", "io.kubernetes.cri.sandbox-name": "pod",
            "io.kubernetes.cri.image-name": "img", "other": "x"});
        let bundle = Bundle { path: "/".into(), spec: with("/annotations", annotations), rootfs: "/".into() };
        let found = of(&bundle, "abc");
        assert_eq!((found.name.as_str(), found.image.as_str(), found.labels.len()), ("pod-app", "img", 3));
    }

    #[test]
    fn a_vm_s_id_is_the_name_where_it_can_be() {
        let id = "0123456789abcdef".repeat(4);
        let named = |name: &str| vm_ids(&Metadata { name: name.into(), ..Metadata::default() }, &id);
        assert_eq!(named("web_1"), ["web_1", "0123456789ab", &id[..63]]);
        for name in ["", "-a", "a/b", "power", &"x".repeat(64)] {
            assert_eq!(named(name)[0], "0123456789ab", "{name}");
        }
        assert_eq!(vm_ids(&Metadata { name: "c".into(), ..Metadata::default() }, "c"), ["c"]);
    }
}
