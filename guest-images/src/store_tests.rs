use super::*;
use crate::manifest::{MANIFEST_FILE, MANIFEST_FORMAT, Package};

/// A store in which `versions` of lumen are complete, the last one current.
fn store(versions: &[&str]) -> (tempfile::TempDir, ImageStore) {
    let folder = tempfile::tempdir().unwrap();
    let store = ImageStore::open(folder.path());
    for version in versions {
        let dir = store.image_dir("lumen").join(version);
        fs::create_dir_all(&dir).unwrap();
        let mut files = std::collections::BTreeMap::new();
        for (file, sparse) in [(DISK_FILE, true), (KERNEL_FILE, false), (INITRD_FILE, false)] {
            let path = dir.join(file);
            fs::write(&path, format!("{file} of {version}")).unwrap();
            let metadata = fs::metadata(&path).unwrap();
            let entry = FileEntry {
                size: metadata.len(),
                allocated: metadata.blocks() * 512,
                mtime_ns: mtime_ns(&metadata),
                sha256: sha256_file(&path, sparse, |_| ()).unwrap(),
                sparse,
            };
            files.insert(file.to_owned(), entry);
        }
        let manifest = Manifest {
            made_from: None,
            machine: None,
            diskless: false,
            format: MANIFEST_FORMAT,
            name: "lumen".into(),
            version: (*version).into(),
            recipe_key: (*version).into(),
            created: 7,
            build_command: vec![],
            suite: "bookworm".into(),
            sources: vec![],
            kernel: "6.1".into(),
            kernel_package: Package { name: "linux".into(), version: "6.1".into() },
            kernel_hz: 250,
            command_line: "quiet root=/dev/vda".into(),
            command_line_software_cpu: "mitigations=off".into(),
            files,
            packages: vec![],
        };
        fs::write(dir.join(MANIFEST_FILE), serde_json::to_vec(&manifest).unwrap()).unwrap();
        let link = store.image_dir("lumen").join(CURRENT_LINK);
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(version, link).unwrap();
    }
    (folder, store)
}

fn state(store: &ImageStore, version: &str) -> ImageState {
    store.list().unwrap().into_iter().find(|info| info.version == version).unwrap().state
}

#[test]
fn the_current_version_is_found_with_its_files_and_command_line() {
    let (_folder, store) = store(&["a1", "b2"]);
    let image = store.current("lumen").unwrap();
    assert_eq!(image.version, "b2");
    assert_eq!(fs::read_to_string(&image.vmlinux).unwrap(), "vmlinux of b2");
    assert_eq!(image.kernel_command_line(&["tsc_early_khz=1", ""]), "quiet root=/dev/vda tsc_early_khz=1");
    assert_eq!(store.version("lumen", "a1").unwrap().version, "a1");
    let current: Vec<_> =
        store.list().unwrap().into_iter().map(|info| (info.version, info.current)).collect();
    assert_eq!(current, [("a1".to_owned(), false), ("b2".to_owned(), true)]);
}

#[test]
fn nothing_half_built_and_missing_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let store = ImageStore::open(folder.path().join("none"));
    assert!(store.list().unwrap().is_empty());
    assert!(matches!(store.current("lumen"), Err(ImageError::Missing { .. })));
    fs::create_dir_all(store.image_dir("lumen").join(".build-c3")).unwrap();
    assert!(matches!(store.current("lumen"), Err(ImageError::Incomplete { .. })));
    assert_eq!(state(&store, "c3"), ImageState::Incomplete);
    assert!(matches!(store.version("lumen", "c3"), Err(ImageError::MissingVersion { .. })));
}

#[test]
fn names_that_leave_the_store_are_refused() {
    let (_folder, store) = store(&["a1"]);
    for name in ["", "..", "a/b", "/etc", ".build-a1", "A", &"a".repeat(65)] {
        assert!(matches!(store.current(name), Err(ImageError::BadName(_))), "{name}");
        assert!(matches!(store.version("lumen", name), Err(ImageError::BadName(_))), "{name}");
    }
    let link = store.image_dir("lumen").join(CURRENT_LINK);
    fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink("../../etc", &link).unwrap();
    assert!(matches!(store.current("lumen"), Err(ImageError::Missing { .. })));
}

