//! One end of a line that outlives its connections: each message arrives once and in order, whatever connection was cut,
//! and whatever side was saved and goes on elsewhere. Does no I/O.
//!
//! Messages are numbered. What was sent is kept until the other side has confirmed it; after a new greeting, in which each side says
//! what it has received, the rest is sent again. The number goes as a frame's stream; confirmations are control frames.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::frame::{Channel, Frame, FrameError, MAX_PAYLOAD, encode};

/// A side confirms what it has received after so many messages.
const CONFIRM_AFTER: u32 = 16;
/// Most messages that may be unconfirmed; who has more out has a partner that breaks the rules.
pub const MOST_UNCONFIRMED: usize = 1024;

/// What control frames on a line say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum LineControl {
    /// The host greets; the guest answers.
    Hello {
        /// What the line belongs to: another number is another line, and all of the one before is void. 0: none yet.
        session: u64,
        /// The number of the last message that was received.
        received: u32,
    },
    /// The number of the last message that was received.
    Confirm {
        /// It.
        received: u32,
    },
}

impl LineControl {
    /// As the payload of a control frame.
    pub fn to_bytes(self) -> Vec<u8> {
        serde_json::to_vec(&self).unwrap_or_default()
    }
}

/// One end of a line. What it holds can be saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// The number of the last message that was sent.
    sent: u32,
    /// The last messages that were sent, which the other side may not have.
    kept: VecDeque<Vec<u8>>,
    /// The number of the last message that was received.
    received: u32,
    /// Up to where that was confirmed.
    confirmed: u32,
}

impl Line {
    /// The number of the last message that was received.
    pub fn received(&self) -> u32 {
        self.received
    }

    /// How many messages the other side has not confirmed.
    pub fn unconfirmed(&self) -> usize {
        self.kept.len()
    }

    /// Takes a message to be sent; the bytes of its frame.
    pub fn send(&mut self, epoch: u32, channel: Channel, message: Vec<u8>) -> Result<Vec<u8>, FrameError> {
        if message.len() > MAX_PAYLOAD {
            return Err(FrameError(message.len()));
        }
        self.sent = next(self.sent);
        let bytes = encode(epoch, self.sent, channel, &message)?;
        self.kept.push_back(message);
        Ok(bytes)
    }

    /// Takes a message that came; `None` if it came before, or has a gap before it.
    pub fn receive(&mut self, frame: Frame) -> Option<Vec<u8>> {
        (frame.stream == next(self.received)).then(|| {
            self.received = frame.stream;
            frame.payload
        })
    }

    /// What is to be confirmed now, if it is time.
    pub fn confirmation(&mut self) -> Option<LineControl> {
        (self.received.wrapping_sub(self.confirmed) >= CONFIRM_AFTER).then(|| {
            self.confirmed = self.received;
            LineControl::Confirm { received: self.received }
        })
    }

    /// The other side has received all up to `number`; false if that cannot be.
    pub fn confirmed(&mut self, number: u32) -> bool {
        let left = usize::try_from(distance(number, self.sent)).unwrap_or(usize::MAX);
        if left > self.kept.len() {
            return false;
        }
        self.kept.drain(..self.kept.len() - left);
        true
    }

    /// The frames that are to be sent again in a new epoch.
    pub fn again(&mut self, epoch: u32, channel: Channel) -> Vec<u8> {
        self.confirmed = self.received;
        let mut number = self.sent;
        for _ in 0..self.kept.len() {
            number = previous(number);
        }
        let mut bytes = Vec::new();
        for message in &self.kept {
            number = next(number);
            bytes.extend(encode(epoch, number, channel, message).unwrap_or_default());
        }
        bytes
    }
}

/// Numbers go round, and leave out 0, which is the stream of control frames.
fn next(number: u32) -> u32 {
    number.checked_add(1).unwrap_or(1)
}

fn previous(number: u32) -> u32 {
    if number <= 1 { u32::MAX } else { number - 1 }
}

/// How many steps from one number to the other; 0 is before 1.
fn distance(from: u32, to: u32) -> u32 {
    if to >= from { to - from } else { (u32::MAX - from) + to }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frame::Decoder;

    fn frames(bytes: &[u8]) -> Vec<Frame> {
        let mut decoder = Decoder::new();
        decoder.push(bytes);
        std::iter::from_fn(|| decoder.next_frame()).collect()
    }

    fn line_at(number: u32) -> Line {
        Line { sent: number, received: number, confirmed: number, kept: VecDeque::new() }
    }

    proptest! {
        /// Connections are cut at any moment: each message arrives once and in order, over the end of the numbers too.
        #[test]
        fn each_message_arrives_once_and_in_order(cuts in prop::collection::vec(0_usize..5, 1..60), start in prop_oneof![Just(0), Just(u32::MAX - 20)]) {
            let (mut here, mut there) = (line_at(start), line_at(start));
            let (mut sent, mut arrived) = (0_u8, Vec::new());
            for cut in cuts {
                // A new connection: what is lost of the last one is sent again.
                prop_assert!(here.confirmed(there.received()));
                let mut bytes = here.again(1, Channel::Output);
                for _ in 0..4 {
                    bytes.extend(here.send(1, Channel::Output, vec![sent]).unwrap());
                    sent += 1;
                }
                for frame in frames(&bytes).into_iter().take(cut) {
                    arrived.extend(there.receive(frame).unwrap_or_default());
                }
            }
            prop_assert!(here.confirmed(there.received()));
            for frame in frames(&here.again(2, Channel::Output)) {
                arrived.extend(there.receive(frame).unwrap_or_default());
            }
            prop_assert_eq!(arrived, (0..sent).collect::<Vec<u8>>());
        }
    }

    #[test]
    fn what_is_confirmed_is_not_kept_and_what_was_never_sent_cannot_be() {
        let (mut here, mut there) = (Line::default(), Line::default());
        for number in 0..20_u8 {
            for frame in frames(&here.send(7, Channel::Input, vec![number]).unwrap()) {
                assert_eq!(there.receive(frame.clone()), Some(vec![number]));
                assert_eq!(there.receive(frame), None, "it came before");
            }
        }
        let confirmation = there.confirmation();
        assert_eq!(confirmation, Some(LineControl::Confirm { received: 20 }));
        assert_eq!(there.confirmation(), None);
        assert_eq!(here.unconfirmed(), 20);
        assert!(here.confirmed(18) && here.confirmed(18));
        assert_eq!(here.unconfirmed(), 2);
        assert!(!here.confirmed(21), "there is no such message");
        assert!(!here.confirmed(3), "it was confirmed before");
        assert!(here.send(7, Channel::Input, vec![0; MAX_PAYLOAD + 1]).is_err());
    }
}
