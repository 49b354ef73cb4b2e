//! One open stream: its credits, the input that waits, and word of its close.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use catalyst_agent_protocol::{INITIAL_CREDIT, StreamChannel};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::exec::Handle;

/// A command or a file on its way.
#[derive(Debug)]
pub struct Stream {
    /// Epoch it was opened in.
    pub epoch: u32,
    /// Number of the request that opened it.
    pub id: u32,
    state: Mutex<State>,
    changed: Condvar,
    /// Readable once the stream is closed.
    closed: EventFd,
    /// The command, if the stream is one's.
    command: Mutex<Option<Handle>>,
}

#[derive(Debug)]
struct State {
    output: u64,
    errors: u64,
    input: VecDeque<Vec<u8>>,
    input_credit: u64,
    input_ended: bool,
    closed: bool,
    lost: bool,
}

/// What the sender of input did.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    /// It sent these bytes.
    Bytes(Vec<u8>),
    /// It said that no more will come.
    End,
    /// The stream is closed.
    Closed,
}

impl Stream {
    /// A stream with the credits of the start.
    pub fn new(epoch: u32, id: u32) -> Result<Self, Errno> {
        let state = State {
            output: INITIAL_CREDIT.into(),
            errors: INITIAL_CREDIT.into(),
            input: VecDeque::new(),
            input_credit: INITIAL_CREDIT.into(),
            input_ended: false,
            closed: false,
            lost: false,
        };
        Ok(Self {
            epoch,
            id,
            state: Mutex::new(state),
            changed: Condvar::new(),
            closed: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            command: Mutex::new(None),
        })
    }

    /// Adds credit. Input has none: its receiver is here.
    pub fn grant(&self, channel: StreamChannel, bytes: u32) {
        let mut state = self.lock();
        match channel {
            StreamChannel::Output => state.output = state.output.saturating_add(bytes.into()),
            StreamChannel::Errors => state.errors = state.errors.saturating_add(bytes.into()),
            StreamChannel::Input => {}
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Waits for credit and says how much there is; `None` when the stream is closed.
    pub fn credit(&self, channel: StreamChannel) -> Option<usize> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            let credit = *state.credit_of(channel);
            if credit > 0 {
                return Some(usize::try_from(credit).unwrap_or(usize::MAX));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes credit that was used.
    pub fn spend(&self, channel: StreamChannel, bytes: usize) {
        let mut state = self.lock();
        let credit = state.credit_of(channel);
        *credit = credit.saturating_sub(bytes as u64);
    }

    /// Queues input; empty: its end. False if the sender had no credit for it.
    pub fn feed(&self, bytes: Vec<u8>) -> bool {
        let mut state = self.lock();
        if state.closed || state.input_ended {
            return true;
        }
        if bytes.is_empty() {
            state.input_ended = true;
        } else {
            let Some(left) = state.input_credit.checked_sub(bytes.len() as u64) else {
                return false;
            };
            state.input_credit = left;
            state.input.push_back(bytes);
        }
        drop(state);
        self.changed.notify_all();
        true
    }

    /// Waits for input.
    pub fn input(&self) -> Input {
        let mut state = self.lock();
        loop {
            if state.closed {
                return Input::Closed;
            }
            if let Some(bytes) = state.input.pop_front() {
                return Input::Bytes(bytes);
            }
            if state.input_ended {
                return Input::End;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Notes that the sender of input is given credit again.
    pub fn input_consumed(&self, bytes: usize) {
        self.lock().input_credit += bytes as u64;
    }

    /// Nothing more is wanted: wakes all that waits here.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
        // It fails only when the counter is full, and then it is readable already.
        let _ = self.closed.write(1);
    }

    /// The same where the host that had it is gone, without a word about it.
    pub fn lose(&self) {
        self.lock().lost = true;
        self.close();
    }

    /// Whether it is closed since its host is gone.
    pub fn is_lost(&self) -> bool {
        self.lock().lost
    }

    /// Whether [`Self::close`] was called.
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Readable once the stream is closed.
    pub fn closed_fd(&self) -> BorrowedFd<'_> {
        self.closed.as_fd()
    }

    /// The command's handle.
    pub fn command(&self) -> MutexGuard<'_, Option<Handle>> {
        self.command.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn credit_of(&mut self, channel: StreamChannel) -> &mut u64 {
        match channel {
            StreamChannel::Output => &mut self.output,
            StreamChannel::Errors => &mut self.errors,
            StreamChannel::Input => &mut self.input_credit,
        }
    }
}
