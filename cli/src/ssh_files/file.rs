//! Changing a file of the user's as a whole: nobody ever reads half of it.

use std::fs::{self, DirBuilder, File, Metadata, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;

/// Largest file that is changed, in bytes.
const MAX_SIZE: u64 = 4 << 20;
/// How often a file is read again that somebody else has changed meanwhile.
const ATTEMPTS: usize = 10;

/// Why a file could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    /// By the system.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The owner is not the caller.
    #[error("it belongs to another user; run this as that user")]
    Foreign,
    /// ssh would not read it either.
    #[error("everybody may write to it, so ssh refuses it; run: chmod o-w on it")]
    Open,
    /// It is not to be written.
    #[error("it is read-only; let its owner write to it: chmod u+w")]
    ReadOnly,
    /// It is no file, or a huge one.
    #[error("it is not a file of at most {} MiB", MAX_SIZE >> 20)]
    Odd,
    /// Our marks in it were changed.
    #[error("the marks of Catalyst's blocks in it are not as they were made, line {0}; mend or remove them")]
    Damaged(usize),
    /// Others change it all the time.
    #[error("another program changes it all the time; try again")]
    Busy,
}

/// The folder, locked against others of us until this is dropped.
#[derive(Debug)]
pub struct Locked {
    folder: PathBuf,
    _lock: Flock<File>,
}

impl Locked {
    /// Locks the folder, and makes it first where `make` says so. `None`: there is none.
    pub fn new(folder: &Path, make: bool) -> Result<Option<Self>, EditError> {
        if make {
            match DirBuilder::new().mode(0o700).create(folder) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
                _ => {}
            }
        }
        let file = match File::open(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !make => return Ok(None),
            other => other?,
        };
        if file.metadata()?.uid() != geteuid().as_raw() {
            return Err(EditError::Foreign);
        }
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| io::Error::from(errno))?;
        Ok(Some(Self { folder: folder.to_owned(), _lock: lock }))
    }

    /// Lets `change` make the new content of the file `name` from what it has, and says whether that is another. A link
    /// is followed and stays one; mode and place stay as they are.
    pub fn edit(
        &self,
        name: &str,
        mut change: impl FnMut(&[u8]) -> Result<Vec<u8>, EditError>,
    ) -> Result<bool, EditError> {
        let path = self.folder.join(name);
        for _ in 0..ATTEMPTS {
            let target = match fs::canonicalize(&path) {
                // Not even a link that leads nowhere.
                Err(error) if error.kind() == io::ErrorKind::NotFound && path.symlink_metadata().is_err() => {
                    path.clone()
                }
                other => other?,
            };
            let (old, known) = read(&target)?;
            let new = change(&old)?;
            if new == old {
                return Ok(false);
            }
            let mode = known.as_ref().map_or(0o600, |data| data.mode() & 0o777);
            let folder = target.parent().unwrap_or(&self.folder);
            let mut file = tempfile::Builder::new().prefix(".catalyst-").tempfile_in(folder)?;
            file.write_all(&new)?;
            file.as_file().set_permissions(Permissions::from_mode(mode))?;
            file.as_file().sync_all()?;
            // ssh itself adds to known_hosts, and asks for no lock.
            if same(known.as_ref(), fs::metadata(&target).ok().as_ref()) {
                file.persist(&target).map_err(|error| error.error)?;
                return Ok(true);
            }
        }
        Err(EditError::Busy)
    }
}

/// The content and what is known of the file; of one that is not there, nothing.
fn read(path: &Path) -> Result<(Vec<u8>, Option<Metadata>), EditError> {
    let data = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), None)),
        other => other?,
    };
    if !data.is_file() || data.len() > MAX_SIZE {
        return Err(EditError::Odd);
    }
    if data.uid() != geteuid().as_raw() {
        return Err(EditError::Foreign);
    }
    if data.mode() & 0o002 != 0 {
        return Err(EditError::Open);
    }
    if data.mode() & 0o200 == 0 {
        return Err(EditError::ReadOnly);
    }
    let mut content = Vec::new();
    File::open(path)?.take(MAX_SIZE + 1).read_to_end(&mut content)?;
    Ok((content, Some(data)))
}

