//! What the reactor's thread does with the queues.
//!
//! All descriptors are watched edge-triggered (epoll(7)): the driver's eventfds need not be read, and a tap whose
//! frames the driver has no buffers for wakes nobody. So everything is used up at each event, or, when the turn of
//! others has come, asked for again by [`Worker::call_again`].

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use virtio_queue::QueueState;
use vmm_sys_util::epoll::EventSet;

use super::receive::Receiver;
use super::send::Sender;
use super::tap::Tap;
use crate::reactor::{EventHandler, Registration};
use crate::virtio::{Counters, QueueError, Virtqueue};

/// The tap has a frame, or room for one.
const TAP: u32 = 0;
/// The driver offers buffers.
const BUFFERS: u32 = 1;
/// The driver offers frames, or there is more to do.
const FRAMES: u32 = 2;

/// An active NIC.
#[derive(Debug)]
pub(super) struct Worker {
    tap: Arc<Tap>,
    receiver: Receiver,
    sender: Sender,
    counters: Counters,
    link_up: bool,
    /// None before it is watched, and after it is stopped.
    registration: Option<Registration>,
    /// The next event on the send queue's eventfd is the device's own.
    called_again: bool,
    /// A ring made no sense; nothing is done any more.
    broken: bool,
}

impl Worker {
    pub(super) fn new(
        tap: Arc<Tap>,
        receive: Virtqueue,
        send: Virtqueue,
        counters: Counters,
        features: u64,
        link_up: bool,
    ) -> Self {
        Self {
            tap,
            receiver: Receiver::new(receive, counters.clone(), features),
            sender: Sender::new(send, counters.clone()),
            counters,
            link_up,
            registration: None,
            called_again: false,
            broken: false,
        }
    }

    /// Begins to wait. What waits already, in the tap or in a queue that was saved, is found at once.
    pub(super) fn start(&mut self, registration: Registration) -> std::io::Result<()> {
        let [tap, buffers, frames] = self.descriptors();
        let edge = EventSet::EDGE_TRIGGERED;
        self.called_again = true;
        let watched = registration
            .watch(tap, TAP, EventSet::IN | EventSet::OUT | edge)
            .and_then(|()| registration.watch(buffers, BUFFERS, EventSet::IN | edge))
            .and_then(|()| registration.watch(frames, FRAMES, again()));
        self.registration = Some(registration);
        watched
    }

    /// Stops for good. The registration is to be dropped when the worker is not locked any more.
    pub(super) fn stop(&mut self) -> Option<Registration> {
        self.broken = true;
        let registration = self.registration.take()?;
        for fd in self.descriptors() {
            // Fails for what was never watched.
            let _ = registration.unwatch(fd);
        }
        Some(registration)
    }

    /// The link goes up or down. What came in while it was down is lost: the caller sees to it.
    pub(super) fn set_link(&mut self, up: bool) {
        self.link_up = up;
        self.receiver.forget_unfinished();
        self.call_again();
    }

    pub(super) fn queue_states(&self) -> Vec<QueueState> {
        vec![self.receiver.state(), self.sender.queue.state()]
    }

    /// Whether frames wait for room in the tap.
    #[cfg(test)]
    pub(super) fn waits_for_tap(&self) -> bool {
        self.sender.waits_for_tap()
    }

    fn descriptors(&self) -> [RawFd; 3] {
        [self.tap.as_raw_fd(), self.receiver.queue().kick_fd(), self.sender.queue.kick_fd()]
    }

    fn receive(&mut self) {
        if !self.link_up || self.broken {
            return;
        }
        match self.receiver.run(&self.tap) {
            Ok(true) => self.call_again(),
            Ok(false) => {}
            Err(error) => self.give_up(&error),
        }
    }

    fn send(&mut self) {
        if self.broken {
            return;
        }
        match self.sender.run(&self.tap, self.link_up) {
            Ok(true) => self.call_again(),
            Ok(false) => {}
            Err(error) => self.give_up(&error),
        }
    }

    fn give_up(&mut self, error: &QueueError) {
        self.broken = true;
        self.sender.queue.give_up(error);
    }

    /// Lets others have their turn, then is called again.
    fn call_again(&mut self) {
        let Some(registration) = &self.registration else { return };
        self.called_again = true;
        if registration.change(self.sender.queue.kick_fd(), FRAMES, again()).is_err() {
            self.counters.failed();
        }
    }
}

/// An eventfd always has room, so that watching it for this, anew or again, makes one event at once. After that it
/// is the driver's writes that make events.
fn again() -> EventSet {
    EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED
}

impl EventHandler for Worker {
    fn ready(&mut self, token: u32, events: EventSet) {
        match token {
            TAP => {
                if self.sender.waits_for_tap() && events.contains(EventSet::OUT) {
                    self.send();
                }
                self.receiver.tap_is_ready();
                self.receive();
            }
            BUFFERS => {
                self.counters.kicked();
                self.receive();
            }
            _ if std::mem::take(&mut self.called_again) => {
                self.send();
                self.receive();
            }
            _ => {
                self.counters.kicked();
                self.send();
            }
        }
    }
}
