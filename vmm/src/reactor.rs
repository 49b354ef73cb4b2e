//! A thread that waits for descriptors and calls the handlers that wait on them (epoll(7)).
//!
//! A handler is called with its lock held and the reactor's gate open. [`Reactor::pause`] closes the gate: it
//! returns when no handler runs, and none will until [`Reactor::resume`]. So what handlers own can be saved whole.

use std::collections::HashMap;
use std::fmt::Debug;
use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Events taken from the kernel at once.
const BATCH: usize = 32;
/// The handler's number is above these bits of an event's data, its own token in them.
const TOKEN_BITS: u32 = 32;
/// The reactor's own descriptor.
const WAKE: u64 = u64::MAX;

/// Called when a descriptor that it watches is ready.
pub trait EventHandler: Send + Debug {
    /// `token` is the one that the descriptor is watched with. What is ready may have been used up meanwhile:
    /// reading must not block.
    fn ready(&mut self, token: u32, events: EventSet);
}

type Handler = Arc<Mutex<dyn EventHandler>>;

/// A thread of handlers. Dropping it ends the thread.
#[derive(Debug)]
pub struct Reactor {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    epoll: Epoll,
    handlers: Mutex<Handlers>,
    gate: Gate,
    wake: EventFd,
}

#[derive(Debug, Default)]
struct Handlers {
    last: u32,
    by_number: HashMap<u32, Handler>,
}

impl Reactor {
    /// Starts the thread `name` (at most 15 bytes are seen). It calls `begin` first, which is where it gets its
    /// system call filter.
    pub fn spawn(name: &str, begin: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            epoll: Epoll::new()?,
            handlers: Mutex::default(),
            gate: Gate::default(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let wake = EpollEvent::new(EventSet::IN, WAKE);
        shared.epoll.ctl(ControlOperation::Add, std::os::fd::AsRawFd::as_raw_fd(&shared.wake), wake)?;
        let own = Arc::clone(&shared);
        // Handlers keep little on the stack; untouched pages of it cost nothing anyway.
        let thread =
            std::thread::Builder::new().name(name.to_owned()).stack_size(256 << 10).spawn(move || {
                begin();
                own.run();
            })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Adds a handler. It is called for what its [`Registration`] watches, until that is dropped.
    pub fn register(&self, handler: Handler) -> Registration {
        let mut handlers = lock(&self.shared.handlers);
        handlers.last += 1;
        let number = handlers.last;
        handlers.by_number.insert(number, handler);
        Registration { shared: Arc::clone(&self.shared), number }
    }

    /// Returns when no handler runs; none will before [`Reactor::resume`].
    pub fn pause(&self) {
        self.shared.gate.close();
    }

    /// Lets handlers run again.
    pub fn resume(&self) {
        self.shared.gate.open();
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        self.shared.gate.end();
        // A full counter has woken it as well.
        let _ = self.shared.wake.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self) {
        let mut events = [EpollEvent::default(); BATCH];
        loop {
            let ready = match self.epoll.wait(-1, &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                // Only a descriptor that is none gives another error, and then nothing can be waited for.
                Err(error) => {
                    return eprintln!("catalyst-vmm: a thread of devices ended: epoll_wait: {error}");
                }
            };
            if !self.gate.enter() {
                return;
            }
            for event in &events[..ready] {
                self.dispatch(event);
            }
            self.gate.leave();
        }
    }

    fn dispatch(&self, event: &EpollEvent) {
        let data = event.data();
        let number = u32::try_from(data >> TOKEN_BITS).unwrap_or(u32::MAX);
        // An event of a handler that has gone meanwhile finds nobody.
        let Some(handler) = lock(&self.handlers).by_number.get(&number).map(Arc::clone) else { return };
        #[expect(clippy::cast_possible_truncation, reason = "the token is the lower half")]
        lock(&handler).ready(data as u32, event.event_set());
    }
}

/// A handler's place in a reactor. Dropped, the handler is not called any more; do not drop it while holding the
/// handler's lock on another thread than the reactor's.
#[derive(Debug)]
pub struct Registration {
    shared: Arc<Shared>,
    number: u32,
}

impl Registration {
    /// Watches `fd`. It must be unwatched before it is closed, unless nobody else has it open.
    pub fn watch(&self, fd: RawFd, token: u32, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Add, fd, token, events)
    }

    /// Changes what `fd` is watched for.
    pub fn change(&self, fd: RawFd, token: u32, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd, token, events)
    }

