//! The host's end of a console or a port: a socket that one client at a time connects to, and a log.
//!
//! It stands in the reactor of the device that owns it: [`Console::begin`] takes two tokens, one for the listener and
//! the next for the client, and the device hands their events back. While a client is connected the listener is not
//! watched: the next client waits in the backlog, as it does with QEMU's character devices. A client that has gone
//! keeps its place until what it sent has been read, or until the next one comes.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use crate::reactor::Registration;

/// Tokens that a console takes.
pub const TOKENS: u32 = 2;
/// Bytes that wait for a client that does not read; what comes on top is dropped.
const MOST_WAITING: usize = 256 << 10;

/// The host's end of a console or a port.
#[derive(Debug, Default)]
pub struct Console {
    listener: Option<UnixListener>,
    log: Option<File>,
    log_failed: bool,
    client: Option<Client>,
    waiting: VecDeque<u8>,
    wants: Wants,
    place: Option<Place>,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    /// It has closed both directions, and is not watched any more.
    gone: bool,
    watched: EventSet,
}

/// What the owner can use of the client now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wants {
    /// Bytes from it.
    pub input: bool,
    /// Room for bytes to it.
    pub room: bool,
}

#[derive(Debug)]
struct Place {
    registration: Arc<Registration>,
    token: u32,
}

/// What was read from a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// So many bytes, at least one.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// There is no client (any more).
    Gone,
}

/// Why a client was not attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Another one is connected.
    #[error("The console has a client already; let it disconnect first")]
    Taken,
    /// The VM has no such console.
    #[error("The machine has no such console")]
    None,
    /// Its socket cannot be used.
    #[error("Cannot attach the client to the console")]
    Io(#[from] io::Error),
}

impl Console {
    /// A console with the ways out that it was given; none are needed.
    pub fn new(listener: Option<UnixListener>, log: Option<File>) -> Self {
        Self { listener, log, ..Self::default() }
    }

    /// Begins to accept clients. The owner gets the events of the listener with `token`, those of the client with the
    /// next one.
    pub fn begin(&mut self, registration: &Arc<Registration>, token: u32) -> io::Result<()> {
        self.place = Some(Place { registration: Arc::clone(registration), token });
        if let Some(listener) = &self.listener {
            listener.set_nonblocking(true)?;
            registration.watch(listener.as_raw_fd(), token, EventSet::IN)?;
        }
        Ok(())
    }

    /// Leaves the reactor, so that it and the owner can go.
    pub fn end(&mut self) {
        self.close();
        if let (Some(place), Some(listener)) = (self.place.take(), &self.listener) {
            // It fails only where nothing is watched.
            let _ = place.registration.unwatch(listener.as_raw_fd());
        }
    }

    /// The listener is ready: takes the next client, in the place of one that has gone. True if there is a new one.
    pub fn accept(&mut self) -> bool {
        // The event may be older than a client that came another way: who waits must not be lost.
        if self.client.as_ref().is_some_and(|client| !client.gone) {
            return false;
        }
        let Some(Ok((stream, _))) = self.listener.as_ref().map(UnixListener::accept) else { return false };
        self.take(stream).inspect_err(|error| eprintln!("catalyst-vmm: a console's client: {error}")).is_ok()
    }

    /// Gives the console a client that came by another way.
    pub fn attach(&mut self, stream: UnixStream) -> Result<(), AttachError> {
        if self.client.as_ref().is_some_and(|client| !client.gone) {
            return Err(AttachError::Taken);
        }
        Ok(self.take(stream)?)
    }

    fn take(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        self.close();
        let Some(place) = &self.place else { return Ok(()) };
        let watched = self.wants.events();
        place.registration.watch(stream.as_raw_fd(), place.token + 1, watched)?;
        if let Some(listener) = &self.listener {
            place.registration.change(listener.as_raw_fd(), place.token, EventSet::empty())?;
        }
        self.client = Some(Client { stream, gone: false, watched });
        Ok(())
    }

