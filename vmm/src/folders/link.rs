//! The port: greetings, and messages that arrive once and in order whatever connection was cut.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use catalyst_agent_protocol::line::MOST_UNCONFIRMED;
use catalyst_agent_protocol::{Channel, Decoder, Frame, HEADER, Line, LineControl, MAX_PAYLOAD, encode};
use serde::{Deserialize, Serialize};

use super::FoldersError;
use super::numbers::SavedNumbers;

/// The guest is not read from while more bytes than this wait to be written to it.
pub(super) const FULL: usize = 1 << 20;

/// What another process needs to go on from here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    pub(super) session: u64,
    pub(super) line: Line,
    pub(super) numbers: SavedNumbers,
}

/// The port's end.
#[derive(Debug)]
pub(super) struct Link {
    stream: UnixStream,
    decoder: Decoder,
    buffer: Box<[u8]>,
    /// What waits to be written.
    out: VecDeque<u8>,
    epoch: u32,
    /// Whether the guest has answered the greeting.
    greeted: bool,
    /// Nobody else has written to the port.
    alone: bool,
    pub(super) session: u64,
    pub(super) line: Line,
}

/// What the guest sends.
#[derive(Debug)]
pub(super) enum Event {
    /// Another session: nothing of the one before counts.
    NewSession,
    /// A FUSE message.
    Message(Vec<u8>),
}

impl Link {
    /// Goes on from what was saved, or begins. `alone` says that nobody else has written to the port, so that there is no half frame
    /// to be completed: a guest on a software CPU is long at what completes it.
    pub(super) fn new(stream: UnixStream, session: u64, line: Line, alone: bool) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let (decoder, out) = (Decoder::new(), VecDeque::new());
        let buffer = vec![0; 64 * 1024].into_boxed_slice();
        let mut link = Self { stream, decoder, buffer, out, epoch: 0, greeted: false, alone, session, line };
        link.greet()?;
        Ok(link)
    }

    /// Whether something waits to be written.
    pub(super) fn is_writing(&self) -> bool {
        !self.out.is_empty()
    }

    /// How many bytes wait to be written.
    pub(super) fn waiting(&self) -> usize {
        self.out.len()
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    fn greet(&mut self) -> io::Result<()> {
        let mut random = [0; 4];
        // SAFETY: the kernel fills the array.
        if unsafe { libc::getrandom(random.as_mut_ptr().cast(), random.len(), 0) } != 4 {
            return Err(io::Error::last_os_error());
        }
        self.epoch = u32::from_le_bytes(random).max(1);
        self.greeted = false;
        if !self.alone {
            // They complete whatever half frame was left there.
            self.out.extend(std::iter::repeat_n(0, MAX_PAYLOAD + HEADER));
        }
        self.tell(LineControl::Hello { session: self.session, received: self.line.received() });
        Ok(())
    }

    fn tell(&mut self, control: LineControl) {
        // A greeting fits into a frame.
        self.out.extend(encode(self.epoch, 0, Channel::Control, &control.to_bytes()).unwrap_or_default());
    }

    /// Sends a FUSE message.
    pub(super) fn send(&mut self, message: Vec<u8>) -> Result<(), FoldersError> {
        let frame = self.line.send(self.epoch, Channel::Input, message);
        self.out.extend(frame.map_err(|_| FoldersError::Guest("an answer was too long"))?);
        if self.line.unconfirmed() > MOST_UNCONFIRMED {
            return Err(FoldersError::Guest("it confirms nothing"));
        }
        Ok(())
    }

    /// Writes what waits, as far as it goes.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            match self.stream.write(self.out.as_slices().0) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => drop(self.out.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads what has come; false at the end of the port.
    pub(super) fn read(&mut self) -> io::Result<bool> {
        match self.stream.read(&mut self.buffer) {
            Ok(0) => return Ok(false),
            Ok(count) => self.decoder.push(&self.buffer[..count]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    /// The next thing that has come.
    pub(super) fn next(&mut self) -> Result<Option<Event>, FoldersError> {
        while let Some(frame) = self.decoder.next_frame() {
            if let Some(event) = self.take(frame)? {
                return Ok(Some(event));
            }
        }
        if let Some(confirmation) = self.line.confirmation() {
            self.tell(confirmation);
        }
        Ok(None)
    }

    fn take(&mut self, frame: Frame) -> Result<Option<Event>, FoldersError> {
        match frame.channel {
            Channel::Control => {
                let Ok(control) = serde_json::from_slice(&frame.payload) else { return Ok(None) };
                match control {
                    // An agent that has just started asks to be greeted.
                    LineControl::Hello { .. } if frame.epoch == 0 && self.out.len() <= FULL => {
                        self.greet().map_err(super::failed("greet the guest"))?;
                    }
                    LineControl::Hello { session, received } if frame.epoch == self.epoch => {
                        return Ok(self.answered(session, received));
                    }
                    LineControl::Confirm { received }
                        if frame.epoch == self.epoch && self.greeted && !self.line.confirmed(received) =>
                    {
                        return Err(FoldersError::Guest("it confirms what was not sent"));
                    }
                    _ => {}
                }
                Ok(None)
            }
            Channel::Output if frame.epoch == self.epoch && self.greeted => {
                Ok(self.line.receive(frame).map(Event::Message))
            }
            _ => Ok(None),
        }
    }

    /// The guest has answered the greeting.
    fn answered(&mut self, session: u64, received: u32) -> Option<Event> {
        self.greeted = true;
        if session == self.session && session != 0 && self.line.confirmed(received) {
            self.out.extend(self.line.again(self.epoch, Channel::Input));
            return None;
        }
        self.session = session;
        self.line = Line::default();
        Some(Event::NewSession)
    }
}
