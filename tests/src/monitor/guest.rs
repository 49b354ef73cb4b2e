//! The guest of the benchmarks: the image's kernel, and the image's initrd with another first program.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::world::image_dir;

/// The guest's first line.
pub const MARKER: &str = "CATALYST-GUEST-INIT";
/// Its last, before it goes to sleep.
pub const DONE: &str = "CATALYST-GUEST-DONE";
/// The host's end of the network, as the guest knows it.
pub const HOST: &str = "192.0.2.1";
/// Where the host takes what the guest sends.
pub const PORT: u16 = 5001;

/// Does what `guest.do=` on the kernel's command line says, and prints one line of result for each.
const INIT: &str = r#"#!/bin/busybox sh
echo CATALYST-GUEST-INIT
export PATH=/bin
b=/bin/busybox
$b mkdir -p /proc /sys
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
words=$($b sed -n 's/.*guest\.do=\([^ ]*\).*/\1/p' /proc/cmdline | $b tr , ' ')
[ -z "$words" ] || while read -r m; do $b insmod /modules/$m; done </modules/order
interrupts() { $b awk '/virtio/ {s += $2} END {print s + 0}' /proc/interrupts; }
dd_line() { # NAME COUNT ARGUMENTS: requests of 4 KiB a second
  name=$1; count=$2; shift 2
  i0=$(interrupts); t0=$($b cut -d' ' -f1 /proc/uptime)
  "$@" 2>/dev/null
  t1=$($b cut -d' ' -f1 /proc/uptime); i1=$(interrupts)
  echo "RESULT $name $count $t0 $t1 $((i1 - i0))"
}
random() { # OPERATION COUNT: single requests all over the disk
  n=0; x=12345
  while [ $n -lt $2 ]; do
    x=$(((x * 1103515245 + 12345) & 0x7fffffff)); at=$((x % 60000))
    if [ $1 = read ]; then $b dd if=/dev/vda of=/dev/null bs=4k count=1 skip=$at iflag=direct
    else $b dd if=/dev/zero of=/dev/vda bs=4k count=1 seek=$at oflag=direct conv=notrunc; fi
    n=$((n + 1))
  done
}
for word in $words; do
  case $word in
    block)
      dd_line seq-write 4096 $b dd if=/dev/zero of=/dev/vda bs=4k count=4096 oflag=direct conv=notrunc
      dd_line seq-read 4096 $b dd if=/dev/vda of=/dev/null bs=4k count=4096 iflag=direct
      dd_line rand-write 200 random write 200
      dd_line rand-read 200 random read 200 ;;
    net)
      $b ip link set eth0 up; $b ip address add 192.0.2.2/24 dev eth0
      dd_line net-send 16384 sh -c "$b dd if=/dev/zero bs=64k count=1024 | $b nc 192.0.2.1 5001" ;;
  esac
done
echo CATALYST-GUEST-DONE
while :; do $b sleep 1000; done
"#;

/// The image's kernel.
pub fn kernel() -> PathBuf {
    image_dir().join("lumen/current/vmlinux")
}

/// Writes the initrd into `folder`: the image's, which has busybox and the drivers, and after it an archive with the first
/// program, which takes the other's place (kernel, early-userspace/buffer-format.rst).
///
/// # Panics
/// If the image is not there, or `cpio` is not.
pub fn write_initrd(folder: &Path) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let files = folder.join("initrd.d");
    fs::create_dir_all(&files).unwrap();
    fs::write(files.join("init"), INIT).unwrap();
    fs::set_permissions(files.join("init"), fs::Permissions::from_mode(0o755)).unwrap();
    let archive = Command::new("sh")
        .args(["-c", "echo init | cpio -o -H newc --quiet"])
        .current_dir(&files)
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(archive.status.success(), "cpio failed");
    let path = folder.join("initrd");
    let mut file = File::create(&path).unwrap();
    let mut image = fs::read(image_dir().join("lumen/current/initrd")).unwrap();
    // Archives begin at multiples of four bytes.
    image.resize(image.len().next_multiple_of(4), 0);
    file.write_all(&image).unwrap();
    file.write_all(&archive.stdout).unwrap();
    path
}