    /// Lets the client go, and the next one come.
    pub fn close(&mut self) {
        self.waiting.clear();
        let Some(client) = self.client.take() else { return };
        if let (Some(place), false) = (&self.place, client.gone) {
            // It was watched; and if the listener cannot be, no client will come, which is all that is lost.
            let _ = place.registration.unwatch(client.stream.as_raw_fd());
            let _ = self.watch_listener();
        }
    }

    fn watch_listener(&self) -> io::Result<()> {
        match (&self.place, &self.listener) {
            (Some(place), Some(listener)) => {
                place.registration.change(listener.as_raw_fd(), place.token, EventSet::IN)
            }
            _ => Ok(()),
        }
    }

    /// The client is ready: writes what waits for it, and sees whether it has gone.
    pub fn client_ready(&mut self, events: EventSet) {
        self.write_waiting();
        let Some(client) = &mut self.client else { return };
        let told = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        // The event may be that of the client before, closed on another thread meanwhile.
        if told && !client.gone && has_hung_up(&client.stream) {
            // Watched further it would be reported without end.
            client.gone = true;
            if let Some(place) = &self.place {
                let _ = place.registration.unwatch(client.stream.as_raw_fd());
            }
            let _ = self.watch_listener();
        }
    }

    /// Says what of the client can be used now.
    pub fn want(&mut self, wants: Wants) {
        self.wants = wants;
        self.rewatch();
    }

    fn rewatch(&mut self) {
        let waiting = !self.waiting.is_empty();
        let events = Wants { room: self.wants.room || waiting, ..self.wants }.events();
        let (Some(place), Some(client)) = (&self.place, &mut self.client) else { return };
        if client.watched != events && !client.gone {
            client.watched = events;
            // It is watched, so this does not fail.
            let _ = place.registration.change(client.stream.as_raw_fd(), place.token + 1, events);
        }
    }

    /// Whether there is a client, or what it left behind.
    pub fn is_connected(&self) -> bool {
        self.client.is_some()
    }

    /// Whether the client has gone and left something behind at most.
    pub fn is_left(&self) -> bool {
        self.client.as_ref().is_some_and(|client| client.gone)
    }

    /// The client's descriptor, for reading and writing without a copy.
    pub fn client_fd(&self) -> Option<RawFd> {
        self.client.as_ref().map(|client| client.stream.as_raw_fd())
    }

    /// Reads from the client; one that has ended is closed.
    pub fn read(&mut self, buffer: &mut [u8]) -> Input {
        let Some(client) = &mut self.client else { return Input::Gone };
        match client.stream.read(buffer) {
            Ok(count) if count > 0 => Input::Bytes(count),
            Err(error) if is_later(&error) => Input::Nothing,
            _ => {
                self.close();
                Input::Gone
            }
        }
    }

    /// Writes to the log and to the client. It does not wait for the client: what it does not read is dropped.
    pub fn write(&mut self, bytes: &[u8]) {
        self.write_log(bytes);
        let Some(client) = self.client.as_mut().filter(|client| !client.gone) else { return };
        let mut rest = bytes;
        if self.waiting.is_empty() {
            match client.stream.write(bytes) {
                Ok(count) => rest = &bytes[count..],
                Err(error) if is_later(&error) => {}
                // The reactor tells that it has gone.
                Err(_) => return,
            }
        }
        let room = MOST_WAITING - self.waiting.len();
        self.waiting.extend(&rest[..rest.len().min(room)]);
        if !rest.is_empty() {
            self.rewatch();
        }
    }

    fn write_log(&mut self, bytes: &[u8]) {
        let Some(log) = &mut self.log else { return };
        let written = log.write_all(bytes);
        if let (Err(error), false) = (&written, self.log_failed) {
            eprintln!("catalyst-vmm: cannot write a console's log, it has gaps: {error}");
        }
        self.log_failed = written.is_err();
    }

    fn write_waiting(&mut self) {
        let Some(client) = &mut self.client else { return };
        while !self.waiting.is_empty() {
            match client.stream.write(self.waiting.as_slices().0) {
                Ok(count) => drop(self.waiting.drain(..count)),
                Err(error) if is_later(&error) => break,
                Err(_) => self.waiting.clear(),
            }
        }
        self.rewatch();
    }
}

