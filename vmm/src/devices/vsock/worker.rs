//! What the reactor's thread does with the queues.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_queue::QueueState;
use vm_memory::Bytes;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::host::{CLIENT_TOKEN, Host};
use super::links::{LINK_TOKEN, Links};
use super::packet::{Received, Room};
use super::queue;
use crate::memory::GuestRam;
use crate::reactor::{EventHandler, Registration};
use crate::virtio::{Activation, Counters, QueueError, Virtqueue};

/// Tokens up to here are of the queues, by their numbers.
const QUEUES: u32 = 3;
const LISTENER: u32 = 3;
const AGAIN: u32 = 4;

/// Chains taken from a queue before others get their turn.
const BATCH: usize = 256;
/// Event: all connections are gone, and the guest's CID may be another (section 5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

/// The handler of a device, at work or not.
#[derive(Debug)]
pub struct Worker {
    host: Host,
    cid: u32,
    counters: Counters,
    active: Option<Active>,
    /// The guest is to be told of a transport reset as soon as the device works.
    owes_reset: bool,
}

/// What there is between activation and reset.
#[derive(Debug)]
struct Active {
    memory: GuestRam,
    queues: Vec<Virtqueue>,
    registration: Arc<Registration>,
    links: Links,
    /// Woken to go on where a batch ended.
    again: EventFd,
    reset_due: bool,
}

impl Worker {
    /// One that is not at work yet.
    pub fn new(cid: u32, host: Host, counters: Counters) -> Self {
        Self { host, cid, counters, active: None, owes_reset: false }
    }

    /// Begins to work; the driver may have offered chains already. After an error it has to be stopped.
    pub fn start(
        &mut self,
        activation: Activation,
        registration: Registration,
        again: EventFd,
    ) -> io::Result<()> {
        let registration = Arc::new(registration);
        let links = Links::new(self.cid, Arc::clone(&registration), self.counters.clone());
        let active = self.active.insert(Active {
            memory: activation.memory,
            queues: activation.queues,
            registration,
            links,
            again,
            reset_due: std::mem::take(&mut self.owes_reset),
        });
        active.watch(&self.host)?;
        active.again.write(1)
    }

    /// Stops: no packet is read or written any more, all connections end. Returns what is to be dropped once the
    /// worker is not locked any more.
    pub fn stop(&mut self) -> Option<Arc<Registration>> {
        let active = self.active.take()?;
        self.host.drop_clients();
        active.unwatch(&self.host);
        Some(active.registration)
    }

    /// The queues, as they are saved.
    pub fn queue_states(&self) -> Vec<QueueState> {
        self.active.iter().flat_map(|active| &active.queues).map(Virtqueue::state).collect()
    }

    /// Drops all connections and tells the guest.
    pub fn transport_reset(&mut self) {
        self.host.drop_clients();
        if let Some(active) = &mut self.active {
            active.links = active.no_links(self.cid, &self.counters);
            active.reset_due = true;
            let result = active.send_event();
            self.end_if_broken(result);
        }
    }

    /// Tells the guest of a transport reset after the next start.
    pub fn owe_reset(&mut self) {
        self.owes_reset = true;
    }

    /// How many connections there are.
    #[cfg(test)]
    pub fn connections(&self) -> usize {
        self.active.as_ref().map_or(0, |active| active.links.count())
    }

    /// How many connections wait for their turn to send to the guest.
    #[cfg(test)]
    pub fn waiting(&self) -> usize {
        self.active.as_ref().map_or(0, |active| active.links.waiting())
    }

    fn end_if_broken(&mut self, result: Result<(), (usize, QueueError)>) {
        let (Err((index, error)), Some(active)) = (result, &mut self.active) else { return };
        active.queues[index].give_up(&error);
        // The queues stay, to be saved with the rest; nobody looks at them before the reset.
        active.unwatch(&self.host);
        active.links = active.no_links(self.cid, &self.counters);
        self.host.drop_clients();
    }
}

impl EventHandler for Worker {
    fn ready(&mut self, token: u32, events: EventSet) {
        let Some(active) = &mut self.active else { return };
        let result = active.handle(token, events, &mut self.host, &self.counters);
        self.end_if_broken(result);
    }
}

/// A queue that cannot be used, by its number.
type Served = Result<(), (usize, QueueError)>;

