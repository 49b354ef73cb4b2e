//! Boxes as others make them: a small Debian, built once and kept; and disks whose loader only says that it was started.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use catalyst_tests::world::run;
use sha2::{Digest, Sha256};

use crate::common::{debian_built, kept, sources};

/// Kinds of disks.
#[derive(Clone, Copy)]
pub enum Kind {
    Sparse,
    Stream,
    Split,
    Flat,
    SplitFlat,
    Qcow2,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Sparse => "monolithicSparse",
            Self::Stream => "streamOptimized",
            Self::Split => "twoGbMaxExtentSparse",
            Self::Flat => "monolithicFlat",
            Self::SplitFlat => "twoGbMaxExtentFlat",
            Self::Qcow2 => "qcow2",
        }
    }

    fn ending(self) -> &'static str {
        if matches!(self, Self::Qcow2) { "qcow2" } else { "vmdk" }
    }
}

/// What of the machine the guest must know.
#[derive(Clone, Copy)]
pub struct Started {
    pub name: &'static str,
    pub prefix: &'static str,
    pub device: &'static str,
    pub nic: &'static str,
    pub firmware: &'static str,
}

impl Started {
    const fn new(name: &'static str, prefix: &'static str, device: &'static str) -> Self {
        Self { name, prefix, device, nic: "e1000", firmware: "bios" }
    }

    pub const PVSCSI: Self = Self::new("pvscsi", "scsi0", "pvscsi");
    pub const LSI: Self = Self::new("lsilogic", "scsi0", "lsilogic");
    pub const SAS: Self = Self::new("lsisas1068", "scsi0", "lsisas1068");
    pub const SATA: Self = Self::new("SATA", "sata0", "");
    pub const IDE: Self = Self::new("IDE", "ide0", "");
    pub const NVME: Self = Self::new("NVMe", "nvme0", "");
}

/// What the small loader writes to its serial port.
pub const WORD: &str = "the end of the disk was read";
/// Where that stands: at the end of a disk of 3 GiB, so that it lies in the second part of one that is split.
const END: u64 = (3 << 21) - 1;

/// A loader that reads the disk's last sector by the BIOS (int 13h, function 42h), writes the text in it to the serial port, and
/// halts.
fn loader() -> Vec<u8> {
    let mut sector = vec![
        0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0xfb, 0xbe, 0x30, 0x7c, 0xb4,
        0x42, 0xcd, 0x13, 0x72, 0x0e, 0xbe, 0x00, 0x80, 0xac, 0x84, 0xc0, 0x74, 0x06, 0xba, 0xf8, 0x03, 0xee,
        0xeb, 0xf5, 0xf4, 0xeb, 0xfd,
    ];
    sector.resize(0x30, 0);
    // One sector to 0000:8000.
    sector.extend([0x10, 0, 1, 0, 0, 0x80, 0, 0]);
    sector.extend(END.to_le_bytes());
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector
}

/// Makes a disk of 3 GiB with the small loader.
pub fn disk(folder: &Path, name: &str, kind: Kind) {
    let raw = folder.join("raw.tmp");
    let file = File::create(&raw).unwrap();
    file.write_all_at(&loader(), 0).unwrap();
    file.write_all_at(format!("{WORD}\r\n\0").as_bytes(), END * 512).unwrap();
    file.set_len((END + 1) * 512).unwrap();
    convert(&raw, &folder.join(name), kind);
    fs::remove_file(&raw).unwrap();
}

fn convert(raw: &Path, to: &Path, kind: Kind) {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-f", "raw"]);
    match kind {
        Kind::Qcow2 => command.args(["-O", "qcow2"]),
        kind => command.args(["-O", "vmdk", "-o", &format!("subformat={}", kind.name())]),
    };
    run(command.arg(raw).arg(to));
}

/// A box with that disk. The folder is made; the VMX's path is returned.
pub fn small(folder: &Path, kind: Kind, machine: Started) -> PathBuf {
    fs::create_dir_all(folder).unwrap();
    let name = format!("Small disk.{}", kind.ending());
    disk(folder, &name, kind);
    vmx(folder, &name, 128, machine)
}

