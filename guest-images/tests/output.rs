//! The program's output, where its reader has gone.

#![allow(clippy::unwrap_used)]

use std::process::Command;

#[test]
fn a_reader_that_has_read_enough_is_no_error() {
    let store = tempfile::tempdir().unwrap();
    for json in [&[][..], &["--json"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut list = Command::new(env!("CARGO_BIN_EXE_catalyst-image"));
        list.args(["list", "--store"]).arg(store.path()).args(json).stdout(writer);
        let ended = list.output().unwrap();
        assert!(ended.status.success() && ended.stderr.is_empty(), "{json:?}: {ended:?}");
    }
}
