//! One connection as the protocol knows it: phases, credit, shutdown (virtio 1.2, section 5.10.6). No input or output.

use super::packet::Header;
use super::{HOST_CID, TYPE_STREAM, WINDOW, op, shut};

/// The two ports of a connection: there is one connection of each pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The guest's port.
    pub guest: u32,
    /// The host's port.
    pub host: u32,
}

/// Where a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The guest has not been asked yet.
    New,
    /// The guest was asked for the connection.
    Asked,
    /// Both sides want it.
    Open,
}

/// What follows from a packet of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing to do, but there may be more to send.
    Fine,
    /// The guest has accepted.
    Opened,
    /// Its data is to be passed on.
    Data,
    /// The guest will not send or receive any more; see [`Connection::guest_shut`].
    Shut,
    /// The guest dropped the connection.
    Gone,
    /// The guest broke the protocol: the connection is to be reset.
    Broken,
}

/// The state of one connection.
#[derive(Debug)]
pub struct Connection {
    key: Key,
    phase: Phase,
    response_due: bool,
    update_due: bool,
    /// What the guest does no more.
    guest_shut: u32,
    /// What the host does no more, and what of it the guest knows.
    host_shut: u32,
    host_shut_told: u32,
    /// Bytes sent to the guest; what it has of them in a buffer of which size.
    sent: u32,
    guest_window: u32,
    guest_forwarded: u32,
    credit_asked: bool,
    request_due: bool,
    /// Bytes from the guest, how many of them went on, and what of that the guest knows.
    received: u32,
    forwarded: u32,
    forwarded_told: u32,
}

impl Connection {
    /// One that the host wants: the guest is to be asked.
    pub fn to_guest(key: Key) -> Self {
        Self {
            key,
            phase: Phase::New,
            response_due: false,
            update_due: false,
            guest_shut: 0,
            host_shut: 0,
            host_shut_told: 0,
            sent: 0,
            guest_window: 0,
            guest_forwarded: 0,
            credit_asked: false,
            request_due: false,
            received: 0,
            forwarded: 0,
            forwarded_told: 0,
        }
    }

    /// One that the guest asked for, and gets.
    pub fn from_guest(key: Key, request: &Header) -> Self {
        let mut new = Self::to_guest(key);
        new.phase = Phase::Open;
        new.response_due = true;
        new.take_credit(request);
        new
    }

