//! What a user has set: `~/.config/catalyst/config.toml`, and below it AppCatalyst's `~/.appcatalyst.conf`.
//!
//! Flags come first, then the environment, then the former, then the latter, then defaults. Both files may be absent, and a
//! file that cannot be understood is an error: a daemon that ignored it would serve other VMs than it should.

mod appcatalyst;
mod own;

use std::error::Error;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Largest file that is read, in bytes.
const MAX_SIZE: u64 = 64 * 1024;
/// The file of our own, in the folder of configurations.
const OWN: &str = "catalyst/config.toml";
/// AppCatalyst's, in the home.
const LEGACY: &str = ".appcatalyst.conf";

/// Why a file cannot be used.
#[derive(Debug)]
pub struct ConfigError {
    path: PathBuf,
    why: Why,
}

#[derive(Debug)]
enum Why {
    Unreadable(io::Error),
    Malformed(String),
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match &self.why {
            Why::Unreadable(error) => write!(f, "Cannot read {path}: {}", error.kind()),
            Why::Malformed(why) => write!(f, "{path} cannot be used: {why}; mend it or remove it"),
        }
    }
}

impl Error for ConfigError {}

/// What the files say. What they do not say is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Where the daemon listens, as `HOST:PORT`.
    pub listen: Option<String>,
    /// The folder in which VMs lie.
    pub vm_dir: Option<PathBuf>,
    /// The folder of the log of a daemon in the background.
    pub log_dir: Option<PathBuf>,
    /// The engine: `auto`, `kvm` or `qemu`.
    pub engine: Option<String>,
    /// The VM that is cloned where nothing else is named: its id, or the path of its VMX.
    pub parent: Option<String>,
    /// The daemon that the command line speaks to.
    pub url: Option<String>,
    /// Whether the command line passes its proxies on to new guests: `host` or `none`.
    pub proxy: Option<String>,
}

impl Config {
    /// Reads the files of the user whose home is `home`. `config_home` is the folder of configurations (XDG Base Directory
    /// Specification), by default `~/.config`.
    pub fn load(home: &Path, config_home: Option<&Path>) -> Result<Self, ConfigError> {
        let config_home = config_home.map_or_else(|| home.join(".config"), Path::to_owned);
        let own = read(&config_home.join(OWN), |text| own::parse(text)?.checked(home))?;
        let legacy = read(&home.join(LEGACY), |text| appcatalyst::parse(text)?.checked(home))?;
        Ok(own.over(legacy))
    }

    /// What this says, and where it says nothing, what `other` says.
    fn over(self, other: Self) -> Self {
        Self {
            listen: self.listen.or(other.listen),
            vm_dir: self.vm_dir.or(other.vm_dir),
            log_dir: self.log_dir.or(other.log_dir),
            engine: self.engine.or(other.engine),
            parent: self.parent.or(other.parent),
            url: self.url.or(other.url),
            proxy: self.proxy.or(other.proxy),
        }
    }

    /// The same with whole paths.
    fn checked(self, home: &Path) -> Result<Self, String> {
        let whole = |what: &str, path: Option<PathBuf>| match path {
            None => Ok(None),
            Some(path) => match path.strip_prefix("~") {
                Ok(rest) => Ok(Some(home.join(rest))),
                Err(_) if path.is_absolute() => Ok(Some(path)),
                Err(_) => Err(format!("the path of {what} must begin with '/' or '~/'")),
            },
        };
        if let Some(proxy) = &self.proxy
            && !["host", "none"].contains(&proxy.as_str())
        {
            return Err(format!("proxy is \"{}\"; it may be \"host\" or \"none\"", proxy.escape_debug()));
        }
        Ok(Self { vm_dir: whole("VMs", self.vm_dir)?, log_dir: whole("logs", self.log_dir)?, ..self })
    }
}

/// The lines that say something, with their numbers.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let all = (1..).zip(text.lines().map(str::trim));
    all.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
}

fn read(path: &Path, parse: impl FnOnce(&str) -> Result<Config, String>) -> Result<Config, ConfigError> {
    let failed = |why| ConfigError { path: path.to_owned(), why };
    match text(path) {
        Ok(Some(Ok(text))) => parse(&text).map_err(|why| failed(Why::Malformed(why))),
        Ok(Some(Err(why))) => Err(failed(Why::Malformed(why))),
        Ok(None) => Ok(Config::default()),
        Err(error) => Err(failed(Why::Unreadable(error))),
    }
}

