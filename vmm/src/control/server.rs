//! The server of the control socket: a handler on a reactor of its own.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::protocol::{Answer, Command, Event, MAX_CLIENTS, MAX_LINE, Outcome, Reply, Request};
use crate::reactor::{EventHandler, Reactor, Registration};

/// The token of the listening socket; clients count from 1.
const LISTENER: u32 = 0;
/// A client that has this much unread is told no more: it is closed. One answer may be longer.
const MAX_UNREAD: usize = 64 << 10;

/// What the server asks of whom it serves.
pub trait Commanded: Send {
    /// Does what is asked, [`Command::Quit`] and [`Command::AttachConsole`] excepted; an error is for people. `descriptor` is
    /// what came with it.
    fn command(&mut self, command: Command, descriptor: Option<File>) -> Result<Answer, String>;

    /// Makes the connection a terminal; given back with the reason if that cannot be.
    fn attach_console(&mut self, stream: UnixStream) -> Result<(), String>;

    /// Whether [`Commanded::attach_console`] would work now.
    fn can_attach(&mut self) -> Result<(), String>;

    /// Ends the machine. Returns at once.
    fn quit(&mut self);
}

/// See the module.
pub struct Server {
    listener: UnixListener,
    registration: Option<Registration>,
    clients: HashMap<u32, Client>,
    last: u32,
    commanded: Box<dyn Commanded>,
}

/// A client, and what is under way between it and us.
#[derive(Debug)]
struct Client {
    stream: UnixStream,
    /// A descriptor that came, for the next request.
    descriptor: Option<File>,
    input: Vec<u8>,
    output: Vec<u8>,
}

/// What becomes of a client.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Stays,
    Goes,
    /// It becomes a terminal.
    Attaches,
}

impl Server {
    /// Serves whoever connects to `listener`, on `reactor`.
    pub fn start(
        listener: UnixListener,
        commanded: Box<dyn Commanded>,
        reactor: &Reactor,
    ) -> io::Result<Arc<Mutex<Self>>> {
        listener.set_nonblocking(true)?;
        let fd = listener.as_raw_fd();
        let server =
            Self { listener, registration: None, clients: HashMap::new(), last: LISTENER, commanded };
        let server = Arc::new(Mutex::new(server));
        let registration = reactor.register(server.clone());
        {
            // Locked, so that a client which waits already is not met before there is a registration to watch it.
            let mut server = server.lock().unwrap_or_else(PoisonError::into_inner);
            registration.watch(fd, LISTENER, EventSet::IN)?;
            server.registration = Some(registration);
        }
        Ok(server)
    }

    /// Tells all clients of something.
    pub fn announce(&mut self, event: Event) {
        let tokens: Vec<u32> = self.clients.keys().copied().collect();
        for token in tokens {
            self.send(token, &event);
        }
    }

    fn accept(&mut self) {
        // One at a time: the listener stays ready while more wait.
        let Ok((stream, _)) = self.listener.accept() else { return };
        if self.clients.len() >= MAX_CLIENTS || stream.set_nonblocking(true).is_err() {
            return;
        }
        self.last = self.last.checked_add(1).unwrap_or(LISTENER + 1);
        let token = self.last;
        let watched =
            self.registration.as_ref().map(|own| own.watch(stream.as_raw_fd(), token, EventSet::IN));
        if matches!(watched, Some(Ok(()))) {
            self.clients
                .insert(token, Client { stream, descriptor: None, input: Vec::new(), output: Vec::new() });
        }
    }

