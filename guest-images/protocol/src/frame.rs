//! Frames: found again after garbage, checked, bounded.
//!
//! ```text
//! offset  size
//!      0     4  magic "CATf"
//!      4     1  channel
//!      5     1  zero
//!      6     2  header check: low half of the CRC-32 of the header with this field zero
//!      8     4  epoch
//!     12     4  stream (0: control)
//!     16     4  length of the payload, at most 65536
//!     20     4  CRC-32 of the payload
//!     24        payload
//! ```
//! Numbers are little-endian, as virtio's are.

use std::fmt;

/// First bytes of every frame.
const MAGIC: [u8; 4] = *b"CATf";
/// Bytes before the payload.
pub const HEADER: usize = 24;
/// Largest payload in bytes.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Channel {
    /// A message (JSON).
    Control,
    /// Bytes towards the guest: a command's stdin, a file that is put. Empty: the end.
    Input,
    /// Bytes from the guest: a command's stdout, a file that is got. Empty: the end.
    Output,
    /// Bytes from the guest: a command's stderr. Empty: the end.
    Errors,
}

impl Channel {
    const fn to_byte(self) -> u8 {
        match self {
            Self::Control => 0,
            Self::Input => 1,
            Self::Output => 2,
            Self::Errors => 3,
        }
    }

    const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Control),
            1 => Some(Self::Input),
            2 => Some(Self::Output),
            3 => Some(Self::Errors),
            _ => None,
        }
    }
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Epoch it belongs to.
    pub epoch: u32,
    /// Stream it belongs to; 0 for [`Channel::Control`].
    pub stream: u32,
    /// What it carries.
    pub channel: Channel,
    /// At most [`MAX_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
}

/// A payload that fits no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameError(pub usize);

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a payload of {} bytes fits no frame: at most {MAX_PAYLOAD} do", self.0)
    }
}

impl std::error::Error for FrameError {}

/// The bytes of a frame.
pub fn encode(epoch: u32, stream: u32, channel: Channel, payload: &[u8]) -> Result<Vec<u8>, FrameError> {
    let length = u32::try_from(payload.len()).ok().filter(|_| payload.len() <= MAX_PAYLOAD);
    let length = length.ok_or(FrameError(payload.len()))?;
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    bytes.extend(MAGIC);
    bytes.extend([channel.to_byte(), 0, 0, 0]);
    bytes.extend(epoch.to_le_bytes());
    bytes.extend(stream.to_le_bytes());
    bytes.extend(length.to_le_bytes());
    bytes.extend(crc32fast::hash(payload).to_le_bytes());
    let check = header_check(&bytes);
    bytes[6..8].copy_from_slice(&check.to_le_bytes());
    bytes.extend_from_slice(payload);
    Ok(bytes)
}

/// The check of a header, whatever its check field holds.
fn header_check(header: &[u8]) -> u16 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header[..6]);
    hasher.update(&[0, 0]);
    hasher.update(&header[8..HEADER]);
    let [low, high, ..] = hasher.finalize().to_le_bytes();
    u16::from_le_bytes([low, high])
}

/// Finds frames in a stream of bytes. Holds at most one frame and what was pushed at once.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
    dropped: u64,
}

impl Decoder {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes as they come.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// Forgets a frame that has begun.
    pub fn clear(&mut self) {
        self.buffer.clear();
        self.start = 0;
    }

    /// Bytes that belonged to no whole frame.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// The next whole frame, if it has come.
    pub fn next_frame(&mut self) -> Option<Frame> {
        loop {
            let rest = &self.buffer[self.start..];
            let at = find_magic(rest);
            self.skip(at);
            let rest = &self.buffer[self.start..];
            if rest.len() < HEADER {
                return None;
            }
            let Some((channel, length)) = check_header(&rest[..HEADER]) else {
                self.skip(1);
                continue;
            };
            let payload = rest.get(HEADER..HEADER + length)?;
            if crc32fast::hash(payload) != number(rest, 20) {
                // The header is sound, so its length is: what follows it is the next frame.
                self.skip(HEADER + length);
                continue;
            }
            let frame = Frame {
                epoch: number(rest, 8),
                stream: number(rest, 12),
                channel,
                payload: payload.to_vec(),
            };
            self.start += HEADER + length;
            return Some(frame);
        }
    }

    fn skip(&mut self, count: usize) {
        self.start += count;
        self.dropped += count as u64;
    }
}

/// Where the next frame may begin: at a magic, or at an end that may become one.
fn find_magic(bytes: &[u8]) -> usize {
    let begins = |at: &usize| {
        let rest = &bytes[*at..];
        let seen = rest.len().min(MAGIC.len());
        rest[..seen] == MAGIC[..seen]
    };
    (0..bytes.len()).find(begins).unwrap_or(bytes.len())
}

