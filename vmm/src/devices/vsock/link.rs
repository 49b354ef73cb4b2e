//! A connection and its socket on the host.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};
use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Phase, Verdict};
use super::packet::{Header, Received, Room};
use super::shut;

/// A connection with its socket. The socket is watched by its edges: it counts as ready until it says otherwise.
#[derive(Debug)]
pub struct Link {
    /// The protocol's side.
    pub connection: Connection,
    /// Whether it waits for its turn to send to the guest.
    pub queued: bool,
    /// The number that sets it apart from those that had its place before.
    pub generation: u32,
    /// The guest is done with it: what waits is written, and that is all.
    pub draining: bool,
    socket: UnixStream,
    waiting: VecDeque<u8>,
    readable: bool,
    writable: bool,
    hung_up: bool,
    finished: bool,
}

impl Link {
    /// Puts both together; the socket does not block.
    pub fn new(connection: Connection, socket: UnixStream, generation: u32) -> Self {
        Self {
            connection,
            queued: false,
            generation,
            draining: false,
            socket,
            waiting: VecDeque::new(),
            readable: true,
            writable: true,
            hung_up: false,
            finished: false,
        }
    }

    /// Its socket's descriptor.
    pub fn socket_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Bytes that wait for the host to read.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether there may be something to send to the guest. Asks the guest for room where that is what is missing.
    pub fn wants_to_send(&mut self) -> bool {
        let data = !self.draining && self.readable && self.connection.takes_data();
        if data && self.connection.credit() == 0 {
            self.connection.want_credit();
        }
        !self.draining && (self.connection.has_control() || (data && self.connection.credit() > 0))
    }

    /// The next packet to the guest, its data read straight into the guest's room. None if there is nothing; an
    /// error ends the connection.
    pub fn send(&mut self, room: &Room) -> io::Result<Option<Header>> {
        if let Some(header) = self.connection.next_control() {
            return Ok(Some(header));
        }
        if !self.wants_to_send() {
            return Ok(None);
        }
        let read = self.read(room, self.connection.credit() as usize)?;
        if read > 0 {
            return Ok(Some(self.connection.data(u32::try_from(read).unwrap_or(u32::MAX))));
        }
        Ok(self.connection.next_control())
    }

    fn read(&mut self, room: &Room, limit: usize) -> io::Result<usize> {
        let mut read = 0;
        for mut piece in room.data(limit) {
            match retry(|| self.socket.read_volatile(&mut piece)) {
                Ok(0) => {
                    self.readable = false;
                    let flags = if self.hung_up { shut::BOTH } else { shut::SEND };
                    self.connection.host_closed(flags);
                    break;
                }
                Ok(count) => {
                    read += count;
                    if count < piece.len() {
                        break;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    break;
                }
                // What was read so far is still good; the error stays for the next time.
                Err(_) if read > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(read)
    }

    /// Passes on the data of a packet, straight from guest memory where the socket takes it; the rest waits, if it
    /// is at most `most` bytes. An error ends the connection.
    pub fn take(&mut self, packet: &Received, most: usize) -> io::Result<()> {
        let length = packet.header.len as usize;
        let written = if self.waiting.is_empty() { self.write(packet)? } else { 0 };
        if !self.connection.host_takes_data() {
            self.connection.forwarded(length - written);
            return Ok(());
        }
        if length - written > most {
            return Err(ErrorKind::OutOfMemory.into());
        }
        for piece in packet.data(written) {
            self.keep(&piece);
        }
        // A socket that took a part only says so itself before it is waited for.
        self.flush()
    }

    fn write(&mut self, packet: &Received) -> io::Result<usize> {
        let mut written = 0;
        for piece in packet.data(0) {
            if !self.writable || !self.connection.host_takes_data() {
                break;
            }
            let result = retry(|| self.socket.write_volatile(&piece));
            let count = self.wrote(result)?;
            written += count;
            if count < piece.len() {
                break;
            }
        }
        Ok(written)
    }

    /// Makes of a write's result how many bytes were written, and notes what it says of the socket.
    fn wrote(&mut self, result: io::Result<usize>) -> io::Result<usize> {
        match result {
            Ok(count) => {
                self.connection.forwarded(count);
                Ok(count)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.writable = false;
                Ok(0)
            }
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.host_reads_no_more();
                Ok(0)
            }
            Err(error) => Err(error),
        }
    }

    fn keep(&mut self, piece: &VolatileSlice) {
        let mut bytes = vec![0; piece.len()];
        piece.copy_to(&mut bytes);
        self.waiting.extend(bytes);
    }

    fn host_reads_no_more(&mut self) {
        self.connection.host_closed(shut::RECEIVE);
        let lost = std::mem::take(&mut self.waiting).len();
        self.connection.forwarded(lost);
    }

    /// Writes what waits, as far as the socket takes it. An error ends the connection.
    pub fn flush(&mut self) -> io::Result<()> {
        while self.writable && !self.waiting.is_empty() {
            let (first, second) = self.waiting.as_slices();
            let both = [io::IoSlice::new(first), io::IoSlice::new(second)];
            let result = (&self.socket).write_vectored(&both);
            if matches!(&result, Err(error) if error.kind() == ErrorKind::Interrupted) {
                continue;
            }
            let count = self.wrote(result)?;
            self.waiting.drain(..count.min(self.waiting.len()));
        }
        if self.waiting.is_empty() {
            // A burst that is over keeps no memory.
            self.waiting = VecDeque::new();
            // Once only: shutting down is itself a change of the socket.
            if self.connection.guest_shut() & shut::SEND != 0 && !self.finished {
                self.finished = true;
                shut_down(&self.socket, Shutdown::Write);
            }
        }
        Ok(())
    }

    /// The guest sends or receives no more: so does the socket.
    pub fn guest_shut(&mut self) -> io::Result<()> {
        if self.connection.guest_shut() & shut::RECEIVE != 0 {
            shut_down(&self.socket, Shutdown::Read);
        }
        self.flush()
    }

    /// Tells the client that its connection is there.
    pub fn opened(&mut self) -> io::Result<()> {
        let line = format!("OK {}\n", self.connection.key().host);
        // Nothing was written before, so there is room for a line.
        let written = (&self.socket).write(line.as_bytes())?;
        if written == line.len() { Ok(()) } else { Err(ErrorKind::WriteZero.into()) }
    }

    /// The socket has changed. An error ends the connection.
    pub fn ready(&mut self, events: EventSet) -> io::Result<()> {
        let ends = EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR;
        self.readable |= events.intersects(EventSet::IN | ends);
        self.writable |= events.contains(EventSet::OUT);
        if events.contains(EventSet::HANG_UP) {
            if self.connection.phase() != Phase::Open {
                return Err(ErrorKind::BrokenPipe.into());
            }
            self.hung_up = true;
            self.host_reads_no_more();
        }
        self.flush()
    }

    /// Takes a packet of the guest, but for its data.
    pub fn receive(&mut self, header: &Header) -> Verdict {
        self.connection.receive(header)
    }
}

fn shut_down(socket: &UnixStream, how: Shutdown) {
    // Fails only when the other end has gone, and then that is known otherwise.
    let _ = socket.shutdown(how);
}

fn retry(mut work: impl FnMut() -> Result<usize, VolatileMemoryError>) -> io::Result<usize> {
    loop {
        match work() {
            Ok(count) => return Ok(count),
            Err(VolatileMemoryError::IOError(error)) if error.kind() == ErrorKind::Interrupted => {}
            Err(VolatileMemoryError::IOError(error)) => return Err(error),
            Err(error) => return Err(io::Error::other(error)),
        }
    }
}
