//! The program's output, where its reader has gone.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};

/// Runs the program with words of its own; whoever reads its output has gone.
fn unread(words: &[&str], store: &Path) -> Output {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut program = Command::new(env!("CARGO_BIN_EXE_catalyst-image"));
    program.args(words).arg("--store").arg(store).stdout(writer).output().unwrap()
}

#[test]
fn a_reader_that_has_read_enough_is_no_error() {
    let store = tempfile::tempdir().unwrap();
    for words in [&["list"][..], &["list", "--json"]] {
        let ended = unread(words, store.path());
        assert!(ended.status.success() && ended.stderr.is_empty(), "{words:?}: {ended:?}");
    }
}

#[test]
fn an_image_that_is_not_whole_is_told_by_the_exit_code_all_the_same() {
    let store = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(store.path().join("lumen/1")).unwrap();
    for words in [&["verify", "lumen", "1"][..], &["verify", "lumen", "1", "--json"]] {
        let ended = unread(words, store.path());
        assert!(ended.status.code() == Some(1) && ended.stderr.is_empty(), "{words:?}: {ended:?}");
    }
}