/// The text of a file, or why it cannot be one; `None` if it is not there, or in a home that is another user's, as sudo(8)
/// may leave it in HOME. People have their settings elsewhere and link to them.
fn text(path: &Path) -> io::Result<Option<Result<String, String>>> {
    use io::ErrorKind::{NotFound, PermissionDenied};
    match fs::metadata(path) {
        Err(error) if matches!(error.kind(), NotFound | PermissionDenied) => return Ok(None),
        // Opening a pipe would hold us up.
        Ok(about) if !about.is_file() => return Ok(Some(Err("it is not a regular file".to_owned()))),
        Err(error) => return Err(error),
        Ok(_) => {}
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_SIZE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_SIZE {
        return Ok(Some(Err(format!("it has more than {MAX_SIZE} bytes"))));
    }
    Ok(Some(String::from_utf8(bytes).map_err(|_| "it is not UTF-8 text".to_owned())))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// A home, until it is dropped.
    struct Home(PathBuf);

    impl Home {
        fn new(own: &str, legacy: &str) -> Self {
            static COUNT: AtomicU32 = AtomicU32::new(0);
            let number = COUNT.fetch_add(1, Ordering::SeqCst);
            let home = std::env::temp_dir().join(format!("catalyst-config-{}-{number}", std::process::id()));
            fs::create_dir_all(home.join(".config/catalyst")).unwrap();
            fs::write(home.join(".config/catalyst/config.toml"), own).unwrap();
            fs::write(home.join(".appcatalyst.conf"), legacy).unwrap();
            Self(home)
        }

        fn load(&self) -> Result<Config, ConfigError> {
            Config::load(&self.0, None)
        }
    }

    impl Drop for Home {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn without_files_nothing_is_set() {
        assert_eq!(Config::load(Path::new("/nowhere"), None).unwrap(), Config::default());
        assert_eq!(Home::new("", "").load().unwrap(), Config::default());
    }

    #[test]
    fn our_own_file_leads_and_the_other_fills_up() {
        let home =
            Home::new("listen = \"localhost:9000\"\nengine = 'qemu'\n", "PORT=81\nDEFAULT_VM_PATH=~/VMs\n");
        let config = home.load().unwrap();
        assert_eq!(config.listen.as_deref(), Some("localhost:9000"));
        assert_eq!(config.engine.as_deref(), Some("qemu"));
        assert_eq!(config.vm_dir, Some(home.0.join("VMs")));
        let elsewhere = Config::load(&home.0, Some(Path::new("/nowhere"))).unwrap();
        assert_eq!(elsewhere.listen.as_deref(), Some("localhost:81"));
    }

    #[test]
    fn what_cannot_be_understood_is_named_with_its_file() {
        for (own, legacy, words) in [
            ("listen = 1", "", ["config.toml", "line 1"]),
            ("\nport = \"1\"", "", ["config.toml", "'port' on line 2"]),
            ("listen", "", ["config.toml", "mend"]),
            ("vm_dir = \"VMs\"", "", ["config.toml", "VMs must begin"]),
            ("proxy = \"http://x\"", "", ["config.toml", "it may be"]),
            ("", "PORT=many", [".appcatalyst.conf", "PORT"]),
            ("", "PORT=0", [".appcatalyst.conf", "PORT"]),
            ("", "DEFAULT_LOG_PATH=logs", [".appcatalyst.conf", "logs must begin"]),
        ] {
            let text = Home::new(own, legacy).load().unwrap_err().to_string();
            assert!(words.iter().all(|word| text.contains(word)) && !text.contains('\n'), "{text}");
        }
    }

    #[test]
    fn what_is_no_text_file_is_named() {
        let home = Home::new("", "");
        let legacy = home.0.join(".appcatalyst.conf");
        fs::write(&legacy, vec![b'#'; 70_000]).unwrap();
        assert!(home.load().unwrap_err().to_string().contains("more than"));
        fs::write(&legacy, [0xff]).unwrap();
        assert!(home.load().unwrap_err().to_string().contains("UTF-8"));
        fs::remove_file(&legacy).unwrap();
        fs::create_dir(&legacy).unwrap();
        assert!(home.load().unwrap_err().to_string().contains("regular file"));
    }
}
