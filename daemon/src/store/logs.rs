//! Logs that a guest can fill are cut before they fill the disk.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A log longer than this, in bytes, is cut.
pub const MAX_SIZE: u64 = 4 << 20;
/// What is kept of it, in `<log>.1`.
const KEPT: u64 = 1 << 20;

/// Cuts the log at `path` if it is too long: its end goes into `<path>.1`, and its writer, which
/// appends, goes on at the start.
pub fn bound(path: &Path) -> io::Result<()> {
    let mut log = match OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    let length = log.metadata()?.len();
    if length <= MAX_SIZE {
        return Ok(());
    }
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    log.seek(SeekFrom::Start(length - KEPT))?;
    let mut kept = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(name)?;
    io::copy(&mut (&mut log).take(KEPT), &mut kept)?;
    log.set_len(0)
}

/// The last `limit` bytes of the log at `path`, and how long it is; nothing if there is none.
pub fn tail(path: &Path, limit: u64) -> io::Result<(Vec<u8>, u64)> {
    let mut log =
        match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), 0)),
            opened => opened?,
        };
    let length = log.metadata()?.len();
    read_from(&mut log, length.saturating_sub(limit), length).map(|bytes| (bytes, length))
}

/// The bytes of the log from `start` up to `end`.
pub fn read_from(log: &mut File, start: u64, end: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    log.seek(SeekFrom::Start(start))?;
    log.take(end.saturating_sub(start)).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_long_log_is_cut_and_its_writer_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let mut writer = OpenOptions::new().append(true).create(true).open(&path).unwrap();
        let size = usize::try_from(MAX_SIZE).unwrap();
        writer.write_all(&vec![b'a'; size]).unwrap();
        bound(&path).unwrap();
        assert_eq!(path.metadata().unwrap().len(), MAX_SIZE);
        writer.write_all(b"end").unwrap();
        bound(&path).unwrap();
        writer.write_all(b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        let kept = std::fs::read(folder.path().join("console.log.1")).unwrap();
        assert!(kept.len() as u64 == KEPT && kept.ends_with(b"end"));
        assert_eq!(tail(&path, 2).unwrap(), (b"ew".to_vec(), 3));
    }
}
