//! Files of an ext2, ext3 or ext4 file system, read within bounds. A journal that was not written back is heeded.

use std::error::Error;
use std::rc::Rc;

use ext4_view::{Ext4, Ext4Error, Ext4Read};

use super::disk::{Partition, Source};

/// Most names of a folder that are looked at.
const MAX_NAMES: usize = 10_000;

/// A file system.
#[derive(Debug)]
pub struct Files(Ext4);

/// Why a file is not read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file system says so.
    #[error("{0} cannot be read")]
    Read(String, #[source] Ext4Error),
    /// More than it may be.
    #[error("{0} is longer than {1} bytes")]
    TooLong(String, u64),
}

struct Reader {
    disk: Rc<dyn Source>,
    part: Partition,
}

impl Ext4Read for Reader {
    fn read(&mut self, start: u64, bytes: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        let end = start.checked_add(bytes.len() as u64).filter(|end| *end <= self.part.length);
        let at =
            end.and_then(|_| self.part.start.checked_add(start)).ok_or("it lies beyond the partition")?;
        Ok(self.disk.read_at(bytes, at)?)
    }
}

impl Files {
    /// Looks at the file system of a partition.
    pub fn open(disk: Rc<dyn Source>, part: Partition) -> Result<Self, Ext4Error> {
        Ext4::load(Box::new(Reader { disk, part })).map(Self)
    }

    /// Its UUID, as `root=UUID=` takes it.
    pub fn uuid(&self) -> String {
        self.0.uuid().to_string()
    }

    /// Whether there is such a file or folder; links are followed within the file system.
    pub fn exists(&self, path: &str) -> bool {
        self.0.exists(path).unwrap_or(false)
    }

    /// The names in a folder; none if there is no such folder.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let Ok(entries) = self.0.read_dir(folder) else { return Vec::new() };
        let names = entries.take(MAX_NAMES).map_while(Result::ok);
        names.filter_map(|entry| entry.file_name().as_str().ok().map(str::to_owned)).collect()
    }

    /// A file of at most `most` bytes.
    pub fn read(&self, path: &str, most: u64) -> Result<Vec<u8>, FileError> {
        let failed = |source| FileError::Read(shown(path), source);
        let mut file = self.0.open(path).map_err(failed)?;
        let length = file.metadata().len();
        if length > most {
            return Err(FileError::TooLong(shown(path), most));
        }
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        let mut done = 0;
        while done < bytes.len() {
            match file.read_bytes(&mut bytes[done..]).map_err(failed)? {
                0 => break,
                count => done += count,
            }
        }
        bytes.truncate(done);
        Ok(bytes)
    }

    /// A text of at most `most` bytes; `None` if there is none.
    pub fn text(&self, path: &str, most: u64) -> Result<Option<String>, FileError> {
        if !self.exists(path) {
            return Ok(None);
        }
        self.read(path, most).map(|bytes| Some(String::from_utf8_lossy(&bytes).into_owned()))
    }
}

/// A name from the disk, as it can be shown.
pub fn shown(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '?' } else { c }).take(200).collect()
}
