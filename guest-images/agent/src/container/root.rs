//! A container's root: what is mounted in it, what is hidden, and how it becomes the root of its first process.
//!
//! All of this is done in a mount namespace of the container's own.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use catalyst_agent_protocol::container::{Container, Mount, ROOT_TREE};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::{FsFlags, statvfs};

use super::inside::{self, Make};
use super::options::{self, Options};
use super::{Step, devices, doing};

const NOTHING: Option<&str> = None;
/// Flags that a change of others would take away from a mount.
const KEPT: [(FsFlags, MsFlags); 6] = [
    (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
    (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
    (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
    (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
    (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
    (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
];

/// Builds the root out of trees, and makes it that of this process and its namespace.
pub fn build(container: &Container, trees: &Path) -> Step<()> {
    mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NOTHING)
        .map_err(doing("making the mounts the container's own"))?;
    let tree = trees.join(ROOT_TREE);
    // A mount of its own: what takes the root's place must be one.
    mount(Some(&tree), &tree, NOTHING, MsFlags::MS_BIND | MsFlags::MS_REC, NOTHING)
        .map_err(doing("mounting the container's root"))?;
    let root: OwnedFd = folder(&tree).map_err(doing("opening the container's root"))?;
    let mut later = Vec::new();
    for one in &container.mounts {
        mount_one(root.as_fd(), one, trees, &mut later)
            .map_err(doing(format_args!("mounting {:?} at {:?}", one.kind, one.destination)))?;
    }
    let is_dev = |one: &Mount| Path::new(&one.destination) == Path::new("/dev") && one.kind == "tree";
    if !container.mounts.iter().any(is_dev) {
        devices::make(root.as_fd()).map_err(doing("making the devices in /dev"))?;
    }
    for (name, value) in &container.sysctls {
        set_sysctl(name, value).map_err(doing(format_args!("setting {name:?} to {value:?}")))?;
    }
    for place in later {
        read_only(&inside::path_of(place.as_fd())).map_err(doing("making a tmpfs read-only"))?;
    }
    enter(root.as_fd()).map_err(doing("changing to the container's root"))
}

/// What needs the root to be in place: paths that are hidden or only read, and the root itself.
pub fn finish(container: &Container) -> Step<()> {
    for path in &container.readonly_paths {
        match bind_read_only(Path::new(path)) {
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            other => other.map_err(doing(format_args!("making {path:?} read-only")))?,
        }
    }
    for path in &container.masked_paths {
        mask(Path::new(path)).map_err(doing(format_args!("hiding {path:?}")))?;
    }
    if container.read_only {
        read_only(Path::new("/")).map_err(doing("making the container's root read-only"))?;
    }
    Ok(())
}

/// A folder that is there, to be named by its descriptor.
pub fn folder(path: &Path) -> io::Result<OwnedFd> {
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    Ok(OpenOptions::new().read(true).custom_flags(flags).open(path)?.into())
}

/// `later` gets what is to be made read-only when all is mounted, since something may be mounted below it.
fn mount_one(root: BorrowedFd<'_>, one: &Mount, trees: &Path, later: &mut Vec<OwnedFd>) -> io::Result<()> {
    if !inside::is_absolute(&one.destination) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "that is no absolute path"));
    }
    let destination = Path::new(&one.destination);
    let options = options::parse(&one.options);
    if one.kind == "tree" {
        return bind(root, destination, &tree(trees, &one.source)?, &options);
    }
    let place = inside::open(root, destination, Make::Folder)?;
    let at = inside::path_of(place.as_fd());
    let Options { mut flags, mut data, propagation, .. } = options;
    let kind = match one.kind.as_str() {
        "cgroup" | "cgroup2" => {
            // Those of version 1 have options that this one does not know.
            data.clear();
            flags |= MsFlags::MS_RDONLY;
            "cgroup2"
        }
        "tmpfs" if !data.contains("mode=") => {
            // What it covers had its permissions for a reason.
            let mode = inside::mode(place.as_fd())?;
            let comma = if data.is_empty() { "" } else { "," };
            data = format!("{data}{comma}mode={mode:o}");
            "tmpfs"
        }
        kind @ ("proc" | "tmpfs" | "sysfs" | "devpts" | "mqueue" | "ramfs") => kind,
        other => {
            let message = format!("the kernel of containers has no file system {other:?} for them");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
    };
    let read_only = kind == "tmpfs" && flags.contains(MsFlags::MS_RDONLY);
    flags.set(MsFlags::MS_RDONLY, flags.contains(MsFlags::MS_RDONLY) && !read_only);
    let data = (!data.is_empty()).then_some(data.as_str());
    let source = Some(one.source.as_str()).filter(|source| !source.is_empty() && !source.contains('\0'));
    mount(Some(source.unwrap_or(kind)), &at, Some(kind), flags, data)?;
    // What was opened is below the mount now.
    let place = inside::open(root, destination, Make::Nothing)?;
    propagate(&inside::path_of(place.as_fd()), &propagation)?;
    if read_only {
        later.push(place);
    }
    Ok(())
}

/// A tree, by its name among those of the host.
fn tree(trees: &Path, name: &str) -> io::Result<PathBuf> {
    let is_name = !name.is_empty() && !name.contains(['/', '\0']) && ![".", ".."].contains(&name);
    if is_name {
        Ok(trees.join(name))
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} is no tree's name")))
    }
}

fn bind(root: BorrowedFd<'_>, destination: &Path, source: &Path, options: &Options) -> io::Result<()> {
    let make = if fs::metadata(source)?.is_dir() { Make::Folder } else { Make::File };
    let place = inside::open(root, destination, make)?;
    let mut flags = MsFlags::MS_BIND;
    flags.set(MsFlags::MS_REC, options.recursive);
    mount(Some(source), &inside::path_of(place.as_fd()), NOTHING, flags, NOTHING)?;
    let place = inside::open(root, destination, Make::Nothing)?;
    let at = inside::path_of(place.as_fd());
    propagate(&at, &options.propagation)?;
    if options.flags.is_empty() {
        return Ok(());
    }
    // A bind itself takes no flags (mount(2), "Creating a bind mount").
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | options.flags;
    Ok(mount(NOTHING, &at, NOTHING, flags, NOTHING)?)
}

fn propagate(at: &Path, propagation: &[MsFlags]) -> io::Result<()> {
    for flags in propagation {
        mount(NOTHING, at, NOTHING, *flags, NOTHING)?;
    }
    Ok(())
}

/// Makes what is mounted at a place read-only, with all else as it is.
fn read_only(at: &Path) -> nix::Result<()> {
    let has = statvfs(at)?.flags();
    let kept = KEPT
        .iter()
        .filter(|(flag, _)| has.contains(*flag))
        .fold(MsFlags::empty(), |all, (_, flag)| all | *flag);
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | kept;
    mount(NOTHING, at, NOTHING, flags, NOTHING)
}

fn bind_read_only(path: &Path) -> nix::Result<()> {
    mount(Some(path), path, NOTHING, MsFlags::MS_BIND | MsFlags::MS_REC, NOTHING)?;
    read_only(path)
}

/// Hides a path: a file is empty, a folder has nothing in it. What is not there needs no hiding.
fn mask(path: &Path) -> nix::Result<()> {
    match mount(Some("/dev/null"), path, NOTHING, MsFlags::MS_BIND, NOTHING) {
        Err(Errno::ENOENT) => Ok(()),
        Err(Errno::ENOTDIR) => mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::MS_RDONLY, NOTHING),
        other => other,
    }
}

/// A kernel setting, as sysctl(8) names it. Those of the network and of IPC are of this process's namespaces.
fn set_sysctl(name: &str, value: &str) -> io::Result<()> {
    // A name with slashes has dots in its parts, such as those of VLANs.
    let path = if name.contains('/') { name.to_owned() } else { name.replace('.', "/") };
    if path.split('/').any(|part| part.is_empty() || part == "..") {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "that is no setting's name"));
    }
    let mut file = OpenOptions::new().write(true).open(Path::new("/proc/sys").join(path))?;
    file.write_all(value.as_bytes())
}

