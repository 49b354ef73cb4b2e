use std::fs;
use std::process::Command;

use super::*;

const VERSION: &str = "6.1.0-42-amd64";
const MODULES_DEP: &str = "\
kernel/virtio/virtio_ring.ko:
kernel/virtio/virtio.ko: kernel/virtio/virtio_ring.ko
kernel/virtio/virtio_mmio.ko: kernel/virtio/virtio.ko kernel/virtio/virtio_ring.ko
kernel/block/virtio_blk.ko: kernel/virtio/virtio.ko kernel/virtio/virtio_ring.ko
kernel/net/virtio_net.ko: kernel/virtio/virtio.ko kernel/virtio/virtio_ring.ko
";
const BUILT_IN: &str = "kernel/virtio_mmio.ko\nkernel/virtio_blk.ko\nkernel/virtio_net.ko\n";
const SLOT: NicName = NicName { mac: [0, 12, 41, 0, 0, 1], slot: 33 };

/// As much of a bzImage as is looked at.
fn kernel(version: &str) -> Vec<u8> {
    let mut image = vec![0; 4096];
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    image[0x20e..0x210].copy_from_slice(&0x300_u16.to_le_bytes());
    image[0x236] = 1;
    let text = format!("{version} (debian@x) #1 SMP\0");
    image[0x500..0x500 + text.len()].copy_from_slice(text.as_bytes());
    image
}

/// A guest's files, which become its disk.
struct Guest(tempfile::TempDir);

impl Guest {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn with(self, path: &str, content: impl AsRef<[u8]>) -> Self {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
        self
    }

    /// A Debian with GRUB, whose command line ends so.
    fn debian(options: &str) -> Self {
        let config = format!(
            "menuentry 'Debian' {{\n linux /boot/vmlinuz-{VERSION} {options}\n initrd /boot/initrd.img-{VERSION}\n}}\n"
        );
        Self::new()
            .with("boot/grub/grub.cfg", config)
            .with(&format!("boot/vmlinuz-{VERSION}"), kernel(VERSION))
            .with(&format!("boot/initrd.img-{VERSION}"), b"070701 the guest's own")
            .with(
                "etc/fstab",
                "UUID=1 / ext4 defaults 0 1\n/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0\n",
            )
    }

    fn modules(self) -> Self {
        let mut guest = self.with(&format!("usr/lib/modules/{VERSION}/modules.dep"), MODULES_DEP);
        guest = guest.with(&format!("usr/lib/modules/{VERSION}/modules.builtin"), "kernel/fs/ext4.ko\n");
        for line in MODULES_DEP.lines() {
            let file = line.split(':').next().unwrap();
            guest = guest.with(&format!("usr/lib/modules/{VERSION}/{file}"), format!("module {file}"));
        }
        guest
    }

    /// The file system.
    fn ext4(&self) -> Vec<u8> {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut command = Command::new("mke2fs");
        command.args(["-q", "-F", "-t", "ext4", "-U", "6d1c1a0e-0c5b-4b3f-9d5e-0123456789ab", "-d"]);
        assert!(command.arg(self.0.path()).arg(file.path()).arg("8M").status().unwrap().success());
        fs::read(file.path()).unwrap()
    }

    fn find(&self) -> Result<Found, FindError> {
        found(vec![self.ext4()])
    }

    fn why(&self) -> String {
        crate::chain(&self.find().unwrap_err())
    }
}

fn looked_at(disk: Vec<u8>) -> Result<Found, FindError> {
    let disk: Rc<dyn Source> = Rc::new(disk);
    find(&disk, true, Some(&SLOT))
}

/// What is found on a disk with these partitions.
fn found(parts: Vec<Vec<u8>>) -> Result<Found, FindError> {
    looked_at(disk(parts))
}

fn disk(parts: Vec<Vec<u8>>) -> Vec<u8> {
    let mut disk = vec![0; 1 << 20];
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    for (number, part) in parts.into_iter().enumerate() {
        let at = 446 + 16 * number;
        disk[at + 4] = 0x83;
        let [first, count] =
            [disk.len(), part.len()].map(|bytes| u32::try_from(bytes / 512).unwrap().to_le_bytes());
        disk[at + 8..at + 12].copy_from_slice(&first);
        disk[at + 12..at + 16].copy_from_slice(&count);
        disk.extend(part);
    }
    disk
}

/// A partition with a mark that is not of ext4.
fn marked(at: usize, mark: &[u8]) -> Vec<u8> {
    let mut part = vec![0; 1 << 18];
    part[at..at + mark.len()].copy_from_slice(mark);
    part
}

