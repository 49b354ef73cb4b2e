//! Builds the images, step by step, so that an interrupted build goes on with the step that was interrupted.
//!
//! All happens in `<store>/lumen/.build-<version>/`:
//! `steps` names the completed steps, `root/` becomes the root disk, `kernel/` is Debian's kernel package, and
//! `out/` becomes the version by one rename when everything in it is on disk. `micro/` becomes that of the image for containers
//! before it.

mod command;
mod kernel;
mod progress;
mod steps;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

pub use command::CommandError;
pub use progress::Progress;

use crate::bzimage::BzImageError;
use crate::manifest::Manifest;
use crate::modules::NoSuchModule;
use crate::recipe;
use crate::sources::{self, Sources, SourcesError};
use crate::store::{BUILD_PREFIX, CURRENT_LINK, ImageError, ImageStore, remove_folder};

/// Where the host's apt keeps its settings.
const APT_SETTINGS: &str = "/etc/apt";
/// An agent larger than this is no agent of ours, in bytes.
const MAX_AGENT: u64 = 64 << 20;

/// What to build and from what.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// Folder of all images.
    pub store: PathBuf,
    /// The program that becomes `/usr/lib/catalyst/catalyst-agent`.
    pub agent: PathBuf,
    /// Build a new version also where there is one of the same recipe.
    pub force: bool,
    /// The command that is noted in the manifest.
    pub command: Vec<String>,
}

/// How a build ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BuildOutcome {
    /// A new version is in the store and the current one.
    Built(String),
    /// The store has a version of this recipe; it is the current one now.
    UpToDate(String),
}

