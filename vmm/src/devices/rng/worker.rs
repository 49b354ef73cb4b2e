//! What the reactor calls.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::{LEAST_COST, MOST_IN_PERIOD, MOST_OF_CHAIN, PERIOD};
use crate::reactor::EventHandler;
use crate::virtio::{Counters, QueueError, Virtqueue};

pub const KICK: u32 = 0;
pub const TIMER: u32 = 1;

/// The queue, and what of this period is left.
#[derive(Debug)]
pub struct Worker {
    pub queue: Option<Virtqueue>,
    pub timer: TimerFd,
    /// The period's bytes are used up, and the timer runs.
    resting: bool,
    /// The ring made no sense; the device waits for a reset.
    given_up: bool,
    began: Instant,
    left: usize,
    counters: Counters,
}

impl Worker {
    pub fn new(queue: Virtqueue, counters: Counters) -> io::Result<Self> {
        let mut timer = TimerFd::new()?;
        timer.reset(Duration::from_nanos(1), None)?;
        let queue = Some(queue);
        Ok(Self {
            queue,
            timer,
            resting: true,
            given_up: false,
            began: Instant::now(),
            left: MOST_IN_PERIOD,
            counters,
        })
    }

    fn serve(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        if self.began.elapsed() >= PERIOD {
            self.began = Instant::now();
            self.left = MOST_IN_PERIOD;
        }
        let memory = queue.memory().clone();
        while self.left > 0 {
            let Some(chain) = queue.pop()? else {
                if queue.enable_kicks()? {
                    self.left -= LEAST_COST.min(self.left);
                    continue;
                }
                return queue.notify();
            };
            let head = chain.head_index();
            let written = chain.writer::<()>(&memory).map_or(0, |mut writer| {
                let wanted = writer.available_bytes().min(MOST_OF_CHAIN);
                fill(&mut writer, wanted)
            });
            if written == 0 {
                self.counters.failed();
            }
            self.counters.read(written);
            self.left -= written.max(LEAST_COST).min(self.left);
            queue.push(head, u32::try_from(written).unwrap_or(0))?;
        }
        queue.notify()?;
        // Without the timer the next kick serves the rest.
        self.resting = self.timer.reset(PERIOD, None).is_ok();
        Ok(())
    }
}

/// Writes `wanted` random bytes; fewer if the kernel or the memory does not give them.
fn fill(writer: &mut impl Write, wanted: usize) -> usize {
    let mut buffer = [0_u8; 4096];
    let mut written = 0;
    while written < wanted {
        let length = buffer.len().min(wanted - written);
        // SAFETY: the buffer has `length` bytes for the kernel to write.
        let got = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), length, 0) };
        let Some(got @ 1..) = usize::try_from(got).ok() else { break };
        if writer.write_all(&buffer[..got]).is_err() {
            break;
        }
        written += got;
    }
    written
}

impl EventHandler for Worker {
    fn ready(&mut self, token: u32, _: EventSet) {
        if token == TIMER {
            // It has run out and only this reads it, so this does not block.
            let _ = self.timer.wait();
            self.resting = false;
        }
        let Some(mut queue) = self.queue.take() else { return };
        if token == KICK {
            queue.take_kick();
        }
        if self.resting || self.given_up {
            // The timer serves it, or nothing does.
        } else if let Err(error) = self.serve(&mut queue) {
            queue.give_up(&error);
            self.given_up = true;
        }
        self.queue = Some(queue);
    }
}