    /// Reads what a client sent and obeys every whole line of it.
    fn read(&mut self, token: u32) -> Fate {
        let Some(client) = self.clients.get_mut(&token) else { return Fate::Stays };
        let mut chunk = [0; MAX_LINE];
        let got = match client.stream.recv_with_fd(&mut chunk) {
            Ok((0, _)) => return Fate::Goes,
            Ok((got, descriptor)) => {
                // The one that came last is the next request's.
                client.descriptor = descriptor.or(client.descriptor.take());
                got
            }
            Err(error) if matches!(error.errno(), libc::EAGAIN | libc::EINTR) => return Fate::Stays,
            Err(_) => return Fate::Goes,
        };
        client.input.extend_from_slice(&chunk[..got]);
        loop {
            let Some(client) = self.clients.get_mut(&token) else { return Fate::Stays };
            let Some(end) = client.input.iter().position(|&byte| byte == b'\n') else {
                if client.input.len() < MAX_LINE {
                    return Fate::Stays;
                }
                let error = format!("A request is longer than {MAX_LINE} bytes");
                self.send(token, &Reply { id: 0, outcome: Outcome::Error(error) });
                return Fate::Goes;
            };
            let line: Vec<u8> = client.input.drain(..=end).collect();
            match self.obey(token, &line) {
                Fate::Stays => {}
                fate => return fate,
            }
        }
    }

    fn obey(&mut self, token: u32, line: &[u8]) -> Fate {
        let Request { id, command } = match serde_json::from_slice(line) {
            Ok(request) => request,
            Err(error) => {
                let error = format!("This is no request: {error}");
                self.send(token, &Reply { id: 0, outcome: Outcome::Error(error) });
                return Fate::Goes;
            }
        };
        let result = match command {
            Command::AttachConsole => self.commanded.can_attach().map(|()| Answer::Done),
            Command::Quit => Ok(Answer::Done),
            command => {
                let descriptor = self.clients.get_mut(&token).and_then(|client| client.descriptor.take());
                self.commanded.command(command, descriptor)
            }
        };
        let done = result.is_ok();
        let outcome = result.map_or_else(Outcome::Error, Outcome::Ok);
        self.send(token, &Reply { id, outcome });
        match command {
            Command::AttachConsole if done => return Fate::Attaches,
            Command::Quit => self.commanded.quit(),
            _ => {}
        }
        Fate::Stays
    }

    fn send(&mut self, token: u32, message: &impl serde::Serialize) {
        let Some(client) = self.clients.get_mut(&token) else { return };
        if client.output.len() > MAX_UNREAD {
            self.remove(token);
            return;
        }
        let Ok(mut line) = serde_json::to_vec(message) else { return };
        line.push(b'\n');
        client.output.extend_from_slice(&line);
        if self.flush(token) == Fate::Goes {
            self.remove(token);
        }
    }

    /// Writes what can be written now; watches for the rest.
    fn flush(&mut self, token: u32) -> Fate {
        let Some(client) = self.clients.get_mut(&token) else { return Fate::Stays };
        while !client.output.is_empty() {
            match client.stream.write(&client.output) {
                Ok(0) => return Fate::Goes,
                Ok(sent) => drop(client.output.drain(..sent)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return Fate::Goes,
            }
        }
        let events = if client.output.is_empty() { EventSet::IN } else { EventSet::IN | EventSet::OUT };
        let changed =
            self.registration.as_ref().map(|own| own.change(client.stream.as_raw_fd(), token, events));
        if matches!(changed, Some(Err(_))) { Fate::Goes } else { Fate::Stays }
    }

    fn remove(&mut self, token: u32) -> Option<Client> {
        let client = self.clients.remove(&token)?;
        if let Some(own) = &self.registration {
            // Closing it would do as well.
            let _ = own.unwatch(client.stream.as_raw_fd());
        }
        Some(client)
    }
}

impl EventHandler for Server {
    fn ready(&mut self, token: u32, events: EventSet) {
        if token == LISTENER {
            return self.accept();
        }
        let mut fate = Fate::Stays;
        if events.contains(EventSet::OUT) {
            fate = self.flush(token);
        }
        if fate == Fate::Stays && events.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::ERROR) {
            fate = self.read(token);
        }
        match fate {
            Fate::Stays => {}
            Fate::Goes => drop(self.remove(token)),
            Fate::Attaches => {
                if let Some(client) = self.remove(token)
                    && let Err(why) = self.commanded.attach_console(client.stream)
                {
                    eprintln!("catalyst-vmm: a console was not attached: {why}");
                }
            }
        }
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("clients", &self.clients.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