fn has(bytes: &[u8], words: &str) -> bool {
    bytes.windows(words.len()).any(|window| window == words.as_bytes())
}

#[test]
fn a_kernel_with_modules_gets_them_behind_its_initial_ram_disk() {
    let found = Guest::debian("root=UUID=1 ro quiet").modules().find().unwrap();
    assert_eq!(found.version, VERSION);
    assert_eq!(found.kernel, kernel(VERSION));
    assert_eq!(found.command_line, "root=UUID=1 ro quiet console=ttyS0 rdinit=/catalyst/init");
    let initrd = found.initrd.unwrap();
    assert!(initrd.starts_with(b"070701 the guest's own\0\x00070701"));
    let at = |words: &str| initrd.windows(words.len()).position(|window| window == words.as_bytes()).unwrap();
    let order =
        ["00-virtio_ring.ko", "01-virtio.ko", "02-virtio_mmio.ko", "03-virtio_blk.ko", "04-virtio_net.ko"];
    assert!(order.map(at).is_sorted());
    assert!(has(&initrd, "module kernel/virtio/virtio_mmio.ko") && has(&initrd, "Name=ens33"));
}

#[test]
fn where_cards_have_no_names_of_slots_none_is_given_and_the_card_is_left_to_the_guest() {
    let found = Guest::debian("root=UUID=1 net.ifnames=0 console=ttyS1").modules().find().unwrap();
    assert_eq!(found.command_line, "root=UUID=1 net.ifnames=0 console=ttyS1 rdinit=/catalyst/init");
    let initrd = found.initrd.unwrap();
    assert!(!has(&initrd, "ens33") && !has(&initrd, "virtio_net") && has(&initrd, "virtio_blk.ko"));
}

#[test]
fn a_kernel_that_has_virtio_in_it_starts_as_it_is() {
    let guest = Guest::debian("root=/dev/sda1 ro net.ifnames=0");
    let guest = guest.with(&format!("lib/modules/{VERSION}/modules.dep"), "");
    let found = guest.with(&format!("lib/modules/{VERSION}/modules.builtin"), BUILT_IN).find().unwrap();
    assert_eq!(found.command_line, "root=/dev/vda1 ro net.ifnames=0 console=ttyS0");
    assert_eq!(found.initrd.unwrap(), b"070701 the guest's own\0\0");
}

#[test]
fn a_kernel_without_virtio_is_named_with_what_it_lacks() {
    let path = format!("usr/lib/modules/{VERSION}/modules.dep");
    let why = Guest::debian("").with(&path, MODULES_DEP.replace("virtio_mmio", "x")).why();
    assert!(why.contains(VERSION) && why.contains("no virtio_mmio,"), "{why}");
    let guest =
        Guest::debian("").modules().with(&path, "kernel/virtio/virtio_mmio.ko: ../../../../etc/fstab\n");
    assert!(guest.why().contains("no virtio_mmio, virtio_blk, virtio_net,"), "{}", guest.why());
    // What the list names is not there.
    let guest = Guest::debian("").with(&path, MODULES_DEP);
    assert!(guest.why().contains("virtio_ring.ko"), "{}", guest.why());
    let guest =
        Guest::new().with("boot/grub/grub.cfg", "linux /boot/k\n").with("boot/k", kernel(VERSION)).modules();
    assert!(guest.why().contains("without an initial RAM disk"), "{}", guest.why());
}

#[test]
fn a_boot_partition_beside_a_root_that_cannot_be_read_is_enough_if_virtio_is_built_in() {
    let boot = |config: &str| {
        Guest::new()
            .with("grub/grub.cfg", "linux /vmlinuz root=/dev/mapper/vg-root\ninitrd /initrd\n")
            .with("vmlinuz", kernel(VERSION))
            .with("initrd", "x")
            .with(&format!("config-{VERSION}"), config)
            .ext4()
    };
    let config = "CONFIG_VIRTIO_MMIO=y\nCONFIG_VIRTIO_BLK=y\nCONFIG_VIRTIO_NET=m\n";
    let lvm = || marked(512, b"LABELONE");
    let command_line = found(vec![boot(config), lvm()]).unwrap().command_line;
    assert!(command_line.starts_with("root=/dev/mapper/vg-root"), "{command_line}");
    let why = found(vec![boot(&config.replace("BLK=y", "BLK=m")), lvm()]).unwrap_err().to_string();
    assert!(why.contains("no virtio_blk built in") && why.contains("ext4, LVM"), "{why}");
    let root = Guest::new().modules();
    let initrd = found(vec![boot(""), root.ext4()]).unwrap().initrd.unwrap();
    assert!(has(&initrd, "module kernel/block/virtio_blk.ko"));
}

