//! What is kept of a container between commands: a folder below the root of state, root's alone.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

use crate::args::OCI_VERSION;
use crate::failure::{Failure, Outcome, Tried, said};
use crate::wire::{self, Answer, Request, Status};

/// Where state is kept where nothing else is said.
pub const DEFAULT_ROOT: &str = "/run/catalyst-oci";
const DOCUMENT: &str = "state.json";
const SPECIFICATION: &str = "config.json";
const CONTROL: &str = "control.sock";
/// How long a shim may take for an answer about itself.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// What is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Kept {
    /// The container's ID.
    pub id: String,
    /// The shim.
    pub pid: u32,
    /// When the shim started, in clock ticks since boot (proc(5)): numbers of processes are used again.
    pub start_time: u64,
    /// Absolute path of the bundle.
    pub bundle: PathBuf,
    /// Absolute path of the root file system.
    pub rootfs: PathBuf,
    /// The specification's annotations.
    pub annotations: BTreeMap<String, String>,
    /// When it was made, RFC 3339.
    pub created: String,
    /// Its VM, once there is one.
    pub vm: String,
    /// The daemon's socket.
    pub socket: PathBuf,
    /// Folders of its cgroup.
    pub cgroup: Vec<PathBuf>,
    /// The VM's memory in MiB.
    pub memory_mib: u64,
}

/// A container's folder.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    id: String,
}

/// What may be an ID: as runc has it, and no step out of the folder.
pub fn check_id(id: &str) -> Outcome {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    if id.is_empty() || id.len() > 1024 || id == "." || id == ".." || !id.chars().all(allowed) {
        return said(format!("{id:?} is no container ID: letters, digits and _ + - . can be in one"));
    }
    Ok(())
}

impl Folder {
    /// The folder of the container `id`, whether it is there or not.
    pub fn of(root: &Path, id: &str) -> Outcome<Self> {
        check_id(id)?;
        Ok(Self { path: root.join(id), id: id.to_owned() })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it.
    pub fn make(&self) -> Outcome {
        let root = self.path.parent().unwrap_or(Path::new("/"));
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .tried(|| format!("make {}", root.display()))?;
        match DirBuilder::new().mode(0o700).create(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                said(format!("container with given ID already exists: {}", self.id))
            }
            made => made.tried(|| format!("make {}", self.path.display())),
        }
    }

    /// Removes it.
    pub fn remove(&self) -> Outcome {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).tried(|| format!("remove {}", self.path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Whether it is there.
    pub fn exists(&self) -> bool {
        self.path.is_dir()
    }

    /// What is kept in it.
    pub fn load(&self) -> Outcome<Kept> {
        let path = self.path.join(DOCUMENT);
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return said(format!("container does not exist: {}", self.id));
            }
            read => read.tried(|| format!("read {}", path.display()))?,
        };
        serde_json::from_slice(&text)
            .map_err(|source| Failure::Document { what: path.display().to_string(), source })
    }

    /// The specification that the container was made by.
    pub fn load_spec(&self) -> Outcome<Spec> {
        let path = self.path.join(SPECIFICATION);
        let text = fs::read(&path).tried(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&text)
            .map_err(|source| Failure::Document { what: path.display().to_string(), source })
    }

    /// Keeps that.
    pub fn save_spec(&self, spec: &Spec) -> Outcome {
        self.write(SPECIFICATION, spec)
    }

    /// Keeps what is known of the container.
    pub fn save(&self, kept: &Kept) -> Outcome {
        self.write(DOCUMENT, kept)
    }

    /// Writes a file; a reader has it old or new.
    fn write(&self, name: &str, content: &impl Serialize) -> Outcome {
        let path = self.path.join(name);
        let aside = self.path.join(format!(".{name}"));
        let text = serde_json::to_vec(content)
            .map_err(io::Error::from)
            .tried(|| "write down the state".to_owned())?;
        let write = || {
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
            file.write_all(&text)?;
            fs::rename(&aside, &path)
        };
        write().tried(|| format!("write {}", path.display()))
    }

    /// Keeps other commands that change the container away, until the file is dropped.
    pub fn lock(&self) -> Outcome<nix::fcntl::Flock<File>> {
        let path = self.path.join("lock");
        let open = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = match open {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return said(format!("container does not exist: {}", self.id));
            }
            open => open.tried(|| format!("open {}", path.display()))?,
        };
        nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .tried(|| format!("lock {}", path.display()))
    }

    /// Listens for commands.
    pub fn listen(&self) -> Outcome<UnixListener> {
        let folder = self.open()?;
        let listener = UnixListener::bind(short(&folder));
        listener.tried(|| format!("listen on {}", self.path.join(CONTROL).display()))
    }

    /// Connects to the shim.
    pub fn connect(&self) -> io::Result<UnixStream> {
        let folder = File::open(&self.path)?;
        UnixStream::connect(short(&folder))
    }

    fn open(&self) -> Outcome<File> {
        File::open(&self.path).tried(|| format!("open {}", self.path.display()))
    }

    /// Asks the shim, within a limit if there is one.
    pub fn ask(&self, request: &Request, limit: Option<Duration>) -> Outcome<Answer> {
        let what = || format!("ask the shim of container {}", self.id);
        let stream = self.connect().tried(what)?;
        stream.set_read_timeout(limit).tried(what)?;
        wire::send(&stream, request, &[]).tried(what)?;
        match wire::receive(&stream).tried(what)? {
            Some((Answer::Failed(why), _)) => said(why),
            Some((answer, _)) => Ok(answer),
            None => said(format!("container not running: {}", self.id)),
        }
    }

    /// How the container is, and the processes that stand for its programs.
    pub fn status(&self, kept: &Kept) -> (Status, Vec<u32>) {
        if !lives(kept.pid, kept.start_time) {
            return (Status::Stopped, Vec::new());
        }
        match self.ask(&Request::State, Some(ANSWER_LIMIT)) {
            Ok(Answer::State { status, pids }) => (status, pids),
            _ if !lives(kept.pid, kept.start_time) => (Status::Stopped, Vec::new()),
            // It is there and does not answer yet.
            _ => (Status::Creating, vec![kept.pid]),
        }
    }
}

