//! What the guest as a whole is asked: who it is, what time it is, to come to rest, to shut down.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use catalyst_agent_protocol::set_up::DOCUMENT;
use catalyst_agent_protocol::{
    FileSpec, Folder, Identity, Reply, Request, SetUp, SetUpReport, SetUpState, ShutdownKind, hex,
};
use rand::RngCore;

use crate::link::tamed;
use crate::{AgentError, AgentLink};

/// A clock that is set within this is near enough.
const CLOCK_ERROR: Duration = Duration::from_millis(20);
/// How often it is tried.
const CLOCK_TRIES: usize = 50;
/// The first pause between two tries, and the longest: what keeps the guest busy has an end.
const CLOCK_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_CLOCK_PAUSE: Duration = Duration::from_millis(500);
/// How long a guest may take to come to rest, on a software CPU too.
const REST_LIMIT: Duration = Duration::from_mins(3);
/// A guest's user may have put programs in the way, each of which may take a minute.
const IDENTIFY_LIMIT: Duration = Duration::from_mins(10);

/// How long users and files may take.
const SET_UP_LIMIT: Duration = Duration::from_mins(5);

impl AgentLink {
    /// Gives the guest its identity; returns when it is applied. Time and random bytes are filled in here.
    pub async fn identify(&self, identity: &Identity) -> Result<(), AgentError> {
        let identity = Identity { unix_ns: unix_ns(), seed: seed(), ..identity.clone() };
        let request = Request::Identify(Box::new(identity));
        self.done_within(request, IDENTIFY_LIMIT).await?;
        self.note_identity();
        Ok(())
    }

    /// Has the guest set itself up, unless it has; returns when users and files are there.
    pub async fn set_up(&self, document: &SetUp) -> Result<SetUpReport, AgentError> {
        let known = self.ask_set_up(document, false).await?;
        if known.state != SetUpState::Absent {
            return Ok(known);
        }
        let text = serde_json::to_vec(document).map_err(|error| AgentError::Io(error.into()))?;
        let size = text.len() as u64;
        let spec = FileSpec { path: DOCUMENT.to_owned(), mode: 0o600, owner: None, size };
        self.put_file(spec, text.as_slice()).await?;
        self.ask_set_up(document, true).await
    }

    async fn ask_set_up(&self, document: &SetUp, lies_ready: bool) -> Result<SetUpReport, AgentError> {
        let request = Request::SetUp { instance: document.instance.clone(), document: lies_ready };
        match self.ask(request, SET_UP_LIMIT).await? {
            Reply::SetUp(report) => Ok(tamed(&report)),
            _ => Err(AgentError::Unexpected),
        }
    }

    /// Has the guest forget what is of it alone.
    pub async fn forget(&self) -> Result<(), AgentError> {
        self.done(Request::Forget).await
    }

    /// Asks the guest to shut down; returns when it has begun.
    pub async fn shutdown(&self, kind: ShutdownKind) -> Result<(), AgentError> {
        self.done(Request::Shutdown { kind }).await
    }

    /// Sets the guest's clock to the host's, and mixes a seed into its random generator. The clock is late by the way there:
    /// where the way there and back takes long, as to a guest that has just begun, it is set again, less and less often.
    pub async fn set_clock(&self) -> Result<(), AgentError> {
        self.set_clock_with(seed()).await
    }

    /// Sets the clock of a guest that has not stood still.
    pub async fn keep_clock(&self) -> Result<(), AgentError> {
        self.set_clock_with(String::new()).await
    }

    async fn set_clock_with(&self, mut seed: String) -> Result<(), AgentError> {
        let mut pause = CLOCK_PAUSE;
        for _ in 0..CLOCK_TRIES {
            let begun = Instant::now();
            self.done(Request::SetClock { unix_ns: unix_ns(), seed: std::mem::take(&mut seed) }).await?;
            if begun.elapsed() <= CLOCK_ERROR {
                break;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_CLOCK_PAUSE);
        }
        Ok(())
    }

    /// Brings the guest to rest before its memory is copied.
    pub async fn rest(&self) -> Result<(), AgentError> {
        self.done_within(Request::Rest, REST_LIMIT).await
    }

    /// Has the guest mount a folder that is served; returns when it has.
    pub async fn mount_folder(&self, folder: Folder) -> Result<(), AgentError> {
        self.done(Request::MountFolder { folder }).await
    }

    /// Has the guest unmount a folder; `busy` if a program uses it.
    pub async fn unmount_folder(&self, name: &str) -> Result<(), AgentError> {
        self.done(Request::UnmountFolder { name: name.to_owned() }).await
    }

    /// Returns when the agent answers.
    pub async fn ping(&self) -> Result<(), AgentError> {
        self.done(Request::Ping).await
    }
}

/// 32 random bytes in hexadecimal.
pub(crate) fn seed() -> String {
    let mut seed = [0_u8; 32];
    rand::rng().fill_bytes(&mut seed);
    hex(&seed)
}

pub(crate) fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
