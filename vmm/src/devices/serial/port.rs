//! One port: what moves between its queues and its client, and what the guest is to be told of it.

use std::io::Read;

use super::control::{Event, Message};
use super::state::PortState;
use super::transfer::{Moved, Way, transfer};
use super::{ROUNDS, receive_queue};
use crate::console::{Console, Wants};
use crate::virtio::{Counters, QueueError, Virtqueue};

/// Bytes that are copied at once from the console's queue.
const PIECE: usize = 4096;
/// Bytes of one chain that the console takes; drivers send a line, a page at most.
const MOST_OF_CHAIN: usize = 64 << 10;

/// A port.
#[derive(Debug)]
pub struct Port {
    pub id: u32,
    /// Empty for the console.
    pub name: String,
    pub console: Console,
    pub state: PortState,
    /// The receiving queue had no chain; the driver notifies when it has.
    starved: bool,
    /// The client has no room; the reactor tells when it has.
    blocked: bool,
}

/// Whether there is more to do at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    More,
    Nothing,
}

impl Port {
    pub fn new(id: u32, name: String, console: Console) -> Self {
        Self { id, name, console, state: PortState::default(), starved: false, blocked: false }
    }

    pub fn is_console(&self) -> bool {
        self.id == 0
    }

    /// The driver was reset: it knows nothing of the port. A client stays.
    pub fn reset(&mut self) {
        self.state = PortState::default();
        self.starved = false;
        self.blocked = false;
        self.console.want(Wants::default());
    }

    /// Goes on from what was saved. Whoever was at the host's end then has gone, and the guest is told so before it is
    /// told of anybody else.
    pub fn restore(&mut self, state: PortState) {
        self.state = PortState { bounced: state.told_open && !self.is_console(), sent: 0, ..state };
    }

    /// The next message for the driver. [`Port::told`] says that it was sent.
    pub fn next_message(&self) -> Option<Message> {
        let message = |event, value| Some(Message { port: self.id, event, value });
        let state = &self.state;
        // The console takes output with or without a client.
        let host_open = self.is_console() || self.console.is_connected();
        if state.owes_add {
            message(Event::PortAdd, true)
        } else if state.owes_name {
            message(if self.is_console() { Event::ConsolePort } else { Event::PortName }, true)
        } else if state.ready && state.told_open && (state.bounced || !host_open) {
            message(Event::PortOpen, false)
        } else if state.ready && !state.told_open && host_open {
            message(Event::PortOpen, true)
        } else {
            None
        }
    }

    /// The driver has got this message.
    pub fn told(&mut self, message: Message) {
        match message.event {
            Event::PortAdd => self.state.owes_add = false,
            Event::PortName | Event::ConsolePort => self.state.owes_name = false,
            Event::PortOpen => {
                self.state.told_open = message.value;
                self.state.bounced = false;
            }
            Event::DeviceReady | Event::PortReady => {}
        }
    }

    /// What the driver says of the port.
    pub fn hear(&mut self, message: Message) {
        match message.event {
            Event::PortReady => {
                self.state = PortState {
                    ready: message.value,
                    owes_name: message.value,
                    guest_open: self.state.guest_open,
                    sent: self.state.sent,
                    ..PortState::default()
                };
            }
            Event::PortOpen => self.state.guest_open = message.value,
            Event::DeviceReady | Event::PortAdd | Event::ConsolePort | Event::PortName => {}
        }
    }

    /// The client has gone, or another one has come in its place: what the guest sent to it is nobody's.
    pub fn client_gone(&mut self, queues: &mut [Virtqueue]) -> Result<(), QueueError> {
        self.state.bounced = self.state.told_open && !self.is_console();
        self.state.sent = 0;
        self.blocked = false;
        if self.is_console() {
            return Ok(());
        }
        match transmit_queue(queues, self.id) {
            Some(queue) => discard(queue).map(drop),
            None => Ok(()),
        }
    }

