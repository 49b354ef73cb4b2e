//! The daemon's events: server-sent events (WHATWG HTML, section 9.2) of JSON.

use std::io::{self, BufRead, BufReader, Read};

use catalyst_api::Event;

use crate::client::{ClientError, Stream};

/// Longest line and longest event, in bytes.
const MAX_LINE: usize = 1 << 20;

/// Why there is no next event.
#[derive(Debug, thiserror::Error)]
pub enum EventsError {
    /// The time given is over.
    #[error("the time is over")]
    TimeOver,
    /// The stream broke off.
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// A stream of events.
pub struct Events {
    reader: BufReader<Stream>,
}

impl Events {
    /// The events in a reply's body.
    pub fn new(stream: Stream) -> Self {
        Self { reader: BufReader::new(stream) }
    }

    /// The next event; waits for it. Events of kinds that this version does not know are
    /// passed over.
    pub fn next(&mut self) -> Result<Event, EventsError> {
        match next_event(&mut self.reader) {
            Ok(event) => Ok(event),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => Err(EventsError::TimeOver),
            Err(error) => Err(self.reader.get_ref().lost(error).into()),
        }
    }

    /// Waits until the daemon ends the stream, for whatever reason.
    pub fn wait_for_end(mut self) {
        while self.next().is_ok() {}
    }
}

/// Reads lines until a blank one ends an event that can be understood.
fn next_event(reader: &mut impl BufRead) -> io::Result<Event> {
    let mut data = String::new();
    loop {
        let line = read_line(reader)?;
        if let Some(value) = line.strip_prefix("data:") {
            if data.len() + value.len() > MAX_LINE {
                return Err(too_long());
            }
            data.push_str(value.strip_prefix(' ').unwrap_or(value));
            data.push('\n');
        } else if line.is_empty() {
            if let Ok(event) = serde_json::from_str(&data) {
                return Ok(event);
            }
            data.clear();
        }
        // Comments, ids and names carry nothing for us.
    }
}

fn read_line(reader: &mut impl BufRead) -> io::Result<String> {
    let mut line = Vec::new();
    reader.by_ref().take(MAX_LINE as u64).read_until(b'\n', &mut line)?;
    if line.pop() != Some(b'\n') {
        let ended = line.len() < MAX_LINE - 1;
        return Err(if ended { io::Error::other("the daemon ended the stream") } else { too_long() });
    }
    if line.last() == Some(&b'\r') {
        line.pop();
    }
    Ok(String::from_utf8_lossy(&line).into_owned())
}

fn too_long() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "an event is longer than 1 MiB")
}

#[cfg(test)]
mod tests {
    use catalyst_api::EventKind;

    use super::*;

    #[test]
    fn events_are_read_across_comments_crlf_and_unknown_kinds() {
        let text = ": hello\r\n\r\nid: 1\r\ndata: {\"at_ms\":1,\"type\":\"vm_created\",\"id\":\"a\"}\r\n\r\n\
                    data:{\"at_ms\":2,\"type\":\"from_the_future\"}\n\n\
                    data: {\"at_ms\":3,\ndata: \"type\":\"lost\",\"count\":7}\n\n";
        let mut reader = text.as_bytes();
        let first = next_event(&mut reader).unwrap();
        assert_eq!(first.kind, EventKind::VmCreated { id: "a".to_owned() });
        assert_eq!(next_event(&mut reader).unwrap().kind, EventKind::Lost { count: 7 });
        assert!(next_event(&mut reader).unwrap_err().to_string().contains("ended"));
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let endless = vec![b'x'; 3 << 20];
        assert!(next_event(&mut endless.as_slice()).unwrap_err().to_string().contains("longer"));
    }
}
