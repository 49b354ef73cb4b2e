//! What the reactor calls.

use std::io::{self, Read};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::{INFLATE, MOST_PAGES, REPORTING, ROUNDS};
use crate::memory::{self, PAGE};
use crate::reactor::EventHandler;
use crate::virtio::queue::Chain;
use crate::virtio::{Counters, QueueError, Virtqueue};

/// There is more to do.
pub const AGAIN: u32 = 0;
/// First token of the kicks of queues.
pub const KICKS: u32 = 1;

/// The queues while the device is active.
#[derive(Debug)]
pub struct Worker {
    pub queues: Vec<Virtqueue>,
    pub again: EventFd,
    /// A ring made no sense; the device waits for a reset.
    given_up: bool,
    counters: Counters,
}

impl Worker {
    /// It looks at all queues first, since a driver may have offered something before.
    pub fn new(queues: Vec<Virtqueue>, counters: Counters) -> io::Result<Self> {
        let again = crate::virtio::event()?;
        again.write(1)?;
        Ok(Self { queues, again, given_up: false, counters })
    }

    fn serve(&mut self, index: usize) -> Result<(), QueueError> {
        let Some(queue) = self.queues.get_mut(index).filter(|queue| queue.is_usable()) else { return Ok(()) };
        let memory = queue.memory().clone();
        for _ in 0..ROUNDS {
            let Some(chain) = queue.pop()? else {
                if queue.enable_kicks()? {
                    continue;
                }
                return queue.notify();
            };
            let head = chain.head_index();
            match index {
                INFLATE => inflate(chain, &memory, &self.counters),
                REPORTING => report(chain, &memory, &self.counters),
                // The pages are the guest's as soon as it touches them.
                _ => {}
            }
            queue.push(head, 0)?;
        }
        queue.notify()?;
        // Full means that it will be called.
        let _ = self.again.write(1);
        Ok(())
    }
}

/// Gives back pages whose numbers the chain holds, neighbours at once: the kernel's work is a call, not a page.
fn inflate(chain: Chain, memory: &GuestMemoryMmap<()>, counters: &Counters) {
    let Ok(mut reader) = chain.reader::<()>(memory) else { return counters.failed() };
    let mut bytes = [0; 4];
    let mut pages: Vec<u64> = std::iter::from_fn(|| {
        reader.read_exact(&mut bytes).ok().map(|()| u64::from(u32::from_le_bytes(bytes)))
    })
    .take(MOST_PAGES)
    .collect();
    // Linux's balloon gives them in falling order as often as in rising.
    pages.sort_unstable();
    pages.dedup();
    for run in pages.chunk_by(|page, next| page + 1 == *next) {
        discard(memory, run[0] * PAGE, run.len() as u64 * PAGE, counters);
    }
}

/// Gives back the memory that the chain consists of (section 5.5.6.7).
fn report(chain: Chain, memory: &GuestMemoryMmap<()>, counters: &Counters) {
    for descriptor in chain.writable() {
        discard(memory, descriptor.addr().0, u64::from(descriptor.len()), counters);
    }
}

/// Memory that does not go back stays the guest's, which harms nobody.
fn discard(memory: &GuestMemoryMmap<()>, address: u64, length: u64, counters: &Counters) {
    match memory::discard(memory, address, length) {
        Ok(()) => counters.written(usize::try_from(length).unwrap_or(usize::MAX)),
        Err(_) => counters.failed(),
    }
}

impl EventHandler for Worker {
    fn ready(&mut self, token: u32, _: EventSet) {
        let queues = match token.checked_sub(KICKS) {
            None => {
                // It may have been read by an event before.
                let _ = self.again.read();
                INFLATE..=REPORTING
            }
            Some(index) => index as usize..=index as usize,
        };
        for index in queues {
            let Some(queue) = self.queues.get(index) else { continue };
            if token != AGAIN {
                queue.take_kick();
            }
            if self.given_up {
                continue;
            }
            if let Err(error) = self.serve(index) {
                self.queues[index].give_up(&error);
                self.given_up = true;
            }
        }
    }
}
