//! Control messages (virtio 1.2, section 5.3.6.2).

use std::io::Read;

use vm_memory::GuestMemoryMmap;

use crate::virtio::queue::Chain;

/// Length of a message without a name.
const LENGTH: usize = 8;

/// What a message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Driver: it is ready, or failed to be.
    DeviceReady,
    /// Device: a port exists.
    PortAdd,
    /// Driver: a port is ready, or failed to be.
    PortReady,
    /// Device: a port is a console.
    ConsolePort,
    /// Both: an end was opened or closed.
    PortOpen,
    /// Device: the port's name follows.
    PortName,
}

const NUMBERS: [(u16, Event); 6] = [
    (0, Event::DeviceReady),
    (1, Event::PortAdd),
    (3, Event::PortReady),
    (4, Event::ConsolePort),
    (6, Event::PortOpen),
    (7, Event::PortName),
];

/// A message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The port's number.
    pub port: u32,
    /// What it is about.
    pub event: Event,
    /// Yes or no.
    pub value: bool,
}

impl Message {
    /// Reads the driver's message; nothing if it is too short or not known.
    pub fn read(chain: Chain, memory: &GuestMemoryMmap<()>) -> Option<Self> {
        let mut bytes = [0; LENGTH];
        chain.reader::<()>(memory).ok()?.read_exact(&mut bytes).ok()?;
        let [a, b, c, d, low, high, value, value_high] = bytes;
        let number = u16::from_le_bytes([low, high]);
        let event = NUMBERS.iter().find(|(known, _)| *known == number)?.1;
        Some(Self { port: u32::from_le_bytes([a, b, c, d]), event, value: value | value_high != 0 })
    }

    /// The message as the driver gets it.
    pub fn bytes(self, name: &str) -> Vec<u8> {
        let number = NUMBERS.iter().find(|(_, event)| *event == self.event).map_or(0, |known| known.0);
        let mut bytes = self.port.to_le_bytes().to_vec();
        bytes.extend(number.to_le_bytes());
        bytes.extend(u16::from(self.value).to_le_bytes());
        if self.event == Event::PortName {
            bytes.extend(name.as_bytes());
        }
        bytes
    }
}
