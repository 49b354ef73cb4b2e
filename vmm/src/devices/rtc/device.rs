//! The two ports, and the registers behind them.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::clock::Moment;
use crate::bus::BusDevice;

const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;
/// The usual time base and rate, and no update in progress.
const A: u8 = 0x26;
/// Hours to 23, BCD, no interrupts.
const B: u8 = 0x02;
/// The battery is good.
const D: u8 = 0x80;

/// The clock.
#[derive(Debug, Default)]
pub struct Rtc {
    index: u8,
    shown: Moment,
}

/// What is saved of a clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    /// The register that was selected last.
    pub index: u8,
}

impl Rtc {
    /// The clock, as after power-on or as it was saved.
    pub fn new(state: RtcState) -> Self {
        let mut rtc = Self { index: state.index & 0x7f, ..Self::default() };
        rtc.look();
        rtc
    }

    /// What is saved.
    pub fn save(&self) -> RtcState {
        RtcState { index: self.index }
    }

    fn look(&mut self) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.shown = Moment::from_unix(since.as_secs());
    }

    fn register(&mut self) -> u8 {
        // A driver reads the seconds first or looks at status A for an update, and then reads on. All of it is the same
        // moment, so no update ever comes between.
        if matches!(self.index, 0 | STATUS_A) {
            self.look();
        }
        match self.index {
            0 => bcd(self.shown.second),
            2 => bcd(self.shown.minute),
            4 => bcd(self.shown.hour),
            6 => bcd(self.shown.weekday),
            7 => bcd(self.shown.day),
            8 => bcd(self.shown.month),
            9 => bcd(self.shown.year),
            CENTURY => bcd(self.shown.century),
            STATUS_A => A,
            STATUS_B => B,
            STATUS_D => D,
            _ => 0,
        }
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (1, [value]) = (offset, data) {
            *value = self.register();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (0, [index]) = (offset, data) {
            // The highest bit masks non-maskable interrupts, of which there are none.
            self.index = index & 0x7f;
        }
    }
}

fn bcd(value: u8) -> u8 {
    ((value / 10) << 4) | (value % 10)
}
