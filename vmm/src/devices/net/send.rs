//! The send queue: each chain is one frame behind its header, and one writev.

use std::io;
use std::os::fd::AsRawFd;

use super::frame::{Direction, Pieces};
use super::tap::Tap;
use super::{ANNOUNCE_BYTES, BUDGET, HEADER};
use crate::virtio::queue::Chain;
use crate::virtio::{Counters, QueueError, Virtqueue};

/// The device's side of the send queue.
#[derive(Debug)]
pub(super) struct Sender {
    pub(super) queue: Virtqueue,
    pieces: Pieces,
    counters: Counters,
    /// The tap took no more; it says when it does.
    waits_for_tap: bool,
}

/// What became of a frame.
enum Sent {
    /// It is gone, or thrown away.
    Done,
    /// The tap has no room now.
    NoRoom,
}

impl Sender {
    pub(super) fn new(queue: Virtqueue, counters: Counters) -> Self {
        let pieces = Pieces::new(std::sync::Arc::clone(queue.memory()));
        Self { queue, pieces, counters, waits_for_tap: false }
    }

    /// Whether frames wait for room in the tap.
    pub(super) fn waits_for_tap(&self) -> bool {
        self.waits_for_tap
    }

    /// Sends what the driver offers, [`BUDGET`] frames at most; true if there may be more. Without a link the frames
    /// are taken and thrown away.
    pub(super) fn run(&mut self, tap: &Tap, link_up: bool) -> Result<bool, QueueError> {
        self.waits_for_tap = false;
        self.queue.disable_kicks()?;
        let mut unannounced = 0;
        for _ in 0..BUDGET {
            let Some(chain) = self.queue.pop()? else {
                if self.queue.enable_kicks()? {
                    self.queue.disable_kicks()?;
                    continue;
                }
                self.queue.notify()?;
                return Ok(false);
            };
            let head = chain.head_index();
            let (sent, bytes) = self.send(chain, tap, link_up);
            if let Sent::NoRoom = sent {
                self.queue.undo_pop();
                self.waits_for_tap = true;
                self.queue.notify()?;
                return Ok(false);
            }
            self.queue.push(head, 0)?;
            unannounced += bytes;
            if unannounced >= ANNOUNCE_BYTES {
                self.queue.notify()?;
                unannounced = 0;
            }
        }
        self.queue.notify()?;
        Ok(true)
    }

    fn send(&mut self, chain: Chain, tap: &Tap, link_up: bool) -> (Sent, usize) {
        self.pieces.clear();
        let Ok(added) = self.pieces.add(chain, Direction::FromGuest) else {
            self.counters.failed();
            return (Sent::Done, 0);
        };
        if link_up {
            match self.pieces.write_to(tap.as_raw_fd()) {
                Ok(_) => self.counters.written(added.bytes - HEADER),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return (Sent::NoRoom, 0),
                // A header that makes no sense (EINVAL), an interface that is down (EIO) or gone (EBADFD), no memory:
                // a wire loses frames too.
                Err(_) => self.counters.failed(),
            }
        }
        (Sent::Done, added.bytes)
    }
}
