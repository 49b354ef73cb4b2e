//! All connections: found by their ports and by the number that their sockets are watched with, served in turn.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Key, Verdict};
use super::link::Link;
use super::packet::{Header, Received, Room};
use super::{HOST_CID, MAX_BUFFERED, MAX_CONNECTIONS, MAX_REPLIES, TYPE_STREAM, op, shut};
use crate::reactor::Registration;
use crate::virtio::Counters;

/// Set in the tokens of connections' sockets. Below it are a generation and a place, so that an event that is late
/// does not reach the connection that has the place now.
pub const LINK_TOKEN: u32 = 1 << 31;
const PLACE_BITS: u32 = 10;
const GENERATIONS: u32 = 1 << (31 - PLACE_BITS);
const _: () = assert!(MAX_CONNECTIONS == 1 << PLACE_BITS);

/// Host ports of connections to the guest are from here up, as many.
const FIRST_PORT: u32 = 1 << 30;

/// What a socket is watched for: by edges, so that data that cannot be taken yet wakes nobody again and again. Room
/// to write only while bytes wait for it, since each read at the other end makes some.
pub fn watched(bytes_wait: bool) -> EventSet {
    let always = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    if bytes_wait { always | EventSet::OUT } else { always }
}

/// The connections. Dropped, all are gone, and nobody in the guest was told.
#[derive(Debug)]
pub struct Links {
    guest_cid: u64,
    registration: Arc<Registration>,
    counters: Counters,
    places: Vec<Option<Link>>,
    free: Vec<usize>,
    by_key: HashMap<Key, usize>,
    /// Places of those that wait for their turn to send to the guest.
    queued: VecDeque<usize>,
    /// Resets to send.
    replies: VecDeque<Header>,
    buffered: usize,
    next_port: u32,
    generation: u32,
}

impl Links {
    /// None yet.
    pub fn new(guest_cid: u32, registration: Arc<Registration>, counters: Counters) -> Self {
        Self {
            guest_cid: u64::from(guest_cid),
            registration,
            counters,
            places: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::new(),
            queued: VecDeque::new(),
            replies: VecDeque::new(),
            buffered: 0,
            next_port: 0,
            generation: 0,
        }
    }

    /// Whether there is no room for another one.
    pub fn is_full(&self) -> bool {
        self.free.is_empty() && self.places.len() == MAX_CONNECTIONS
    }

    /// How many there are, those included that only wait for their reader.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// How many wait for their turn to send to the guest.
    #[cfg(test)]
    pub fn waiting(&self) -> usize {
        self.queued.len()
    }

    /// Adds a connection to `port` of the guest, from a host port that is free. Its socket is watched already, as
    /// something else.
    pub fn add_to_guest(&mut self, port: u32, socket: UnixStream) {
        let key = loop {
            // There are more ports than connections, so one is free soon.
            let key = Key { guest: port, host: FIRST_PORT + self.next_port };
            self.next_port = (self.next_port + 1) % FIRST_PORT;
            if !self.by_key.contains_key(&key) {
                break key;
            }
        };
        let fd = socket.as_raw_fd();
        let (place, token) = self.add(Connection::to_guest(key), socket);
        match self.registration.change(fd, token, watched(false)) {
            Ok(()) => self.queue(place),
            Err(_) => self.remove(place),
        }
    }

    /// Adds a connection that the guest asked for; it is refused if the socket cannot be watched.
    pub fn add_from_guest(&mut self, request: &Header, socket: UnixStream) {
        let key = key_of(request);
        let fd = socket.as_raw_fd();
        let (place, token) = self.add(Connection::from_guest(key, request), socket);
        match self.registration.watch(fd, token, watched(false)) {
            Ok(()) => self.queue(place),
            Err(_) => self.reset(place),
        }
    }

    fn add(&mut self, connection: Connection, socket: UnixStream) -> (usize, u32) {
        self.generation = (self.generation + 1) % GENERATIONS;
        let place = self.free.pop().unwrap_or_else(|| {
            self.places.push(None);
            self.places.len() - 1
        });
        self.by_key.insert(connection.key(), place);
        self.places[place] = Some(Link::new(connection, socket, self.generation));
        (place, token_of(place, self.generation))
    }

    /// A connection's socket is ready.
    pub fn ready(&mut self, token: u32, events: EventSet) {
        let place = (token & ((1 << PLACE_BITS) - 1)) as usize;
        let generation = (token & !LINK_TOKEN) >> PLACE_BITS;
        let Some(link) = self.link(place).filter(|link| link.generation == generation) else { return };
        let before = link.waiting();
        let result = link.ready(events);
        self.settle(place, before, result.is_err());
    }

    /// The guest sent a packet that is of a connection, or of none. True if it asks for one that there is not.
    pub fn receive(&mut self, packet: &Received) -> bool {
        let header = &packet.header;
        let right = header.src_cid == self.guest_cid && header.dst_cid == HOST_CID;
        let place = self.by_key.get(&key_of(header)).copied();
        let (true, true, Some(place)) = (right, header.kind == TYPE_STREAM, place) else {
            let asks = right && header.kind == TYPE_STREAM && header.op == op::REQUEST;
            if !asks {
                self.refuse(header);
            }
            return asks;
        };
        self.receive_on(place, packet);
        false
    }

