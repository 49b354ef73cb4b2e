use super::*;

#[test]
fn completed_steps_survive_and_an_empty_folder_has_none() {
    let work = tempfile::tempdir().unwrap();
    assert!(completed(work.path()).unwrap().is_empty());
    record(work.path(), &["packages".to_owned(), "system".to_owned()]).unwrap();
    assert_eq!(completed(work.path()).unwrap(), ["packages", "system"]);
}

#[test]
fn a_version_that_either_image_has_gets_a_number() {
    let (lumen, micro) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let free = || free_version(&[lumen.path(), micro.path()], "abc");
    assert_eq!(free(), "abc");
    fs::create_dir(lumen.path().join("abc")).unwrap();
    fs::create_dir(micro.path().join("abc-2")).unwrap();
    assert_eq!(free(), "abc-3");
}

#[test]
fn the_finished_version_becomes_the_current_one() {
    let dir = tempfile::tempdir().unwrap();
    for version in ["a1", "b2"] {
        let work = dir.path().join(format!(".build-{version}"));
        fs::create_dir_all(work.join("out")).unwrap();
        fs::write(work.join("out/file"), version).unwrap();
        publish(dir.path(), &work, version).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("current/file")).unwrap(), version);
        assert!(!work.exists());
    }
    assert_eq!(fs::read_to_string(dir.path().join("a1/file")).unwrap(), "a1");
}

#[test]
fn builds_of_other_recipes_are_removed_and_this_one_stays() {
    let dir = tempfile::tempdir().unwrap();
    for name in [".build-old", ".build-new", "old"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    remove_other_builds(dir.path(), &dir.path().join(".build-new")).unwrap();
    let left = |name: &str| dir.path().join(name).exists();
    assert!(!left(".build-old") && left(".build-new") && left("old"));
}

#[test]
fn a_second_build_waits_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let first = lock(dir.path(), &mut |_| ()).unwrap();
    let (said, heard) = std::sync::mpsc::channel();
    let path = dir.path().to_owned();
    let second = std::thread::spawn(move || {
        lock(&path, &mut |progress| said.send(progress.message.clone()).unwrap()).map(|_| ())
    });
    assert!(heard.recv().unwrap().contains("waiting"));
    drop(first);
    second.join().unwrap().unwrap();
}

#[test]
fn an_agent_that_is_none_is_refused_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    for path in [folder.path().to_owned(), folder.path().join("missing")] {
        let message = read_agent(&path).unwrap_err().to_string();
        assert!(message.contains("--agent"), "{message}");
    }
}

#[test]
fn interrupted_steps_run_again_and_completed_ones_do_not() {
    let store = tempfile::tempdir().unwrap();
    let options = BuildOptions {
        store: store.path().to_owned(),
        agent: PathBuf::from("/bin/true"),
        force: false,
        command: Vec::new(),
    };
    record(store.path(), &steps::STEPS.iter().map(|(name, _)| (*name).to_owned()).collect::<Vec<_>>())
        .unwrap();
    let mut said = Vec::new();
    let mut report = |progress: &Progress| said.push((progress.step, progress.message.clone()));
    let mut build = Build {
        options: &options,
        sources: Sources { suite: "bookworm".to_owned(), entries: Vec::new() },
        agent: Vec::new(),
        key: String::new(),
        version: "v".to_owned(),
        work: store.path().to_owned(),
        cache: store.path().to_owned(),
        step: 0,
        name: "packages",
        report: &mut report,
    };
    build.run().unwrap();
    // With the last step missing, only that one runs; here it fails, since there is nothing to describe.
    let all_but_last = ["packages", "system", "containers", "kernel", "disk", "manifest"];
    record(store.path(), &all_but_last.map(str::to_owned)).unwrap();
    assert!(build.run().is_err());
    let before = |said: &&(u32, String)| said.1 == "done before";
    assert_eq!(said.iter().filter(before).count(), 7 + 6);
    assert!(said.contains(&(7, "begun".to_owned())));
}