    /// Watches `fd` no more.
    pub fn unwatch(&self, fd: RawFd) -> io::Result<()> {
        self.control(ControlOperation::Delete, fd, 0, EventSet::empty())
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        token: u32,
        events: EventSet,
    ) -> io::Result<()> {
        let data = u64::from(self.number) << TOKEN_BITS | u64::from(token);
        self.shared.epoll.ctl(operation, fd, EpollEvent::new(events, data))
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        lock(&self.shared.handlers).by_number.remove(&self.number);
    }
}

/// What a reactor's thread passes before it calls handlers.
#[derive(Debug, Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    closed: bool,
    inside: bool,
    ended: bool,
}

impl Gate {
    /// Waits until the gate is open; false if the reactor is to end.
    fn enter(&self) -> bool {
        let state = lock(&self.state);
        let mut state = self
            .changed
            .wait_while(state, |state| state.closed && !state.ended)
            .unwrap_or_else(PoisonError::into_inner);
        state.inside = true;
        !state.ended
    }

    fn leave(&self) {
        let mut state = lock(&self.state);
        state.inside = false;
        let awaited = state.closed;
        drop(state);
        // Telling nobody would be a system call too, for each round of events.
        if awaited {
            self.changed.notify_all();
        }
    }

    fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        drop(self.changed.wait_while(state, |state| state.inside));
    }

    fn open(&self) {
        lock(&self.state).closed = false;
        self.changed.notify_all();
    }

    fn end(&self) {
        lock(&self.state).ended = true;
        self.changed.notify_all();
    }
}

/// A panic ends the monitor's process (see `main`), so no lock is ever found poisoned there.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[derive(Debug)]
    struct Teller {
        event: EventFd,
        told: mpsc::Sender<u32>,
    }

    impl EventHandler for Teller {
        fn ready(&mut self, token: u32, _: EventSet) {
            self.event.read().unwrap();
            self.told.send(token).unwrap();
        }
    }

    fn teller(reactor: &Reactor) -> (EventFd, mpsc::Receiver<u32>, Registration) {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let (told, heard) = mpsc::channel();
        let handler = Teller { event: event.try_clone().unwrap(), told };
        let registration = reactor.register(Arc::new(Mutex::new(handler)));
        registration.watch(event.as_raw_fd(), 7, EventSet::IN).unwrap();
        (event, heard, registration)
    }

    const SOON: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(10);

    #[test]
    fn a_ready_descriptor_calls_its_handler_with_its_token() {
        let reactor = Reactor::spawn("test", || ()).unwrap();
        let (event, heard, _registration) = teller(&reactor);
        event.write(1).unwrap();
        assert_eq!(heard.recv_timeout(LONG), Ok(7));
    }

    #[test]
    fn no_handler_runs_while_paused_and_nothing_is_lost() {
        let reactor = Reactor::spawn("test", || ()).unwrap();
        let (event, heard, _registration) = teller(&reactor);
        reactor.pause();
        event.write(1).unwrap();
        assert!(heard.recv_timeout(SOON).is_err());
        reactor.resume();
        assert_eq!(heard.recv_timeout(LONG), Ok(7));
    }

    #[test]
    fn a_dropped_registration_is_not_called_and_a_paused_reactor_can_be_dropped() {
        let reactor = Reactor::spawn("test", || ()).unwrap();
        let (event, heard, registration) = teller(&reactor);
        registration.unwatch(event.as_raw_fd()).unwrap();
        drop(registration);
        event.write(1).unwrap();
        assert!(heard.recv_timeout(SOON).is_err());
        reactor.pause();
        drop(reactor);
    }
}
