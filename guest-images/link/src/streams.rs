//! Streams of one link, with what each side may still send.

use std::sync::Arc;

use bytes::Bytes;
use catalyst_agent_protocol::{ExecExit, INITIAL_CREDIT, StreamChannel};
use tokio::sync::{Semaphore, mpsc};

/// What comes on a stream.
#[derive(Debug)]
pub(crate) enum Arrival {
    Output(Bytes),
    Errors(Bytes),
    OutputEnd,
    Exited(ExecExit),
    Lost(String),
}

/// The link's end of a stream. Arrivals need no bound of their own: the credit is one.
#[derive(Debug)]
pub(crate) struct Stream {
    arrivals: mpsc::UnboundedSender<Arrival>,
    input: Arc<Semaphore>,
    output_credit: u32,
    errors_credit: u32,
    output_ended: bool,
}

/// What the user of a stream holds.
#[derive(Debug)]
pub(crate) struct StreamEnd {
    pub id: u32,
    pub arrivals: mpsc::UnboundedReceiver<Arrival>,
    pub input: Arc<Semaphore>,
}

impl Stream {
    pub(crate) fn new(id: u32) -> (Self, StreamEnd) {
        let (sender, arrivals) = mpsc::unbounded_channel();
        let input = Arc::new(Semaphore::new(INITIAL_CREDIT as usize));
        let stream = Self {
            arrivals: sender,
            input: Arc::clone(&input),
            output_credit: INITIAL_CREDIT,
            errors_credit: INITIAL_CREDIT,
            output_ended: false,
        };
        (stream, StreamEnd { id, arrivals, input })
    }

    /// Takes data of the guest; an error is more than it may send.
    pub(crate) fn data(&mut self, channel: StreamChannel, bytes: Vec<u8>) -> Result<(), &'static str> {
        let credit = match channel {
            StreamChannel::Output => &mut self.output_credit,
            StreamChannel::Errors => &mut self.errors_credit,
            StreamChannel::Input => return Err("it sent what only the host sends"),
        };
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        *credit = credit.checked_sub(length).ok_or("it sent more than it may")?;
        let arrival = match (channel, bytes.is_empty()) {
            // An end costs no credit, so that it may come but once.
            (StreamChannel::Output, _) if self.output_ended => return Err("it sent more after the end"),
            (StreamChannel::Output, true) => {
                self.output_ended = true;
                Arrival::OutputEnd
            }
            (StreamChannel::Output, false) => Arrival::Output(bytes.into()),
            // The end of the command says enough of the end of its errors.
            (_, true) => return Ok(()),
            (_, false) => Arrival::Errors(bytes.into()),
        };
        self.arrive(arrival);
        Ok(())
    }

    /// The guest may send this much more on `channel`.
    pub(crate) fn grant(&mut self, channel: StreamChannel, bytes: u32) {
        let credit = match channel {
            StreamChannel::Output => &mut self.output_credit,
            StreamChannel::Errors => &mut self.errors_credit,
            StreamChannel::Input => return,
        };
        *credit = credit.saturating_add(bytes).min(INITIAL_CREDIT);
    }

    /// The guest lets the host send this much more; never more than there was at first.
    pub(crate) fn credited(&self, bytes: u32) {
        let room = (INITIAL_CREDIT as usize).saturating_sub(self.input.available_permits());
        self.input.add_permits(room.min(bytes as usize));
    }

    pub(crate) fn arrive(&self, arrival: Arrival) {
        // Whoever used the stream may have dropped it.
        let _ = self.arrivals.send(arrival);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.input.close();
    }
}
