//! `manifest.json`: what an image consists of and how it was made.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Version of the layout of `manifest.json`; readers refuse other ones.
pub const MANIFEST_FORMAT: u32 = 1;
/// No manifest of ours comes near this many bytes; a larger file is not read.
const MAX_MANIFEST_BYTES: u64 = 4 << 20;

/// Name of the manifest inside an image's folder.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Name of the root disk inside an image's folder.
pub const DISK_FILE: &str = "disk.raw";
/// Name of the kernel (an ELF file) inside an image's folder.
pub const KERNEL_FILE: &str = "vmlinux";
/// Name of the initial RAM disk inside an image's folder.
pub const INITRD_FILE: &str = "initrd";

/// One Debian package in the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Package {
    /// The package's name, with its architecture where Debian's tools show it (`libc6:amd64`).
    pub name: String,
    /// Debian version.
    pub version: String,
}

/// One file of the image as it was when it was built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Length in bytes (of a sparse file: the virtual one).
    pub size: u64,
    /// Bytes on disk when built.
    pub allocated: u64,
    /// Time of last change in nanoseconds since 1970, as the builder left it.
    pub mtime_ns: i64,
    /// SHA-256 in hexadecimal: of the whole content where `sparse` is false, else as [`crate::digest`] says.
    pub sha256: String,
    /// Whether `sha256` skips blocks of zeros (a disk of mostly nothing).
    pub sparse: bool,
}

/// The machine of an image that starts by its own loader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Machine {
    /// A PC with a BIOS.
    Bios,
    /// A PC with UEFI.
    Efi,
}

/// What an image consists of and how it was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_FORMAT`].
    pub format: u32,
    /// Name of the image (`lumen`).
    pub name: String,
    /// Version of the image: the first digits of `recipe_key`.
    pub version: String,
    /// SHA-256 over everything that the recipe consists of.
    pub recipe_key: String,
    /// When the build ended, in seconds since 1970.
    pub created: u64,
    /// The command that built it.
    pub build_command: Vec<String>,
    /// Debian release that the packages are from (`bookworm`).
    pub suite: String,
    /// The apt sources that the image was built from and carries, one line each.
    pub sources: Vec<String>,
    /// Release of the kernel (`6.1.0-56-amd64`).
    pub kernel: String,
    /// Debian version of the kernel's package.
    pub kernel_package: Package,
    /// The kernel's timer interrupts a second (`CONFIG_HZ`); 0 if unknown.
    #[serde(default)]
    pub kernel_hz: u32,
    /// Arguments that the kernel needs for this image, without those that depend on VM or engine.
    pub command_line: String,
    /// Arguments to add where the CPU is emulated in software and so has none of the weaknesses that
    /// mitigations cost time for.
    pub command_line_software_cpu: String,
    /// What it was made from by its owner, where no recipe made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_from: Option<String>,
    /// The machine that its guest starts on by its own loader; a kernel of ours starts it if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<Machine>,
    /// Its VMs have no disk: all that it is comes with the kernel. It is for containers.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub diskless: bool,
    /// The files, by name.
    pub files: BTreeMap<String, FileEntry>,
    /// All packages, sorted by name.
    pub packages: Vec<Package>,
}

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// There is none.
    #[error("it has no {MANIFEST_FILE}")]
    Absent,
    /// It cannot be read.
    #[error("its {MANIFEST_FILE} cannot be read")]
    Read(#[source] std::io::Error),
    /// It is larger than any manifest of ours.
    #[error("its {MANIFEST_FILE} is {0} bytes long, more than any that was built")]
    TooLarge(u64),
    /// It is no manifest.
    #[error("its {MANIFEST_FILE} is garbled")]
    Parse(#[source] serde_json::Error),
    /// A newer or older builder wrote it.
    #[error("its {MANIFEST_FILE} has format {0}, this program reads format {MANIFEST_FORMAT}")]
    Format(u32),
    /// A file that every image has is not listed.
    #[error("its {MANIFEST_FILE} does not list {0}")]
    Unlisted(&'static str),
}

impl Manifest {
    /// Reads and checks the manifest in the image folder `dir`.
    pub fn read(dir: &Path) -> Result<Self, ManifestError> {
        let path = dir.join(MANIFEST_FILE);
        let size = match std::fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(ManifestError::Absent),
            Err(error) => return Err(ManifestError::Read(error)),
        };
        if size > MAX_MANIFEST_BYTES {
            return Err(ManifestError::TooLarge(size));
        }
        Self::parse(&std::fs::read(&path).map_err(ManifestError::Read)?)
    }

    /// Parses and checks the text of a manifest.
    pub fn parse(text: &[u8]) -> Result<Self, ManifestError> {
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let Format { format } = serde_json::from_slice(text).map_err(ManifestError::Parse)?;
        if format != MANIFEST_FORMAT {
            return Err(ManifestError::Format(format));
        }
        let manifest: Self = serde_json::from_slice(text).map_err(ManifestError::Parse)?;
        // What starts by its own loader has its kernel on its disk.
        let files: &[_] = match (manifest.machine, manifest.diskless) {
            (Some(_), _) => &[DISK_FILE],
            (None, true) => &[KERNEL_FILE, INITRD_FILE],
            (None, false) => &[DISK_FILE, KERNEL_FILE, INITRD_FILE],
        };
        for &name in files {
            if !manifest.files.contains_key(name) {
                return Err(ManifestError::Unlisted(name));
            }
        }
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A manifest that lists these files.
    fn text(files: &[&str], more: &str) -> String {
        let entry = r#"{"size":1,"allocated":1,"mtime_ns":1,"sha256":"","sparse":false}"#;
        let files: Vec<String> = files.iter().map(|file| format!("\"{file}\":{entry}")).collect();
        format!(
            r#"{{"format":1,"name":"n","version":"v","recipe_key":"k","created":0,"build_command":[],"suite":"","sources":[],
            "kernel":"","kernel_package":{{"name":"","version":""}},"command_line":"","command_line_software_cpu":"",
            "packages":[],"files":{{{}}}{more}}}"#,
            files.join(",")
        )
    }

    #[test]
    fn an_image_lists_what_its_vms_start_from() {
        let parse = |files: &[&str], more: &str| Manifest::parse(text(files, more).as_bytes());
        let (all, started) = ([DISK_FILE, KERNEL_FILE, INITRD_FILE], [KERNEL_FILE, INITRD_FILE]);
        assert!(!parse(&all, "").unwrap().diskless);
        assert!(matches!(parse(&started, ""), Err(ManifestError::Unlisted(DISK_FILE))));
        let diskless = parse(&started, r#","diskless":true"#).unwrap();
        assert!(diskless.diskless);
        assert!(serde_json::to_string(&diskless).unwrap().contains("diskless"));
        assert!(matches!(
            parse(&[KERNEL_FILE], r#","diskless":true"#),
            Err(ManifestError::Unlisted(INITRD_FILE))
        ));
        assert!(parse(&[DISK_FILE], r#","machine":"bios""#).is_ok());
    }
}
