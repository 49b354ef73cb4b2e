//! What the guest as a whole is asked: who it is, what time it is, to come to rest, to shut down.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use catalyst_agent_protocol::{Folder, Identity, Request, ShutdownKind};
use catalyst_images::digest::hex;
use rand::RngCore;

use super::{AgentError, AgentLink};

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

impl AgentLink {
    /// Gives the guest its identity; returns when it is applied. Time and random bytes are filled in here.
    pub async fn identify(&self, identity: &Identity) -> Result<(), AgentError> {
        let identity = Identity { unix_ns: unix_ns(), seed: seed(), ..identity.clone() };
        let request = Request::Identify(Box::new(identity));
        self.done_within(request, IDENTIFY_LIMIT).await?;
        self.note_identity();
        Ok(())
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
fn seed() -> String {
    let mut seed = [0_u8; 32];
    rand::rng().fill_bytes(&mut seed);
    hex(&seed)
}

fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
