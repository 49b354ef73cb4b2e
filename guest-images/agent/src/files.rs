//! Files from and to the host, and the atomic replacement of small ones.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use catalyst_agent_protocol::{Channel, FileSpec, ProblemKind, Reply, StreamChannel};

use crate::session::{Session, failed};
use crate::spawn::absolute;
use crate::stream::{Input, Stream};

/// Bytes of a file in one frame at most.
const PIECE: usize = 32 * 1024;

/// A file that is being written beside the one it will replace.
#[derive(Debug)]
pub struct Replacement {
    file: File,
    temporary: PathBuf,
    target: PathBuf,
    whole: bool,
}

impl Replacement {
    /// Begins; nobody but root can read it until [`Self::finish`].
    pub fn begin(target: &Path, tag: u32) -> io::Result<Self> {
        let name = target.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
        // Names are 255 bytes at most: a long one is cut, the numbers keep it apart.
        let name: String = name.chars().take(40).collect();
        let temporary = target.with_file_name(format!(".{name}.catalyst-{}-{tag}", std::process::id()));
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let file = match options.open(&temporary) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // What an agent with this number left when it was killed.
                fs::remove_file(&temporary)?;
                options.open(&temporary)?
            }
            other => other?,
        };
        Ok(Self { file, temporary, target: target.to_owned(), whole: false })
    }

    /// Puts it in place with its owner and permission bits.
    pub fn finish(mut self, mode: u32, owner: Option<(u32, u32)>) -> io::Result<()> {
        if let Some((uid, gid)) = owner {
            fchown(&self.file, Some(uid), Some(gid))?;
        }
        // After the owner: a change of that clears the set-id bits.
        self.file.set_permissions(fs::Permissions::from_mode(mode & 0o7777))?;
        fs::rename(&self.temporary, &self.target)?;
        self.whole = true;
        Ok(())
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        if !self.whole {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// One of [`replace`] and [`overwrite`].
pub type Put = fn(&Path, &[u8], u32, Option<(u32, u32)>) -> io::Result<()>;

/// Whether it is a plain file with these permission bits and this owner.
fn is_plain(meta: &fs::Metadata, mode: u32, owner: Option<(u32, u32)>) -> bool {
    meta.is_file()
        && meta.mode() & 0o7777 == mode
        && owner.is_none_or(|owner| owner == (meta.uid(), meta.gid()))
}

/// Makes a file hold `bytes`, in place where it is a plain one with no other name; else it is replaced. For guests that
/// nobody reaches yet and that are told again when they boot: most of what a new file takes is spared, but who reads
/// meanwhile, or finds it after a crash, may see a part of each.
pub fn overwrite(path: &Path, bytes: &[u8], mode: u32, owner: Option<(u32, u32)>) -> io::Result<()> {
    let opened = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    let Ok(file) = opened else { return replace(path, bytes, mode, owner) };
    let meta = file.metadata()?;
    // A file that is mounted over another is not that one.
    let mounted =
        path.parent().is_some_and(|folder| fs::metadata(folder).is_ok_and(|of| of.dev() != meta.dev()));
    if !is_plain(&meta, mode, owner) || meta.nlink() != 1 || mounted {
        return replace(path, bytes, mode, owner);
    }
    file.write_all_at(bytes, 0)?;
    if meta.len() == bytes.len() as u64 { Ok(()) } else { file.set_len(bytes.len() as u64) }
}

/// Makes a file hold `bytes`, atomically; a file that is so already is left alone.
pub fn replace(path: &Path, bytes: &[u8], mode: u32, owner: Option<(u32, u32)>) -> io::Result<()> {
    let same = fs::symlink_metadata(path).is_ok_and(|meta| {
        is_plain(&meta, mode, owner)
            && meta.len() == bytes.len() as u64
            && fs::read(path).is_ok_and(|old| old == bytes)
    });
    if same {
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let mut replacement = Replacement::begin(path, 0)?;
    replacement.file.write_all(bytes)?;
    replacement.finish(mode, owner)
}

fn problem(error: &io::Error, doing: &str, path: &Path) -> Reply {
    let kind = match error.kind() {
        io::ErrorKind::NotFound => ProblemKind::NotFound,
        _ => ProblemKind::Failed,
    };
    failed(kind, format!("{} cannot be {doing}: {error}", path.display()))
}

/// Takes a file from the host; the answer comes when it stands in its place.
pub fn put(session: &Arc<Session>, stream: &Arc<Stream>, spec: FileSpec) -> Result<(), Reply> {
    let path = target(&spec.path)?;
    let replacement =
        Replacement::begin(&path, stream.id).map_err(|error| problem(&error, "written", &path))?;
    let (session, stream) = (Arc::clone(session), Arc::clone(stream));
    in_thread(move || {
        let reply = receive(&session, &stream, replacement, &spec, &path);
        session.finish(&stream);
        session.reply(stream.epoch, stream.id, reply);
    })
}

fn receive(
    session: &Session,
    stream: &Stream,
    mut replacement: Replacement,
    spec: &FileSpec,
    path: &Path,
) -> Reply {
    let mut left = spec.size;
    loop {
        match stream.input() {
            Input::Closed => {
                let message = format!("{} was given up before it was whole", path.display());
                return failed(ProblemKind::Failed, message);
            }
            Input::End if left > 0 => {
                let message =
                    format!("{} ended {left} bytes before its size of {}", path.display(), spec.size);
                return failed(ProblemKind::Invalid, message);
            }
            Input::End => break,
            Input::Bytes(bytes) => {
                let Some(rest) = left.checked_sub(bytes.len() as u64) else {
                    let message = format!("{} is longer than its size of {}", path.display(), spec.size);
                    return failed(ProblemKind::Invalid, message);
                };
                left = rest;
                if let Err(error) = replacement.file.write_all(&bytes) {
                    return problem(&error, "written", path);
                }
                session.credit_input(stream, bytes.len());
            }
        }
    }
    match replacement.finish(spec.mode, spec.owner) {
        Ok(()) => Reply::Done,
        Err(error) => problem(&error, "put in place", path),
    }
}

fn in_thread(work: impl FnOnce() + Send + 'static) -> Result<(), Reply> {
    let started = thread::Builder::new().spawn(work);
    started
        .map(drop)
        .map_err(|error| failed(ProblemKind::Failed, format!("no thread can be started: {error}")))
}

fn target(path: &str) -> Result<PathBuf, Reply> {
    absolute(path)
        .ok_or_else(|| failed(ProblemKind::Invalid, format!("{path:?} is not an absolute path without NUL")))
}

/// Sends a file to the host. One that grows meanwhile is sent as long as it was; one that cannot
/// be read to its end ends early.
pub fn get(session: &Arc<Session>, stream: &Arc<Stream>, path: &str) -> Result<(), Reply> {
    let path = target(path)?;
    // Not blocking, for the case that it is a FIFO, which is refused below.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(&path);
    let file = opened.map_err(|error| problem(&error, "opened", &path))?;
    let meta = file.metadata().map_err(|error| problem(&error, "examined", &path))?;
    if !meta.is_file() {
        return Err(failed(ProblemKind::Invalid, format!("{} is not a regular file", path.display())));
    }
    let (size, mode) = (meta.len(), meta.mode() & 0o7777);
    let (session, stream) = (Arc::clone(session), Arc::clone(stream));
    in_thread(move || {
        session.reply(stream.epoch, stream.id, Reply::File { size, mode });
        // Files of /proc and the like say that they are empty and are not.
        send(&session, &stream, file.take(if size == 0 { u64::MAX } else { size }));
        session.finish(&stream);
        session.outbox.data(stream.epoch, stream.id, Channel::Output, &[]);
    })
}

fn send(session: &Session, stream: &Stream, mut file: impl Read) {
    let mut buffer = vec![0; PIECE];
    while let Some(credit) = stream.credit(StreamChannel::Output) {
        match file.read(&mut buffer[..credit.min(PIECE)]) {
            Ok(0) => return,
            Ok(count) => {
                stream.spend(StreamChannel::Output, count);
                if !session.outbox.data(stream.epoch, stream.id, Channel::Output, &buffer[..count]) {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                eprintln!("catalyst-agent: a file ends early for the host: {error}");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_plain_file_is_overwritten_in_place_and_all_else_replaced() {
        let folder = std::env::temp_dir().join(format!("catalyst-agent-files-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("file");
        let inode = || fs::symlink_metadata(&path).unwrap().ino();
        let is = |bytes: &[u8]| {
            let meta = fs::symlink_metadata(&path).unwrap();
            assert!(is_plain(&meta, 0o640, None) && meta.nlink() == 1, "{meta:?}");
            assert_eq!(fs::read(&path).unwrap(), bytes);
        };
        overwrite(&path, b"made", 0o640, None).unwrap();
        is(b"made");
        let first = inode();
        for bytes in [&b"longer than before"[..], b"short", b""] {
            overwrite(&path, bytes, 0o640, None).unwrap();
            is(bytes);
            assert_eq!(inode(), first);
        }
        // Other rights; another name; a link to elsewhere.
        overwrite(&path, b"private", 0o600, None).unwrap();
        assert_ne!(inode(), first);
        overwrite(&path, b"again", 0o640, None).unwrap();
        let other = folder.join("other");
        fs::hard_link(&path, &other).unwrap();
        overwrite(&path, b"mine", 0o640, None).unwrap();
        is(b"mine");
        assert_eq!(fs::read(&other).unwrap(), b"again");
        fs::remove_file(&path).unwrap();
        symlink(&other, &path).unwrap();
        overwrite(&path, b"mine", 0o640, None).unwrap();
        is(b"mine");
        assert_eq!(fs::read(&other).unwrap(), b"again");
        fs::remove_dir_all(folder).unwrap();
    }
}
