//! Frames on their way to the host: one bounded queue, one thread that writes it out.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use catalyst_agent_protocol::{Channel, Control, encode};

/// Bytes that may wait before senders of data wait too.
const ROOM: usize = 1024 * 1024;
/// The same for control messages: data may not keep them out, a host that never reads must.
const CONTROL_ROOM: usize = 8 * 1024 * 1024;

/// The queue. It belongs to one epoch; what is of another never enters it.
#[derive(Debug, Default)]
pub struct Outbox {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    epoch: u32,
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
    writing: bool,
}

impl Outbox {
    /// Discards what waits and takes frames of `epoch` alone from now on.
    pub fn begin(&self, epoch: u32) {
        let mut queue = self.lock();
        queue.epoch = epoch;
        queue.frames.clear();
        queue.bytes = 0;
        drop(queue);
        self.changed.notify_all();
    }

    /// Queues a control message; waits when very much waits already. False if the epoch is over.
    pub fn control(&self, epoch: u32, message: &Control) -> bool {
        match serde_json::to_vec(message) {
            Ok(text) => self.push(epoch, 0, Channel::Control, &text, CONTROL_ROOM),
            Err(_) => false,
        }
    }

    /// Queues bytes of a stream; waits while the queue is full. False if the epoch is over.
    pub fn data(&self, epoch: u32, stream: u32, channel: Channel, payload: &[u8]) -> bool {
        self.push(epoch, stream, channel, payload, ROOM)
    }

    fn push(&self, epoch: u32, stream: u32, channel: Channel, payload: &[u8], room: usize) -> bool {
        let Ok(frame) = encode(epoch, stream, channel, payload) else {
            return false;
        };
        let mut queue = self.lock();
        while queue.epoch == epoch && queue.bytes >= room {
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        if queue.epoch != epoch {
            return false;
        }
        queue.bytes += frame.len();
        queue.frames.push_back(frame);
        drop(queue);
        self.changed.notify_all();
        true
    }

    /// Waits until everything is written, at most `limit`.
    pub fn flush(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let mut queue = self.lock();
        while queue.writing || !queue.frames.is_empty() {
            let Some(left) = until.checked_duration_since(Instant::now()) else { return };
            queue = self.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Writes frames as they come, for ever. A frame that cannot be written is lost: the host
    /// finds the next one.
    pub fn write_to(&self, port: &mut impl Write) -> ! {
        let mut queue = self.lock();
        loop {
            let Some(frame) = queue.frames.pop_front() else {
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            queue.bytes -= frame.len();
            queue.writing = true;
            drop(queue);
            self.changed.notify_all();
            if let Err(error) = port.write_all(&frame) {
                eprintln!("catalyst-agent: a frame could not be written to the port: {error}");
            }
            queue = self.lock();
            queue.writing = false;
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
