//! QEMU's block graph of a disk that is frozen again and again.
//!
//! ```text
//! overlay5      written; each freeze puts one more on top (`blockdev-snapshot`)
//!   overlay4    what was written until then
//!     …         layers below, which on disk were merged into few meanwhile
//! ```
//! When they were, the process gets the few (`blockdev-reopen`) instead of the many, whose nodes and descriptors are given up: a chain
//! that grew with each clone would make every read slower. Nodes are named by the descriptor set of their file, `overlay5` and
//! `overlay5-file`, those of the command line `disk` and `below1`.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use catalyst_vmm::description::Format;
use serde_json::{Value, json};

use super::super::Layer;
use super::qmp::{Qmp, QmpError};

/// What nodes of files are called after.
const FILE: &str = "-file";
/// Where QEMU finds the descriptors of a set.
const SETS: &str = "/dev/fdset/";

/// What is to be given up.
#[derive(Debug, Default)]
pub(super) struct Blocks(Mutex<Stale>);

#[derive(Debug, Default)]
struct Stale {
    /// Descriptor sets.
    sets: Vec<u64>,
    /// All nodes but these, if it is known which are needed.
    needed: Option<HashSet<String>>,
}

/// A node of QEMU's block graph.
#[derive(Debug, PartialEq, Eq)]
struct Node {
    name: String,
    /// The descriptor set that it has its file from.
    set: Option<u64>,
}

impl Blocks {
    /// The descriptor set is not needed any more.
    pub(super) fn give_up_set(&self, set: u64) {
        self.stale().sets.push(set);
    }

    fn stale(&self) -> std::sync::MutexGuard<'_, Stale> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`Qmp::switch_disk`].
    pub(super) async fn switch(
        &self,
        qmp: &Qmp,
        disk: &str,
        overlay: Layer,
        below: Vec<Layer>,
    ) -> Result<(), QmpError> {
        let active = root(qmp, disk).await?;
        let mut lower: Option<String> = None;
        let mut needed = HashSet::from([active.clone()]);
        for layer in below.into_iter().rev() {
            let name = add(qmp, layer.file, layer.format, Use::Below(lower.as_deref())).await?;
            needed.insert(name.clone());
            lower = Some(name);
        }
        let node = add(qmp, overlay.file, overlay.format, Use::Overlay).await?;
        needed.insert(node.clone());
        qmp.execute("blockdev-snapshot", Some(json!({ "node": active, "overlay": node }))).await?;
        if let Some(lower) = lower {
            let mut options = qcow2(&active);
            options["backing"] = lower.into();
            // As the snapshot has left it; else it is locked for writing, and no clone opens it.
            options["read-only"] = true.into();
            qmp.execute("blockdev-reopen", Some(json!({ "options": [options] }))).await?;
            let files: Vec<String> = needed.iter().map(|name| format!("{name}{FILE}")).collect();
            needed.extend(files);
            self.stale().needed = Some(needed);
        }
        Ok(())
    }

    /// Gives up what is not needed any more. What cannot be stays until the next time.
    pub(super) async fn tidy(&self, qmp: &Qmp) {
        let Stale { sets, needed } = std::mem::take(&mut *self.stale());
        for set in sets {
            give_up(qmp, set).await;
        }
        if let Some(needed) = needed
            && let Err(error) = delete_others(qmp, &needed).await
        {
            tracing::warn!(%error, "QEMU keeps files of its disk open that it does not need");
        }
    }
}

/// The options of the qcow2 node `name` on a file that is written.
fn qcow2(name: &str) -> Value {
    json!({
        "driver": "qcow2", "node-name": name, "file": format!("{name}{FILE}"), "backing": null,
        "discard": "unmap", "detect-zeroes": "unmap",
    })
}

/// What a node is for.
#[derive(Clone, Copy, Debug)]
enum Use<'a> {
    /// To be written, on nothing yet.
    Overlay,
    /// To be read only, on that node, if it is on one.
    Below(Option<&'a str>),
}