/// Whether a file is still the one that was read.
fn same(before: Option<&Metadata>, now: Option<&Metadata>) -> bool {
    let mark = |data: &Metadata| (data.ino(), data.len(), data.mtime(), data.mtime_nsec());
    before.map(mark) == now.map(mark)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn add(locked: &Locked, text: &str) -> Result<bool, EditError> {
        locked.edit("config", |old| Ok([old, text.as_bytes()].concat()))
    }

    #[test]
    fn mode_and_link_stay_and_new_ones_are_the_users_alone() {
        let temp = tempfile::tempdir().unwrap();
        let folder = temp.path().join("ssh");
        assert!(Locked::new(&folder, false).unwrap().is_none());
        let locked = Locked::new(&folder, true).unwrap().unwrap();
        assert_eq!(folder.metadata().unwrap().mode() & 0o777, 0o700);
        let config = folder.join("config");
        assert!(!add(&locked, "").unwrap() && !config.exists());
        assert!(add(&locked, "a").unwrap());
        assert_eq!(config.metadata().unwrap().mode() & 0o777, 0o600);
        fs::set_permissions(&config, Permissions::from_mode(0o644)).unwrap();
        let target = temp.path().join("dotfile");
        fs::rename(&config, &target).unwrap();
        symlink("../dotfile", &config).unwrap();
        add(&locked, "b").unwrap();
        assert!(config.symlink_metadata().unwrap().is_symlink());
        assert_eq!(
            (fs::read(&target).unwrap(), target.metadata().unwrap().mode() & 0o777),
            (b"ab".to_vec(), 0o644)
        );
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 2, "nothing is left beside it");
    }

    #[test]
    fn what_ssh_or_its_owner_would_not_have_is_left_alone() {
        let temp = tempfile::tempdir().unwrap();
        let locked = Locked::new(temp.path(), true).unwrap().unwrap();
        let config = temp.path().join("config");
        symlink("nowhere", &config).unwrap();
        assert!(matches!(add(&locked, "a"), Err(EditError::Io(_))));
        fs::remove_file(&config).unwrap();
        fs::write(&config, "mine").unwrap();
        for (mode, wanted) in [(0o666, "chmod o-w"), (0o400, "read-only")] {
            fs::set_permissions(&config, Permissions::from_mode(mode)).unwrap();
            let error = add(&locked, "a").unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
            assert_eq!(fs::read(&config).unwrap(), b"mine");
        }
        fs::remove_file(&config).unwrap();
        fs::create_dir(&config).unwrap();
        assert!(matches!(add(&locked, "a"), Err(EditError::Odd)));
    }

    #[test]
    fn what_another_program_adds_meanwhile_is_not_lost() {
        let temp = tempfile::tempdir().unwrap();
        let locked = Locked::new(temp.path(), true).unwrap().unwrap();
        let config = temp.path().join("config");
        fs::write(&config, "a\n").unwrap();
        let first = std::cell::Cell::new(true);
        let changed = locked.edit("config", |old| {
            if first.replace(false) {
                fs::write(&config, "a\nb\n").unwrap();
            }
            Ok([old, b"c\n"].concat())
        });
        assert!(changed.unwrap());
        assert_eq!(fs::read(&config).unwrap(), b"a\nb\nc\n");
        let busy = locked.edit("config", |old| {
            fs::write(&config, [old, b"d"].concat()).unwrap();
            Ok(Vec::new())
        });
        assert!(matches!(busy, Err(EditError::Busy)));
    }

    #[test]
    fn two_at_once_lose_nothing() {
        let temp = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for number in 0..8 {
                let folder = temp.path();
                scope.spawn(move || {
                    for _ in 0..10 {
                        let locked = Locked::new(folder, true).unwrap().unwrap();
                        add(&locked, &number.to_string()).unwrap();
                    }
                });
            }
        });
        assert_eq!(fs::read(temp.path().join("config")).unwrap().len(), 80);
    }
}