/// Why a build failed.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Packages can only be installed by root.
    #[error("building an image needs root (it installs Debian packages with their owners): run it with sudo")]
    NotRoot,
    /// The agent's program cannot be used.
    #[error("cannot read the guest agent {path}: build it (make build) or name it with --agent", path = .path.display())]
    Agent {
        /// Where it was looked for.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The host's apt sources give no Debian.
    #[error(transparent)]
    Sources(#[from] SourcesError),
    /// A program of a step failed.
    #[error("step '{step}': {source}")]
    Command {
        /// Name of the step.
        step: &'static str,
        /// The command and its last lines.
        source: CommandError,
    },
    /// The kernel package has no kernel in the expected form.
    #[error("step 'kernel': no usable kernel in {path}", path = .path.display())]
    Kernel {
        /// The bzImage.
        path: PathBuf,
        /// Why not.
        #[source]
        source: BzImageError,
    },
    /// A module of the recipe is not in the kernel package.
    #[error("step 'kernel': {0}")]
    Module(#[from] NoSuchModule),
    /// A step found something else than it needs.
    #[error("step '{step}': {message}")]
    Unexpected {
        /// Name of the step.
        step: &'static str,
        /// What it found.
        message: String,
    },
    /// The store cannot be read or changed.
    #[error(transparent)]
    Store(#[from] ImageError),
    /// A file cannot be read or written.
    #[error("cannot {action} {path}", path = .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// A function that turns an I/O error into one that says what was tried on what.
pub(crate) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BuildError {
    let path = path.to_owned();
    move |source| BuildError::Io { action, path, source }
}

/// A running build: what its steps share.
pub(crate) struct Build<'a> {
    pub options: &'a BuildOptions,
    pub sources: Sources,
    pub agent: Vec<u8>,
    pub key: String,
    pub version: String,
    /// `<store>/lumen/.build-<version>`.
    pub work: PathBuf,
    /// Packages that were downloaded.
    pub cache: PathBuf,
    step: u32,
    name: &'static str,
    report: &'a mut dyn FnMut(&Progress),
}

/// Builds the images lumen and micro as `options` says and makes them the current versions. `report` hears of progress.
/// Another build in the same store is waited for.
pub fn build(options: &BuildOptions, report: &mut dyn FnMut(&Progress)) -> Result<BuildOutcome, BuildError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(BuildError::NotRoot);
    }
    let agent = read_agent(&options.agent)?;
    let sources = sources::read(Path::new(APT_SETTINGS))?;
    let key = recipe::key(&agent, &sources);
    let store = ImageStore::open(&options.store);
    let dir = store.image_dir(recipe::NAME);
    let micro = store.image_dir(recipe::MICRO);
    for folder in [options.store.as_path(), &dir, &micro] {
        fs::create_dir_all(folder).map_err(io_error("create", folder))?;
        set_mode(folder, 0o755)?;
    }
    let _lock = lock(&dir, report)?;
    let good = |name| good_version(&store, name, &key);
    if !options.force
        && let (Some(version), Some(of_micro)) = (good(recipe::NAME)?, good(recipe::MICRO)?)
    {
        switch_current(&micro, &of_micro)?;
        switch_current(&dir, &version)?;
        return Ok(BuildOutcome::UpToDate(version));
    }
    let version = free_version(&[&dir, &micro], recipe::version(&key));
    let work = dir.join(format!("{BUILD_PREFIX}{version}"));
    remove_other_builds(&dir, &work)?;
    let cache = options.store.join(".cache/packages");
    for folder in [&work, &cache] {
        fs::create_dir_all(folder).map_err(io_error("create", folder))?;
    }
    let mut build =
        Build { options, sources, agent, key, version, work, cache, step: 0, name: "packages", report };
    build.run()?;
    place(&build.work.join(recipe::MICRO), &micro, &build.version)?;
    publish(&dir, &build.work, &build.version)?;
    Ok(BuildOutcome::Built(build.version))
}

impl Build<'_> {
    /// Tells that the step goes on with `message`.
    pub fn say(&mut self, message: &str, percent: Option<u8>) {
        let (step, of) = (self.step, u32::try_from(steps::STEPS.len()).unwrap_or(u32::MAX));
        let (name, message) = (self.name.to_owned(), message.to_owned());
        (self.report)(&Progress { step, of, name, percent, message });
    }

    /// Runs a program of the current step; what it prints is progress.
    pub fn command(&mut self, command: std::process::Command) -> Result<(), BuildError> {
        let step = self.name;
        command::run(command, |line| self.say(line, None))
            .map_err(|source| BuildError::Command { step, source })
    }

    fn run(&mut self) -> Result<(), BuildError> {
        let mut done = completed(&self.work)?;
        for (number, (name, step)) in steps::STEPS.iter().enumerate() {
            (self.step, self.name) = (u32::try_from(number).unwrap_or(0) + 1, name);
            if done.iter().any(|earlier| earlier == name) {
                self.say("done before", Some(100));
                continue;
            }
            self.say("begun", Some(0));
            step(self)?;
            done.push((*name).to_owned());
            record(&self.work, &done)?;
            self.say("done", Some(100));
        }
        Ok(())
    }
}

fn read_agent(path: &Path) -> Result<Vec<u8>, BuildError> {
    let error = |source| BuildError::Agent { path: path.to_owned(), source };
    let metadata = fs::metadata(path).map_err(error)?;
    if !metadata.is_file() || metadata.len() == 0 || metadata.len() > MAX_AGENT {
        return Err(error(io::Error::other("it is no program")));
    }
    fs::read(path).map_err(error)
}

/// Locks the image's folder against other builds; waits for one that is going on.
fn lock(dir: &Path, report: &mut dyn FnMut(&Progress)) -> Result<Flock<File>, BuildError> {
    let path = dir.join(".lock");
    let open = || File::create(&path).map_err(io_error("create", &path));
    match Flock::lock(open()?, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => return Ok(lock),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => {}
        Err((_, error)) => return Err(io_error("lock", &path)(error.into())),
    }
    let message = "waiting for another build in this store".to_owned();
    report(&Progress { step: 0, of: 0, name: "lock".to_owned(), percent: None, message });
    Flock::lock(open()?, FlockArg::LockExclusive).map_err(|(_, error)| io_error("lock", &path)(error.into()))
}