    /// Moves what can be moved, both ways, and watches the client for the rest.
    pub fn work(&mut self, queues: &mut [Virtqueue], counters: &Counters) -> Result<Left, QueueError> {
        let had_client = self.console.is_connected();
        let mut left = self.receive(queues, counters)?;
        if self.console.is_left() && !self.state.guest_open {
            self.console.close();
        }
        if had_client && !self.console.is_connected() {
            self.client_gone(queues)?;
        }
        if let Some(queue) = transmit_queue(queues, self.id) {
            let sent = self.transmit(queue, counters)?;
            queue.notify()?;
            if sent == Left::More {
                left = Left::More;
            }
        }
        self.console.want(Wants { input: self.state.guest_open && !self.starved, room: self.blocked });
        Ok(left)
    }

    fn receive(&mut self, queues: &mut [Virtqueue], counters: &Counters) -> Result<Left, QueueError> {
        let index = receive_queue(self.id);
        let Some(queue) = queues.get_mut(index).filter(|queue| queue.is_usable()) else {
            return Ok(Left::Nothing);
        };
        self.starved = false;
        let mut left = Left::More;
        for _ in 0..ROUNDS {
            let Some(socket) = self.console.client_fd().filter(|_| self.state.guest_open) else {
                left = Left::Nothing;
                break;
            };
            match transfer(queue, socket, Way::ToGuest, &mut 0)? {
                Moved::Bytes(bytes) => counters.read(bytes),
                Moved::NoChain if queue.enable_kicks()? => {}
                Moved::NoChain => {
                    self.starved = true;
                    left = Left::Nothing;
                    break;
                }
                Moved::Later => {
                    left = Left::Nothing;
                    break;
                }
                Moved::Ended => self.console.close(),
            }
        }
        queue.notify()?;
        Ok(left)
    }

    fn transmit(&mut self, queue: &mut Virtqueue, counters: &Counters) -> Result<Left, QueueError> {
        self.blocked = false;
        if self.is_console() {
            return self.print(queue, counters);
        }
        for _ in 0..ROUNDS {
            let Some(socket) = self.console.client_fd() else { return discard(queue) };
            match transfer(queue, socket, Way::FromGuest, &mut self.state.sent)? {
                Moved::Bytes(bytes) => counters.written(bytes),
                Moved::NoChain if queue.enable_kicks()? => {}
                Moved::NoChain => return Ok(Left::Nothing),
                Moved::Later => {
                    self.blocked = true;
                    return Ok(Left::Nothing);
                }
                // The client reads no more; what it still has to say is read.
                Moved::Ended => {
                    self.state.sent = 0;
                    return discard(queue);
                }
            }
        }
        Ok(Left::More)
    }

    /// Takes the console's output. The driver waits for each chain, so it never waits for the client.
    fn print(&mut self, queue: &mut Virtqueue, counters: &Counters) -> Result<Left, QueueError> {
        let memory = queue.memory().clone();
        for _ in 0..ROUNDS {
            let Some(chain) = queue.pop()? else {
                if queue.enable_kicks()? {
                    continue;
                }
                return Ok(Left::Nothing);
            };
            let head = chain.head_index();
            match chain.reader::<()>(&memory) {
                Ok(reader) => {
                    let mut reader = reader.take(MOST_OF_CHAIN as u64);
                    let mut piece = [0; PIECE];
                    while let Ok(count @ 1..) = reader.read(&mut piece) {
                        self.console.write(&piece[..count]);
                        counters.written(count);
                    }
                }
                Err(_) => counters.failed(),
            }
            queue.push(head, 0)?;
        }
        Ok(Left::More)
    }
}

fn transmit_queue(queues: &mut [Virtqueue], port: u32) -> Option<&mut Virtqueue> {
    queues.get_mut(receive_queue(port) + 1).filter(|queue| queue.is_usable())
}

/// Gives chains back unread, a queue's length of them at most.
fn discard(queue: &mut Virtqueue) -> Result<Left, QueueError> {
    for _ in 0..super::QUEUE_SIZE {
        match queue.pop()? {
            Some(chain) => queue.push(chain.head_index(), 0)?,
            None if queue.enable_kicks()? => {}
            None => return queue.notify().map(|()| Left::Nothing),
        }
    }
    queue.notify().map(|()| Left::More)
}
