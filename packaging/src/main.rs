//! Writes the manual pages of all programs: `catalyst-manual FOLDER`.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use catalyst_daemon::settings::Args;
use clap::{CommandFactory, Parser};

/// Writes the manual pages of catalyst and catalyst-daemon.
#[derive(Parser)]
struct Manual {
    /// Folder for them, in which man1 and man8 are made
    folder: PathBuf,
}

fn main() -> Result<(), Box<dyn Error>> {
    let folder = Manual::parse().folder;
    let (commands, programs) = (folder.join("man1"), folder.join("man8"));
    for folder in [&commands, &programs] {
        fs::create_dir_all(folder)?;
    }
    clap_mangen::generate_to(catalyst_cli::grammar().disable_help_subcommand(true), &commands)?;
    link("catalyst.1", &commands.join("appcatalyst.1"))?;
    let mut page = Vec::new();
    clap_mangen::Man::new(Args::command()).section("8").render(&mut page)?;
    fs::write(programs.join("catalyst-daemon.8"), page)?;
    link("catalyst-daemon.8", &programs.join("appcatalyst-daemon.8"))
}

/// A page that is another one by another name.
fn link(page: &str, path: &Path) -> Result<(), Box<dyn Error>> {
    let folder = path.parent().and_then(Path::file_name).unwrap_or_default().display();
    Ok(fs::write(path, format!(".so {folder}/{page}\n"))?)
}
