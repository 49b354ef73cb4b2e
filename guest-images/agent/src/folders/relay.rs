//! Between the kernel's FUSE device and the port.
//!
//! ```text
//! kernel ── /dev/fuse ──► reader of this session ──► line ──► writer ──► port
//!        ◄────────────── reader of the port ◄──────────────────────────
//! ```
//! The line (protocol) keeps what the host has not confirmed. When the host's side greets with our session, it goes on from where
//! it was; when it does not know it, all that programs have open is lost: the file system is mounted anew.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use catalyst_agent_protocol::{Channel, Frame, Line, LineControl, MAX_PAYLOAD, encode};

use super::mounts;
use crate::identity::random;
use crate::port::{Event, Port};

/// No more is asked while so many messages are not confirmed.
const MOST_OUT: usize = 256;

/// Passes messages on.
pub struct Relay {
    state: Mutex<State>,
    changed: Condvar,
    out: Sender<Vec<u8>>,
    /// Programs with set-uid and devices are what they are.
    trusted: bool,
    /// Called when the file system was mounted anew.
    again: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct State {
    session: u64,
    line: Line,
    epoch: u32,
    /// Whether the host's side is there and knows the session.
    greeted: bool,
    fuse: Option<Arc<File>>,
}

impl std::fmt::Debug for Relay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Relay").finish_non_exhaustive()
    }
}

impl Relay {
    /// Opens the port and begins. `again` is called when the file system was mounted, and each time that it was anew.
    pub fn begin(
        path: &Path,
        trusted: bool,
        again: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<Arc<Self>> {
        let mut port = Port::open(path)?;
        let writer = port.writer()?;
        let (out, queue) = channel();
        thread::spawn(move || write_out(writer, &queue));
        let state = Mutex::default();
        let relay = Arc::new(Self { state, changed: Condvar::new(), out, trusted, again: Box::new(again) });
        if !trusted {
            // The host's side may have greeted an agent that is no more. A container's has no other than this.
            relay.tell(0, LineControl::Hello { session: 0, received: 0 });
        }
        let reader = Arc::clone(&relay);
        thread::spawn(move || {
            if let Err(error) = port.read(|event| reader.handle(event)) {
                eprintln!("catalyst-agent: the port for folders failed: {error}");
            }
        });
        Ok(relay)
    }

    /// Begins a session before the host's side greets, which goes on with it; its number.
    pub fn mount(self: &Arc<Self>) -> io::Result<u64> {
        let mut state = self.lock();
        if state.session == 0 {
            self.begin_session(&mut state)?;
        }
        Ok(state.session)
    }

    /// The session's number, if there is one.
    pub fn mounted(&self) -> Option<u64> {
        Some(self.lock().session).filter(|session| *session != 0)
    }

    /// Waits until the file system is mounted and the host's side there; false if that takes too long.
    pub fn wait(&self, limit: Duration) -> bool {
        let state = self.lock();
        let waited = self.changed.wait_timeout_while(state, limit, |state| !state.greeted);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.greeted
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, bytes: Vec<u8>) {
        // The writer lives as long as the port.
        let _ = self.out.send(bytes);
    }

    fn tell(&self, epoch: u32, control: LineControl) {
        self.send(encode(epoch, 0, Channel::Control, &control.to_bytes()).unwrap_or_default());
    }

    fn handle(self: &Arc<Self>, event: Event) {
        match event {
            Event::HostGone => self.lock().greeted = false,
            Event::Frame(frame) if frame.channel == Channel::Control => self.control(&frame),
            Event::Frame(frame) if frame.channel == Channel::Input => self.answer(frame),
            Event::Frame(_) => {}
        }
    }

    fn control(self: &Arc<Self>, frame: &Frame) {
        let Ok(control) = serde_json::from_slice(&frame.payload) else { return };
        match control {
            LineControl::Hello { session, received } => self.greet(frame.epoch, session, received),
            LineControl::Confirm { received } => {
                let mut state = self.lock();
                if state.greeted && frame.epoch == state.epoch {
                    state.line.confirmed(received);
                    self.changed.notify_all();
                }
            }
        }
    }

    /// Goes on with the session if the host's side knows it, else begins another.
    fn greet(self: &Arc<Self>, epoch: u32, session: u64, received: u32) {
        let mut state = self.lock();
        state.epoch = epoch;
        // It may greet twice before it has heard of us.
        let unheard = session == 0 && state.session != 0 && state.line.received() == 0;
        let known = unheard || (session != 0 && session == state.session && state.line.confirmed(received));
        if !known && let Err(error) = self.begin_session(&mut state) {
            eprintln!("catalyst-agent: the file system of folders cannot be mounted: {error}");
            state.greeted = false;
            return;
        }
        self.tell(epoch, LineControl::Hello { session: state.session, received: state.line.received() });
        self.send(state.line.again(epoch, Channel::Output));
        state.greeted = true;
        drop(state);
        self.changed.notify_all();
        if !known {
            (self.again)();
        }
    }

    fn begin_session(self: &Arc<Self>, state: &mut State) -> io::Result<()> {
        (state.fuse, state.session) = (None, 0);
        mounts::forget_all()?;
        let mut number = [0; 8];
        random::fill(&mut number)?;
        let device = Arc::new(open_fuse()?);
        mounts::mount(&device, self.trusted)?;
        state.session = u64::from_le_bytes(number).max(1);
        state.line = Line::default();
        state.fuse = Some(Arc::clone(&device));
        let (relay, session) = (Arc::clone(self), state.session);
        thread::spawn(move || relay.ask(&device, session));
        Ok(())
    }

    /// Passes on what the kernel asks, until it is unmounted.
    fn ask(&self, device: &File, session: u64) {
        // No longer than a frame takes: messages that gather many are cut by the kernel to what is read.
        let mut buffer = vec![0; MAX_PAYLOAD];
        let mut device = device;
        loop {
            let count = match device.read(&mut buffer) {
                Ok(count) => count,
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return,
                // The program that asked was interrupted.
                Err(_) => continue,
            };
            let mut state = self.lock();
            while state.session == session && state.line.unconfirmed() >= MOST_OUT {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.session != session {
                return;
            }
            let epoch = state.epoch;
            let Ok(frame) = state.line.send(epoch, Channel::Output, buffer[..count].to_vec()) else {
                continue;
            };
            if state.greeted {
                self.send(frame);
            }
        }
    }

    /// Passes an answer to the kernel.
    fn answer(&self, frame: Frame) {
        let mut state = self.lock();
        if !state.greeted || frame.epoch != state.epoch {
            return;
        }
        let Some(message) = state.line.receive(frame) else { return };
        if let Some(confirmation) = state.line.confirmation() {
            self.tell(state.epoch, confirmation);
        }
        let device = state.fuse.clone();
        drop(state);
        if let Some(device) = device {
            // A program that does not wait for it any more, or a file system that was unmounted, wants no answer.
            let _ = (&*device).write(&message);
        }
    }
}

/// Opens the kernel's FUSE device. A guest that is still booting may not have it yet.
fn open_fuse() -> io::Result<File> {
    let open = || OpenOptions::new().read(true).write(true).open("/dev/fuse");
    match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let status = Command::new("modprobe").arg("fuse").status()?;
            if status.success() { open() } else { Err(io::Error::other(format!("modprobe fuse: {status}"))) }
        }
        opened => opened,
    }
}

fn write_out(mut port: File, queue: &Receiver<Vec<u8>>) {
    for bytes in queue {
        if let Err(error) = port.write_all(&bytes) {
            eprintln!("catalyst-agent: the port for folders cannot be written to: {error}");
            return;
        }
    }
}
