//! The console device: the console and two ports, with clients that come and go.

#![no_main]
#![allow(clippy::unwrap_used)]

use catalyst_vmm::console::Console;
use catalyst_vmm::devices::serial::Serial;
use catalyst_vmm_fuzz::{All, Data, Door, Guest, Message, Op, threads};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

/// A control message, or a port's data.
#[derive(Arbitrary, Debug)]
enum Said {
    Control { port: u8, event: u8, value: u8 },
    Data { queue: u8, bytes: Data },
}

impl Message for Said {
    fn queue(&self) -> u8 {
        match self {
            Self::Control { .. } => 3,
            Self::Data { queue, .. } => *queue,
        }
    }
    fn bytes(&self, _: &[u64]) -> Vec<u8> {
        match self {
            Self::Control { port, event, value } => vec![port % 5, 0, 0, 0, event % 9, 0, *value, 0],
            Self::Data { bytes, .. } => bytes.0.clone(),
        }
    }
}

fuzz_target!(|ops: All<Op<Said>>| {
    let (listeners, mut doors): (Vec<_>, Vec<_>) = (0..3).map(|_| Door::new()).unzip();
    let mut listeners = listeners.into_iter();
    let console = Console::new(listeners.next(), None);
    let ports = ["one", "two"].map(str::to_owned).into_iter().zip(listeners).collect();
    let device = Serial::new(Some(console), ports, &threads().reactor).unwrap();
    Guest::new(device).run(&ops.0, |_, which, act| {
        doors[usize::from(which % 3)].act(which / 3, act);
    });
});