/// The newest version of an image that was built by the recipe with this key and is well.
fn good_version(store: &ImageStore, name: &str, key: &str) -> Result<Option<String>, BuildError> {
    let of_key = |version: &str| {
        Manifest::read(&store.image_dir(name).join(version)).is_ok_and(|manifest| manifest.recipe_key == key)
    };
    let versions = store.list()?.into_iter().filter(|info| info.name == name).map(|info| info.version);
    let mut good = versions.filter(|version| of_key(version) && store.version(name, version).is_ok());
    Ok(good.next())
}

/// `base`, or `base-2`, `base-3`, … where the earlier ones are taken in one of the folders: a version never changes.
fn free_version(dirs: &[&Path], base: &str) -> String {
    let numbered = (2..).map(|number: u64| format!("{base}-{number}"));
    let mut names = std::iter::once(base.to_owned()).chain(numbered);
    let is_free = |name: &String| !dirs.iter().any(|dir| dir.join(name).exists());
    names.find(is_free).unwrap_or_else(|| base.to_owned())
}

/// Removes what builds of other recipes left.
fn remove_other_builds(dir: &Path, work: &Path) -> Result<(), BuildError> {
    for entry in fs::read_dir(dir).map_err(io_error("read", dir))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(BUILD_PREFIX) && entry.path() != work {
            steps::refuse_mounts(&entry.path())?;
            remove_folder(dir, &name)?;
        }
    }
    Ok(())
}

/// Steps that an earlier run completed in `work`.
fn completed(work: &Path) -> Result<Vec<String>, BuildError> {
    let path = work.join("steps");
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text.lines().map(str::to_owned).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(io_error("read", &path)(error)),
    }
}

/// Notes the completed steps after everything they wrote is on disk.
fn record(work: &Path, done: &[String]) -> Result<(), BuildError> {
    let folder = File::open(work).map_err(io_error("open", work))?;
    nix::unistd::syncfs(&folder).map_err(|error| io_error("sync", work)(error.into()))?;
    let (path, aside) = (work.join("steps"), work.join("steps.new"));
    fs::write(&aside, done.join("\n")).map_err(io_error("write", &aside))?;
    let file = File::open(&aside).map_err(io_error("open", &aside))?;
    file.sync_all().map_err(io_error("sync", &aside))?;
    fs::rename(&aside, &path).map_err(io_error("write", &path))?;
    folder.sync_all().map_err(io_error("sync", work))
}

/// Moves the finished version into the store, makes it the current one, and removes what is left of its build.
fn publish(dir: &Path, work: &Path, version: &str) -> Result<(), BuildError> {
    place(&work.join("out"), dir, version)?;
    steps::refuse_mounts(work)?;
    remove_folder(dir, &format!("{BUILD_PREFIX}{version}"))?;
    Ok(())
}

/// Moves a finished version into its image's folder and makes it the current one.
fn place(finished: &Path, dir: &Path, version: &str) -> Result<(), BuildError> {
    let target = dir.join(version);
    fs::rename(finished, &target).map_err(io_error("create", &target))?;
    sync_folder(dir)?;
    switch_current(dir, version)
}

/// Makes `version` the one that new VMs get.
fn switch_current(dir: &Path, version: &str) -> Result<(), BuildError> {
    let (link, aside) = (dir.join(CURRENT_LINK), dir.join(".current.new"));
    if fs::read_link(&link).is_ok_and(|target| target == Path::new(version)) {
        return Ok(());
    }
    match fs::remove_file(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(io_error("remove", &aside)(error));
        }
        _ => {}
    }
    std::os::unix::fs::symlink(version, &aside).map_err(io_error("create", &aside))?;
    fs::rename(&aside, &link).map_err(io_error("replace", &link))?;
    sync_folder(dir)
}

fn sync_folder(dir: &Path) -> Result<(), BuildError> {
    File::open(dir).and_then(|folder| folder.sync_all()).map_err(io_error("sync", dir))
}

pub(crate) fn set_mode(path: &Path, mode: u32) -> Result<(), BuildError> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(io_error("set the permissions of", path))
}

#[cfg(test)]
mod tests;
