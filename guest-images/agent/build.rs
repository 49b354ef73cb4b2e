//! Writes into the agent what it was made from, so that an image knows whether it holds this
//! agent: the program's own bytes differ with the folder it was built in.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

fn main() {
    let mut files = vec![PathBuf::from("Cargo.toml"), PathBuf::from("../protocol/Cargo.toml")];
    for folder in ["src", "../protocol/src"] {
        collect(Path::new(folder), &mut files);
    }
    files.push(PathBuf::from("../../Cargo.lock"));
    files.sort();
    let mut hasher = DefaultHasher::new();
    for file in &files {
        println!("cargo::rerun-if-changed={}", file.display());
        let bytes = std::fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        (file.to_string_lossy(), bytes).hash(&mut hasher);
    }
    println!("cargo::rustc-env=CATALYST_AGENT_SOURCES={:016x}", hasher.finish());
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    println!("cargo::rerun-if-changed={}", folder.display());
    let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() { collect(&path, files) } else { files.push(path) }
    }
}