/// The socket's address however long the folder's path is (unix(7): 108 bytes).
fn short(folder: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{CONTROL}", folder.as_raw_fd()))
}

/// When a process started, if it is there and has not ended.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_start_time(&stat)
}

/// proc(5), `/proc/pid/stat`: the 3rd field is the state, the 22nd the start; the 2nd may have anything in it.
fn parse_start_time(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X" | "x") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Whether that very process has not ended.
pub fn lives(pid: u32, start: u64) -> bool {
    pid != 0 && start_time(pid) == Some(start)
}

/// The state as the runtime specification has it ("State"), for hooks and for the command.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Told<'a> {
    oci_version: &'static str,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    status: Status,
    bundle: &'a Path,
    #[serde(skip_serializing_if = "Option::is_none")]
    rootfs: Option<&'a Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    created: Option<&'a str>,
    annotations: &'a BTreeMap<String, String>,
}

impl Kept {
    /// As it is told.
    pub fn told(&self, status: Status) -> Told<'_> {
        Told {
            oci_version: OCI_VERSION,
            id: &self.id,
            pid: Some(if status == Status::Stopped { 0 } else { self.pid }),
            status,
            bundle: &self.bundle,
            rootfs: Some(self.rootfs.as_path()),
            created: Some(self.created.as_str()),
            annotations: &self.annotations,
        }
    }
}

/// A time as RFC 3339 has it, in UTC.
pub fn rfc3339(time: std::time::SystemTime) -> String {
    let since = time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs();
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Years from March on, in eras of 400 of them, so that a leap day is a year's last.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:09}Z", since.subsec_nanos())
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn ids_stay_in_their_folder() {
        for id in ["a", "0".repeat(64).as_str(), "a_b+c-d.e"] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in ["", ".", "..", "a/b", "é", "a b"] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }

    #[test]
    fn what_is_kept_comes_back_and_a_folder_is_made_once() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::of(&root.path().join("deep/er"), "c1").unwrap();
        let missing = folder.load().unwrap_err().to_string();
        assert!(missing.contains("does not exist"), "{missing}");
        folder.make().unwrap();
        let twice = folder.make().unwrap_err().to_string();
        assert!(twice.contains("already exists"), "{twice}");
        let kept = Kept { id: "c1".into(), pid: 7, ..Kept::default() };
        folder.save(&kept).unwrap();
        assert_eq!(folder.load().unwrap(), kept);
        folder.remove().unwrap();
        assert!(!folder.exists());
    }

    #[test]
    fn a_process_is_known_by_its_start_and_not_once_it_has_ended() {
        let own = std::process::id();
        let start = start_time(own).unwrap();
        assert!(lives(own, start) && !lives(own, start + 1) && !lives(0, 0));
        assert_eq!(parse_start_time(&format!("7 (a) b) S {} 99 0", "1 ".repeat(18))), Some(99));
        assert_eq!(parse_start_time(&format!("7 (a) Z {} 99 0", "1 ".repeat(18))), None);
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let started = start_time(child.id());
        child.wait().unwrap();
        assert!(!lives(child.id(), started.unwrap_or(1)));
    }

    #[test]
    fn a_shim_is_reached_in_a_folder_with_a_long_path() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::of(&root.path().join("x".repeat(80)), &"f".repeat(64)).unwrap();
        folder.make().unwrap();
        let listener = folder.listen().unwrap();
        let answering = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let (request, _) = wire::receive::<Request>(&stream).unwrap().unwrap();
            assert_eq!(request, Request::Pause);
            wire::send(&stream, &Answer::Failed("no".into()), &[]).unwrap();
        });
        assert_eq!(folder.ask(&Request::Pause, None).unwrap_err().to_string(), "no");
        answering.join().unwrap();
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00"),
            (951_782_399, "2000-02-28T23:59:59"),
            (951_782_400, "2000-02-29T00:00:00"),
            (1_709_251_200, "2024-03-01T00:00:00"),
            (4_102_444_799, "2099-12-31T23:59:59"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), format!("{text}.000000000Z"));
        }
    }
}