impl Active {
    fn handle(&mut self, token: u32, events: EventSet, host: &mut Host, counters: &Counters) -> Served {
        match token {
            token if token < QUEUES => {
                self.queues[token as usize].take_kick();
            }
            AGAIN => {
                // The event is what counts, not how often it was asked for.
                let _ = self.again.read();
            }
            LISTENER => {
                if let Err(error) = host.accept(&self.registration) {
                    eprintln!("catalyst-vmm: the vsock takes no more connections of the host: {error}");
                    let _ = host.listener_fd().map(|fd| self.registration.unwatch(fd));
                }
            }
            token if token & LINK_TOKEN != 0 => self.links.ready(token, events),
            token if token & CLIENT_TOKEN != 0 => {
                if let Some((port, client)) = host.client(token, events)
                    && !self.links.is_full()
                {
                    self.links.add_to_guest(port, client);
                }
            }
            _ => {}
        }
        let tx = u32::try_from(queue::TX).unwrap_or(0);
        let more_to_take = if token == tx || token == AGAIN {
            self.serve_tx(host, counters).map_err(|error| (queue::TX, error))?
        } else {
            false
        };
        let more_to_give = self.serve_rx(counters).map_err(|error| (queue::RX, error))?;
        if more_to_take || more_to_give {
            // Fails only when the counter is full, and then the event is pending anyway.
            let _ = self.again.write(1);
        }
        self.send_event()
    }

    /// Takes packets from the guest; true if there are more.
    fn serve_tx(&mut self, host: &Host, counters: &Counters) -> Result<bool, QueueError> {
        let memory = Arc::clone(&self.memory);
        let mut taken = 0;
        let more = loop {
            self.queues[queue::TX].disable_kicks()?;
            while taken < BATCH
                && let Some(chain) = self.queues[queue::TX].pop()?
            {
                taken += 1;
                let head = chain.head_index();
                match Received::parse(&memory, chain) {
                    Ok(packet) => self.take(&packet, host),
                    Err(_) => counters.failed(),
                }
                self.queues[queue::TX].push(head, 0)?;
            }
            if taken == BATCH {
                break true;
            }
            if !self.queues[queue::TX].enable_kicks()? {
                break false;
            }
        };
        if taken > 0 {
            self.queues[queue::TX].notify()?;
        }
        Ok(more)
    }

    fn take(&mut self, packet: &Received, host: &Host) {
        if !self.links.receive(packet) {
            return;
        }
        let request = &packet.header;
        let socket = if self.links.is_full() { None } else { host.connect(request.dst_port).ok() };
        match socket {
            Some(socket) => self.links.add_from_guest(request, socket),
            None => self.links.refuse(request),
        }
    }

    /// Gives packets to the guest as long as there are packets and room for them; true if both are left.
    fn serve_rx(&mut self, counters: &Counters) -> Result<bool, QueueError> {
        let memory = Arc::clone(&self.memory);
        let rx = &mut self.queues[queue::RX];
        let mut used = 0;
        while used < BATCH && self.links.want_to_send() {
            let Some(chain) = rx.pop()? else {
                // Sockets are watched by their edges, so what they have waits without anybody looking.
                if rx.enable_kicks()? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let length = if let Ok(room) = Room::parse(&memory, chain) {
                self.links.send(&room)
            } else {
                counters.failed();
                Some(0)
            };
            let Some(length) = length else {
                rx.undo_pop();
                break;
            };
            rx.push(head, length)?;
            used += 1;
        }
        if used > 0 {
            rx.disable_kicks()?;
            rx.notify()?;
        }
        Ok(used == BATCH && self.links.want_to_send())
    }

    /// Tells the guest that its connections are gone, if it was not told and has a buffer for it.
    fn send_event(&mut self) -> Served {
        if self.reset_due { self.try_send_event().map_err(|error| (queue::EVENT, error)) } else { Ok(()) }
    }

    fn try_send_event(&mut self) -> Result<(), QueueError> {
        let events = &mut self.queues[queue::EVENT];
        loop {
            let Some(chain) = events.pop()? else {
                if events.enable_kicks()? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            let event = TRANSPORT_RESET.to_le_bytes();
            let buffer = chain.writable().next();
            let written = buffer.is_some_and(|buffer| {
                buffer.len() as usize >= event.len() && self.memory.write_slice(&event, buffer.addr()).is_ok()
            });
            events.push(head, if written { 4 } else { 0 })?;
            events.notify()?;
            if written {
                self.reset_due = false;
                return Ok(());
            }
        }
    }

    fn no_links(&self, cid: u32, counters: &Counters) -> Links {
        Links::new(cid, Arc::clone(&self.registration), counters.clone())
    }

    fn watch(&self, host: &Host) -> io::Result<()> {
        for (token, queue) in (0..).zip(&self.queues) {
            self.registration.watch(queue.kick_fd(), token, EventSet::IN)?;
        }
        self.registration.watch(self.again.as_raw_fd(), AGAIN, EventSet::IN)?;
        host.listener_fd().map_or(Ok(()), |fd| self.registration.watch(fd, LISTENER, EventSet::IN))
    }

    /// What it watches is of others too, so it is not forgotten when it is closed here.
    fn unwatch(&self, host: &Host) {
        let fds = self.queues.iter().map(Virtqueue::kick_fd).chain(host.listener_fd());
        for fd in fds.chain([self.again.as_raw_fd()]) {
            // Whatever is not watched needs no unwatching.
            let _ = self.registration.unwatch(fd);
        }
    }
}
