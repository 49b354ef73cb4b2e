//! What the reactor's thread does with the queues.

use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use fuse_backend_rs::api::server::Server;
use virtio_queue::QueueState;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::files::Files;
use super::request;
use crate::reactor::EventHandler;
use crate::virtio::{Counters, QueueError, Virtqueue};

/// Most messages of a queue that are answered before others get their turn on the thread.
const BATCH: usize = 64;
/// The token of [`Worker::again`]; the others are the queues' numbers.
pub(super) const AGAIN: u32 = 2;

/// Answers what comes on the queues.
pub(super) struct Worker {
    server: Server<Arc<Files>>,
    /// Empty once the device was reset: a call that was under way then finds nothing to do.
    queues: Vec<Virtqueue>,
    /// Written when a queue has more than a batch.
    again: EventFd,
    counters: Counters,
}

impl Worker {
    pub(super) fn new(files: Arc<Files>, queues: Vec<Virtqueue>, again: EventFd, counters: Counters) -> Self {
        Self { server: Server::new(files), queues, again, counters }
    }

    /// The descriptors that must be watched, with their tokens.
    pub(super) fn watched(&self) -> Vec<(i32, u32)> {
        let queues = self.queues.iter().zip(0..).map(|(queue, token)| (queue.kick_fd(), token));
        queues.chain([(self.again.as_raw_fd(), AGAIN)]).collect()
    }

    /// Gives the queues up.
    pub(super) fn stop(&mut self) {
        self.queues.clear();
    }

    pub(super) fn queue_states(&self) -> Vec<QueueState> {
        self.queues.iter().map(Virtqueue::state).collect()
    }

    /// Answers a batch; true if there may be more.
    fn serve(&mut self, index: usize) -> Result<bool, QueueError> {
        let queue = &mut self.queues[index];
        let mut left = BATCH;
        loop {
            queue.disable_kicks()?;
            while left > 0 {
                let Some(chain) = queue.pop()? else { break };
                let (written, good) = request::answer(&self.server, queue.memory(), &chain);
                if !good {
                    self.counters.failed();
                }
                queue.push(chain.head_index(), written)?;
                left -= 1;
            }
            if left == 0 || !queue.enable_kicks()? {
                queue.notify()?;
                return Ok(left == 0);
            }
        }
    }
}

impl EventHandler for Worker {
    fn ready(&mut self, token: u32, _: EventSet) {
        let of_queue = token as usize;
        if token == AGAIN {
            let _ = self.again.read();
        } else if let Some(queue) = self.queues.get(of_queue) {
            queue.take_kick();
        }
        for index in 0..self.queues.len() {
            if !self.queues[index].is_usable() || (token != AGAIN && index != of_queue) {
                continue;
            }
            match self.serve(index) {
                Ok(false) => {}
                // The counter is far from full.
                Ok(true) => drop(self.again.write(1)),
                Err(error) => {
                    self.queues[index].give_up(&error);
                    return self.stop();
                }
            }
        }
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("queues", &self.queues).finish_non_exhaustive()
    }
}
