//! Power, reset and events of ACPI: the registers that hardware-reduced ACPI wants (ACPI 6.5, sections 4.8.3 and
//! 5.6.9), on one page.

mod device;
mod state;
#[cfg(test)]
mod tests;

pub use device::{Power, PowerRequest};
pub use state::PowerState;

/// Events that happened since the last read, 32 bits; reading takes them.
pub const EVENTS: u64 = 0;
/// Sleep control register, 8 bits (section 4.8.3.7).
pub const SLEEP_CONTROL: u64 = 4;
/// Sleep status register, 8 bits.
pub const SLEEP_STATUS: u64 = 5;
/// Reset register, 8 bits.
pub const RESET: u64 = 6;
/// What is written there to reset.
pub const RESET_VALUE: u8 = 1;
/// Sleep type of S5, soft off.
pub const SLEEP_TYPE_OFF: u8 = 5;

/// Event: the power button was pressed.
pub const POWER_BUTTON: u8 = 1;
/// Event: the generation ID has changed.
pub const NEW_GENERATION: u8 = 2;