/// Adds a file and what is in it as nodes.
async fn add(qmp: &Qmp, file: OwnedFd, format: Format, what_for: Use<'_>) -> Result<String, QmpError> {
    // Numbers that were not used before.
    let added = qmp.execute_with("add-fd", None, Some(file)).await?;
    let set = added.get("fdset-id").and_then(Value::as_u64);
    let set = set.ok_or_else(|| QmpError::Malformed("add-fd without fdset-id".to_owned()))?;
    let name = format!("overlay{set}");
    let mut file = json!({
        "driver": "file", "node-name": format!("{name}{FILE}"), "filename": format!("{SETS}{set}"),
        "discard": "unmap", "aio": "threads",
    });
    let mut image = match format {
        Format::Qcow2 => qcow2(&name),
        Format::Raw => json!({ "driver": "raw", "node-name": name, "file": format!("{name}{FILE}") }),
    };
    if let Use::Below(below) = what_for {
        file["read-only"] = true.into();
        image["read-only"] = true.into();
        if let Some(options) = image.as_object_mut() {
            options.remove("detect-zeroes");
        }
        if let (Format::Qcow2, Some(below)) = (format, below) {
            image["backing"] = below.into();
        }
    }
    qmp.execute("blockdev-add", Some(file)).await?;
    qmp.execute("blockdev-add", Some(image)).await?;
    Ok(name)
}

/// The node that a device reads and writes. By its property: what `query-block` says has all layers in it, one in the other.
async fn root(qmp: &Qmp, device: &str) -> Result<String, QmpError> {
    let property = json!({ "path": format!("/machine/peripheral/{device}"), "property": "drive" });
    let answer = qmp.execute("qom-get", Some(property)).await?;
    let name = answer.as_str().filter(|name| !name.is_empty());
    name.map(str::to_owned).ok_or_else(|| QmpError::Refused(format!("the machine has no disk {device}")))
}

async fn give_up(qmp: &Qmp, set: u64) {
    if let Err(error) = qmp.execute("remove-fd", Some(json!({ "fdset-id": set }))).await {
        tracing::debug!(set, %error, "QEMU keeps a descriptor");
    }
}

/// Deletes all nodes but those that are needed, with their files.
async fn delete_others(qmp: &Qmp, needed: &HashSet<String>) -> Result<(), QmpError> {
    let answer = qmp.execute("query-named-block-nodes", Some(json!({ "flat": true }))).await?;
    let mut left: Vec<Node> =
        nodes(&answer).into_iter().filter(|node| !needed.contains(&node.name)).collect();
    // One that another lies on cannot be deleted before that one is, and which these are is not told.
    loop {
        let before = left.len();
        let mut kept = Vec::new();
        for node in left {
            match qmp.execute("blockdev-del", Some(json!({ "node-name": node.name }))).await {
                Ok(_) => {
                    if let Some(set) = node.set {
                        give_up(qmp, set).await;
                    }
                }
                Err(QmpError::Refused(_)) => kept.push(node),
                Err(error) => return Err(error),
            }
        }
        left = kept;
        if left.is_empty() || left.len() == before {
            break;
        }
    }
    if left.is_empty() { Ok(()) } else { Err(QmpError::Refused(format!("nodes in use: {}", left.len()))) }
}

/// The nodes that QEMU tells of, the latest first, each before its file.
fn nodes(answer: &Value) -> Vec<Node> {
    let one = |node: &Value| {
        let name = node.get("node-name")?.as_str()?;
        // QEMU gives names that begin so to nodes of its own.
        if name.starts_with('#') {
            return None;
        }
        let file = node.get("file").and_then(Value::as_str).unwrap_or_default();
        let set = if name.ends_with(FILE) { file.strip_prefix(SETS) } else { None };
        Some(Node { name: name.to_owned(), set: set.and_then(|number| number.parse().ok()) })
    };
    let mut all: Vec<Node> = answer.as_array().into_iter().flatten().filter_map(one).collect();
    let number = |name: &str| name.strip_prefix("overlay").and_then(|rest| rest.parse::<u64>().ok());
    all.sort_by_key(|node| {
        let image = node.name.strip_suffix(FILE).unwrap_or(&node.name);
        (std::cmp::Reverse(number(image)), image.to_owned(), node.name.len())
    });
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_come_from_the_top_each_before_its_file_and_qemus_own_not_at_all() {
        let node = |name: &str, file: &str| json!({ "node-name": name, "file": file });
        let answer = json!([
            node("disk-file", "/dev/fdset/10"),
            node("overlay3-file", "/dev/fdset/3"),
            node("below1", "/dev/fdset/11"),
            node("overlay12", "json:{}"),
            node("overlay3", "/dev/fdset/3"),
            node("#block17", "/dev/fdset/9"),
            node("disk", "/dev/fdset/10"),
        ]);
        let all = nodes(&answer);
        let names: Vec<&str> = all.iter().map(|node| node.name.as_str()).collect();
        assert_eq!(names, ["overlay12", "overlay3", "overlay3-file", "below1", "disk", "disk-file"]);
        let sets: Vec<_> = all.iter().filter_map(|node| node.set).collect();
        assert_eq!(sets, [3, 10]);
    }
}
