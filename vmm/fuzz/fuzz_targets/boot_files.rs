//! What is found on a guest's disk: a small one with a kernel, of which bytes are changed; or texts that lie on one.

#![no_main]
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::sync::LazyLock;

use catalyst_vmm::boot_files::disk::Source;
use catalyst_vmm::boot_files::{FindError, Found, NicName, find, loader, modules};
use libfuzzer_sys::fuzz_target;

const VERSION: &str = "6.1.0-42-amd64";
const NIC: NicName = NicName { mac: [0, 12, 41, 0, 0, 1], slot: 33 };

/// Without checksums, which would refuse most of what is changed.
static DISK: LazyLock<Option<Vec<u8>>> = LazyLock::new(|| {
    let root = tempfile::tempdir().unwrap();
    let write = |path: &str, content: &[u8]| {
        let path = root.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    };
    let mut kernel = vec![0; 4096];
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    kernel[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    kernel[0x20e..0x210].copy_from_slice(&0x300_u16.to_le_bytes());
    kernel[0x236] = 1;
    kernel[0x500..0x500 + VERSION.len()].copy_from_slice(VERSION.as_bytes());
    write("boot/vmlinuz", &kernel);
    write("boot/initrd", b"070701");
    write("boot/grub/grub.cfg", b"menuentry 'a' {\nlinux /boot/vmlinuz root=/dev/sda1 ro\ninitrd /boot/initrd\n}\n");
    write("etc/fstab", b"UUID=1 / ext4 defaults 0 1\n");
    let folder = format!("usr/lib/modules/{VERSION}");
    write(&format!("{folder}/modules.dep"), b"a/virtio_mmio.ko: a/v.ko\na/virtio_blk.ko: a/v.ko\na/virtio_net.ko:\n");
    for module in ["v", "virtio_mmio", "virtio_blk", "virtio_net"] {
        write(&format!("{folder}/a/{module}.ko"), b"\x7fELF");
    }
    made(root.path())
});

fn looked_at(disk: Vec<u8>) -> Result<Found, FindError> {
    let disk: Rc<dyn Source> = Rc::new(disk);
    find(&disk, true, Some(&NIC))
}

fn made(root: &Path) -> Option<Vec<u8>> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-F", "-t", "ext4", "-b", "1024", "-O", "^metadata_csum,^has_journal", "-d"]);
    let made = command.arg(root).arg(file.path()).arg("1M").status();
    let whole = made.is_ok_and(|status| status.success()).then(|| std::fs::read(file.path()).unwrap())?;
    assert!(looked_at(whole.clone()).is_ok());
    Some(whole)
}

fuzz_target!(|data: &[u8]| {
    let Some(disk) = DISK.as_ref() else {
        println!("SKIPPED: needs mke2fs");
        std::process::exit(0);
    };
    let Some((kind, data)) = data.split_first() else { return };
    if kind % 4 == 0 {
        let text = String::from_utf8_lossy(data);
        let _ = loader::chosen(&text, Some(text.get(..8).unwrap_or_default()));
        let modules = modules::Modules::parse(&text, &text);
        for driver in ["virtio_mmio", "virtio_blk", "virtio_net"] {
            let _ = modules.driver(driver);
            let _ = modules::Modules::of_config(&text, &[driver]).driver(driver);
        }
        let _ = looked_at(data.to_vec());
        return;
    }
    // Three bytes each: where, and what becomes of the byte there.
    let mut disk = disk.clone();
    for change in data.as_chunks::<3>().0 {
        let at = usize::from(u16::from_le_bytes([change[0], change[1]]));
        // The tables of the file system, and what lies behind them.
        let at = if kind % 4 == 1 { 1024 + at % 8192 } else { at * (usize::from(*kind) % 16 + 1) };
        if let Some(byte) = disk.get_mut(at) {
            *byte ^= change[2];
        }
    }
    let _ = looked_at(disk);
});
