//! What a process that dies at any moment leaves: its images are whole.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use imago::io_buffers::IoVector;

use super::image::Image;
use super::image_tests::{Folder, assert_whole, open_rw, read};
use crate::description::Format::Qcow2;

/// A test of this program, to be run in a process of its own.
fn child(module: &str, test: &str) -> Command {
    let module = module.split_once("::").map_or(module, |(_, path)| path);
    let mut command = Command::new("/proc/self/exe");
    command.args(["--exact", &format!("{module}::{test}"), "--ignored", "--nocapture", "--test-threads=1"]);
    command
}

/// Runs an ignored test in a process that sees a tmpfs of 2 MiB at `folder`; false, and says SKIPPED, where no such can
/// be made.
pub(super) fn in_a_small_tmpfs(module: &str, test: &str, folder: &Path) -> bool {
    let script = "mount -t tmpfs -o size=2m tmpfs \"$CATALYST_TEST_FOLDER\" || exit 77; exec \"$0\" \"$@\"";
    let inner = child(module, test);
    let program = std::env::current_exe().unwrap();
    let output = Command::new("unshare")
        .args(["--mount", "--map-root-user", "sh", "-c", script])
        .arg(program)
        .args(inner.get_args())
        .env("CATALYST_TEST_FOLDER", folder)
        .output();
    let Ok(output) = output else {
        eprintln!("SKIPPED: unshare(1) is not installed");
        return false;
    };
    let errors = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(77) || errors.contains("unshare failed") {
        eprintln!("SKIPPED: no mount namespace: {errors}");
        return false;
    }
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{errors}");
    assert!(text.contains("1 passed"), "{text}");
    true
}

/// Numbers that look random, the same for the same seed (xorshift).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

/// Writes, zeroes, discards and flushes at random until it is killed.
#[test]
#[ignore = "a part of the test below"]
fn writer_that_is_killed() {
    let Some(path) = std::env::var_os("CATALYST_TEST_IMAGE") else { return };
    let seed = std::env::var("CATALYST_TEST_SEED").unwrap().parse().unwrap();
    let image = Image::open(vec![(open_rw(Path::new(&path)), Qcow2)], false).unwrap();
    let writer = |seed: u64| {
        let mut numbers = Numbers(seed * 0x9e37_79b9 + 1);
        loop {
            // Near the start of one of many L2 tables, and of few clusters there, so that they are given up and reused.
            let offset = numbers.next(200) * (512 << 20) + numbers.next(40) * 32768;
            match numbers.next(16) {
                0 => image.flush().unwrap(),
                1 | 2 => image.discard(offset, 65536 * (1 + numbers.next(4))).unwrap(),
                3 => image.write_zeroes(offset, 512 * (1 + numbers.next(300)), true).unwrap(),
                4 => image.write_zeroes(offset, 512 * (1 + numbers.next(300)), false).unwrap(),
                _ => {
                    let length = usize::try_from(512 * (1 + numbers.next(300))).unwrap();
                    image.write(IoVector::from(&vec![0xa5; length][..]), offset).unwrap();
                }
            }
        }
    };
    println!("begun");
    std::thread::scope(|scope| {
        scope.spawn(|| writer(seed));
        scope.spawn(|| writer(seed + 1000));
    });
}

#[test]
fn a_killed_process_leaves_a_whole_image() {
    let folder = Folder::new();
    let Some(path) = folder.qcow2("image", &[], "100G") else { return };
    let rounds = std::env::var("CATALYST_TEST_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(15);
    for seed in 1..=rounds {
        let mut child = child(module_path!(), "writer_that_is_killed")
            .env("CATALYST_TEST_IMAGE", &path)
            .env("CATALYST_TEST_SEED", seed.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut seen = String::new();
        let mut byte = [0];
        while !seen.contains("begun") {
            assert_eq!(child.stdout.as_mut().unwrap().read(&mut byte).unwrap(), 1, "{seen}");
            seen.push(char::from(byte[0]));
        }
        // Any moment will do: this chooses one, and waits for nothing.
        std::thread::sleep(std::time::Duration::from_micros(Numbers(seed * 77).next(60_000) + 500));
        child.kill().unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&child.wait().unwrap()),
            Some(libc::SIGKILL)
        );
        assert_whole(&path);
    }
}

#[test]
fn what_was_flushed_outlives_the_process() {
    let folder = Folder::new();
    let Some(path) = folder.qcow2("image", &[], "1G") else { return };
    let image = Image::open(vec![(open_rw(&path), Qcow2)], false).unwrap();
    image.write(IoVector::from(&[3; 4096][..]), 600 << 20).unwrap();
    image.flush().unwrap();
    // As if killed: nothing of this process writes any more.
    let copy = folder.path("copy");
    std::fs::copy(&path, &copy).unwrap();
    let again = Image::open(vec![(open_rw(&copy), Qcow2)], false).unwrap();
    assert_eq!(read(&again, 600 << 20, 4096), vec![3; 4096]);
    drop(again);
    assert_whole(&copy);
}

#[test]
fn a_cluster_that_was_given_up_is_not_reused_before_that_is_on_disk() {
    let folder = Folder::new();
    let Some(path) = folder.qcow2("image", &[], "4G") else { return };
    let open = || Image::open(vec![(open_rw(&path), Qcow2)], false).unwrap();
    let data = vec![3; 1 << 16];
    for give_up in
        [&(|image: &Image| image.discard(0, 1 << 16)) as &dyn Fn(&Image) -> std::io::Result<()>, &|image| {
            image.write_zeroes(0, 1 << 16, true)
        }]
    {
        let image = open();
        image.write(IoVector::from(&data[..]), 0).unwrap();
        image.flush().unwrap();
        give_up(&image).unwrap();
        // A place whose L2 table does not exist yet takes the cluster for that, and writes it at once.
        for table in 1..5_u64 {
            image.write_zeroes(table << 29, 1 << 16, true).unwrap();
            let copy = folder.path("copy");
            std::fs::copy(&path, &copy).unwrap();
            assert_whole(&copy);
        }
    }
}
