//! Bytes between guest memory and a socket, without a copy: several chains with one system call.

use std::io;
use std::os::fd::RawFd;

use vm_memory::{GuestMemory, GuestMemoryMmap};

use crate::virtio::queue::Chain;
use crate::virtio::{QueueError, Virtqueue};

/// Chains that are used with one system call.
const CHAINS: usize = 32;
/// Pieces of memory that one system call is given.
const PIECES: usize = 64;
/// Bytes that one system call moves at most.
const BYTES: usize = 256 << 10;

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the socket.
    ToGuest,
    /// To the socket.
    FromGuest,
}

/// How it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// So many bytes, at least one.
    Bytes(usize),
    /// The driver offers no chain.
    NoChain,
    /// The socket is not ready.
    Later,
    /// The socket has ended.
    Ended,
}

struct Taken {
    head: u16,
    bytes: usize,
    /// `bytes` is the rest of the chain.
    whole: bool,
}

/// Moves what one system call does, and gives chains back that are done: full or not when reading, sent when
/// writing. `sent` is what was written before of the chain that comes first.
pub fn transfer(queue: &mut Virtqueue, socket: RawFd, way: Way, sent: &mut u32) -> Result<Moved, QueueError> {
    let memory = queue.memory().clone();
    let mut pieces = Vec::with_capacity(PIECES);
    let chains = gather(queue, &memory, way, sent, &mut pieces)?;
    if chains.is_empty() {
        return Ok(Moved::NoChain);
    }
    let moved = match call(socket, way, &mut pieces) {
        Ok(0) => Moved::Ended,
        Ok(bytes) => Moved::Bytes(bytes),
        Err(error) if crate::console::is_later(&error) => Moved::Later,
        Err(_) => Moved::Ended,
    };
    let mut rest = if let Moved::Bytes(bytes) = moved { bytes } else { 0 };
    let mut done = 0;
    for chain in &chains {
        let part = chain.bytes.min(rest);
        rest -= part;
        let finished = match way {
            Way::ToGuest => part > 0,
            Way::FromGuest => part == chain.bytes && chain.whole,
        };
        if !finished {
            // It comes first the next time; those after it were not touched.
            *sent = sent.saturating_add(u32::try_from(part).unwrap_or(u32::MAX));
            break;
        }
        let written = if way == Way::ToGuest { part } else { 0 };
        queue.push(chain.head, u32::try_from(written).unwrap_or(u32::MAX))?;
        *sent = 0;
        done += 1;
    }
    for _ in done..chains.len() {
        queue.undo_pop();
    }
    Ok(moved)
}

/// Takes chains and their memory. Those without any, or with memory that there is not, go back at once.
fn gather(
    queue: &mut Virtqueue,
    memory: &GuestMemoryMmap<()>,
    way: Way,
    sent: &mut u32,
    pieces: &mut Vec<libc::iovec>,
) -> Result<Vec<Taken>, QueueError> {
    let mut chains: Vec<Taken> = Vec::new();
    let mut total = 0;
    while chains.len() < CHAINS && pieces.len() < PIECES && total < BYTES {
        let Some(chain) = queue.pop()? else { break };
        let head = chain.head_index();
        let skip = if chains.is_empty() { *sent as usize } else { 0 };
        let before = pieces.len();
        let taken = take(chain, memory, way, skip, BYTES - total, pieces);
        if let Some((bytes @ 1.., whole)) = taken {
            total += bytes;
            chains.push(Taken { head, bytes, whole });
            if !whole {
                break;
            }
            continue;
        }
        pieces.truncate(before);
        if !chains.is_empty() {
            // Chains go back in order, so its turn comes the next time.
            queue.undo_pop();
            break;
        }
        *sent = 0;
        queue.push(head, 0)?;
    }
    Ok(chains)
}

/// A chain's memory after its first `skip` bytes: how many bytes, at most `most`, and whether these are all.
fn take(
    chain: Chain,
    memory: &GuestMemoryMmap<()>,
    way: Way,
    mut skip: usize,
    most: usize,
    pieces: &mut Vec<libc::iovec>,
) -> Option<(usize, bool)> {
    let mut bytes = 0;
    for descriptor in chain.filter(|descriptor| descriptor.is_write_only() == (way == Way::ToGuest)) {
        for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
            let slice = slice.ok()?;
            let skipped = skip.min(slice.len());
            skip -= skipped;
            let slice = slice.offset(skipped).ok()?;
            if slice.is_empty() {
                continue;
            }
            if bytes == most || pieces.len() == PIECES {
                return Some((bytes, false));
            }
            let length = slice.len().min(most - bytes);
            // The memory stays mapped for as long as the queue holds it.
            pieces.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: length });
            bytes += length;
            if length < slice.len() {
                return Some((bytes, false));
            }
        }
    }
    Some((bytes, true))
}

fn call(socket: RawFd, way: Way, pieces: &mut [libc::iovec]) -> io::Result<usize> {
    let moved = match way {
        Way::ToGuest => {
            let count = libc::c_int::try_from(pieces.len()).unwrap_or(0);
            // SAFETY: each piece is a checked range of guest memory, mapped for writing while the queue is held; the
            // kernel writes it as another process would, and nothing here has a reference into it.
            unsafe { libc::readv(socket, pieces.as_ptr(), count) }
        }
        Way::FromGuest => {
            // SAFETY: all zeros are a message without address, pieces and control data.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = pieces.as_mut_ptr();
            message.msg_iovlen = pieces.len();
            // SAFETY: as above, but that the kernel only reads; the message lives for the call.
            unsafe { libc::sendmsg(socket, &raw const message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) }
        }
    };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}