impl Wants {
    fn events(self) -> EventSet {
        let mut events = EventSet::empty();
        events.set(EventSet::IN, self.input);
        events.set(EventSet::OUT, self.room);
        events
    }
}

fn has_hung_up(stream: &UnixStream) -> bool {
    let mut poll = libc::pollfd { fd: stream.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: the one entry is valid for the call, which does not wait.
    unsafe { libc::poll(&raw mut poll, 1, 0) > 0 }
}

/// Whether it was only not the time for it.
pub(crate) fn is_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;
    use std::sync::Mutex;

    use super::*;
    use crate::reactor::{EventHandler, Reactor};

    /// A listening socket, and how to connect to it.
    pub fn listener() -> (tempfile::TempDir, UnixListener) {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        (folder, listener)
    }

    /// Connects to it; reads wait for ten seconds at most.
    pub fn connect(folder: &Path) -> UnixStream {
        let client = UnixStream::connect(folder.join("s")).unwrap();
        client.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
        client
    }

    #[derive(Debug)]
    struct Owner(Console, std::sync::mpsc::Sender<Vec<u8>>);

    impl EventHandler for Owner {
        fn ready(&mut self, token: u32, events: EventSet) {
            if token == 4 {
                self.0.accept();
                return;
            }
            let mut buffer = [0; 64];
            while let Input::Bytes(count) = self.0.read(&mut buffer) {
                self.1.send(buffer[..count].to_vec()).unwrap();
            }
            self.0.client_ready(events);
        }
    }

    const LONG: std::time::Duration = std::time::Duration::from_secs(10);

    #[test]
    fn the_second_client_waits_until_the_first_has_gone_and_a_third_way_is_refused() {
        let (folder, listener) = listener();
        let reactor = Reactor::spawn("test", || ()).unwrap();
        let (told, heard) = std::sync::mpsc::channel();
        let mut console = Console::new(Some(listener), None);
        console.want(Wants { input: true, room: false });
        let owner = Arc::new(Mutex::new(Owner(console, told)));
        let registration = Arc::new(reactor.register(owner.clone()));
        owner.lock().unwrap().0.begin(&registration, 4).unwrap();
        let mut first = connect(folder.path());
        first.write_all(b"one").unwrap();
        assert_eq!(heard.recv_timeout(LONG).unwrap(), b"one");
        let mut second = connect(folder.path());
        second.write_all(b"two").unwrap();
        assert!(heard.recv_timeout(std::time::Duration::from_millis(50)).is_err());
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(matches!(owner.lock().unwrap().0.attach(ours), Err(AttachError::Taken)));
        drop(first);
        assert_eq!(heard.recv_timeout(LONG).unwrap(), b"two");
        owner.lock().unwrap().0.end();
    }

    #[test]
    fn a_client_that_does_not_read_loses_output_and_the_log_loses_none() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let reactor = Reactor::spawn("test", || ()).unwrap();
        let log = File::options().append(true).open(file.path()).unwrap();
        let owner = Arc::new(Mutex::new(Owner(Console::new(None, Some(log)), std::sync::mpsc::channel().0)));
        let registration = Arc::new(reactor.register(owner.clone()));
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        {
            let console = &mut owner.lock().unwrap().0;
            console.begin(&registration, 4).unwrap();
            console.attach(ours).unwrap();
            for _ in 0..4096 {
                console.write(&[b'x'; 1024]);
            }
        }
        assert_eq!(file.as_file().metadata().unwrap().len(), 4 << 20);
        theirs.set_read_timeout(Some(std::time::Duration::from_millis(200))).unwrap();
        let (mut read, mut buffer) = (0, vec![0; 1 << 16]);
        while let Ok(count @ 1..) = theirs.read(&mut buffer) {
            read += count;
        }
        assert!((MOST_WAITING..4 << 20).contains(&read), "{read}");
        // It reads again, so it gets what comes now.
        owner.lock().unwrap().0.write(b"y");
        assert_eq!(theirs.read(&mut buffer).unwrap(), 1);
        owner.lock().unwrap().0.end();
    }
}
