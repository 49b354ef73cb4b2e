//! The registers.

use std::fmt::Debug;

use vmm_sys_util::eventfd::EventFd;

use super::{EVENTS, POWER_BUTTON, PowerState, RESET, RESET_VALUE, SLEEP_CONTROL, SLEEP_TYPE_OFF};
use crate::bus::BusDevice;

/// What the guest asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// S5.
    Off,
    /// A reset.
    Reset,
}

/// Called when the guest asks for something.
type Ask = Box<dyn FnMut(PowerRequest) + Send>;

/// The registers of power and events.
pub struct Power {
    state: PowerState,
    interrupt: EventFd,
    ask: Ask,
}

impl Power {
    /// Events raise `interrupt`; what the guest asks is told to `ask`.
    pub fn new(interrupt: EventFd, ask: impl FnMut(PowerRequest) + Send + 'static) -> Self {
        Self { state: PowerState::default(), interrupt, ask: Box::new(ask) }
    }

    /// Presses the power button.
    pub fn press_button(&mut self) {
        self.raise(POWER_BUTTON);
    }

    /// Tells the guest of an event.
    pub fn raise(&mut self, event: u8) {
        self.state.events |= u32::from(event);
        // Full means raised.
        let _ = self.interrupt.write(1);
    }

    /// The interrupt of events; it is wired to its GSI.
    pub fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// What is saved.
    pub fn save(&self) -> PowerState {
        self.state
    }

    /// Goes on from what was saved; events that the guest has not taken are told once more.
    pub fn restore(&mut self, state: PowerState) {
        self.state = state;
        if state.events != 0 {
            // Full means raised.
            let _ = self.interrupt.write(1);
        }
    }
}

impl BusDevice for Power {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (EVENTS, Ok(data)) = (offset, <&mut [u8; 4]>::try_from(data)) {
            *data = std::mem::take(&mut self.state.events).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        const SLEEP_ENABLE: u8 = 1 << 5;
        let &[value] = data else { return };
        match offset {
            SLEEP_CONTROL if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_TYPE_OFF => {
                (self.ask)(PowerRequest::Off);
            }
            RESET if value == RESET_VALUE => (self.ask)(PowerRequest::Reset),
            _ => {}
        }
    }
}

impl Debug for Power {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Power").field("state", &self.state).finish_non_exhaustive()
    }
}