    fn receive_on(&mut self, place: usize, packet: &Received) {
        let most = MAX_BUFFERED - self.buffered.min(MAX_BUFFERED);
        let Some(link) = self.link(place) else { return };
        let before = link.waiting();
        let result = match link.receive(&packet.header) {
            Verdict::Fine => Ok(()),
            Verdict::Opened => link.opened(),
            Verdict::Data => link.take(packet, most),
            Verdict::Shut if link.connection.guest_shut() == shut::BOTH => return self.finish(place),
            Verdict::Shut => link.guest_shut(),
            Verdict::Gone => return self.remove(place),
            Verdict::Broken => {
                self.counters.failed();
                return self.reset(place);
            }
        };
        if packet.header.op == op::RW && result.is_ok() {
            self.counters.written(packet.header.len as usize);
        }
        self.settle(place, before, result.is_err());
    }

    /// Answers a packet that cannot be right with a reset (section 5.10.6.4.1), but for a reset.
    pub fn refuse(&mut self, header: &Header) {
        if header.op == op::RST {
            return;
        }
        self.counters.failed();
        // The guest knows what it spoke to by the addresses that it used.
        self.reply(header.dst_cid, key_of(header), header.kind);
    }

    fn reply(&mut self, src_cid: u64, key: Key, kind: u16) {
        if self.replies.len() < MAX_REPLIES {
            let reset = Header { src_port: key.host, dst_port: key.guest, op: op::RST, ..Header::default() };
            self.replies.push_back(Header { src_cid, kind, ..reset });
        }
    }

    /// Takes account of what happened to the link: the bytes that wait, whether it failed, its turn.
    fn settle(&mut self, place: usize, before: usize, failed: bool) {
        let Some(link) = self.link(place) else { return };
        let (after, draining) = (link.waiting(), link.draining);
        let (fd, token) = (link.socket_fd(), token_of(place, link.generation));
        self.buffered = self.buffered + after - before;
        // The change itself tells of room that has come meanwhile.
        let changed = (after > 0) != (before > 0);
        let failed = failed || (changed && self.registration.change(fd, token, watched(after > 0)).is_err());
        if draining && (failed || after == 0) {
            self.remove(place);
        } else if failed {
            self.reset(place);
        } else {
            self.queue(place);
        }
    }

    fn queue(&mut self, place: usize) {
        let Some(link) = self.link(place) else { return };
        if !link.queued && link.wants_to_send() {
            link.queued = true;
            self.queued.push_back(place);
        }
    }

    /// The guest sends and receives no more: it gets its reset, and the host what still waits for it.
    fn finish(&mut self, place: usize) {
        let Some(link) = self.link(place) else { return };
        if link.waiting() == 0 {
            return self.reset(place);
        }
        link.draining = true;
        link.queued = false;
        let key = link.connection.key();
        self.queued.retain(|&queued| queued != place);
        self.by_key.remove(&key);
        self.reply(HOST_CID, key, TYPE_STREAM);
    }

    /// Ends a connection and tells the guest so, unless it does not know of it.
    fn reset(&mut self, place: usize) {
        let Some(link) = self.link(place) else { return };
        let key = link.connection.key();
        let known = link.connection.phase() != super::connection::Phase::New;
        self.remove(place);
        if known {
            self.reply(HOST_CID, key, TYPE_STREAM);
        }
    }

    /// Ends a connection. Nobody else has its socket open, so it is not watched any more either.
    fn remove(&mut self, place: usize) {
        let Some(link) = self.places.get_mut(place).and_then(Option::take) else { return };
        self.free.push(place);
        self.buffered -= link.waiting();
        if link.queued {
            self.queued.retain(|&queued| queued != place);
        }
        let key = link.connection.key();
        if self.by_key.get(&key) == Some(&place) {
            self.by_key.remove(&key);
        }
    }

    /// Whether there may be something to send to the guest.
    pub fn want_to_send(&self) -> bool {
        !self.replies.is_empty() || !self.queued.is_empty()
    }

    /// Puts the next packet into the guest's room and returns its length, if there is one. Each connection sends one
    /// packet, then it is the next one's turn.
    pub fn send(&mut self, room: &Room) -> Option<u32> {
        loop {
            if let Some(reply) = self.replies.pop_front() {
                return Some(room.finish(Header { dst_cid: self.guest_cid, ..reply }));
            }
            let place = self.queued.pop_front()?;
            let Some(link) = self.link(place) else { continue };
            link.queued = false;
            match link.send(room) {
                Ok(Some(header)) => {
                    self.counters.read(header.len as usize);
                    self.queue(place);
                    return Some(room.finish(Header { dst_cid: self.guest_cid, ..header }));
                }
                Ok(None) => self.queue(place),
                Err(_) => self.reset(place),
            }
        }
    }

    fn link(&mut self, place: usize) -> Option<&mut Link> {
        self.places.get_mut(place).and_then(Option::as_mut)
    }
}

fn token_of(place: usize, generation: u32) -> u32 {
    LINK_TOKEN | generation << PLACE_BITS | u32::try_from(place).unwrap_or(0)
}

fn key_of(header: &Header) -> Key {
    Key { guest: header.src_port, host: header.dst_port }
}