    /// Its ports.
    pub fn key(&self) -> Key {
        self.key
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// What the guest does no more ([`shut`]).
    pub fn guest_shut(&self) -> u32 {
        self.guest_shut
    }

    /// Whether the host's side may be read: the guest takes data, and the host may send some.
    pub fn takes_data(&self) -> bool {
        self.phase == Phase::Open && self.guest_shut & shut::RECEIVE == 0 && self.host_shut & shut::SEND == 0
    }

    /// Whether the host still takes data.
    pub fn host_takes_data(&self) -> bool {
        self.host_shut & shut::RECEIVE == 0
    }

    /// Bytes that the guest has room for.
    pub fn credit(&self) -> u32 {
        // What makes no sense, such as more taken than was sent, leaves no credit.
        self.guest_window.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// The guest sent a packet on this connection.
    pub fn receive(&mut self, header: &Header) -> Verdict {
        self.take_credit(header);
        match (header.op, self.phase) {
            (op::RST, _) => Verdict::Gone,
            (op::RESPONSE, Phase::Asked) => {
                self.phase = Phase::Open;
                Verdict::Opened
            }
            (op::SHUTDOWN, Phase::Open) => {
                self.guest_shut |= header.flags & shut::BOTH;
                Verdict::Shut
            }
            (op::RW, Phase::Open) if self.may_receive(header.len) => {
                self.received = self.received.wrapping_add(header.len);
                Verdict::Data
            }
            (op::CREDIT_UPDATE, Phase::Open) => Verdict::Fine,
            (op::CREDIT_REQUEST, Phase::Open) => {
                self.update_due = true;
                Verdict::Fine
            }
            _ => Verdict::Broken,
        }
    }

    fn may_receive(&self, length: u32) -> bool {
        let waiting = self.received.wrapping_sub(self.forwarded);
        self.guest_shut & shut::SEND == 0 && length <= WINDOW - waiting.min(WINDOW)
    }

    fn take_credit(&mut self, header: &Header) {
        self.guest_window = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_asked = false;
            self.request_due = false;
        }
    }

    /// The host has data and the guest no room: the guest is asked, once.
    pub fn want_credit(&mut self) {
        if !self.credit_asked {
            self.credit_asked = true;
            self.request_due = true;
        }
    }

    /// The host's side does these no more ([`shut`]).
    pub fn host_closed(&mut self, flags: u32) {
        self.host_shut |= flags;
    }

    /// Bytes of the guest went on to the host.
    pub fn forwarded(&mut self, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.forwarded = self.forwarded.wrapping_add(bytes);
        if self.forwarded.wrapping_sub(self.forwarded_told) >= WINDOW / 4 {
            self.update_due = true;
        }
    }

    /// Bytes that are to be sent to the guest as data.
    pub fn data(&mut self, bytes: u32) -> Header {
        self.sent = self.sent.wrapping_add(bytes);
        Header { len: bytes, ..self.header(op::RW) }
    }

    /// Whether there is a packet without data to send.
    pub fn has_control(&self) -> bool {
        let open =
            self.response_due || self.update_due || self.request_due || self.host_shut != self.host_shut_told;
        self.phase == Phase::New || (self.phase == Phase::Open && open)
    }

    /// The next packet without data. Once it is taken it counts as sent.
    pub fn next_control(&mut self) -> Option<Header> {
        if !self.has_control() {
            return None;
        }
        if self.phase == Phase::New {
            self.phase = Phase::Asked;
            return Some(self.header(op::REQUEST));
        }
        if std::mem::take(&mut self.response_due) {
            return Some(self.header(op::RESPONSE));
        }
        if self.host_shut != self.host_shut_told {
            self.host_shut_told = self.host_shut;
            return Some(Header { flags: self.host_shut, ..self.header(op::SHUTDOWN) });
        }
        if std::mem::take(&mut self.request_due) {
            return Some(self.header(op::CREDIT_REQUEST));
        }
        Some(self.header(op::CREDIT_UPDATE))
    }

    /// A header, which tells the guest its credit as each one does.
    fn header(&mut self, op: u16) -> Header {
        self.forwarded_told = self.forwarded;
        self.update_due = false;
        Header {
            src_cid: HOST_CID,
            src_port: self.key.host,
            dst_port: self.key.guest,
            kind: TYPE_STREAM,
            op,
            buf_alloc: WINDOW,
            fwd_cnt: self.forwarded,
            ..Header::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key = Key { guest: 1, host: 2 };

    fn packet(op: u16) -> Header {
        Header { op, buf_alloc: 100, ..Header::default() }
    }

    fn open() -> Connection {
        let mut connection = Connection::from_guest(KEY, &packet(op::REQUEST));
        assert_eq!(connection.next_control().unwrap().op, op::RESPONSE);
        assert_eq!(connection.next_control(), None);
        connection
    }

    #[test]
    fn the_guest_is_asked_once_and_opens_by_its_response() {
        let mut connection = Connection::to_guest(KEY);
        assert_eq!(connection.next_control().unwrap().op, op::REQUEST);
        assert_eq!(connection.next_control(), None);
        assert!(!connection.takes_data());
        assert_eq!(connection.receive(&packet(op::RESPONSE)), Verdict::Opened);
        assert!(connection.takes_data());
        assert_eq!(connection.receive(&packet(op::RESPONSE)), Verdict::Broken);
    }

    #[test]
    fn a_guest_that_was_not_asked_cannot_answer() {
        let mut connection = Connection::to_guest(KEY);
        assert_eq!(connection.receive(&packet(op::RESPONSE)), Verdict::Broken);
    }

    #[test]
    fn credit_is_what_the_guest_has_room_for_also_across_the_wrap() {
        let mut connection = open();
        assert_eq!(connection.credit(), 100);
        connection.data(60);
        assert_eq!(connection.credit(), 40);
        connection.receive(&Header { fwd_cnt: 50, ..packet(op::CREDIT_UPDATE) });
        assert_eq!(connection.credit(), 90);
        connection.receive(&Header { fwd_cnt: 61, ..packet(op::CREDIT_UPDATE) });
        assert_eq!(connection.credit(), 0, "more taken than was sent");
        connection.sent = u32::MAX - 4;
        connection.receive(&Header { fwd_cnt: u32::MAX - 4, ..packet(op::CREDIT_UPDATE) });
        connection.data(10);
        assert_eq!(connection.credit(), 90);
    }

    #[test]
    fn credit_is_asked_for_once_until_there_is_some() {
        let mut connection = open();
        connection.data(100);
        connection.want_credit();
        connection.want_credit();
        assert_eq!(connection.next_control().unwrap().op, op::CREDIT_REQUEST);
        connection.receive(&packet(op::CREDIT_UPDATE));
        connection.want_credit();
        assert_eq!(connection.next_control(), None, "an update without credit is no reason to ask again");
        connection.receive(&Header { fwd_cnt: 100, ..packet(op::CREDIT_UPDATE) });
        connection.data(100);
        connection.want_credit();
        assert!(connection.has_control());
    }

    #[test]
    fn a_guest_beyond_its_credit_breaks_the_connection() {
        let mut connection = open();
        let data = |len| Header { len, ..packet(op::RW) };
        assert_eq!(connection.receive(&data(WINDOW)), Verdict::Data);
        assert_eq!(connection.receive(&data(0)), Verdict::Data);
        assert_eq!(connection.receive(&data(1)), Verdict::Broken);
        connection.forwarded(1);
        assert_eq!(connection.receive(&data(1)), Verdict::Data);
    }

    #[test]
    fn the_guest_learns_of_room_when_a_quarter_is_free_or_when_it_asks() {
        let mut connection = open();
        connection.receive(&Header { len: WINDOW, ..packet(op::RW) });
        connection.forwarded(WINDOW as usize / 4 - 1);
        assert_eq!(connection.next_control(), None);
        connection.forwarded(1);
        let update = connection.next_control().unwrap();
        assert_eq!((update.op, update.fwd_cnt, update.buf_alloc), (op::CREDIT_UPDATE, WINDOW / 4, WINDOW));
        connection.receive(&packet(op::CREDIT_REQUEST));
        assert_eq!(connection.next_control().unwrap().op, op::CREDIT_UPDATE);
        assert_eq!(connection.next_control(), None);
    }

    #[test]
    fn each_direction_is_shut_by_itself_and_told_once() {
        let mut connection = open();
        connection.host_closed(shut::SEND);
        assert_eq!(connection.next_control().unwrap().flags, shut::SEND);
        assert_eq!(connection.next_control(), None);
        assert!(!connection.takes_data() && connection.host_takes_data());
        connection.host_closed(shut::BOTH);
        assert_eq!(connection.next_control().unwrap().flags, shut::BOTH);
        let shutdown = Header { flags: shut::SEND | 8, ..packet(op::SHUTDOWN) };
        assert_eq!(connection.receive(&shutdown), Verdict::Shut);
        assert_eq!(connection.guest_shut(), shut::SEND);
        assert_eq!(connection.receive(&Header { len: 1, ..packet(op::RW) }), Verdict::Broken);
    }
}
