//! VM disks: qcow2 overlays on the template's read-only disk (design decision 4).
//!
//! `qemu-img` makes them; names in a header are never followed: whoever opens a disk gets
//! the base beside it as a descriptor, and a header that wants an external data file is refused.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use catalyst_vmm::description::Format;
use thiserror::Error;

use super::sparse;

/// `QFI\xfb`, the first four bytes of a qcow2 (QEMU's docs/interop/qcow2.txt).
const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Incompatible feature bit "external data file" (same document).
const EXTERNAL_DATA_FILE: u64 = 1 << 2;

/// Why a disk could not be made or opened.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The tool could not be run.
    #[error("Cannot run qemu-img; install it: sudo apt-get install qemu-utils")]
    Tool(#[source] io::Error),
    /// The tool failed.
    #[error("Cannot make the disk {path}: {message}")]
    Create {
        /// The disk.
        path: String,
        /// What the tool said.
        message: String,
    },
    /// No room.
    #[error("Cannot make the disk {0}: no space left on the device; free some and try again")]
    Full(String),
    /// It is not there.
    #[error("The disk {0} is missing; restore it or delete the VM")]
    Missing(String),
    /// It could not be opened, read or written.
    #[error("Cannot {what} the disk {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The disk.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is not what it should be.
    #[error("The disk {path} cannot be used: {why}")]
    Unusable {
        /// The disk.
        path: String,
        /// Why not.
        why: &'static str,
    },
}

/// Makes an overlay of `gib` GiB on the image `base` of that format; what stood there is lost. Runs the tool as the
/// thread's file system user `owner` (uid, gid), so that it can write only where the owner can.
pub fn create_overlay(
    path: &Path,
    (base, format): (&Path, Format),
    gib: u64,
    owner: (u32, u32),
) -> Result<(), DiskError> {
    let mut command = Command::new("qemu-img");
    let format = match format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
    };
    // -u: the base is known to be whole; opening it here would only cost time.
    command.args(["create", "-q", "-u", "-f", "qcow2", "-F", format, "-b"]).arg(base).arg(path);
    command.arg(format!("{gib}G")).stdin(Stdio::null());
    run_as(command, owner, path)
}

/// Makes an empty qcow2 of so many bytes, whose header names nothing below it; what stood there is lost. Runs the tool as
/// `owner` (uid, gid).
pub fn create_empty(path: &Path, bytes: u64, owner: (u32, u32)) -> Result<(), DiskError> {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]).arg(path).arg(bytes.to_string()).stdin(Stdio::null());
    run_as(command, owner, path)
}

/// Has the header of the VM's disk `path` say that it stands on something, if it does not: the monitor takes it for a whole disk
/// else. Nobody follows the name that it says. Runs the tool as `owner` (uid, gid).
pub fn name_base(path: &Path, owner: (u32, u32)) -> Result<(), DiskError> {
    let mut file = open_overlay(path)?;
    let mut header = [0_u8; 16];
    let read = file.read_exact(&mut header);
    read.map_err(|source| DiskError::Io { what: "read", path: path.display().to_string(), source })?;
    if header[8..] != [0; 8] {
        return Ok(());
    }
    let mut command = Command::new("qemu-img");
    command
        .args(["rebase", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "below"])
        .arg(path)
        .stdin(Stdio::null());
    run_as(command, owner, path)
}

/// Runs the tool, which makes or changes the disk `path`.
pub(super) fn run_as(mut command: Command, owner: (u32, u32), path: &Path) -> Result<(), DiskError> {
    if rustix::process::geteuid().is_root() && owner.0 != 0 {
        command.uid(owner.0).gid(owner.1);
    }
    let output = command.output().map_err(DiskError::Tool)?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    let shown = path.display().to_string();
    if message.contains("No space left") {
        Err(DiskError::Full(shown))
    } else {
        Err(DiskError::Create { path: shown, message })
    }
}

/// Writes what the qcow2 `upper` holds into the qcow2 `lower`, both of which nobody has open. What lies below them in their
/// headers is not looked at. Runs the tool as `owner` (uid, gid).
pub fn commit(upper: &Path, lower: &Path, owner: (u32, u32)) -> Result<(), DiskError> {
    let file = |path: &Path| serde_json::json!({ "driver": "file", "filename": path });
    let below = serde_json::json!({ "driver": "qcow2", "file": file(lower), "backing": null });
    let disk = serde_json::json!({ "driver": "qcow2", "file": file(upper), "backing": below });
    let mut command = Command::new("qemu-img");
    // -d: what was written is not taken out of the upper one.
    command.args(["commit", "-q", "-d"]).arg(format!("json:{disk}")).stdin(Stdio::null());
    run_as(command, owner, lower)
}