/// As VMware's products write it.
fn vmx(folder: &Path, disk: &str, memory: u32, machine: Started) -> PathBuf {
    let Started { prefix, device, nic, firmware, .. } = machine;
    let device =
        if device.is_empty() { String::new() } else { format!("{prefix}.virtualDev = \"{device}\"\n") };
    let text = format!(
        "#!/usr/bin/vmware\n.encoding = \"UTF-8\"\nconfig.version = \"8\"\nvirtualHW.version = \"11\"\n\
         displayName = \"A small box\"\nguestOS = \"debian12-64\"\nfirmware = \"{firmware}\"\nmemsize = \"{memory}\"\n\
         numvcpus = \"1\"\n{prefix}.present = \"TRUE\"\n{device}{prefix}:0.present = \"TRUE\"\n\
         {prefix}:0.fileName = \"{disk}\"\nide1:0.present = \"TRUE\"\nide1:0.deviceType = \"cdrom-raw\"\n\
         ide1:0.fileName = \"auto detect\"\nethernet0.present = \"TRUE\"\nethernet0.virtualDev = \"{nic}\"\n\
         ethernet0.addressType = \"generated\"\nethernet0.generatedAddress = \"00:0c:29:00:00:01\"\n\
         ethernet0.pciSlotNumber = \"33\"\n"
    );
    let path = folder.join("box.vmx");
    fs::write(&path, text).unwrap();
    path
}

/// UEFI where the machine has it.
pub fn efi() -> &'static str {
    if Path::new("/usr/share/OVMF/OVMF_CODE_4M.fd").exists() {
        return "efi";
    }
    println!("    (BIOS instead of UEFI, which is not installed: apt-get install ovmf)");
    "bios"
}

/// A box with the small Debian.
pub fn debian(folder: &Path, kind: Kind, machine: Started) -> PathBuf {
    fs::create_dir_all(folder).unwrap();
    let name = format!("disk.{}", kind.ending());
    convert(&built().join("disk.raw"), &folder.join(&name), kind);
    vmx(folder, &name, 384, machine)
}

/// The same, with something done to the disk before, which is given as it is.
pub fn changed(folder: &Path, kind: Kind, machine: Started, change: impl FnOnce(&Path)) -> PathBuf {
    fs::create_dir_all(folder).unwrap();
    let raw = folder.join("raw.tmp");
    run(Command::new("cp").args(["--sparse=always"]).arg(built().join("disk.raw")).arg(&raw));
    change(&raw);
    let name = format!("disk.{}", kind.ending());
    convert(&raw, &folder.join(&name), kind);
    fs::remove_file(&raw).unwrap();
    vmx(folder, &name, 384, machine)
}

/// The private key of the user vagrant there.
pub fn key() -> PathBuf {
    built().join("key")
}

/// Digests of the disks in a folder.
pub fn digests(folder: &Path) -> Vec<(PathBuf, String)> {
    let files = fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path());
    let mut all: Vec<_> = files.map(|path| (path.clone(), sample(&path))).collect();
    all.sort();
    all
}

/// Of the first bytes, the size and the time of the last change: disks are large and mostly holes.
fn sample(path: &Path) -> String {
    let about = path.metadata().unwrap();
    let mut bytes = Vec::new();
    File::open(path).unwrap().take(1 << 20).read_to_end(&mut bytes).unwrap();
    format!("{:?} {} {:x?}", about.modified().unwrap(), about.len(), Sha256::digest(&bytes).as_slice())
}

/// The folder of the small Debian.
fn built() -> PathBuf {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/box");
    let sources = sources();
    kept("box", &[fs::read_to_string(recipe).unwrap(), sources.join("\n")].concat(), |folder| {
        let own = folder.join("key");
        run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-C", "box", "-f"]).arg(&own));
        let mut build = Command::new(recipe);
        build.arg(folder).arg(own.with_extension("pub")).args(&sources);
        debian_built(build);
    })
}
