//! The layers of a VM's disk: which of them are needed, and how a long chain becomes short.
//!
//! ```text
//! disk.qcow2          written by the VM
//!   layer-….qcow2     never written again; a snapshot or a clone may stand on it
//!   layer-….qcow2
//!     the disk of a warm state, the disk of the image
//! ```
//! Layers that nothing but the layer above stands on are merged: a copy of the lower one takes what the upper ones hold, by
//! `qemu-img commit`, and then takes the place of all of them. So at any moment the chain that is written down is whole, and
//! a process that has the old layers open reads on what it read before.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::snapshots::Snapshot;
use super::{Chain, StoreError, VmDir, disk, io_error};

/// What a layer's file is called before its number.
const LAYER: &str = "layer-";
/// Layers that are being merged.
const MERGING: &str = ".merging-";

/// A name for a new layer.
pub fn new_name() -> String {
    format!("{LAYER}{}.qcow2", &uuid::Uuid::new_v4().simple().to_string()[..16])
}

/// What may be merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merge {
    /// The VM has no process, so that its disk can be merged with the layer below.
    pub still: bool,
    /// Layers that clones have in common as well, at the price of a copy.
    pub shared: bool,
    /// Whose (uid, gid) the tool is run as.
    pub owner: (u32, u32),
}

impl VmDir {
    /// Removes layers that neither the VM nor a snapshot stands on, and what a merging left that was cut short.
    pub fn collect_layers(&self) -> Result<(), StoreError> {
        if self.restoring().exists() {
            return Ok(());
        }
        let mut needed: BTreeSet<String> = self.chain()?.own.into_iter().collect();
        needed.extend(self.snapshots()?.into_iter().flat_map(|snapshot| snapshot.chain.own));
        let entries = fs::read_dir(self.path()).map_err(io_error("read the folder", self.path()))?;
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(MERGING) || name.starts_with(LAYER) && !needed.contains(&name) {
                fs::remove_file(entry.path()).map_err(io_error("remove the layer", &entry.path()))?;
            }
        }
        Ok(())
    }

    /// Merges what can be merged, and removes what is not needed any more; whether anything was merged.
    pub fn shorten(&self, merge: Merge) -> Result<bool, StoreError> {
        // Of such a VM it is not known which file its process writes.
        if self.switching().exists() {
            return Ok(false);
        }
        let mut merged = false;
        loop {
            let chain = self.chain()?;
            let snapshots = self.snapshots()?;
            let movable = |name: &String| {
                merge.shared || fs::metadata(self.path().join(name)).is_ok_and(|about| about.nlink() == 1)
            };
            if merge.still
                && let Some(count) = under_disk(&chain, &snapshots, movable)
            {
                self.merge_disk(chain, count, merge.owner)?;
            } else if let Some(run) = run(&chain, &snapshots, movable) {
                self.merge_run(&run, &chain, snapshots, merge.owner)?;
            } else {
                return self.collect_layers().map(|()| merged);
            }
            merged = true;
        }
    }

    /// Merges the disk with the first `count` layers below it.
    fn merge_disk(&self, chain: Chain, count: usize, owner: (u32, u32)) -> Result<(), StoreError> {
        let merged = self.path().join(format!("{MERGING}disk"));
        let below = chain.own[..count].iter().map(|name| self.path().join(name));
        let files: Vec<PathBuf> = std::iter::once(self.disk()).chain(below).collect();
        self.merge(&files, &merged, owner)?;
        fs::rename(&merged, self.disk()).map_err(io_error("put into place", &merged))?;
        // In between, the new disk lies on what it holds already.
        self.write_chain(&Chain { own: chain.own[count..].to_vec(), ..chain })
    }

    /// Merges layers that lie on each other, in all chains.
    fn merge_run(
        &self,
        run: &[String],
        chain: &Chain,
        snapshots: Vec<Snapshot>,
        owner: (u32, u32),
    ) -> Result<(), StoreError> {
        let name = new_name();
        let aside = self.path().join(format!("{MERGING}{name}"));
        let files: Vec<PathBuf> = run.iter().map(|name| self.path().join(name)).collect();
        self.merge(&files, &aside, owner)?;
        fs::rename(&aside, self.path().join(&name)).map_err(io_error("put into place", &aside))?;
        let replaced = |chain: &Chain| {
            let at = chain.own.iter().position(|own| *own == run[0])?;
            let mut own = chain.own.clone();
            own.splice(at..at + run.len(), [name.clone()]);
            Some(Chain { own, ..chain.clone() })
        };
        for snapshot in snapshots {
            if let Some(chain) = replaced(&snapshot.chain) {
                self.rewrite_snapshot(&Snapshot { chain, ..snapshot })?;
            }
        }
        replaced(chain).map_or(Ok(()), |chain| self.write_chain(&chain))
    }

    /// `files`, the uppermost first, become one.
    fn merge(&self, files: &[PathBuf], merged: &Path, owner: (u32, u32)) -> Result<(), StoreError> {
        let Some((lowest, above)) = files.split_last() else { return Ok(()) };
        let upper = self.path().join(format!("{MERGING}upper"));
        let work = || {
            let _ = fs::remove_file(merged);
            disk::copy(lowest, merged)?;
            for file in above.iter().rev() {
                let _ = fs::remove_file(&upper);
                disk::copy(file, &upper)?;
                disk::commit(&upper, merged, owner)?;
            }
            disk::sync(merged)
        };
        let done = work();
        let _ = fs::remove_file(&upper);
        done.map_err(|error| {
            let _ = fs::remove_file(merged);
            error.into()
        })
    }
}

