//! The guest of the benchmarks: the image's kernel, and the image's initrd with another first program.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::world::{image_dir, programs};

/// The guest's first line.
pub const MARKER: &str = "CATALYST-GUEST-INIT";
/// When its drivers are there and its work begins.
pub const BEGINS: &str = "CATALYST-GUEST-BEGINS";
/// Its last, before it goes to sleep.
pub const DONE: &str = "CATALYST-GUEST-DONE";
/// Where its work is `answer`, it says each word that is typed, after this sign. The shorter the better: a serial line takes
/// several exits a character.
pub const SAYS: char = '=';
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
$b mount -t sysfs sys /sys
[ -z "$words" ] || while read -r m; do $b insmod /modules/$m; done </modules/order
echo CATALYST-GUEST-BEGINS
for word in $words; do
  [ $word != answer ] || while read -r word; do echo "=$word"; done
  [ $word != net ] || { $b ip link set eth0 up; $b ip address add 192.0.2.2/24 dev eth0; }
  /guest-io $word
done
echo CATALYST-GUEST-DONE
while :; do $b sleep 1000; done
"#;

/// Where [`INIT`] finds `guest_io.rs`, compiled; the benchmark's makefile rule compiles it beside our programs.
const WORK: &str = "guest-io";

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
    fs::copy(programs().join(WORK), files.join(WORK)).expect("guest-io: make bench-monitor compiles it");
    let archive = Command::new("sh")
        .args(["-c", "printf 'init\\nguest-io\\n' | cpio -o -H newc --quiet"])
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