/// Waits until what was written to a disk lies on the medium.
pub fn sync(path: &Path) -> Result<(), DiskError> {
    let failed = |source| DiskError::Io { what: "sync", path: path.display().to_string(), source };
    File::open(path).and_then(|file| file.sync_all()).map_err(failed)
}

/// Opens a VM's own disk for reading and writing and checks its header.
pub fn open_overlay(path: &Path) -> Result<File, DiskError> {
    open_qcow2(path, true)
}

/// Opens a qcow2, for reading alone unless `write`, and checks its header.
pub fn open_qcow2(path: &Path, write: bool) -> Result<File, DiskError> {
    let shown = || path.display().to_string();
    let mut file = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => DiskError::Missing(shown()),
            _ => DiskError::Io { what: "open", path: shown(), source },
        })?;
    let read_error = |source| DiskError::Io { what: "read", path: shown(), source };
    if !file.metadata().map_err(read_error)?.is_file() {
        return Err(DiskError::Unusable { path: shown(), why: "it is not a regular file" });
    }
    check_header(&mut file).map_err(|why| DiskError::Unusable { path: shown(), why })?;
    Ok(file)
}

fn check_header(file: &mut (impl Read + Seek)) -> Result<(), &'static str> {
    let mut header = [0_u8; 80];
    file.read_exact(&mut header).map_err(|_| "it is too short for a qcow2")?;
    file.seek(SeekFrom::Start(0)).map_err(|_| "it cannot be read from its start")?;
    if header[..4] != MAGIC || header[4..8] != [0, 0, 0, 3] {
        return Err("it is not a qcow2 of version 3");
    }
    let mut features = [0_u8; 8];
    features.copy_from_slice(&header[72..80]);
    if u64::from_be_bytes(features) & EXTERNAL_DATA_FILE != 0 {
        return Err("its header names an external data file, which is never followed");
    }
    Ok(())
}

/// Copies a disk that no process has open, holes kept.
pub fn copy(from: &Path, to: &Path) -> Result<(), DiskError> {
    let source = open_overlay(from)?;
    let error = |what| move |source| DiskError::Io { what, path: to.display().to_string(), source };
    let target =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(to).map_err(error("make"))?;
    sparse::copy(&source, &target).and_then(|()| target.sync_all()).map_err(|source| match source.kind() {
        io::ErrorKind::StorageFull => DiskError::Full(to.display().to_string()),
        _ => error("copy to")(source),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn an_overlay_is_small_for_any_size_and_copies_sparsely() {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("base.raw");
        File::create(&base).unwrap().set_len(64 << 30).unwrap();
        let disk = folder.path().join("disk.qcow2");
        create_overlay(&disk, (&base, Format::Raw), 16384, (0, 0)).unwrap();
        assert!(disk.metadata().unwrap().blocks() * 512 < 1 << 20);
        open_overlay(&disk).unwrap();
        let second = folder.path().join("second.qcow2");
        copy(&disk, &second).unwrap();
        assert_eq!(std::fs::read(&disk).unwrap(), std::fs::read(&second).unwrap());
        assert!(second.metadata().unwrap().blocks() * 512 < 1 << 20);
    }

    #[test]
    fn a_header_with_an_external_data_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("d");
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-o"])
            .arg(format!("data_file={}", folder.path().join("secret").display()))
            .arg(&disk)
            .arg("1M")
            .status()
            .unwrap();
        assert!(made.success());
        assert!(open_overlay(&disk).unwrap_err().to_string().contains("external data file"));
    }

    #[test]
    fn a_disk_that_stands_alone_says_that_it_stands_on_something_once_asked() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("d.qcow2");
        create_empty(&disk, 1 << 20, (0, 0)).unwrap();
        name_base(&disk, (0, 0)).unwrap();
        let named = std::fs::read(&disk).unwrap();
        assert!(named.windows(5).any(|word| word == b"below"));
        name_base(&disk, (0, 0)).unwrap();
        assert!(std::fs::read(&disk).unwrap() == named);
        open_overlay(&disk).unwrap();
    }

    #[test]
    fn what_is_no_disk_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d");
        assert!(matches!(open_overlay(&path), Err(DiskError::Missing(_))));
        std::fs::write(&path, "hello").unwrap();
        assert!(matches!(open_overlay(&path), Err(DiskError::Unusable { .. })));
        let link = folder.path().join("l");
        std::os::unix::fs::symlink("/etc/shadow", &link).unwrap();
        assert!(matches!(open_overlay(&link), Err(DiskError::Io { .. })));
    }

    #[test]
    fn a_full_disk_is_named_with_the_path() {
        let error = create_overlay(Path::new("/dev/full"), (Path::new("/dev/null"), Format::Raw), 64, (0, 0))
            .unwrap_err();
        assert!(error.to_string().contains("/dev/full"), "{error}");
    }
}
