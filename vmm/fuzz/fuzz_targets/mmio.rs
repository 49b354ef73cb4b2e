//! The transport's registers, in any order and width, in front of two kinds of device.

#![no_main]
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use catalyst_vmm::bus::BusDevice;
use catalyst_vmm::devices::balloon::Balloon;
use catalyst_vmm::devices::rng::Rng;
use catalyst_vmm::virtio::VirtioDevice;
use catalyst_vmm::virtio::mmio::Transport;
use catalyst_vmm::virtio::testing;
use catalyst_vmm_fuzz::{All, Data, Place, threads};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

#[derive(Arbitrary, Debug)]
enum Access {
    Read {
        offset: u16,
        width: u8,
    },
    Write {
        offset: u16,
        bytes: [u8; 8],
        width: u8,
    },
    /// A register's number that drivers write.
    Known {
        register: u8,
        value: u32,
    },
    /// A queue's three addresses.
    Queue {
        queue: u8,
        size: u16,
        at: [Place; 3],
    },
    /// Status up to this step.
    Steps(u8),
    Memory(Place, Data),
    Settle,
}

const REGISTERS: [u16; 16] =
    [0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0xfc];

fn drive<D: VirtioDevice>(device: D, accesses: &[Access]) {
    let memory = testing::memory();
    let mut transport = Transport::new(device, Arc::clone(&memory)).unwrap();
    let put = |transport: &mut Transport<D>, offset: u16, value: u32| {
        transport.write(offset.into(), &value.to_le_bytes());
    };
    for access in accesses {
        match access {
            Access::Read { offset, width } => {
                transport.read((*offset).into(), &mut [0xff; 8][..=usize::from(width % 8)]);
            }
            Access::Write { offset, bytes, width } => {
                transport.write((*offset).into(), &bytes[..=usize::from(width % 8)]);
            }
            Access::Known { register, value } => {
                put(&mut transport, REGISTERS[usize::from(register % 16)], *value);
            }
            Access::Queue { queue, size, at } => {
                put(&mut transport, 0x30, (queue % 4).into());
                put(&mut transport, 0x38, (*size).into());
                for (offset, place) in [0x80, 0x90, 0xa0].into_iter().zip(at) {
                    put(&mut transport, offset, place.address() as u32);
                    put(&mut transport, offset + 4, (place.address() >> 32) as u32);
                }
                put(&mut transport, 0x44, 1);
            }
            Access::Steps(most) => {
                put(&mut transport, 0x24, 1);
                put(&mut transport, 0x20, 1);
                for status in [1, 3, 0xb, 0xf].into_iter().take((most % 5).into()) {
                    put(&mut transport, 0x70, status);
                }
            }
            Access::Memory(place, bytes) => drop(memory.write_slice(&bytes.0, GuestAddress(place.address()))),
            Access::Settle => threads().settle(),
        }
    }
    threads().settle();
    let saved = serde_json::to_vec(&transport.save()).unwrap();
    assert!(!saved.is_empty());
}

fuzz_target!(|input: (bool, All<Access>)| {
    let reactor = Arc::clone(&threads().reactor);
    if input.0 {
        drive(Rng::new(reactor), &input.1.0);
    } else {
        drive(Balloon::new(reactor), &input.1.0);
    }
});