fn check_header(header: &[u8]) -> Option<(Channel, usize)> {
    let sound = header[5] == 0 && header_check(header) == u16::from_le_bytes([header[6], header[7]]);
    let length = usize::try_from(number(header, 16)).ok()?;
    (sound && length <= MAX_PAYLOAD).then_some(())?;
    Some((Channel::from_byte(header[4])?, length))
}

fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn any_frame() -> impl Strategy<Value = Frame> {
        let channel = prop_oneof![
            Just(Channel::Control),
            Just(Channel::Input),
            Just(Channel::Output),
            Just(Channel::Errors)
        ];
        (any::<u32>(), any::<u32>(), channel, vec(any::<u8>(), 0..300))
            .prop_map(|(epoch, stream, channel, payload)| Frame { epoch, stream, channel, payload })
    }

    fn bytes_of(frame: &Frame) -> Vec<u8> {
        encode(frame.epoch, frame.stream, frame.channel, &frame.payload).unwrap()
    }

    fn decode_all(decoder: &mut Decoder) -> Vec<Frame> {
        std::iter::from_fn(|| decoder.next_frame()).collect()
    }

    proptest! {
        #[test]
        fn frames_come_back_however_the_stream_is_cut(
            frames in vec(any_frame(), 0..8),
            size in 1_usize..200,
        ) {
            let stream: Vec<u8> = frames.iter().flat_map(bytes_of).collect();
            let mut decoder = Decoder::new();
            let mut found = Vec::new();
            for piece in stream.chunks(size) {
                decoder.push(piece);
                found.extend(decode_all(&mut decoder));
            }
            prop_assert_eq!(found, frames);
            prop_assert_eq!(decoder.dropped(), 0);
        }

        #[test]
        fn garbage_between_frames_costs_no_frame(
            frames in vec(any_frame(), 1..5),
            // Garbage that begins like a frame could swallow the next one; that is the test below.
            garbage in vec(any::<u8>().prop_filter("no magic", |b| *b != b'C'), 0..100),
        ) {
            let mut stream = Vec::new();
            for frame in &frames {
                stream.extend(&garbage);
                stream.extend(bytes_of(frame));
            }
            let mut decoder = Decoder::new();
            decoder.push(&stream);
            prop_assert_eq!(decode_all(&mut decoder), frames.clone());
            prop_assert_eq!(decoder.dropped(), (garbage.len() * frames.len()) as u64);
        }

        #[test]
        fn a_flipped_bit_costs_one_frame_and_no_other(
            frames in vec(any_frame(), 3..4),
            at in any::<prop::sample::Index>(),
            bit in 0_u8..8,
        ) {
            let mut pieces: Vec<Vec<u8>> = frames.iter().map(bytes_of).collect();
            let hit = at.index(pieces[1].len());
            pieces[1][hit] ^= 1 << bit;
            let mut decoder = Decoder::new();
            decoder.push(&pieces.concat());
            let found = decode_all(&mut decoder);
            prop_assert_eq!(found.first(), frames.first());
            prop_assert_eq!(found.last(), frames.last());
            prop_assert_eq!(found.len(), 2);
        }

        #[test]
        fn a_frame_cut_short_is_dropped_when_the_next_comes(
            first in any_frame(),
            second in any_frame(),
            keep in any::<prop::sample::Index>(),
        ) {
            let whole = bytes_of(&first);
            let mut decoder = Decoder::new();
            decoder.push(&whole[..keep.index(whole.len())]);
            prop_assert_eq!(decoder.next_frame(), None);
            decoder.clear();
            decoder.push(&bytes_of(&second));
            prop_assert_eq!(decoder.next_frame(), Some(second));
        }

        #[test]
        fn any_bytes_are_survived_and_the_buffer_stays_bounded(pieces in vec(vec(any::<u8>(), 0..5000), 0..20)) {
            let mut decoder = Decoder::new();
            for piece in pieces {
                decoder.push(&piece);
                decode_all(&mut decoder);
                prop_assert!(decoder.buffer.len() - decoder.start < HEADER + MAX_PAYLOAD);
            }
        }
    }

    #[test]
    fn a_payload_beyond_the_bound_is_refused_on_both_sides() {
        assert!(encode(0, 0, Channel::Output, &vec![0; MAX_PAYLOAD]).is_ok());
        assert_eq!(
            encode(0, 0, Channel::Output, &vec![0; MAX_PAYLOAD + 1]),
            Err(FrameError(MAX_PAYLOAD + 1))
        );
        let mut header = encode(0, 0, Channel::Output, b"").unwrap();
        header[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
        let check = header_check(&header);
        header[6..8].copy_from_slice(&check.to_le_bytes());
        let mut decoder = Decoder::new();
        decoder.push(&header);
        assert_eq!(decoder.next_frame(), None);
        assert_eq!(decoder.dropped(), 24);
    }
}
