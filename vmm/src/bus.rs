//! Leads accesses to ports or to memory-mapped registers to the device that has them.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

/// What a guest can reach by port or by address. Accesses are 1 to 8 bytes long; offsets count from where the
/// device begins. What a device does not have reads as it left `data`, which is all ones.
pub trait BusDevice: Send + Debug {
    /// The guest reads.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device on a bus.
pub type Attached = Arc<Mutex<dyn BusDevice>>;

/// The devices of one address space. It is filled before the guest runs and does not change after.
#[derive(Debug, Default)]
pub struct Bus {
    /// By first address: the length, and the device.
    devices: BTreeMap<u64, (u64, Attached)>,
}

/// Two devices want one address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("The range {start:#x} to {end:#x} is taken by another device")]
pub struct Taken {
    start: u64,
    end: u64,
}

impl Bus {
    /// Puts a device at `start`, for `length` bytes (at least one).
    pub fn attach(&mut self, start: u64, length: u64, device: Attached) -> Result<(), Taken> {
        let end = start.saturating_add(length.max(1));
        let before = self.devices.range(..end).next_back();
        if before.is_some_and(|(first, (length, _))| first + length > start) {
            return Err(Taken { start, end });
        }
        self.devices.insert(start, (length.max(1), device));
        Ok(())
    }

    /// The guest reads; all ones where nothing is.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(address) {
            device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
        }
    }

    /// The guest writes; into nothing where nothing is.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(u64, &Attached)> {
        let (start, (length, device)) = self.devices.range(..=address).next_back()?;
        let offset = address - start;
        (offset < *length).then_some((offset, device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Echo(u64);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = u8::try_from(self.0 + offset).unwrap();
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0 = offset + u64::from(data[0]);
        }
    }

    fn echo(value: u64) -> Attached {
        Arc::new(Mutex::new(Echo(value)))
    }

    #[test]
    fn accesses_reach_the_device_whose_range_they_are_in() {
        let mut bus = Bus::default();
        bus.attach(0x100, 8, echo(1)).unwrap();
        bus.attach(0x108, 8, echo(64)).unwrap();
        let read = |address| {
            let mut data = [0];
            bus.read(address, &mut data);
            data[0]
        };
        assert_eq!([read(0xff), read(0x100), read(0x107), read(0x108), read(0x110)], [255, 1, 8, 64, 255]);
        bus.write(0x10a, &[5]);
        assert_eq!(read(0x108), 7);
    }

    #[test]
    fn ranges_do_not_overlap() {
        let mut bus = Bus::default();
        bus.attach(0x100, 0x10, echo(0)).unwrap();
        for (start, length) in [(0x100, 1), (0xf8, 9), (0x10f, 1), (0x80, 0x1000)] {
            assert!(bus.attach(start, length, echo(0)).is_err(), "{start:#x}");
        }
        bus.attach(0x110, 1, echo(0)).unwrap();
        bus.attach(0xf8, 8, echo(0)).unwrap();
    }
}
