//! The receive queue: a frame is read straight into as many of the driver's buffers as it needs.
//!
//! How long a frame is, the tap does not say before it is read. So buffers for the longest are held, and stay held
//! for the next frame if this one needs fewer. Where the driver offers less than that, a buffer of the device's own
//! stands behind them, and what lands there is copied once the driver offers more.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;

use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF};
use virtio_queue::QueueState;

use super::frame::{Added, Direction, MAX_PIECES, Pieces};
use super::tap::Tap;
use super::{ANNOUNCE_BYTES, BUDGET, HEADER, MAX_FRAME};
use crate::virtio::{Counters, QueueError, Virtqueue};

/// Offset of `flags` in the header.
const FLAGS: usize = 0;
/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;

/// The device's side of the receive queue.
#[derive(Debug)]
pub(super) struct Receiver {
    queue: Virtqueue,
    /// Most chains that the driver can offer at once.
    size: usize,
    counters: Counters,
    /// A frame may be spread over several chains (`VIRTIO_NET_F_MRG_RXBUF`).
    mergeable: bool,
    /// The driver takes frames without checksum, so flags mean something to it.
    takes_flags: bool,
    /// The tap may have frames: cleared when it says that it has none.
    tap_ready: bool,
    /// Chains that were popped and not used yet, the oldest first.
    held: VecDeque<Held>,
    /// Bytes of them.
    room: usize,
    /// Pieces of them, in the same order.
    pieces: Pieces,
    /// A frame of which a part lies in `overflow`.
    unfinished: Option<Unfinished>,
    /// What did not fit into chains; empty until it is needed first.
    overflow: Vec<u8>,
    /// Chains of the frame that is given back, as (head, bytes).
    used: Vec<(u16, u32)>,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    head: u16,
    added: Added,
}

#[derive(Clone, Copy, Debug)]
struct Unfinished {
    /// Bytes of the frame, its header with it.
    length: usize,
    /// So many of them are in the held chains already.
    placed: usize,
}

/// What came of a try to receive one frame.
enum Received {
    /// A frame of so many bytes is with the driver, or thrown away.
    Frame(usize),
    /// The driver has no buffers.
    NoBuffers,
    /// The tap has no frames.
    NoFrames,
}

impl Receiver {
    pub(super) fn new(queue: Virtqueue, counters: Counters, features: u64) -> Self {
        let pieces = Pieces::new(std::sync::Arc::clone(queue.memory()));
        Self {
            size: usize::from(queue.state().size),
            queue,
            counters,
            mergeable: features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0,
            takes_flags: features & 1 << VIRTIO_NET_F_GUEST_CSUM != 0,
            tap_ready: false,
            held: VecDeque::new(),
            room: 0,
            pieces,
            unfinished: None,
            overflow: Vec::new(),
            used: Vec::new(),
        }
    }

    pub(super) fn queue(&self) -> &Virtqueue {
        &self.queue
    }

    /// The queue as if the chains that are held had not been popped: whoever goes on from this pops them again.
    pub(super) fn state(&self) -> QueueState {
        let mut state = self.queue.state();
        let held = u16::try_from(self.held.len()).unwrap_or_default();
        state.next_avail = state.next_avail.wrapping_sub(held);
        state
    }

    /// The tap may have frames.
    pub(super) fn tap_is_ready(&mut self) {
        self.tap_ready = true;
    }

    /// Forgets a frame that was received in part, as a link does that goes down.
    pub(super) fn forget_unfinished(&mut self) {
        self.unfinished = None;
    }

    /// Receives [`BUDGET`] frames at most; true if there may be more. False means that the tap or the driver will
    /// tell: the tap when a frame comes, the driver when it has buffers again.
    pub(super) fn run(&mut self, tap: &Tap) -> Result<bool, QueueError> {
        if !self.tap_ready {
            return Ok(false);
        }
        self.queue.disable_kicks()?;
        let mut unannounced = 0;
        for _ in 0..BUDGET {
            match self.receive(tap)? {
                Received::Frame(bytes) => unannounced += bytes,
                Received::NoFrames => {
                    self.tap_ready = false;
                    self.queue.notify()?;
                    return Ok(false);
                }
                Received::NoBuffers => {
                    self.queue.notify()?;
                    if !self.queue.enable_kicks()? {
                        return Ok(false);
                    }
                    self.queue.disable_kicks()?;
                }
            }
            if unannounced >= ANNOUNCE_BYTES {
                self.queue.notify()?;
                unannounced = 0;
            }
        }
        self.queue.notify()?;
        Ok(true)
    }

