//! What a VM's disk stands on, between its own overlay and its image: `disk.json` in the VM's folder.
//!
//! The header of a qcow2 names a file below it, which is never followed; this says it instead. A VM without the file
//! stands on its image alone.

use serde::{Deserialize, Serialize};

use super::{StoreError, VmDir, files, io_error, read_json};

/// The file.
pub(super) const FILE: &str = "disk.json";
/// Longest file, in bytes.
const MAX_SIZE: usize = 64 * 1024;
/// Most layers that are the VM's own.
const MAX_LAYERS: usize = 64;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chain {
    /// The VM was never powered on: its overlay is empty, and what it stands on is not settled.
    #[serde(default)]
    pub fresh: bool,
    /// Files of the VM's folder below its overlay, the uppermost first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub own: Vec<String>,
    /// The warm state of the image (the folder's name) whose disk lies below those.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm: Option<String>,
    /// The snapshot that the VM comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
}

/// Whether `name` is a file beside others and nothing else.
pub(super) fn is_plain(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=80).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('.')
}

impl VmDir {
    fn chain_file(&self) -> std::path::PathBuf {
        self.path().join(FILE)
    }

    /// What the disk stands on.
    pub fn chain(&self) -> Result<Chain, StoreError> {
        let path = self.chain_file();
        let chain: Chain = read_json(&path, MAX_SIZE)?.unwrap_or_default();
        check(&chain).map_err(io_error("understand", &path))?;
        Ok(chain)
    }

    /// Says what the disk stands on.
    pub fn write_chain(&self, chain: &Chain) -> Result<(), StoreError> {
        write(&self.chain_file(), chain)
    }
}

/// Refuses a chain that leads out of its folder.
pub(super) fn check(chain: &Chain) -> std::io::Result<()> {
    let mut names = chain.own.iter().chain(&chain.warm).chain(&chain.at);
    if chain.own.len() > MAX_LAYERS || !names.all(|name| is_plain(name)) {
        return Err(std::io::Error::other("it names what is no file beside it"));
    }
    Ok(())
}

/// Writes a chain to a file.
pub(super) fn write(path: &std::path::Path, chain: &Chain) -> Result<(), StoreError> {
    files::write_json(path, chain, 0o644).map_err(io_error("write", path))
}

#[cfg(test)]
mod tests {
    use super::super::{Store, VmId};
    use super::*;

    #[test]
    fn a_chain_is_read_as_it_was_written_and_leads_nowhere_else() {
        let state = tempfile::tempdir().unwrap();
        let dir = Store::open(state.path()).unwrap().dir(&VmId::parse("web1").unwrap());
        std::fs::create_dir(dir.path()).unwrap();
        assert_eq!(dir.chain().unwrap(), Chain::default());
        let chain = Chain {
            own: vec!["layer-1.qcow2".into()],
            warm: Some("qemu-1x1024-ab".into()),
            ..Chain::default()
        };
        dir.write_chain(&chain).unwrap();
        assert_eq!(dir.chain().unwrap(), chain);
        for name in ["../../etc/shadow", "/etc/shadow", "", ".", "..", "a/b", "a\0b"] {
            dir.write_chain(&Chain { own: vec![name.into()], ..Chain::default() }).unwrap();
            assert!(dir.chain().is_err(), "{name}");
            dir.write_chain(&Chain { warm: Some(name.into()), ..Chain::default() }).unwrap();
            assert!(dir.chain().is_err(), "{name}");
        }
    }
}