/// Puts the root in the place of the old one, which goes (pivot_root(2), "pivot_root(".", ".")").
pub fn enter(root: BorrowedFd<'_>) -> io::Result<()> {
    nix::unistd::fchdir(root)?;
    nix::unistd::pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    Ok(nix::unistd::chdir("/")?)
}

/// Puts a terminal where programs look for the container's console.
pub fn console(terminal: &Path) -> Step<()> {
    let bind = || -> io::Result<()> {
        let console = Path::new("/dev/console");
        File::options().create(true).append(true).mode(0o666).open(console)?;
        Ok(mount(Some(terminal), console, NOTHING, MsFlags::MS_BIND, NOTHING)?)
    };
    bind().map_err(doing("making /dev/console"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_are_named_by_one_part_of_a_path() {
        let trees = Path::new("/trees");
        assert_eq!(tree(trees, "volume1").unwrap(), Path::new("/trees/volume1"));
        for bad in ["", ".", "..", "../etc", "a/b", "/etc", "a\0"] {
            assert!(tree(trees, bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn settings_have_names_that_stay_among_settings() {
        for bad in ["", "net..x", "../../etc/passwd", "net/../../../etc/passwd", "/etc/passwd"] {
            let error = set_sysctl(bad, "1").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{bad}");
        }
        let error = set_sysctl("catalyst.no_such_setting", "1").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
