//! The serial port, the keyboard controller and the clock, by their ports.

#![no_main]
#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};

use catalyst_vmm::bus::Bus;
use catalyst_vmm::console::Console;
use catalyst_vmm::devices::i8042::I8042;
use catalyst_vmm::devices::rtc::{Rtc, RtcState};
use catalyst_vmm::devices::uart::Uart;
use catalyst_vmm_fuzz::{Act, All, Door, threads};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[derive(Arbitrary, Debug)]
enum Access {
    Read {
        port: Port,
        width: u8,
    },
    Write {
        port: Port,
        bytes: [u8; 8],
        width: u8,
    },
    /// Of the client at the serial port.
    Host(Act),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Port {
    Serial(u8),
    Keyboard(u8),
    Clock(u8),
    Any(u16),
}

impl Port {
    fn number(self) -> u64 {
        match self {
            Self::Serial(offset) => 0x3f8 + u64::from(offset % 8),
            Self::Keyboard(offset) => 0x60 + u64::from(offset % 5),
            Self::Clock(offset) => 0x70 + u64::from(offset % 2),
            Self::Any(port) => port.into(),
        }
    }
}

fuzz_target!(|accesses: All<Access>| {
    let (listener, mut door) = Door::new();
    let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
    let uart = Uart::new(Console::new(Some(listener), None), interrupt, &threads().reactor).unwrap();
    let mut bus = Bus::default();
    let uart = Arc::new(Mutex::new(uart));
    bus.attach(0x3f8, 8, uart.clone()).unwrap();
    bus.attach(0x60, 5, Arc::new(Mutex::new(I8042::new(|| ())))).unwrap();
    bus.attach(0x70, 2, Arc::new(Mutex::new(Rtc::new(RtcState::default())))).unwrap();
    for access in &accesses.0 {
        match access {
            Access::Read { port, width } => {
                bus.read(port.number(), &mut [0; 8][..=usize::from(width % 8)]);
            }
            Access::Write { port, bytes, width } => {
                bus.write(port.number(), &bytes[..=usize::from(width % 8)]);
            }
            Access::Host(act) => door.act(0, act),
        }
    }
    threads().settle();
    let uart = uart.lock().unwrap();
    let _ = uart.save();
    uart.flush();
    uart.end();
});
