//! How the daemon is started: flags and their defaults.

use std::path::{Path, PathBuf};

use catalyst_api::EngineName;
use catalyst_api::config::{Config, ConfigError};
use clap::{Parser, ValueEnum};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::access::owner::Owner;
use crate::privilege::as_root;
use crate::release::Release;

/// Where the daemon listens where nothing else is said.
pub const LISTEN: &str = "localhost:8080";

/// Where images lie where nothing else is said: shared by all state folders.
pub const IMAGE_DIR: &str = "/var/lib/catalyst/images";

/// Command line of `catalyst-daemon`.
#[derive(Debug, Clone, Parser)]
#[command(name = "catalyst-daemon", version, about = "The daemon of Catalyst: VMs, network, REST")]
pub struct Args {
    /// Tolerated, as the original's was started with it.
    #[arg(value_parser = ["start"], hide = true)]
    pub start: Option<String>,
    /// State folder; VMs lie in vms/ below it [default: $XDG_DATA_HOME/catalyst of the owner]
    #[arg(long, value_name = "DIR", env = "CATALYST_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// Where to listen; loopback only [default: localhost:8080]
    #[arg(long, value_name = "ADDR:PORT", env = "CATALYST_LISTEN")]
    pub listen: Option<String>,
    /// Folder in which VMs lie [default: vms in the state folder]
    #[arg(long, value_name = "DIR", env = "CATALYST_VM_DIR")]
    pub vm_dir: Option<PathBuf>,
    /// Whose VMs these are, by name or uid [default: SUDO_UID, else who starts it]
    #[arg(long, value_name = "USER")]
    pub owner: Option<String>,
    /// Folder of the images, shared between state folders
    #[arg(long, value_name = "DIR", env = "CATALYST_IMAGE_DIR", default_value = IMAGE_DIR)]
    pub image_dir: PathBuf,
    /// The engine VMs are started with; auto measures KVM and takes it if it is usable [default: auto]
    #[arg(long, value_enum, env = "CATALYST_ENGINE")]
    pub engine: Option<EngineChoice>,
    /// Make no warm states but those that are asked for
    #[arg(long, env = "CATALYST_NO_WARMING")]
    pub no_warming: bool,
    /// Name of the bridge [default: the first free of catalyst0, catalyst1, …]
    #[arg(long, value_name = "NAME")]
    pub bridge: Option<String>,
    /// Folder of the log of a daemon in the background [default: /var/log]
    #[arg(long, value_name = "DIR", env = "CATALYST_LOG_DIR")]
    pub log_dir: Option<PathBuf>,
    /// Go into the background; returns when the daemon listens
    #[arg(long)]
    pub background: bool,
    /// For packages that are removed: take away what is not the owner's VMs, and end
    #[arg(long, value_name = "WHAT", hide = true)]
    pub release: Option<Release>,
    /// What is logged, as in RUST_LOG
    #[arg(long, value_name = "FILTER", env = "CATALYST_LOG", default_value = "info")]
    pub log: String,
}

/// The flag `--engine`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EngineChoice {
    /// Measure and choose.
    Auto,
    /// The monitor on /dev/kvm.
    Kvm,
    /// QEMU's software CPU.
    Qemu,
}

impl EngineChoice {
    /// The engine that was named, if one was.
    pub const fn named(self) -> Option<EngineName> {
        match self {
            Self::Auto => None,
            Self::Kvm => Some(EngineName::Kvm),
            Self::Qemu => Some(EngineName::Qemu),
        }
    }
}

/// A setting that is none.
#[derive(Debug, thiserror::Error)]
#[error("The setting engine = \"{0}\" is none: 'auto', 'kvm' and 'qemu' are")]
pub struct NoEngine(String);

impl Args {
    /// Fills up with the owner's settings what was not named.
    pub fn over(mut self, config: &Config) -> Result<Self, NoEngine> {
        self.listen = self.listen.or_else(|| config.listen.clone());
        // A daemon with a state folder of its own is another one beside the owner's, with VMs of its own.
        if self.state_dir.is_none() {
            self.vm_dir = self.vm_dir.or_else(|| config.vm_dir.clone());
        }
        self.log_dir = self.log_dir.or_else(|| config.log_dir.clone());
        if let (None, Some(word)) = (self.engine, &config.engine) {
            let engine = EngineChoice::from_str(word, true).map_err(|_| NoEngine(word.clone()))?;
            self.engine = Some(engine);
        }
        Ok(self)
    }
}

/// What the owner has set. `own_environment` says whether the environment is the owner's.
pub fn owners_config(owner: &Owner, own_environment: bool) -> Result<Config, ConfigError> {
    let named = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    Config::load(&owner.home, named.filter(|_| own_environment).as_deref())
}

/// How this daemon runs, everything decided.
#[derive(Debug, Clone)]
pub struct Settings {
    /// State folder.
    pub state_dir: PathBuf,
    /// Folder of the images.
    pub image_dir: PathBuf,
    /// Where it listens, as it was asked for.
    pub listen: String,
}

/// Descriptors that a daemon asks for: a connection through a published port takes two.
const DESCRIPTORS: u64 = 1 << 16;

/// Takes as many descriptors as the host lets it, within reason: the usual limit of 1,024 suits programs of old.
pub fn raise_descriptors() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.unwrap_or(DESCRIPTORS).min(DESCRIPTORS);
    if current.is_some_and(|current| current < wanted) {
        // What it has is enough for everything but that many connections.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum });
    }
}

/// Descriptors that the daemon can have open.
pub fn descriptors() -> usize {
    let current = getrlimit(Resource::Nofile).current.unwrap_or(DESCRIPTORS);
    usize::try_from(current.min(DESCRIPTORS)).unwrap_or_default()
}

/// The state folder where none is named: the owner's data folder (XDG Base Directory Specification).
/// `XDG_DATA_HOME` of the environment counts only if that is the owner's own.
pub fn default_state_dir(owner: &Owner, own_environment: bool) -> PathBuf {
    let named = std::env::var_os("XDG_DATA_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    match named.filter(|_| own_environment) {
        Some(data) => data.join("catalyst"),
        None => owner.home.join(".local/share/catalyst"),
    }
}

/// A program of ours, as an absolute path: beside this one, as built; in `../lib/catalyst`, as installed; else in a
/// folder of PATH. Where there is none, it is the first of these.
pub fn sibling(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    let folder = own.parent().unwrap_or(Path::new("/"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = vec![folder.join(name), folder.join("../lib/catalyst").join(name)];
    places.extend(std::env::split_paths(&path).filter(|path| path.is_absolute()).map(|path| path.join(name)));
    // They may lie where the daemon's owner may not look, such as in root's home.
    let found = as_root(|| places.iter().find(|path| path.exists()).cloned());
    found.unwrap_or_else(|| folder.join(name))
}
