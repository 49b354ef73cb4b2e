//! What happens, told to whoever listens.

use std::time::{SystemTime, UNIX_EPOCH};

use catalyst_api::{Event, EventKind};
use tokio::sync::broadcast;

/// Events a slow listener may be behind before it loses some and is told so.
const BACKLOG: usize = 1024;

/// The daemon's event bus.
#[derive(Clone, Debug)]
pub struct Events(broadcast::Sender<Event>);

impl Default for Events {
    fn default() -> Self {
        Self(broadcast::channel(BACKLOG).0)
    }
}

impl Events {
    /// Tells all listeners.
    pub fn send(&self, kind: EventKind) {
        // An error only says that nobody listens.
        let _ = self.0.send(Event { at_ms: now_ms(), kind });
    }

    /// Everything from now on.
    pub fn listen(&self) -> broadcast::Receiver<Event> {
        self.0.subscribe()
    }
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
