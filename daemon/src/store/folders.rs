//! The folders of the host that a VM's guest sees: `folders.json` in the VM's folder.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{StoreError, VmDir, files, io_error, read_json};

/// The file.
const FILE: &str = "folders.json";
/// Longest file, in bytes: the most folders with the longest paths fit.
const MAX_SIZE: usize = 1 << 20;
/// Most folders of a VM.
pub const MOST: usize = 64;

/// One folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Folder {
    /// Its name: one part of a path.
    pub name: String,
    /// On the host.
    pub host_path: PathBuf,
    /// In the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_path: Option<String>,
    /// Whether the guest may only read.
    #[serde(default)]
    pub read_only: bool,
    /// Whom the files belong to in the guest.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

/// Whether a text can be a folder's name: it is one of a folder, and part of paths in REST.
pub fn is_name(text: &str) -> bool {
    let plain = !text.contains('/') && !text.chars().any(char::is_control);
    (1..=80).contains(&text.len()) && plain && ![".", ".."].contains(&text)
}

impl VmDir {
    fn folders_file(&self) -> PathBuf {
        self.path().join(FILE)
    }

    /// The VM's folders.
    pub fn folders(&self) -> Result<Vec<Folder>, StoreError> {
        let path = self.folders_file();
        let folders: Vec<Folder> = read_json(&path, MAX_SIZE)?.unwrap_or_default();
        if folders.len() > MOST || !folders.iter().all(|folder| is_name(&folder.name)) {
            let why = std::io::Error::other("it names what cannot be folders");
            return Err(io_error("understand", &path)(why));
        }
        Ok(folders)
    }

    /// Gives a new VM the folders of another.
    pub fn copy_folders(&self, from: &Self) -> Result<(), StoreError> {
        let folders = from.folders()?;
        if folders.is_empty() { Ok(()) } else { self.write_folders(&folders) }
    }

    /// Says which folders the VM has.
    pub fn write_folders(&self, folders: &[Folder]) -> Result<(), StoreError> {
        let path = self.folders_file();
        files::write_json(&path, &folders, 0o644).map_err(io_error("write", &path))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Store, VmId};
    use super::*;

    #[test]
    fn folders_are_read_as_they_were_written_and_bad_names_are_none() {
        let state = tempfile::tempdir().unwrap();
        let dir = Store::open(state.path()).unwrap().dir(&VmId::parse("web1").unwrap());
        std::fs::create_dir(dir.path()).unwrap();
        assert_eq!(dir.folders().unwrap(), []);
        let folder = |name: &str| Folder {
            name: name.into(),
            host_path: "/srv".into(),
            guest_path: None,
            read_only: true,
            uid: 1000,
            gid: 1000,
        };
        dir.write_folders(&[folder("a b"), folder("ü")]).unwrap();
        assert_eq!(dir.folders().unwrap(), [folder("a b"), folder("ü")]);
        for name in ["", ".", "..", "a/b", "a\nb", &"x".repeat(81)] {
            dir.write_folders(&[folder(name)]).unwrap();
            assert!(dir.folders().is_err(), "{name:?}");
        }
    }
}
