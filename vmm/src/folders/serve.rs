//! The loop: the port, and the control socket.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use catalyst_agent_protocol::container::ROOT_TREE;

use super::link::{Event, FULL, Link, Saved};
use super::numbers::Numbers;
use super::{Answer, FoldersError, Request, failed, fuse};
use crate::devices::fs::Files;

/// Longest request on the control socket, in bytes.
const MAX_REQUEST: usize = 1 << 20;

/// What serves one guest.
pub(super) struct Server {
    numbers: Numbers,
    link: Link,
    control: Option<UnixListener>,
    client: Option<Client>,
}

/// Who is asking on the control socket; one at a time.
struct Client {
    stream: UnixStream,
    asked: Vec<u8>,
    /// The port is left alone while it is there.
    holds: bool,
}

impl Server {
    pub(super) fn new(
        files: Files,
        answers: fuse::Pipe,
        port: UnixStream,
        control: Option<UnixListener>,
        state: Option<Saved>,
    ) -> Result<Self, FoldersError> {
        if let Some(control) = &control {
            control.set_nonblocking(true).map_err(failed("set up the control socket"))?;
        }
        let Saved { session, line, numbers } = state.unwrap_or_default();
        Ok(Self {
            numbers: Numbers::new(Arc::new(files), answers, numbers),
            // Trees alone are served without one, by one process in a guest's life.
            link: Link::new(port, session, line, control.is_none()).map_err(failed("set up the port"))?,
            control,
            client: None,
        })
    }

    /// Serves at once, without being told whose files are: they are whose they are.
    pub(super) fn with_all_known(mut self) -> Self {
        self.numbers.set_owners(Vec::new());
        self.numbers.serve_container(ROOT_TREE.as_bytes());
        self
    }

    /// Until the port ends.
    pub(super) fn run(mut self) -> Result<(), FoldersError> {
        loop {
            let [port, listener, client] = self.wait().map_err(failed("wait"))?;
            if port & libc::POLLOUT != 0 {
                self.link.flush().map_err(failed("write to the port"))?;
            }
            if self.is_held() && port & (libc::POLLHUP | libc::POLLERR) != 0 {
                // What waits there is asked again of whoever goes on.
                return Ok(());
            }
            if port & !libc::POLLOUT != 0 {
                if !self.link.read().map_err(failed("read from the port"))? {
                    return Ok(());
                }
                while let Some(event) = self.link.next()? {
                    self.serve(event)?;
                }
                self.link.flush().map_err(failed("write to the port"))?;
            }
            if listener != 0 {
                let accepted = self.control.as_ref().and_then(|control| control.accept().ok());
                self.client = accepted.map(|(stream, _)| Client { stream, asked: Vec::new(), holds: false });
                if let Some(client) = &self.client {
                    client.stream.set_nonblocking(true).map_err(failed("set up a client"))?;
                }
            }
            if client != 0 && !self.hear() {
                self.client = None;
            }
        }
    }

    fn serve(&mut self, event: Event) -> Result<(), FoldersError> {
        match event {
            Event::NewSession => self.numbers.forget_all(),
            Event::Message(message) => {
                if let Some(answer) = self.numbers.answer(message) {
                    self.link.send(answer)?;
                }
            }
        }
        Ok(())
    }

    /// Whether the port is to be left alone.
    fn is_held(&self) -> bool {
        self.client.as_ref().is_some_and(|client| client.holds)
    }

    /// Waits; which events port, listener and client have.
    fn wait(&self) -> io::Result<[i16; 3]> {
        let held = self.is_held();
        let writes = if self.link.is_writing() && !held { libc::POLLOUT } else { 0 };
        let reads =
            if !held && self.numbers.is_ready() && self.link.waiting() <= FULL { libc::POLLIN } else { 0 };
        let entry = |fd: RawFd, events| libc::pollfd { fd, events, revents: 0 };
        // A negative number is passed over: one client at a time, the next waits.
        let client = self.client.as_ref().map_or(-1, |client| client.stream.as_raw_fd());
        let listener = match &self.control {
            Some(control) if client == -1 => control.as_raw_fd(),
            _ => -1,
        };
        let mut all = [
            entry(self.link.stream().as_raw_fd(), reads | writes),
            entry(listener, libc::POLLIN),
            entry(client, libc::POLLIN),
        ];
        loop {
            // SAFETY: the array is as long as is said.
            let ready = unsafe { libc::poll(all.as_mut_ptr(), 3, -1) };
            if ready >= 0 {
                return Ok(all.map(|entry| entry.revents));
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Reads from the client, and answers a whole request; false when it is done.
    fn hear(&mut self) -> bool {
        let Some(client) = &mut self.client else { return false };
        let mut buffer = [0; 16 * 1024];
        match client.stream.read(&mut buffer) {
            Ok(0) => return false,
            Ok(count) => client.asked.extend_from_slice(&buffer[..count]),
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        }
        let Some(end) = client.asked.iter().position(|byte| *byte == b'\n') else {
            return client.asked.len() <= MAX_REQUEST;
        };
        let request = serde_json::from_slice(&client.asked[..end]);
        let answer = match request {
            Ok(Request::Ready) => Answer::Done,
            Ok(Request::Owners { folders }) => {
                self.numbers.set_owners(folders);
                Answer::Done
            }
            Ok(Request::Save) => {
                client.holds = true;
                Answer::Saved(Box::new(Saved {
                    session: self.link.session,
                    line: self.link.line.clone(),
                    numbers: self.numbers.save(),
                }))
            }
            Err(error) => Answer::Failed(format!("no such request: {error}")),
        };
        let mut line = serde_json::to_vec(&answer).unwrap_or_default();
        line.push(b'\n');
        let Some(client) = &mut self.client else { return false };
        // The daemon is the owner's and reads what it asked for; it ends the connection by itself.
        let sent = client.stream.set_nonblocking(false).and_then(|()| client.stream.write_all(&line));
        if sent.is_err() {
            return false;
        }
        client.asked.drain(..=end);
        client.stream.set_nonblocking(true).is_ok()
    }
}
