//! Where folders are mounted: the file system of all of them, and the places that each is bound to.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use catalyst_agent_protocol::Folder;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount as mount_at, umount2};

use super::ROOT;

/// What mount(8) shows.
const SOURCE: &str = "catalyst";
/// Longest read, in bytes: an answer must fit into a frame.
const MAX_READ: usize = 15 * 4096;
/// Most programs that are named as users of a folder.
const MOST_NAMED: usize = 5;

/// Why a folder stays mounted.
#[derive(Debug)]
pub enum Unbind {
    /// Programs use it: their names and numbers.
    Busy(String),
    /// The system said no.
    Failed(io::Error),
}

/// A mount of our file system (proc_pid_mountinfo(5)).
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    /// What of the file system is mounted.
    root: PathBuf,
    at: PathBuf,
}

/// Mounts the file system whose messages come over `device`. Where it is `trusted`, its programs with set-uid and its devices count.
pub fn mount(device: &File, trusted: bool) -> io::Result<()> {
    fs::create_dir_all(ROOT)?;
    let options = format!(
        "fd={},rootmode=40755,user_id=0,group_id=0,allow_other,default_permissions,max_read={MAX_READ}",
        device.as_raw_fd()
    );
    let flags = if trusted { MsFlags::empty() } else { MsFlags::MS_NOSUID | MsFlags::MS_NODEV };
    Ok(mount_at(Some(SOURCE), ROOT, Some("fuse.catalyst"), flags, Some(options.as_str()))?)
}

/// Binds the whole file system to `at`.
pub fn bind_all(at: &Path) -> io::Result<()> {
    bind_at(Path::new(ROOT), at, false)
}

/// Binds a folder to its place, if it has one. It must be there, also without a place.
pub fn bind(folder: &Folder) -> io::Result<()> {
    let source = Path::new(ROOT).join(&folder.name);
    if !source.is_dir() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the host has not made it ready"));
    }
    let Some(at) = &folder.path else { return Ok(()) };
    bind_at(&source, Path::new(at), folder.read_only)
}

fn bind_at(source: &Path, at: &Path, read_only: bool) -> io::Result<()> {
    let root = Path::new("/").join(source.strip_prefix(ROOT).unwrap_or(source));
    fs::create_dir_all(at)?;
    let at = fs::canonicalize(at)?;
    // What is mounted last at a place is what is seen there.
    if mounts()?.iter().rfind(|mount| mount.at == at).is_some_and(|mount| mount.root == root) {
        return Ok(());
    }
    mount_at(Some(source), &at, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    if read_only {
        let flags = MsFlags::MS_BIND
            | MsFlags::MS_REMOUNT
            | MsFlags::MS_RDONLY
            | MsFlags::MS_NOSUID
            | MsFlags::MS_NODEV;
        mount_at(None::<&str>, &at, None::<&str>, flags, None::<&str>)?;
    }
    Ok(())
}

/// Unmounts a folder wherever it is bound, or leaves all as it is.
pub fn unbind(name: &str) -> Result<(), Unbind> {
    let root = Path::new("/").join(name);
    let all = mounts().map_err(Unbind::Failed)?;
    let own: Vec<Mount> = all.into_iter().filter(|mount| mount.root.starts_with(&root)).collect();
    let mut gone: Vec<&Mount> = Vec::new();
    for mount in own.iter().rev() {
        match umount2(&mount.at, MntFlags::empty()) {
            Ok(()) => gone.push(mount),
            Err(Errno::EINVAL) => {}
            Err(error) => {
                for mount in gone.into_iter().rev() {
                    let source = Path::new(ROOT).join(mount.root.strip_prefix("/").unwrap_or(&mount.root));
                    // It was there a moment ago.
                    let _ = bind_at(&source, &mount.at, false);
                }
                return Err(match error {
                    Errno::EBUSY => Unbind::Busy(holders(&mount.at)),
                    error => Unbind::Failed(error.into()),
                });
            }
        }
    }
    Ok(())
}

/// Takes the file system away from everywhere, whoever uses it: who waits for an answer gets an error.
pub fn forget_all() -> io::Result<()> {
    // Whether it is busy or not there: by force it has no connection to the host any more (the kernel's fuse.rst).
    let _ = umount2(ROOT, MntFlags::MNT_FORCE);
    for mount in mounts()?.iter().rev() {
        match umount2(&mount.at, MntFlags::MNT_DETACH) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn mounts() -> io::Result<Vec<Mount>> {
    Ok(parse(&fs::read_to_string("/proc/self/mountinfo")?))
}

fn parse(text: &str) -> Vec<Mount> {
    let one = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let mut kind = after.split(' ');
        if (kind.next()?, kind.next()?) != ("fuse.catalyst", SOURCE) {
            return None;
        }
        let mut fields = before.split(' ').skip(3);
        Some(Mount { root: unescaped(fields.next()?), at: unescaped(fields.next()?) })
    };
    text.lines().filter_map(one).collect()
}

/// Blanks and the like are written as `\040`.
fn unescaped(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let octal = (bytes[at] == b'\\').then(|| text.get(at + 1..at + 4)).flatten();
        let byte = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        at += if byte.is_some() { 4 } else { 1 };
        out.push(byte.unwrap_or(bytes[at - 1]));
    }
    std::ffi::OsString::from_vec(out).into()
}

/// Which programs have something below `at` open, as words for a person.
fn holders(at: &Path) -> String {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let names: Vec<String> = pids.filter(|pid| holds(*pid, at)).map(named).collect();
    match names.len() {
        0 => "a program".into(),
        count if count > MOST_NAMED => {
            format!("{} and {} more", names[..MOST_NAMED].join(", "), count - MOST_NAMED)
        }
        _ => names.join(", "),
    }
}

fn holds(pid: u32, at: &Path) -> bool {
    let below = |link: PathBuf| fs::read_link(link).is_ok_and(|to| to.starts_with(at));
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let open = fs::read_dir(proc.join("fd")).into_iter().flatten().flatten().map(|entry| entry.path());
    ["cwd", "root", "exe"].iter().any(|link| below(proc.join(link))) || open.into_iter().any(below)
}

fn named(pid: u32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("{} (pid {pid})", name.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_of_folders_are_found_with_what_they_show() {
        let text = "\
            30 1 254:0 / / rw,relatime - ext4 /dev/root rw\n\
            41 30 0:40 / /run/catalyst/folders rw,nosuid - fuse.catalyst catalyst rw\n\
            42 30 0:40 /my\\040work /srv/a\\134b rw,nosuid shared:1 - fuse.catalyst catalyst rw\n\
            43 30 0:41 / /mnt rw - fuse.sshfs catalyst rw\n";
        let mount = |root: &str, at: &str| Mount { root: root.into(), at: at.into() };
        assert_eq!(parse(text), [mount("/", "/run/catalyst/folders"), mount("/my work", "/srv/a\\b")]);
    }

    #[test]
    fn programs_that_use_a_folder_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = File::create(folder.path().join("open")).unwrap();
        let words = holders(folder.path());
        assert!(words.contains(&format!("(pid {})", std::process::id())), "{words}");
        drop(file);
        assert_eq!(holders(folder.path()), "a program");
    }
}