#[test]
fn sizes_and_times_show_damage_without_reading_files() {
    for damage in [
        &(|dir: &Path| fs::remove_file(dir.join(INITRD_FILE)).unwrap()) as &dyn Fn(&Path),
        &|dir| fs::write(dir.join(DISK_FILE), "x").unwrap(),
        &|dir| fs::write(dir.join(DISK_FILE), "disk.raw of b2").unwrap(),
        &|dir| fs::write(dir.join(MANIFEST_FILE), "{").unwrap(),
        &|dir| fs::write(dir.join(MANIFEST_FILE), "{\"format\":2}").unwrap(),
        &|dir| fs::remove_file(dir.join(MANIFEST_FILE)).unwrap(),
    ] {
        let (_folder, store) = store(&["b2"]);
        damage(&store.image_dir("lumen").join("b2"));
        assert!(matches!(store.current("lumen"), Err(ImageError::Damaged { .. })));
        assert!(matches!(state(&store, "b2"), ImageState::Damaged(_)));
    }
}

#[test]
fn verify_marks_changed_content_that_sizes_and_times_hide() {
    let (_folder, store) = store(&["a1"]);
    assert_eq!(store.verify("lumen", None, |_| ()).unwrap(), ImageState::Ok);
    let disk = store.current("lumen").unwrap().disk;
    let built = fs::metadata(&disk).unwrap().modified().unwrap();
    fs::write(&disk, "disk.raw of XX").unwrap();
    fs::File::open(&disk).unwrap().set_modified(built).unwrap();
    assert!(store.current("lumen").is_ok(), "the change is meant to be hidden");
    assert!(matches!(store.verify("lumen", None, |_| ()).unwrap(), ImageState::Damaged(_)));
    assert!(matches!(store.current("lumen"), Err(ImageError::Damaged { .. })));
}

#[test]
fn verify_accepts_a_copy_with_other_times() {
    let (_folder, store) = store(&["a1"]);
    let disk = store.current("lumen").unwrap().disk;
    fs::File::open(&disk).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    assert!(store.current("lumen").is_err());
    let mut covered = 0;
    let well = store.verify("lumen", Some("a1"), |progress| covered = progress.done).unwrap();
    assert_eq!(well, ImageState::Ok);
    assert!(covered > 0);
    assert!(store.current("lumen").is_ok());
}

#[test]
fn versions_in_use_survive_a_removal() {
    let (_folder, store) = store(&["a1", "b2"]);
    fs::create_dir(store.image_dir("lumen").join(".build-c3")).unwrap();
    let removal = store.remove("lumen", &["a1"]).unwrap();
    assert_eq!(removal.removed, ["c3", "b2"]);
    assert_eq!(removal.in_use, ["a1"]);
    assert!(store.version("lumen", "a1").is_ok());
    assert!(matches!(store.current("lumen"), Err(ImageError::Missing { .. })));
    store.remove("lumen", &[]).unwrap();
    assert!(matches!(store.remove("lumen", &[]), Err(ImageError::Missing { .. })));
}

#[test]
fn an_image_without_a_disk_is_well_and_has_no_size() {
    let (_folder, store) = store(&["a1"]);
    let dir = store.image_dir("micro").join("a1");
    fs::create_dir(store.image_dir("micro")).unwrap();
    fs::rename(store.image_dir("lumen").join("a1"), &dir).unwrap();
    fs::rename(store.image_dir("lumen").join(CURRENT_LINK), store.image_dir("micro").join(CURRENT_LINK))
        .unwrap();
    fs::remove_file(dir.join(DISK_FILE)).unwrap();
    let mut manifest = Manifest::read(&dir).unwrap();
    manifest.files.remove(DISK_FILE);
    manifest.diskless = true;
    fs::write(dir.join(MANIFEST_FILE), serde_json::to_vec(&manifest).unwrap()).unwrap();
    assert!(store.current("micro").unwrap().manifest.diskless);
    let infos = store.list().unwrap();
    assert_eq!((infos.len(), infos[0].size_virtual, &infos[0].state), (1, 0, &ImageState::Ok));
    assert_eq!(store.verify("micro", None, |_| ()).unwrap(), ImageState::Ok);
    fs::remove_file(dir.join(INITRD_FILE)).unwrap();
    assert!(matches!(store.current("micro"), Err(ImageError::Damaged { .. })));
}
