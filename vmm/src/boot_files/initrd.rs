//! What is put behind a guest's initial RAM disk: an archive of its own (kernel, Documentation/driver-api/early-userspace/
//! buffer-format.rst), which the kernel unpacks over the first. It loads modules before the guest's own `init` begins.

use std::collections::BTreeSet;

/// The program that the kernel starts instead of the guest's `/init`.
pub const INIT: &str = "/catalyst/init";
const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;
const LINK: u32 = 0o120_777;

/// Loads the modules in their order, by what of the guest's there is, and gives way to its `init`. Modules that are packed
/// are unpacked by kmod, which looks in /sys for whether the kernel does that.
const SCRIPT: &str = "#!/bin/sh
PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t sysfs sysfs /sys
for module in /catalyst/*.ko*; do
  /catalyst/insmod \"$module\" || insmod \"$module\"
done
umount /sys
exec /init \"$@\"
";

/// An archive in cpio's `newc` format.
#[derive(Debug, Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    folders: BTreeSet<String>,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.entries += 1;
        let lengths = [data.len(), name.len() + 1].map(|length| u32::try_from(length).unwrap_or(u32::MAX));
        // inode, mode, uid, gid, links, time, size, four numbers of devices, length of the name, checksum.
        let fields = [self.entries, mode, 0, 0, 1, 0, lengths[0], 0, 0, 0, 0, lengths[1], 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// A folder and those that it is in. One that is there already stays as it is; one whose name is a link there must
    /// not be named.
    fn folder(&mut self, path: &str) {
        for (at, _) in path.match_indices('/').chain([(path.len(), "")]) {
            if self.folders.insert(path[..at].to_owned()) {
                self.entry(&path[..at], FOLDER, &[]);
            }
        }
    }
}

/// The archive that loads `modules`, each with its file's name, and gives the network card with that MAC address a name.
pub fn archive(modules: &[(String, Vec<u8>)], name: Option<&super::NicName>) -> Vec<u8> {
    let mut archive = Archive::default();
    archive.folder("catalyst");
    if !modules.is_empty() {
        archive.folder("sys");
        archive.entry(&INIT[1..], PROGRAM, SCRIPT.as_bytes());
        // kmod does what the name says that it is called by.
        archive.entry("catalyst/insmod", LINK, b"/sbin/modprobe");
    }
    for (number, (file, content)) in modules.iter().enumerate() {
        let file = file.rsplit('/').next().unwrap_or_default();
        archive.entry(&format!("catalyst/{number:02}-{file}"), FILE, content);
    }
    if let Some(name) = name {
        let mac = name.mac.map(|byte| format!("{byte:02x}")).join(":");
        let text = format!("[Match]\nMACAddress={mac}\n[Link]\nName=ens{}\n", name.slot);
        archive.folder("etc/systemd/network");
        archive.entry("etc/systemd/network/10-catalyst.link", FILE, text.as_bytes());
    }
    archive.entry("TRAILER!!!", 0, &[]);
    archive.bytes
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::boot_files::NicName;

    #[test]
    fn cpio_unpacks_it_and_a_shell_takes_the_script() {
        let folder = tempfile::tempdir().unwrap();
        let modules = [("kernel/b.ko".to_owned(), vec![1; 5]), ("kernel/a.ko.xz".to_owned(), vec![2; 8])];
        let bytes = archive(&modules, Some(&NicName { mac: [0, 12, 41, 0, 0, 1], slot: 33 }));
        let mut cpio = Command::new("cpio");
        cpio.args(["-i", "--quiet", "--no-absolute-filenames", "-m"]).current_dir(folder.path());
        let mut child = cpio.stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        assert!(child.wait().unwrap().success());
        let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
        assert_eq!((read("catalyst/00-b.ko"), read("catalyst/01-a.ko.xz")), (vec![1; 5], vec![2; 8]));
        assert!(
            String::from_utf8(read("etc/systemd/network/10-catalyst.link")).unwrap().contains("Name=ens33")
        );
        let checked = Command::new("sh").arg("-n").arg(folder.path().join("catalyst/init")).status();
        assert!(checked.unwrap().success());
        let link = std::fs::read_link(folder.path().join("catalyst/insmod")).unwrap();
        assert_eq!(link.to_str(), Some("/sbin/modprobe"));
    }
}
