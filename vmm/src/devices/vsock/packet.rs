//! A packet in guest memory: a header, and the bytes of a stream.
//!
//! The crate `virtio-vsock` knows the header. How a packet lies in its chain is found out here: the crate wants the
//! data in one descriptor, while Linux (from 6.17, and for zero-copy from 6.7) sends it in several.

use virtio_vsock::packet::{PKT_HEADER_SIZE, VsockPacket};
use vm_memory::{GuestMemory, GuestMemoryMmap, VolatileSlice};

use crate::virtio::queue::Chain;

/// Bytes of a header.
pub const HEADER_BYTES: usize = PKT_HEADER_SIZE;
/// Most pieces of memory in a packet. Linux uses 18 at most.
const MAX_PIECES: usize = 64;

/// A chain that is no packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    /// A descriptor of the wrong direction, outside memory, or too many of them.
    #[error("The guest's packet is not in memory that the device may use")]
    Memory,
    /// Shorter than its header, or than its header says.
    #[error("The guest's packet is shorter than it must be")]
    Short,
}

/// A packet's header (virtio 1.2, section 5.10.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Context ID of the sender.
    pub src_cid: u64,
    /// Context ID of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of data.
    pub len: u32,
    /// Socket type.
    pub kind: u16,
    /// What it is for.
    pub op: u16,
    /// More about that.
    pub flags: u32,
    /// The sender's buffer, in bytes.
    pub buf_alloc: u32,
    /// Bytes that have left that buffer since the connection began, modulo 2³².
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut own = *bytes;
        let read = |packet: &mut VsockPacket<'_, ()>| Self {
            src_cid: packet.src_cid(),
            dst_cid: packet.dst_cid(),
            src_port: packet.src_port(),
            dst_port: packet.dst_port(),
            len: packet.len(),
            kind: packet.type_(),
            op: packet.op(),
            flags: packet.flags(),
            buf_alloc: packet.buf_alloc(),
            fwd_cnt: packet.fwd_cnt(),
        };
        with_packet(&mut own, |packet| packet.set_header_from_raw(bytes).ok().map(|()| read(packet)))
            .flatten()
            .unwrap_or_default()
    }

    /// Writes a header.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        with_packet(&mut bytes, |packet| {
            packet
                .set_src_cid(self.src_cid)
                .set_dst_cid(self.dst_cid)
                .set_src_port(self.src_port)
                .set_dst_port(self.dst_port)
                .set_len(self.len)
                .set_type(self.kind)
                .set_op(self.op)
                .set_flags(self.flags)
                .set_buf_alloc(self.buf_alloc)
                .set_fwd_cnt(self.fwd_cnt);
        });
        bytes
    }
}

/// The crate's view of a header in our own memory.
fn with_packet<R>(
    bytes: &mut [u8; HEADER_BYTES],
    work: impl FnOnce(&mut VsockPacket<'_, ()>) -> R,
) -> Option<R> {
    // SAFETY: the packet lives only within this function, during which `bytes` is borrowed for nobody else.
    unsafe { VsockPacket::new(bytes, None) }.ok().map(|mut packet| work(&mut packet))
}

/// Pieces of guest memory that are one run of bytes.
#[derive(Debug)]
pub struct Span<'m>(Vec<VolatileSlice<'m>>);

impl<'m> Span<'m> {
    /// All memory of a chain, which must be for the device to write or to read.
    fn of(memory: &'m GuestMemoryMmap<()>, chain: Chain, writable: bool) -> Result<Self, PacketError> {
        let mut pieces = Vec::with_capacity(2);
        for (index, descriptor) in chain.enumerate() {
            // Empty ones count too: an indirect table may have 65535 of them.
            if descriptor.is_write_only() != writable || index == MAX_PIECES {
                return Err(PacketError::Memory);
            }
            for piece in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
                if pieces.len() == MAX_PIECES {
                    return Err(PacketError::Memory);
                }
                pieces.push(piece.map_err(|_| PacketError::Memory)?);
            }
        }
        Ok(Self(pieces))
    }

    /// Bytes in all.
    pub fn length(&self) -> usize {
        self.0.iter().map(VolatileSlice::len).sum()
    }

    /// The bytes from `skip` on, at most `count`, piece by piece.
    pub fn pieces(&self, skip: usize, count: usize) -> impl Iterator<Item = VolatileSlice<'m>> {
        let (mut skip, mut left) = (skip, count);
        self.0.iter().filter_map(move |piece| {
            let begin = skip.min(piece.len());
            skip -= begin;
            let length = left.min(piece.len() - begin);
            left -= length;
            if length == 0 { None } else { piece.subslice(begin, length).ok() }
        })
    }

    fn header(&self) -> Result<[u8; HEADER_BYTES], PacketError> {
        let mut bytes = [0; HEADER_BYTES];
        let mut at = 0;
        for piece in self.pieces(0, HEADER_BYTES) {
            at += piece.copy_to(&mut bytes[at..]);
        }
        if at == HEADER_BYTES { Ok(bytes) } else { Err(PacketError::Short) }
    }
}

/// A packet from the guest. Its header was read once; the data may still change under the device.
#[derive(Debug)]
pub struct Received<'m> {
    /// The header.
    pub header: Header,
    span: Span<'m>,
}

impl<'m> Received<'m> {
    /// Reads the packet of a chain of the tx queue.
    pub fn parse(memory: &'m GuestMemoryMmap<()>, chain: Chain) -> Result<Self, PacketError> {
        let span = Span::of(memory, chain, false)?;
        let header = Header::from_bytes(&span.header()?);
        if span.length() - HEADER_BYTES < header.len as usize {
            return Err(PacketError::Short);
        }
        Ok(Self { header, span })
    }

    /// The data from `skip` on.
    pub fn data(&self, skip: usize) -> impl Iterator<Item = VolatileSlice<'m>> {
        self.span.pieces(HEADER_BYTES + skip, (self.header.len as usize).saturating_sub(skip))
    }
}

/// Room for a packet to the guest.
#[derive(Debug)]
pub struct Room<'m>(Span<'m>);

impl<'m> Room<'m> {
    /// Takes the room of a chain of the rx queue; there is some for data.
    pub fn parse(memory: &'m GuestMemoryMmap<()>, chain: Chain) -> Result<Self, PacketError> {
        let span = Span::of(memory, chain, true)?;
        if span.length() > HEADER_BYTES { Ok(Self(span)) } else { Err(PacketError::Short) }
    }

    /// Where data goes, `limit` bytes at most.
    pub fn data(&self, limit: usize) -> impl Iterator<Item = VolatileSlice<'m>> {
        self.0.pieces(HEADER_BYTES, limit)
    }

    /// Writes the header and returns the bytes that the packet takes, its data being there already.
    pub fn finish(&self, header: Header) -> u32 {
        let bytes = header.to_bytes();
        let mut at = 0;
        for piece in self.0.pieces(0, HEADER_BYTES) {
            piece.copy_from(&bytes[at..]);
            at += piece.len();
        }
        u32::try_from(at).unwrap_or(0) + header.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_back_as_it_was_written() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 3,
            dst_port: 4,
            len: 5,
            kind: 6,
            op: 7,
            flags: 8,
            buf_alloc: 9,
            fwd_cnt: 0xa0b0_c0d0,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes[..8], 0x0102_0304_0506_0708_u64.to_le_bytes());
        assert_eq!(bytes[28..32], [6, 0, 7, 0]);
        assert_eq!(bytes[40..], 0xa0b0_c0d0_u32.to_le_bytes());
        assert_eq!(Header::from_bytes(&bytes), header);
    }
}
