//! Memory of templates for QEMU: sealed memfds, one for each file, shared by all VMs that go on from it.
//!
//! QEMU 7.2 opens a memory file for writing although it maps it privately, and gives pages back by punching holes into
//! it. So it never gets the file itself, but a copy in memory that is sealed against any change (memfd_create(2)). A copy
//! is made at the first use, holes kept, and lives as long as a VM that uses it, and a while longer.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{SealFlags, fcntl_get_seals};

use crate::saved::{new_memory, seal};
use crate::store::sparse;

/// How long a copy that no VM uses is kept for the next one.
const KEPT: Duration = Duration::from_mins(5);

/// A file: device, inode, time of its last change (s, ns). Templates are never written, so these name a content.
type Key = (u64, u64, i64, i64);

/// The copies there are.
#[derive(Clone, Debug, Default)]
pub struct Frozen(Arc<Mutex<HashMap<Key, Kept>>>);

#[derive(Debug)]
struct Kept {
    memory: Arc<OwnedFd>,
    /// How often it was asked for: a wait that was begun before the last time does not end it.
    uses: u64,
}

impl Frozen {
    /// The memory in `file` for as many as want it. A sealed memfd is taken as it is.
    pub fn of(&self, file: &File) -> io::Result<Arc<OwnedFd>> {
        if fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::WRITE)) {
            return Ok(Arc::new(file.as_fd().try_clone_to_owned()?));
        }
        let about = file.metadata()?;
        let key = (about.dev(), about.ino(), about.ctime(), about.ctime_nsec());
        // Held while the copy is made: who comes meanwhile waits for the same one.
        let mut kept = self.lock();
        let memory = match kept.get(&key) {
            Some(kept) => Arc::clone(&kept.memory),
            None => Arc::new(copied(file)?.into()),
        };
        let uses = kept.get(&key).map_or(0, |kept| kept.uses) + 1;
        kept.insert(key, Kept { memory: Arc::clone(&memory), uses });
        drop(kept);
        self.end_later(key, uses);
        Ok(memory)
    }

    /// Lets a copy go when it was not asked for a while and nobody uses it.
    fn end_later(&self, key: Key, uses: u64) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let all = Arc::downgrade(&self.0);
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(KEPT).await;
                let Some(all) = all.upgrade().map(Self) else { return };
                let mut kept = all.lock();
                let Some(one) = kept.get(&key).filter(|one| one.uses == uses) else { return };
                if Arc::strong_count(&one.memory) == 1 {
                    kept.remove(&key);
                    return;
                }
            }
        });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Kept>> {
        // Nothing panics while it holds the lock; if it did, the map would still be whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn copied(file: &File) -> io::Result<File> {
    let memory = thawed(file)?;
    seal(memory.as_fd())?;
    Ok(memory.into())
}

/// A copy of the memory in `file` for one that may write it.
pub fn thawed(file: &File) -> io::Result<OwnedFd> {
    let memory = new_memory()?;
    sparse::copy(file, &memory)?;
    Ok(memory.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_file_is_copied_once_and_nobody_can_write_the_copy() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(b"hello", 8192).unwrap();
        let frozen = Frozen::default();
        let (one, two) = (frozen.of(&file).unwrap(), frozen.of(&file).unwrap());
        assert!(Arc::ptr_eq(&one, &two));
        let memory = File::from(one.try_clone().unwrap());
        let mut read = [0; 5];
        memory.read_exact_at(&mut read, 8192).unwrap();
        assert_eq!(&read, b"hello");
        assert!(memory.write_all_at(b"x", 0).is_err());
        assert!(sparse::punch(&memory, 0, 1 << 20).is_err());
        assert!(memory.set_len(0).is_err());
        assert_eq!(sparse::allocated(&memory, 0, 1 << 20).unwrap(), 4096);
        let taken = frozen.of(&memory).unwrap();
        assert_eq!(
            File::from(taken.try_clone().unwrap()).metadata().unwrap().ino(),
            memory.metadata().unwrap().ino()
        );
    }

    #[test]
    fn a_file_that_changed_is_another() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let frozen = Frozen::default();
        let before = frozen.of(&file).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        file.write_all_at(b"x", 0).unwrap();
        assert!(!Arc::ptr_eq(&before, &frozen.of(&file).unwrap()));
    }
}