/// How many layers right below the VM's disk nothing else stands on; `None` if there is none.
fn under_disk(chain: &Chain, snapshots: &[Snapshot], movable: impl Fn(&String) -> bool) -> Option<usize> {
    let elsewhere = |name: &String| snapshots.iter().any(|snapshot| snapshot.chain.own.contains(name));
    let count = chain.own.iter().take_while(|name| movable(name) && !elsewhere(name)).count();
    (count > 0).then_some(count)
}

/// Layers that can be merged into one, the uppermost first: nothing stands on any but the first.
fn run(chain: &Chain, snapshots: &[Snapshot], movable: impl Fn(&String) -> bool) -> Option<Vec<String>> {
    let chains: Vec<&Chain> =
        std::iter::once(chain).chain(snapshots.iter().map(|snapshot| &snapshot.chain)).collect();
    // What lies right above a layer, in each chain that has it; nothing in one that begins with it.
    let only_below = |lower: &String, upper: &String| {
        chains.iter().all(|chain| match chain.own.iter().position(|own| own == lower) {
            None => true,
            Some(0) => false,
            Some(at) => chain.own[at - 1] == *upper,
        })
    };
    chains.iter().find_map(|chain| {
        let joins =
            |pair: &[String]| movable(&pair[0]) && movable(&pair[1]) && only_below(&pair[1], &pair[0]);
        let start = chain.own.windows(2).position(joins)?;
        let length = chain.own[start..].windows(2).take_while(|pair| joins(pair)).count() + 1;
        Some(chain.own[start..start + length].to_vec())
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use catalyst_vmm::description::Format;

    use super::super::{Store, VmId};
    use super::*;

    fn chain(own: &[&str]) -> Chain {
        Chain { own: own.iter().map(|name| (*name).to_owned()).collect(), ..Chain::default() }
    }

    fn snapshot(id: &str, own: &[&str]) -> Snapshot {
        Snapshot {
            id: id.to_owned(),
            name: id.to_owned(),
            description: String::new(),
            number: 0,
            created: 0,
            parent: None,
            chain: chain(own),
            unnamed: false,
            ran: false,
        }
    }

    #[test]
    fn only_what_nothing_else_stands_on_is_merged() {
        let all = |_: &String| true;
        let run = |own: &[&str], snapshots: &[Snapshot]| super::run(&chain(own), snapshots, all);
        assert_eq!(run(&["c", "b", "a"], &[]).unwrap(), ["c", "b", "a"]);
        assert_eq!(run(&["c", "b", "a"], &[snapshot("s", &["b", "a"])]).unwrap(), ["b", "a"]);
        let two = [snapshot("s", &["b", "a"]), snapshot("t", &["a"])];
        assert_eq!(run(&["c", "b", "a"], &two), None);
        // The VM went back to another branch; what only a snapshot has is merged as well.
        assert_eq!(run(&["a"], &[snapshot("s", &["c", "b", "a"])]).unwrap(), ["c", "b"]);
        let branches = [snapshot("s", &["c", "a"]), snapshot("t", &["d", "a"])];
        assert_eq!(run(&["a"], &branches), None);
        assert_eq!(super::run(&chain(&["c", "b", "a"]), &[], |name| name != "b"), None);

        let under = |own: &[&str], snapshots: &[Snapshot]| super::under_disk(&chain(own), snapshots, all);
        assert_eq!(under(&["c", "b", "a"], &[snapshot("s", &["a"])]), Some(2));
        assert_eq!(under(&["a"], &[snapshot("s", &["a"])]), None);
    }

    /// What qemu-io says of a command on an image that lies on nothing.
    fn io(path: &Path, command: &str) -> String {
        let file = serde_json::json!({ "driver": "file", "filename": path });
        let image = serde_json::json!({ "driver": "qcow2", "file": file, "backing": null });
        let output =
            Command::new("qemu-io").args(["-c", command]).arg(format!("json:{image}")).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    }

    fn holds(path: &Path, what: &str) -> bool {
        !io(path, what).contains("Pattern verification failed")
    }

    #[test]
    fn merged_layers_hold_what_they_held_together_and_hide_what_they_hid() {
        let state = tempfile::tempdir().unwrap();
        let dir = Store::open(state.path()).unwrap().dir(&VmId::parse("web1").unwrap());
        fs::create_dir(dir.path()).unwrap();
        let owner = (0, 0);
        let nothing = (Path::new("/nowhere"), Format::Raw);
        for name in ["disk.qcow2", "layer-b.qcow2", "layer-a.qcow2"] {
            disk::create_overlay(&dir.path().join(name), nothing, 1, owner).unwrap();
        }
        let at = |name: &str| dir.path().join(name);
        io(&at("layer-a.qcow2"), "write -P 1 0 256k");
        io(&at("layer-b.qcow2"), "write -P 2 64k 64k");
        // Zeros that hide what lies below, also below all of these.
        io(&at("layer-b.qcow2"), "write -z 128k 64k");
        io(&at("layer-b.qcow2"), "write -z 512k 64k");
        io(&at("disk.qcow2"), "write -P 3 192k 64k");
        dir.write_chain(&chain(&["layer-b.qcow2", "layer-a.qcow2"])).unwrap();
        fs::write(at("layer-old.qcow2"), "nobody's").unwrap();

        // A VM that runs: its disk stays, below it there is one layer now.
        dir.shorten(Merge { still: false, shared: false, owner }).unwrap();
        let own = dir.chain().unwrap().own;
        assert_eq!(own.len(), 1);
        let layer = at(&own[0]);
        for what in ["read -P 1 0 64k", "read -P 2 64k 64k", "read -P 0 128k 64k", "read -P 1 192k 64k"] {
            assert!(holds(&layer, what), "{what}");
        }
        assert!(holds(&at("disk.qcow2"), "read -P 3 192k 64k"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "disk, layer, chain");

        // One that is off: all is in its disk.
        dir.shorten(Merge { still: true, shared: false, owner }).unwrap();
        assert!(dir.chain().unwrap().own.is_empty());
        for what in ["read -P 1 0 64k", "read -P 2 64k 64k", "read -P 0 128k 64k", "read -P 3 192k 64k"] {
            assert!(holds(&at("disk.qcow2"), what), "{what}");
        }
        // Over another base, what was zeros is zeros, and what was never written shows it.
        let base = at("base.raw");
        fs::write(&base, vec![9; 1 << 20]).unwrap();
        let file = |path: PathBuf| serde_json::json!({ "driver": "file", "filename": path });
        let raw = serde_json::json!({ "driver": "raw", "file": file(base.clone()) });
        let over = serde_json::json!({ "driver": "qcow2", "file": file(at("disk.qcow2")), "backing": raw });
        for what in ["read -P 0 128k 64k", "read -P 0 512k 64k", "read -P 9 576k 64k", "read -P 2 64k 64k"] {
            let output = Command::new("qemu-io")
                .args(["-r", "-c", what])
                .arg(format!("json:{over}"))
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(!text.contains("failed") && text.contains("read 65536"), "{what}: {text}");
        }
    }
}
