//! Setting a guest up, once in its life: users, keys and files before anybody reaches it, commands when it has its network.
//!
//! A note on the guest's disk says how far that is, so that a disk that goes back to a snapshot tells the truth, and a clone,
//! whose host does not ask, is left alone.

mod commands;
mod files;
mod users;

pub use self::commands::{LOG, SCRIPT};
pub use self::users::FURTHER_KEYS;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use catalyst_agent_protocol::set_up::{DOCUMENT, MAX_DOCUMENT};
use catalyst_agent_protocol::{ProblemKind, Reply, SetUp, SetUpReport, SetUpState};
use serde::{Deserialize, Serialize};

use crate::files::replace;
use crate::notify;
use crate::session::{Config, Session, failed};

/// The note, below the root.
pub const NOTE: &str = "var/lib/catalyst/set-up.json";
/// What is said of what failed, in characters.
const MAX_MESSAGE: usize = 900;
/// How long one step may take before the service manager takes the agent for dead, in seconds.
const STEP_SECONDS: u64 = 120;

/// See the module.
#[derive(Debug, Default)]
pub struct Setting(Mutex<Progress>);

#[derive(Debug, Default)]
struct Progress {
    /// The instance whose users and files are being made, or whose commands wait or run.
    under_way: Option<String>,
    /// What waits for the network.
    waiting: Option<Waiting>,
}

/// Commands that are to be run, and what failed before them.
#[derive(Debug)]
struct Waiting {
    instance: String,
    preparation: Vec<String>,
    commands: Vec<String>,
    problems: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Note {
    instance: String,
    report: SetUpReport,
}

impl Setting {
    /// Does what the document says, unless that was done, or begins with it; the answer is how far it is.
    pub fn begin(self: &Arc<Self>, session: &Arc<Session>, instance: &str, document: bool) -> Reply {
        let config = &session.config;
        let path = document_path(config);
        // Taken away in any case: it may hold secrets.
        let text = if document { take(&path) } else { Ok(Vec::new()) };
        {
            let mut progress = self.lock();
            let noted = read_note(config).filter(|note| note.instance == instance);
            let under_way = progress.under_way.as_deref() == Some(instance);
            match noted {
                Some(Note { report: SetUpReport { state: SetUpState::Commands, .. }, .. }) if !under_way => {
                    return Reply::SetUp(end(config, instance, vec![INTERRUPTED.to_owned()]));
                }
                Some(note) if under_way || note.report.state != SetUpState::Absent => {
                    return Reply::SetUp(note.report);
                }
                _ if !document => return Reply::SetUp(SetUpReport::default()),
                _ if under_way => {
                    return failed(ProblemKind::Busy, "the guest is being set up by an earlier request");
                }
                _ => progress.under_way = Some(instance.to_owned()),
            }
        }
        let read = text.map_err(|error| error.to_string()).and_then(|bytes| parse(&bytes, instance));
        match read {
            Ok(document) => Reply::SetUp(self.make(session, document)),
            Err(why) => {
                self.lock().under_way = None;
                failed(ProblemKind::Invalid, format!("the guest cannot be set up: {why}"))
            }
        }
    }

    /// Makes users and files; the commands come when the guest has its network.
    fn make(self: &Arc<Self>, session: &Arc<Session>, document: SetUp) -> SetUpReport {
        let config = &session.config;
        let mut problems = Vec::new();
        note(config, &document.instance, &SetUpReport::default(), &mut problems);
        notify::more_time(STEP_SECONDS);
        users::make(config, &document, &mut problems);
        for file in &document.files {
            notify::more_time(STEP_SECONDS);
            if let Err(error) = files::write(config, file) {
                problems.push(format!("{} was not written: {error}", file.path));
            }
        }
        let SetUp { instance, preparation, commands, .. } = document;
        if commands.is_empty() && preparation.is_empty() {
            self.lock().under_way = None;
            return end(config, &instance, problems);
        }
        let report = SetUpReport { state: SetUpState::Commands, message: joined(&problems) };
        note(config, &instance, &report, &mut problems);
        if !config.files_only() {
            nix::unistd::sync();
        }
        self.lock().waiting = Some(Waiting { instance, preparation, commands, problems });
        if session.is_identified() {
            self.go_on(session);
        }
        report
    }