    fn receive(&mut self, tap: &Tap) -> Result<Received, QueueError> {
        let can_grow = self.hold(self.unfinished.map_or(MAX_FRAME, |frame| frame.length))?;
        if let Some(frame) = self.unfinished {
            return self.finish(frame, can_grow);
        }
        if self.held.is_empty() {
            return Ok(Received::NoBuffers);
        }
        let spare = self.room < MAX_FRAME;
        if spare && self.overflow.is_empty() {
            self.overflow = vec![0; MAX_FRAME];
        }
        let overflow = if spare { self.overflow.as_mut_slice() } else { &mut [] };
        match self.pieces.read_from(tap.as_raw_fd(), overflow) {
            Ok(length) if length > self.room => {
                let frame = Unfinished { length, placed: self.room };
                let can_grow = self.hold(length)?;
                self.finish(frame, can_grow)
            }
            Ok(length) => {
                self.give(length)?;
                Ok(Received::Frame(length))
            }
            Err(error) => {
                // An interface that is gone (EBADFD) or memory that is none: the next event of the tap tries again.
                if error.kind() != io::ErrorKind::WouldBlock {
                    self.counters.failed();
                }
                Ok(Received::NoFrames)
            }
        }
    }

    /// Holds chains for `bytes`, as far as the driver offers them; false if it could offer more in vain, since there
    /// can be no more at once. Without mergeable buffers a frame has one chain.
    fn hold(&mut self, bytes: usize) -> Result<bool, QueueError> {
        // Bad chains do not stay, so the number of tries needs a bound of its own.
        for _ in 0..self.size {
            let enough = if self.mergeable { self.room >= bytes } else { !self.held.is_empty() };
            if enough {
                break;
            }
            if self.held.len() >= self.size {
                return Ok(false);
            }
            let Some(chain) = self.queue.pop()? else { break };
            let head = chain.head_index();
            let Ok(added) = self.pieces.add(chain, Direction::ToGuest) else {
                self.counters.failed();
                self.queue.push(head, 0)?;
                continue;
            };
            if self.pieces.count() > MAX_PIECES {
                self.pieces.remove_last(added.pieces);
                self.queue.undo_pop();
                return Ok(false);
            }
            self.room += added.bytes;
            self.held.push_back(Held { head, added });
        }
        Ok(self.mergeable)
    }

    /// Goes on with a frame that did not fit into the chains that were there.
    fn finish(&mut self, frame: Unfinished, can_grow: bool) -> Result<Received, QueueError> {
        self.unfinished = None;
        if self.mergeable && self.room >= frame.length {
            self.pieces.write_at(frame.placed, &self.overflow[..frame.length - frame.placed]);
            self.give(frame.length)?;
        } else if can_grow {
            self.unfinished = Some(frame);
            return Ok(Received::NoBuffers);
        } else {
            // The driver has no place for such a frame.
            self.counters.failed();
        }
        Ok(Received::Frame(frame.length))
    }

    /// Gives the driver the first chains, which hold a frame of `length` bytes.
    fn give(&mut self, length: usize) -> Result<(), QueueError> {
        self.used.clear();
        let (mut left, mut pieces) = (length, 0);
        while let (Some(&Held { head, added }), true) = (self.held.front(), left > 0) {
            let filled = added.bytes.min(left);
            self.used.push((head, u32::try_from(filled).unwrap_or(u32::MAX)));
            left -= filled;
            pieces += added.pieces;
            self.room -= added.bytes;
            self.held.pop_front();
        }
        let buffers = u16::try_from(self.used.len()).unwrap_or(u16::MAX);
        self.pieces.write_at(NUM_BUFFERS, &buffers.to_le_bytes());
        if !self.takes_flags {
            self.pieces.write_at(FLAGS, &[0]);
        }
        self.pieces.remove_first(pieces);
        self.counters.read(length.saturating_sub(HEADER));
        self.queue.push_all(&self.used)
    }
}
