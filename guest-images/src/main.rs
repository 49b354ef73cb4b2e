//! `catalyst-image`: builds the bundled images and looks after the store of images.

use std::error::Error;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use catalyst_images::{
    BuildOptions, BuildOutcome, ImageError, ImageInfo, ImageState, ImageStore, Progress, VerifyProgress,
    build, recipe,
};
use clap::{Args, Parser, Subcommand};

/// Builds the images lumen and micro and looks after the store of images.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Args)]
struct StoreArgs {
    /// Folder of all images
    #[arg(long, value_name = "DIR", env = "CATALYST_IMAGE_STORE")]
    store: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Verb {
    /// Build the images, or go on with a build that was interrupted (needs root)
    Build {
        #[command(flatten)]
        store: StoreArgs,
        /// Program that runs in the guest [default: catalyst-agent-static beside this program]
        #[arg(long, value_name = "PATH")]
        agent: Option<PathBuf>,
        /// Build again although the store has this version
        #[arg(long)]
        force: bool,
    },
    /// List all versions of all images
    List {
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Show what a version consists of
    Show {
        #[command(flatten)]
        store: StoreArgs,
        /// Image
        #[arg(default_value = "lumen")]
        name: String,
        /// Version [default: the current one]
        version: Option<String>,
    },
    /// Read every file and compare it with what was built
    Verify {
        #[command(flatten)]
        store: StoreArgs,
        /// Image
        #[arg(default_value = "lumen")]
        name: String,
        /// Version [default: the current one]
        version: Option<String>,
    },
    /// Remove all versions of an image
    Remove {
        #[command(flatten)]
        store: StoreArgs,
        /// Image
        name: String,
        /// Version to leave, since VMs use it (may be given several times)
        #[arg(long, value_name = "VERSION")]
        keep: Vec<String>,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        // Whoever read the output has read enough, as `head` does.
        Err(error) if is_closed_pipe(&*error) => ExitCode::SUCCESS,
        Err(error) => {
            let mut message = format!("Error: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                message.push_str(": ");
                message.push_str(&error.to_string());
                cause = error.source();
            }
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn is_closed_pipe(error: &(dyn Error + 'static)) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn run(verb: Verb) -> Result<ExitCode, Box<dyn Error>> {
    match verb {
        Verb::Build { store, agent, force } => build_image(&store, agent, force)?,
        Verb::List { store } => list(&store)?,
        Verb::Show { store, name, version } => show(&store, &name, version.as_deref())?,
        Verb::Verify { store, name, version } => return verify(&store, &name, version.as_deref()),
        Verb::Remove { store, name, keep } => {
            let keep: Vec<_> = keep.iter().map(String::as_str).collect();
            let removal = ImageStore::open(&store.store).remove(&name, &keep)?;
            if store.json {
                print_json(&removal)?;
            } else {
                writeln!(io::stdout(), "removed: {}", removal.removed.join(" "))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn build_image(store: &StoreArgs, agent: Option<PathBuf>, force: bool) -> Result<(), Box<dyn Error>> {
    let agent = match agent {
        Some(agent) => agent,
        None => std::env::current_exe()?.with_file_name("catalyst-agent-static"),
    };
    let command = std::env::args().collect();
    let options = BuildOptions { store: store.store.clone(), agent, force, command };
    let begun = std::time::Instant::now();
    let mut last = Progress { step: 0, of: 0, name: String::new(), percent: None, message: String::new() };
    let outcome = build(&options, &mut |progress| {
        // Without a reader of progress the build goes on.
        let _ = if store.json { json_line(progress) } else { human_line(progress) };
        last = progress.clone();
    })?;
    let (BuildOutcome::Built(version) | BuildOutcome::UpToDate(version)) = &outcome;
    let what = if matches!(outcome, BuildOutcome::Built(_)) { "built" } else { "up to date" };
    let message = format!("{} and {} {version} {what}", recipe::NAME, recipe::MICRO);
    if store.json {
        let name = "done".to_owned();
        json_line(&Progress { step: last.of, of: last.of, name, percent: Some(100), message })?;
    } else {
        eprintln!("{message} ({:.1} s)", begun.elapsed().as_secs_f64());
        writeln!(io::stdout(), "{version}")?;
    }
    Ok(())
}

fn json_line(progress: &Progress) -> io::Result<()> {
    let mut output = io::stdout().lock();
    writeln!(output, "{}", serde_json::to_string(progress)?)?;
    output.flush()
}

/// On a terminal one line that changes; else only where steps begin and end.
fn human_line(progress: &Progress) -> io::Result<()> {
    let mut output = io::stderr().lock();
    let Progress { step, of, name, percent, message } = progress;
    let text = format!("[{step}/{of}] {name}: {message}");
    if output.is_terminal() {
        let end = if *percent == Some(100) { "\n" } else { "" };
        let short: String = text.chars().filter(|c| !c.is_control()).take(100).collect();
        write!(output, "\r\x1b[K{short}{end}")?;
    } else if percent.is_some() || *step == 0 {
        writeln!(output, "{text}")?;
    }
    output.flush()
}

fn list(store: &StoreArgs) -> Result<(), Box<dyn Error>> {
    let infos = ImageStore::open(&store.store).list()?;
    if store.json {
        return Ok(print_json(&infos)?);
    }
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{:<8} {:<16} {:<10} {:>9} {:>9} {:<16} PACKAGES",
        "NAME", "VERSION", "STATE", "SIZE", "ON DISK", "KERNEL"
    )?;
    for info in &infos {
        writeln!(
            out,
            "{:<8} {:<16} {:<10} {:>5} GiB {:>5} MiB {:<16} {}",
            info.name,
            info.version,
            state_word(info),
            info.size_virtual >> 30,
            info.allocated >> 20,
            info.kernel,
            info.packages
        )?;
    }
    Ok(())
}

fn state_word(info: &ImageInfo) -> &'static str {
    match info.state {
        ImageState::Ok if info.current => "current",
        ImageState::Ok => "ok",
        ImageState::Damaged(_) => "damaged",
        ImageState::Incomplete => "incomplete",
    }
}

fn show(store: &StoreArgs, name: &str, version: Option<&str>) -> Result<(), Box<dyn Error>> {
    let images = ImageStore::open(&store.store);
    let image = match version {
        Some(version) => images.version(name, version),
        None => images.current(name),
    }?;
    if store.json {
        return Ok(print_json(&image.manifest)?);
    }
    let manifest = &image.manifest;
    let mut out = io::stdout().lock();
    writeln!(out, "name:         {}\nversion:      {}", image.name, image.version)?;
    writeln!(out, "folder:       {}", image.dir.display())?;
    writeln!(out, "debian:       {}\nkernel:       {}", manifest.suite, manifest.kernel)?;
    writeln!(out, "command line: {}", manifest.command_line)?;
    if manifest.diskless {
        writeln!(out, "disk:         none: it is for containers")?;
    }
    for (file, entry) in &manifest.files {
        writeln!(out, "{:<13} {} bytes, sha256 {}", format!("{file}:"), entry.size, entry.sha256)?;
    }
    writeln!(out, "packages:     {}", manifest.packages.len())?;
    for package in &manifest.packages {
        writeln!(out, "  {} {}", package.name, package.version)?;
    }
    Ok(())
}

fn verify(store: &StoreArgs, name: &str, version: Option<&str>) -> Result<ExitCode, Box<dyn Error>> {
    let images = ImageStore::open(&store.store);
    if version.is_none()
        && let Err(error @ (ImageError::Missing { .. } | ImageError::Incomplete { .. })) =
            images.current(name)
    {
        return Err(error.into());
    }
    let terminal = io::stderr().is_terminal();
    let mut shown = None;
    let state = images.verify(name, version, |VerifyProgress { file, done, total }| {
        let percent = done.saturating_mul(100).checked_div(total);
        if terminal && shown != percent {
            shown = percent;
            eprint!("\r\x1b[K{file}: {} %", percent.unwrap_or(0));
        }
    })?;
    if terminal {
        eprintln!();
    }
    let told = if store.json {
        print_json(&state)
    } else {
        let mut out = io::stdout();
        match &state {
            ImageState::Ok => writeln!(out, "ok"),
            ImageState::Damaged(reason) => writeln!(out, "damaged: {reason}"),
            ImageState::Incomplete => writeln!(out, "incomplete"),
        }
    };
    match told {
        // The exit code tells it as well.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error.into()),
        _ => {}
    }
    Ok(if state == ImageState::Ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print_json(value: &impl serde::Serialize) -> io::Result<()> {
    writeln!(io::stdout(), "{}", serde_json::to_string_pretty(value)?)
}
