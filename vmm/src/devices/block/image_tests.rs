//! Images: which chains are taken, and that what is written is read.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use imago::io_buffers::{IoVector, IoVectorMut};
use proptest::prelude::*;

use super::image::{Image, ImageError, Refused};
use crate::description::Format::{self, Qcow2, Raw};

/// Runs qemu-img; false, and says SKIPPED, where there is none.
pub(super) fn qemu_img(arguments: &[&str]) -> bool {
    let Ok(output) = Command::new("qemu-img").args(arguments).output() else {
        eprintln!("SKIPPED: qemu-img is not installed");
        return false;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    true
}

/// Panics if `qemu-img check` finds more than leaked clusters.
pub(super) fn assert_whole(path: &Path) {
    let output = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(path).output().unwrap();
    // 0: nothing wrong; 3: leaks only.
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(matches!(output.status.code(), Some(0 | 3)), "{text}");
}

pub(super) fn open_rw(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

pub(super) fn read(image: &Image, offset: u64, length: usize) -> Vec<u8> {
    let mut data = vec![0xee; length];
    image.read(IoVectorMut::from(&mut data[..]), offset).unwrap();
    data
}

pub(super) fn write(image: &Image, offset: u64, data: &[u8]) {
    image.write(IoVector::from(data), offset).unwrap();
}

pub(super) struct Folder(tempfile::TempDir);

impl Folder {
    pub(super) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(super) fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    /// A raw image of these bytes.
    pub(super) fn raw(&self, name: &str, bytes: &[u8]) -> std::path::PathBuf {
        std::fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    /// An empty qcow2 with these options of qemu-img; None without qemu-img.
    pub(super) fn qcow2(&self, name: &str, options: &[&str], size: &str) -> Option<std::path::PathBuf> {
        let path = self.path(name);
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        arguments.extend(options);
        arguments.push(path.to_str().unwrap());
        arguments.push(size);
        qemu_img(&arguments).then_some(path)
    }
}

fn refusal(layers: Vec<(File, Format)>) -> Refused {
    match Image::open(layers, false).unwrap_err() {
        ImageError::Refused { why, .. } => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_overlay_reads_through_to_its_base_and_keeps_what_is_written_when_opened_again() {
    let folder = Folder::new();
    let base = folder.raw("base", &vec![7; 1 << 20]);
    let named = format!("backing_file={},backing_fmt=raw", base.display());
    let Some(overlay) = folder.qcow2("overlay", &["-o", &named], "2M") else { return };
    let open = || {
        let layers = vec![(open_rw(&overlay), Qcow2), (File::open(&base).unwrap(), Raw)];
        Image::open(layers, false).unwrap()
    };
    let image = open();
    assert_eq!(image.size(), 2 << 20);
    write(&image, 4096, &[1; 4096]);
    write(&image, 1 << 20, &[2; 512]);
    drop(image);
    let image = open();
    assert_eq!(read(&image, 0, 12288), [vec![7; 4096], vec![1; 4096], vec![7; 4096]].concat());
    assert_eq!(read(&image, (1 << 20) - 512, 1536), [vec![7; 512], vec![2; 512], vec![0; 512]].concat());
    assert_eq!(std::fs::read(&base).unwrap(), vec![7; 1 << 20], "the base is only read");
    drop(image);
    assert_whole(&overlay);
}

#[test]
fn a_name_in_a_header_is_not_followed() {
    let folder = Folder::new();
    let secret = folder.raw("secret", &vec![b'S'; 1 << 16]);
    let named = format!("backing_file={},backing_fmt=raw", secret.display());
    let Some(overlay) = folder.qcow2("overlay", &["-o", &named], "64K") else { return };
    let refused = refusal(vec![(open_rw(&overlay), Qcow2)]);
    assert_eq!(refused, Refused::NameNotFollowed(secret.to_str().unwrap().to_owned()));
    assert!(refused.to_string().contains("not followed"));
    // With a base in the chain the name says only that there is one.
    let other = folder.raw("other", &vec![b'o'; 1 << 16]);
    let layers = vec![(open_rw(&overlay), Qcow2), (File::open(other).unwrap(), Raw)];
    let image = Image::open(layers, false).unwrap();
    assert_eq!(read(&image, 0, 1 << 16), vec![b'o'; 1 << 16]);
}

#[test]
fn an_external_data_file_is_refused() {
    let folder = Folder::new();
    let data = format!("data_file={}", folder.path("data").display());
    let Some(image) = folder.qcow2("image", &["-o", &data], "64K") else { return };
    assert_eq!(refusal(vec![(open_rw(&image), Qcow2)]), Refused::ExternalData);
}

#[test]
fn a_chain_that_does_not_fit_its_headers_is_refused() {
    let folder = Folder::new();
    let raw = folder.raw("raw", &[0; 4096]);
    let other = folder.raw("other", &[0; 4096]);
    let below = (File::open(&other).unwrap(), Raw);
    assert_eq!(refusal(vec![(open_rw(&raw), Raw), below]), Refused::StandsAlone);
    assert_eq!(refusal(vec![(open_rw(&raw), Qcow2)]), Refused::NotQcow2);
    assert_eq!(refusal(vec![(File::open(&raw).unwrap(), Raw)]), Refused::NotWritable);
    assert!(matches!(Image::open(Vec::new(), false), Err(ImageError::Empty)));
    let Some(alone) = folder.qcow2("alone", &[], "64K") else { return };
    let below = (File::open(&other).unwrap(), Raw);
    assert_eq!(refusal(vec![(open_rw(&alone), Qcow2), below]), Refused::StandsAlone);
}

#[test]
fn a_loop_in_a_backing_chain_is_refused() {
    let folder = Folder::new();
    let named = format!("backing_file={},backing_fmt=qcow2", folder.path("other").display());
    let Some(a) = folder.qcow2("a", &["-u", "-o", &named], "64K") else { return };
    let link = folder.path("link");
    std::fs::hard_link(&a, &link).unwrap();
    let layers = vec![(open_rw(&a), Qcow2), (File::open(link).unwrap(), Qcow2)];
    let error = Image::open(layers, false).unwrap_err();
    assert!(error.to_string().contains("a loop in its backing chain"), "{error}");
}

#[test]
fn a_truncated_qcow2_gives_errors_or_zeroes_and_nothing_worse() {
    let folder = Folder::new();
    let Some(path) = folder.qcow2("image", &[], "1M") else { return };
    let image = Image::open(vec![(open_rw(&path), Qcow2)], false).unwrap();
    write(&image, 0, &vec![5; 1 << 18]);
    drop(image);
    let length = std::fs::metadata(&path).unwrap().len();
    for keep in [0, 50, 103, 104, 4096, 65536, 65537, 200_000, length - 65536, length - 1] {
        open_rw(&path).set_len(length).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let cut = folder.raw("cut", &bytes[..usize::try_from(keep).unwrap()]);
        if let Ok(image) = Image::open(vec![(open_rw(&cut), Qcow2)], false) {
            let mut data = vec![0; 1 << 18];
            let _ = image.read(IoVectorMut::from(&mut data[..]), 0);
            let _ = image.write(IoVector::from(&data[..4096]), 1 << 19);
        }
    }
}

#[test]
fn a_read_only_image_is_not_written() {
    let folder = Folder::new();
    let Some(path) = folder.qcow2("image", &[], "1M") else { return };
    let before = std::fs::read(&path).unwrap();
    let image = Image::open(vec![(File::open(&path).unwrap(), Qcow2)], true).unwrap();
    assert!(image.write(IoVector::from(&[1; 512][..]), 0).is_err());
    assert!(image.write_zeroes(0, 512, true).is_err());
    image.flush().unwrap();
    drop(image);
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn old_and_compressed_images_can_be_written() {
    let folder = Folder::new();
    let raw = folder.raw("raw", &vec![3; 1 << 20]);
    for options in [&["-c"][..], &["-o", "compat=0.10"]] {
        let path = folder.path("converted");
        let mut arguments = vec!["convert", "-O", "qcow2"];
        arguments.extend(options);
        arguments.extend([raw.to_str().unwrap(), path.to_str().unwrap()]);
        if !qemu_img(&arguments) {
            return;
        }
        let image = Image::open(vec![(open_rw(&path), Qcow2)], false).unwrap();
        write(&image, 70_144, &[4; 512]);
        image.write_zeroes(131_072, 65536, true).unwrap();
        image.write_zeroes(512, 512, false).unwrap();
        image.discard(262_144, 65536).unwrap();
        write(&image, 300_032, &vec![6; 200_192]);
        let mut expected = vec![3; 1 << 20];
        expected[70_144..70_656].fill(4);
        expected[131_072..196_608].fill(0);
        expected[512..1024].fill(0);
        expected[300_032..500_224].fill(6);
        let gone = read(&image, 262_144, 37_888);
        expected[262_144..300_032].copy_from_slice(&gone);
        assert!(read(&image, 0, 1 << 20) == expected, "{options:?}");
        drop(image);
        assert_whole(&path);
    }
}

#[test]
fn what_is_given_up_is_given_back_to_the_file_system() {
    use std::os::unix::fs::MetadataExt;
    let folder = Folder::new();
    let Some(path) = folder.qcow2("image", &[], "16M") else { return };
    let image = Image::open(vec![(open_rw(&path), Qcow2)], false).unwrap();
    let blocks = || std::fs::metadata(&path).unwrap().blocks();
    for zeroes in [false, true] {
        write(&image, 0, &vec![5; 8 << 20]);
        let full = blocks();
        if zeroes { image.write_zeroes(0, 8 << 20, true) } else { image.discard(0, 8 << 20) }.unwrap();
        assert!(full - blocks() >= (7 << 20) / 512, "{full} {}", blocks());
        assert_eq!(read(&image, 4 << 20, 512), [0; 512]);
    }
    let before = blocks();
    image.discard(8 << 20, 8 << 20).unwrap();
    image.flush().unwrap();
    assert!(blocks() <= before + 256, "discarding nothing takes nothing");
    drop(image);
    assert_whole(&path);
}

#[test]
fn a_full_disk_fails_writes_and_leaves_a_whole_image_that_goes_on_when_there_is_space() {
    let folder = Folder::new();
    // Says SKIPPED where it cannot be.
    super::crash_tests::in_a_small_tmpfs(module_path!(), "full_disk_child", &folder.path(""));
}

/// Runs in a process whose folder is a tmpfs of 2 MiB.
#[test]
#[ignore = "a part of the test above"]
fn full_disk_child() {
    let Some(folder) = std::env::var_os("CATALYST_TEST_FOLDER") else { return };
    let path = Path::new(&folder).join("image");
    assert!(qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "64G"]));
    let image = Image::open(vec![(open_rw(&path), Qcow2)], false).unwrap();
    let mut failed = 0;
    for step in 0..64_u64 {
        // Every second write needs an L2 table of its own too.
        let offset = if step % 2 == 0 { (step / 2) * (512 << 20) } else { step * 65536 };
        failed += u32::from(image.write(IoVector::from(&vec![9; 65536][..]), offset).is_err());
    }
    assert!(failed > 0, "the file system was never full");
    let _ = image.flush();
    assert_whole(&path);
    assert!(Command::new("mount").args(["-o", "remount,size=16m"]).arg(&folder).status().unwrap().success());
    write(&image, 40 << 30, &[8; 4096]);
    image.flush().unwrap();
    assert_eq!(read(&image, 40 << 30, 4096), vec![8; 4096]);
    drop(image);
    assert_whole(&path);
    let image = Image::open(vec![(open_rw(&path), Qcow2)], false).unwrap();
    assert_eq!(read(&image, 40 << 30, 4096), vec![8; 4096]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn random_headers_never_panic(
        version in 2_u32..5,
        bits in 8_u32..23,
        numbers in proptest::collection::vec(prop_oneof![any::<u8>(), Just(0), Just(0)], 76..400),
    ) {
        let mut bytes = vec![0x51, 0x46, 0x49, 0xfb];
        bytes.extend(version.to_be_bytes());
        bytes.extend(numbers);
        bytes[20..24].copy_from_slice(&bits.to_be_bytes());
        bytes.resize(1 << 16, 0);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        if let Ok(image) = Image::open(vec![(file, Qcow2)], false) {
            let mut data = [0; 1024];
            let _ = image.read(IoVectorMut::from(&mut data[..]), 0);
            let _ = image.write(IoVector::from(&data[..]), 0);
        }
    }

    #[test]
    fn a_damaged_image_never_panics(
        damage in proptest::collection::vec((0_u64..400_000, any::<[u8; 8]>()), 1..20),
        in_tables in proptest::collection::vec((0_u64..4, 0_u64..32, any::<[u8; 8]>()), 0..20),
    ) {
        let folder = Folder::new();
        let Some(path) = folder.qcow2("image", &[], "2M") else { return Ok(()) };
        let image = Image::open(vec![(open_rw(&path), Qcow2)], false).unwrap();
        write(&image, 0, &vec![5; 1 << 17]);
        drop(image);
        let file = open_rw(&path);
        for (offset, bytes) in damage {
            file.write_at(&bytes, offset).unwrap();
        }
        for (cluster, entry, bytes) in in_tables {
            file.write_at(&bytes, (1 + cluster) * 65536 + entry * 8).unwrap();
        }
        if let Ok(image) = Image::open(vec![(file, Qcow2)], false) {
            let mut data = vec![0; 1 << 18];
            let length = usize::try_from(image.size()).unwrap_or(usize::MAX).min(data.len());
            let _ = image.read(IoVectorMut::from(&mut data[..length]), 0);
            let _ = image.write(IoVector::from(&data[..length]), 0);
            let _ = image.write_zeroes(0, length as u64 / 2, true);
            let _ = image.write(IoVector::from(&data[..length]), 0);
            let _ = image.flush();
        }
    }
}

/// One thing that is done to an image.
#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Flush,
    Reopen,
}

const SECTORS: u64 = 2048;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range =
        || (0..SECTORS, prop_oneof![1_u64..16, 1_u64..600]).prop_map(|(at, n)| (at, n.min(SECTORS - at)));
    let step = prop_oneof![
        4 => (range(), 1_u8..255).prop_map(|((at, n), byte)| Step::Write(at, n, byte)),
        2 => (range(), any::<bool>()).prop_map(|((at, n), unmap)| Step::Zero(at, n, unmap)),
        2 => range().prop_map(|(at, n)| Step::Discard(at, n)),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ];
    proptest::collection::vec(step, 1..40)
}

fn is_like_a_vector(open: &dyn Fn() -> Image, base: &[u8], steps: &[Step]) {
    let mut image = open();
    let mut model = base.to_vec();
    let bytes =
        |at: u64, n: u64| usize::try_from(at * 512).unwrap()..usize::try_from((at + n) * 512).unwrap();
    for step in steps {
        match *step {
            Step::Write(at, n, byte) => {
                write(&image, at * 512, &vec![byte; usize::try_from(n).unwrap() * 512]);
                model[bytes(at, n)].fill(byte);
            }
            Step::Zero(at, n, unmap) => {
                image.write_zeroes(at * 512, n * 512, unmap).unwrap();
                model[bytes(at, n)].fill(0);
            }
            Step::Discard(at, n) => {
                image.discard(at * 512, n * 512).unwrap();
                // What is there now is not said, but it must stay, and be nothing of other places.
                let now = read(&image, at * 512, usize::try_from(n).unwrap() * 512);
                let range = bytes(at, n);
                for ((byte, old), base) in now.iter().zip(&model[range.clone()]).zip(&base[range.clone()]) {
                    assert!(*byte == 0 || byte == old || byte == base);
                }
                model[range].copy_from_slice(&now);
            }
            Step::Flush => image.flush().unwrap(),
            Step::Reopen => {
                drop(image);
                image = open();
            }
        }
        assert!(read(&image, 0, model.len()) == model, "after {step:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn an_image_is_like_a_vector(steps in steps(), cluster in prop_oneof![Just("4K"), Just("64K")]) {
        let folder = Folder::new();
        let base: Vec<u8> = (0..SECTORS * 512).map(|at| (at / 512 % 251) as u8 + 1).collect();
        let raw = folder.raw("base", &base);
        let named = format!("cluster_size={cluster},backing_file={},backing_fmt=raw", raw.display());
        let Some(path) = folder.qcow2("overlay", &["-o", &named], "1M") else { return Ok(()) };
        let open = || {
            let layers = vec![(open_rw(&path), Qcow2), (File::open(&raw).unwrap(), Raw)];
            Image::open(layers, false).unwrap()
        };
        is_like_a_vector(&open, &base, &steps);
        assert_whole(&path);
        assert!(std::fs::read(&raw).unwrap() == base);
        is_like_a_vector(&|| Image::open(vec![(open_rw(&raw), Raw)], false).unwrap(), &base, &steps);
    }
}