#[test]
fn without_a_configuration_the_newest_kernel_starts_with_its_own_file_system() {
    let old = "6.1.0-9-amd64";
    let guest = Guest::new().modules().with("sbin/init", "").with("etc/hostname", "x");
    let guest = guest
        .with(&format!("boot/vmlinuz-{VERSION}"), kernel(VERSION))
        .with("boot/vmlinuz-6.1.0-9-amd64", kernel(old));
    let found = guest.with(&format!("boot/initrd.img-{VERSION}"), "x").find().unwrap();
    assert_eq!(found.version, VERSION);
    assert!(found.command_line.starts_with("root=UUID=6d1c1a0e-0c5b-4b3f-9d5e-0123456789ab ro "));
}

#[test]
fn what_cannot_be_read_is_named() {
    for (at, mark, name) in
        [(0, &b"XFSB"[..], "xfs"), (0x1_0040, b"_BHRfS_M", "btrfs"), (0, b"LUKS\xba\xbe", "encrypted")]
    {
        let why = found(vec![marked(at, mark)]).unwrap_err().to_string();
        assert!(why.contains("no kernel") && why.contains(name), "{why}");
    }
    assert!(Guest::new().why().contains("no kernel"), "{}", Guest::new().why());
    assert!(found(vec![]).unwrap_err().to_string().contains("not understood"));
}

#[test]
fn disks_by_names_that_they_have_not_here_are_named() {
    for table in ["/dev/sda1 / ext4 defaults 0 1", "/dev/nvme0n1p3 none swap sw 0 0"] {
        let why = Guest::debian("").modules().with("etc/fstab", table).why();
        assert!(why.contains(table.split(' ').next().unwrap()) && why.contains("UUID"), "{why}");
    }
    for table in ["#/dev/sda1 / ext4 defaults 0 1", "/dev/sda9 /x ext4 defaults,nofail 0 1", "/dev/sda1", ""]
    {
        Guest::debian("").modules().with("etc/fstab", table).find().unwrap();
    }
    for (old, new) in [
        ("/dev/sdb2", Some("/dev/vdb2")),
        ("/dev/hda", Some("/dev/vda")),
        ("/dev/nvme0n1p2", Some("/dev/vda2")),
        ("/dev/nvme1n1p2", None),
        ("/dev/sd", None),
        ("/dev/sdaa1", None),
        ("/dev/sda1234", None),
    ] {
        assert_eq!(renamed(old).as_deref(), new, "{old}");
    }
    assert!(Guest::debian("root=/dev/nvme3n1p1").modules().why().contains("UUID"));
}

#[test]
fn what_means_ill_is_refused_or_leads_nowhere() {
    let link = |to: &str| {
        let guest = Guest::debian("").modules();
        let path = guest.0.path().join(format!("boot/vmlinuz-{VERSION}"));
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(to, &path).unwrap();
        guest
    };
    // A link stays in the guest, and one that comes back to itself ends.
    assert!(link("/etc/fstab").why().contains("no kernel that can be started"));
    for nowhere in ["../../../../../../etc/passwd", &format!("vmlinuz-{VERSION}"), "/"] {
        assert!(link(nowhere).find().is_err(), "{nowhere}");
    }
    for version in ["../../../etc", "/etc", "", "a b"] {
        let guest = Guest::debian("").modules().with(&format!("boot/vmlinuz-{VERSION}"), kernel(version));
        assert!(guest.find().is_err(), "{version}");
    }
    let guest = Guest::debian(&"x".repeat(4000)).modules();
    assert!(guest.why().contains("command line"), "{}", guest.why());
    let guest = Guest::debian("").modules().with("boot/grub/grub.cfg", vec![b'\n'; 5 << 20]);
    assert!(guest.why().contains("no kernel"), "{}", guest.why());
}

#[test]
fn a_disk_with_any_byte_wrong_ends_in_an_answer() {
    let whole = disk(vec![Guest::debian("root=UUID=1").modules().ext4()]);
    let tried = std::cell::Cell::new(0);
    // The tables of the file system lie in its first blocks.
    for at in
        (0..512).chain((1 << 20) + 1024..(1 << 20) + 2048).chain(((1 << 20) + 2048..(3 << 20)).step_by(4099))
    {
        let mut disk = whole.clone();
        disk[at] ^= 0xff;
        let _ = looked_at(disk);
        tried.set(tried.get() + 1);
    }
    assert!(tried.get() > 1500);
}