    /// Runs the commands that wait; the guest has its network.
    pub fn go_on(self: &Arc<Self>, session: &Arc<Session>) {
        let Some(waiting) = self.lock().waiting.take() else { return };
        let (setting, session) = (Arc::clone(self), Arc::clone(session));
        thread::spawn(move || {
            let Waiting { instance, preparation, commands, mut problems } = waiting;
            problems.extend(commands::run(&session.config, &preparation, &commands));
            let report = end(&session.config, &instance, problems);
            setting.lock().under_way = None;
            session.tell_set_up(report);
        });
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const INTERRUPTED: &str =
    "the guest or its agent was started anew while the commands ran; they are not run again";

fn document_path(config: &Config) -> PathBuf {
    config.root.join(DOCUMENT.trim_start_matches('/'))
}

fn take(path: &Path) -> io::Result<Vec<u8>> {
    let length = fs::symlink_metadata(path)?.len();
    let read = if length <= MAX_DOCUMENT as u64 {
        fs::read(path)
    } else {
        Err(io::Error::other(format!("the document has more than {MAX_DOCUMENT} bytes")))
    };
    fs::remove_file(path)?;
    read
}

fn parse(bytes: &[u8], instance: &str) -> Result<SetUp, String> {
    let document: SetUp = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if document.instance == instance { Ok(document) } else { Err("the document is another's".to_owned()) }
}

fn read_note(config: &Config) -> Option<Note> {
    serde_json::from_slice(&fs::read(config.root.join(NOTE)).ok()?).ok()
}

fn note(config: &Config, instance: &str, report: &SetUpReport, problems: &mut Vec<String>) {
    let note = Note { instance: instance.to_owned(), report: report.clone() };
    let written = serde_json::to_vec(&note)
        .map_err(io::Error::from)
        .and_then(|text| replace(&config.root.join(NOTE), &text, 0o600, None));
    if let Err(error) = written {
        problems.push(format!("/{NOTE} was not written: {error}"));
    }
}

/// Notes the end, and gives the report of it.
fn end(config: &Config, instance: &str, mut problems: Vec<String>) -> SetUpReport {
    let report = |problems: &[String]| {
        let state = if problems.is_empty() { SetUpState::Done } else { SetUpState::Failed };
        SetUpReport { state, message: joined(problems) }
    };
    let ended = report(&problems);
    note(config, instance, &ended, &mut problems);
    if !config.files_only() {
        nix::unistd::sync();
    }
    report(&problems)
}

/// One line of what failed.
fn joined(problems: &[String]) -> String {
    let text = problems.join("; ").replace(|c: char| c.is_control(), " ");
    text.chars().take(MAX_MESSAGE).collect()
}

#[cfg(test)]
mod tests {
    use catalyst_agent_protocol::set_up::{Content, NewFile};

    use super::*;
    use crate::outbox::Outbox;

    fn session(root: &Path) -> Arc<Session> {
        Session::new(Config::of_files(root), Arc::new(Outbox::default()))
    }

    fn lay(root: &Path, document: &SetUp) {
        fs::create_dir_all(root.join("run")).unwrap();
        fs::write(root.join(&DOCUMENT[1..]), serde_json::to_vec(document).unwrap()).unwrap();
    }

    fn document(instance: &str, text: &str) -> SetUp {
        let file = NewFile {
            path: "/srv/new/file".into(),
            content: Content(text.into()),
            owner: ("root".into(), "root".into()),
            mode: 0o640,
            append: false,
        };
        SetUp { instance: instance.into(), files: vec![file], ..SetUp::default() }
    }

    fn state(reply: Reply) -> SetUpState {
        match reply {
            Reply::SetUp(report) => report.state,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_guest_is_set_up_once_and_says_so_to_the_next_agent() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: files of root need root");
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let first = session(root);
        let setting = Arc::new(Setting::default());
        assert_eq!(state(setting.begin(&first, "one", false)), SetUpState::Absent);
        lay(root, &document("one", "hello"));
        assert_eq!(state(setting.begin(&first, "one", true)), SetUpState::Done);
        assert!(!root.join(&DOCUMENT[1..]).exists());
        let written = || fs::read_to_string(root.join("srv/new/file")).unwrap();
        assert_eq!(written(), "hello");
        // Another agent, the same VM: not again. Another VM on the same disk: anew.
        let setting = Arc::new(Setting::default());
        lay(root, &document("one", "again"));
        assert_eq!(state(setting.begin(&first, "one", true)), SetUpState::Done);
        assert_eq!(written(), "hello");
        lay(root, &document("two", "other"));
        assert_eq!(state(setting.begin(&first, "two", true)), SetUpState::Done);
        assert_eq!(written(), "other");
        lay(root, &document("four", "other"));
        let reply = setting.begin(&first, "three", true);
        assert!(matches!(reply, Reply::Failed(_)), "{reply:?}");
    }

    #[test]
    fn commands_that_were_cut_short_are_not_run_again() {
        let root = tempfile::tempdir().unwrap();
        let session = session(root.path());
        let config = &session.config;
        let report = SetUpReport { state: SetUpState::Commands, message: String::new() };
        note(config, "one", &report, &mut Vec::new());
        let setting = Arc::new(Setting::default());
        assert_eq!(state(setting.begin(&session, "one", false)), SetUpState::Failed);
        // Users and files that were cut short are made again: doing so twice does no harm.
        note(config, "one", &SetUpReport::default(), &mut Vec::new());
        assert_eq!(state(setting.begin(&session, "one", false)), SetUpState::Absent);
    }
}
