//! A disk and all that it stands on, made one file by `qemu-img convert`. Every file is passed as a descriptor, and names in
//! headers are not followed.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use catalyst_vmm::description::Format;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};

use super::disk::{DiskError, run_as};
use super::foreign::image::{self, Parts};
use crate::engine::Layer;

/// A disk as QEMU's tools take it.
#[derive(Debug)]
pub struct Source {
    node: Value,
    files: Vec<OwnedFd>,
}

/// The name by which a child opens a descriptor that it inherits.
fn name(file: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

fn file_node(file: &impl AsRawFd) -> Value {
    json!({ "driver": "file", "filename": name(file) })
}

impl Source {
    /// Layers, the uppermost first.
    pub fn of_layers(layers: Vec<Layer>) -> Self {
        let mut node = Value::Null;
        let mut files = Vec::new();
        for Layer { file, format } in layers.into_iter().rev() {
            let own = file_node(&file);
            node = match format {
                Format::Raw => json!({ "driver": "raw", "file": own }),
                Format::Qcow2 => json!({ "driver": "qcow2", "file": own, "backing": node }),
            };
            files.push(file);
        }
        Self { node, files }
    }

    /// A disk of others.
    pub fn of_parts(parts: Parts) -> io::Result<Self> {
        let mut files = Vec::new();
        let (driver, file) = match parts {
            Parts::Raw(file) => ("raw", file),
            Parts::Qcow2(file) => ("qcow2", file),
            Parts::Vmdk(file) => ("vmdk", file),
            Parts::Extents(extents) => {
                let text = image::descriptor(extents, |file| {
                    let name = name(&file);
                    files.push(file.into());
                    name
                });
                let mut file = File::from(memfd_create("catalyst-vmdk", MemfdFlags::CLOEXEC)?);
                file.write_all(text.as_bytes())?;
                // The tool may run as another user, who opens it anew.
                file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
                ("vmdk", file)
            }
        };
        let mut node = json!({ "driver": driver, "file": file_node(&file) });
        if driver == "qcow2" {
            node["backing"] = Value::Null;
        }
        files.push(file.into());
        Ok(Self { node, files })
    }
}

/// Writes what a disk holds into the new file `to`, which stands on nothing. Runs the tool as `owner` (uid, gid).
pub fn convert(source: &Source, to: &Path, format: Format, owner: (u32, u32)) -> Result<(), DiskError> {
    let mut command = Command::new("qemu-img");
    let format = match format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
    };
    command.args(["convert", "-q", "-O", format]).arg(format!("json:{}", source.node)).arg(to);
    command.stdin(Stdio::null());
    let inherited: Vec<RawFd> = source.files.iter().map(AsRawFd::as_raw_fd).collect();
    let pass = move || {
        for fd in &inherited {
            // SAFETY: the descriptors are open until the tool has ended: `source` is borrowed for as long.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(*fd) };
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls alone, on values made before: it neither allocates nor locks.
    unsafe { command.pre_exec(pass) };
    run_as(command, owner, to)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::disk;
    use super::*;

    fn io(path: &Path, what: &str) {
        let done = Command::new("qemu-io").args(["-f", "qcow2", "-c", what]).arg(path).output().unwrap();
        let said = String::from_utf8_lossy(&done.stdout);
        assert!(done.status.success() && !said.contains("failed"), "{what}: {said}");
    }

    #[test]
    fn layers_become_one_file_that_stands_on_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let [base, upper, flat, raw] =
            ["base.raw", "upper.qcow2", "flat.qcow2", "flat.raw"].map(|name| folder.path().join(name));
        let mut bytes = vec![1; 1 << 20];
        bytes.resize(2 << 20, 0);
        fs::write(&base, &bytes).unwrap();
        // A header that names something else is not followed.
        disk::create_empty(&upper, 2 << 20, (0, 0)).unwrap();
        io(&upper, "write -P 2 0 64k");
        let source = || {
            let layers = vec![
                Layer { file: File::open(&upper).unwrap().into(), format: Format::Qcow2 },
                Layer { file: File::open(&base).unwrap().into(), format: Format::Raw },
            ];
            Source::of_layers(layers)
        };
        convert(&source(), &flat, Format::Qcow2, (0, 0)).unwrap();
        for what in ["read -P 2 0 64k", "read -P 1 64k 64k", "read -P 0 1M 1M"] {
            io(&flat, what);
        }
        convert(&source(), &raw, Format::Raw, (0, 0)).unwrap();
        let written = fs::read(&raw).unwrap();
        assert!(written[..65536].iter().all(|byte| *byte == 2) && written[65536..] == bytes[65536..]);
        let parts = image::open(folder.path(), "flat.qcow2").unwrap().parts;
        convert(&Source::of_parts(parts).unwrap(), &raw, Format::Raw, (0, 0)).unwrap();
        assert_eq!(fs::read(&raw).unwrap(), written);
    }

    #[test]
    fn every_kind_of_vmdk_becomes_raw() {
        let folder = tempfile::tempdir().unwrap();
        let [raw, back] = ["disk.raw", "back.raw"].map(|name| folder.path().join(name));
        fs::write(&raw, vec![7; 3 << 20]).unwrap();
        for kind in ["monolithicSparse", "streamOptimized", "twoGbMaxExtentFlat", "monolithicFlat"] {
            let name = format!("{kind}.vmdk");
            let mut made = Command::new("qemu-img");
            made.args(["convert", "-O", "vmdk", "-o"]).arg(format!("subformat={kind}"));
            let status = made.arg(&raw).arg(folder.path().join(&name)).status().unwrap();
            assert!(status.success());
            let parts = image::open_or_raw(folder.path(), &name).unwrap().parts;
            convert(&Source::of_parts(parts).unwrap(), &back, Format::Raw, (0, 0)).unwrap();
            assert!(fs::read(&back).unwrap() == fs::read(&raw).unwrap(), "{kind}");
        }
        let parts = image::open_or_raw(folder.path(), "disk.raw").unwrap().parts;
        assert!(matches!(parts, Parts::Raw(_)));
    }
}
