//! What a VM's guest is to be set up with, and how far that is known to be: `set-up.json` and `set-up-state.json` in the VM's
//! folder. Whether it was done is written on the guest's own disk; what is here of it is what the guest said last.

use std::path::PathBuf;

use catalyst_agent_protocol::set_up::MAX_DOCUMENT;
use catalyst_agent_protocol::{SetUp, SetUpReport};
use serde::{Deserialize, Serialize};

use super::{StoreError, VmDir, files, io_error, read_json};

/// The file.
const FILE: &str = "set-up.json";
/// Longest one, in bytes: it is laid out for people.
const MAX_SIZE: usize = MAX_DOCUMENT * 2;
/// The guest's last word.
const STATE: &str = "set-up-state.json";
const MAX_STATE: usize = 64 * 1024;

/// What is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The guest's own name, where it is not the VM's id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// What its agent is told.
    pub document: SetUp,
}

impl VmDir {
    fn set_up_file(&self) -> PathBuf {
        self.path().join(FILE)
    }

    fn set_up_state_file(&self) -> PathBuf {
        self.path().join(STATE)
    }

    /// What the guest is to be set up with, if anything.
    pub fn set_up(&self) -> Result<Option<Kept>, StoreError> {
        read_json(&self.set_up_file(), MAX_SIZE)
    }

    /// Keeps what the guest is to be set up with. It may hold secrets: nobody but the owner reads it.
    pub fn write_set_up(&self, kept: &Kept) -> Result<(), StoreError> {
        let path = self.set_up_file();
        files::write_json(&path, kept, 0o600).map_err(io_error("write", &path))
    }

    /// Gives a new VM what another, which never was on, was to be set up with.
    pub fn copy_set_up(&self, from: &Self) -> Result<(), StoreError> {
        from.set_up()?.map_or(Ok(()), |kept| self.write_set_up(&kept))
    }

    /// What the guest said last of it; `None` where there is nothing to set up.
    pub fn set_up_report(&self) -> Option<SetUpReport> {
        self.set_up_file()
            .exists()
            .then(|| read_json(&self.set_up_state_file(), MAX_STATE).ok().flatten().unwrap_or_default())
    }

    /// Keeps what the guest said.
    pub fn write_set_up_report(&self, report: &SetUpReport) -> Result<(), StoreError> {
        let path = self.set_up_state_file();
        files::write_json(&path, report, 0o600).map_err(io_error("write", &path))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use catalyst_agent_protocol::SetUpState;

    use super::super::{Store, VmId};
    use super::*;

    #[test]
    fn what_is_kept_is_the_owners_alone_and_says_how_far_it_is() {
        let state = tempfile::tempdir().unwrap();
        let store = Store::open(state.path()).unwrap();
        let [dir, other] = ["web1", "web2"].map(|id| store.dir(&VmId::parse(id).unwrap()));
        std::fs::create_dir(dir.path()).unwrap();
        std::fs::create_dir(other.path()).unwrap();
        assert_eq!((dir.set_up().unwrap(), dir.set_up_report()), (None, None));
        let document = SetUp { instance: "1".into(), commands: vec!["true".into()], ..SetUp::default() };
        let kept = Kept { hostname: Some("db".into()), document };
        dir.write_set_up(&kept).unwrap();
        assert_eq!(dir.set_up_file().metadata().unwrap().mode() & 0o777, 0o600);
        assert_eq!(dir.set_up_report(), Some(SetUpReport::default()));
        let report = SetUpReport { state: SetUpState::Failed, message: "no".into() };
        dir.write_set_up_report(&report).unwrap();
        other.copy_set_up(&dir).unwrap();
        assert_eq!(
            (other.set_up().unwrap(), other.set_up_report()),
            (Some(kept), Some(SetUpReport::default()))
        );
        assert_eq!(dir.set_up_report(), Some(report));
    }
}
