//! Saved machines: the file, and what a device and its transport make of their part of one. What goes on works on rings
//! of any content, and what is saved of it can be restored.

#![no_main]
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use catalyst_vmm::console::Console;
use catalyst_vmm::description::Format;
use catalyst_vmm::devices::balloon::Balloon;
use catalyst_vmm::devices::block::{Block, Image};
use catalyst_vmm::devices::rng::Rng;
use catalyst_vmm::devices::serial::Serial;
use catalyst_vmm::devices::uart::{Uart, UartState};
use catalyst_vmm::devices::vsock::Vsock;
use catalyst_vmm::memory::GuestRam;
use catalyst_vmm::snapshot::{decode, seal};
use catalyst_vmm::virtio::mmio::{Saved, Transport};
use catalyst_vmm::virtio::{VirtioDevice, testing};
use catalyst_vmm_fuzz::{All, Data, Door, Few, Place, memfd, threads};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[derive(Arbitrary, Debug)]
enum Input {
    /// Any bytes.
    File(Data),
    /// Any content behind a header that is right.
    Content(Data),
    /// A device of some kind.
    Device { kind: u8, state: Transported, then: All<Then> },
    /// A serial port.
    Port { registers: [u8; 9], received: Data, held: Data },
}

/// What is saved of a transport.
#[derive(Arbitrary, Debug)]
struct Transported {
    /// Part of the device's own state.
    numbers: [u32; 2],
    flags: [bool; 6],
    /// One that works, most often.
    status: Option<u32>,
    features: u64,
    selected: [u32; 3],
    interrupt: u32,
    needs_reset: bool,
    queues: Few<Ring>,
}

#[derive(Arbitrary, Debug)]
struct Ring {
    /// As the device has it, most often.
    longest: Option<u16>,
    size: u8,
    ready: bool,
    at: [Place; 3],
    next: [u8; 2],
}

/// What the guest does after.
#[derive(Arbitrary, Debug)]
enum Then {
    Write(Place, Data),
    Kick(u8),
    Settle,
}

impl Transported {
    fn json<D: VirtioDevice>(&self, device: &D, own: Value) -> Value {
        // VIRTIO_F_VERSION_1, and what is offered.
        let features = (self.features & (device.features() | 3 << 28)) | 1 << 32;
        let sizes = device.queue_sizes();
        let ring = |(index, ring): (usize, &Ring)| {
            let longest = sizes.get(index).copied().unwrap_or(16);
            json!({
                "max_size": ring.longest.unwrap_or(longest),
                "size": 1_u32 << (ring.size % 10),
                "ready": ring.ready,
                // As they must be aligned, most often.
                "desc_table": ring.at[0].address() & !(u64::from(ring.size < 200) * 15),
                "avail_ring": ring.at[1].address() & !(u64::from(ring.size < 200)),
                "used_ring": ring.at[2].address() & !(u64::from(ring.size < 200) * 3),
                "next_avail": ring.next[0],
                "next_used": ring.next[1],
                "event_idx_enabled": ring.ready,
            })
        };
        let blank = Ring {
            longest: None,
            size: 3,
            ready: false,
            at: [Place::Ring(0), Place::Ring(0x80), Place::Ring(0x100)],
            next: [0, 0],
        };
        let rings = (0..sizes.len()).map(|index| self.queues.0.get(index).unwrap_or(&blank));
        json!({
            "device": own,
            "status": self.status.unwrap_or(15),
            "features": features,
            "features_select": self.selected[0],
            "driver_features_select": self.selected[1],
            "queue_select": self.selected[2],
            "interrupt_status": self.interrupt,
            "needs_reset": self.needs_reset,
            "queues": rings.enumerate().map(ring).collect::<Vec<_>>(),
        })
    }
}

fn transport<D: VirtioDevice>(device: D, memory: &GuestRam) -> Transport<D> {
    Transport::new(device, Arc::clone(memory)).unwrap()
}

fn go_on<D: VirtioDevice>(make: impl Fn() -> D, state: &Transported, own: Value, then: &[Then]) {
    let memory = testing::memory();
    let mut first = transport(make(), &memory);
    let state = state.json(first.device(), own);
    if Saved::restore(&mut first, &state).is_err() {
        return;
    }
    for step in then {
        match step {
            Then::Write(place, bytes) => drop(memory.write_slice(&bytes.0, GuestAddress(place.address()))),
            Then::Kick(queue) => {
                let kicks = first.kicks();
                kicks[usize::from(*queue) % kicks.len()].write(1).unwrap();
            }
            Then::Settle => threads().settle(),
        }
    }
    threads().settle();
    let saved = Saved::save(&first).unwrap();
    drop(first);
    let mut second = transport(make(), &memory);
    Saved::restore(&mut second, &saved).unwrap_or_else(|error| panic!("{error}: {saved}"));
    threads().settle();
}

fn serial() -> Serial {
    let (listeners, _doors): (Vec<_>, Vec<_>) = (0..2).map(|_| Door::new()).unzip();
    let ports = ["one", "two"].map(str::to_owned).into_iter().zip(listeners).collect();
    Serial::new(Some(Console::default()), ports, &threads().reactor).unwrap()
}

fn device(kind: u8, state: &Transported, then: &[Then]) {
    let reactor = || Arc::clone(&threads().reactor);
    let [first, second] = state.numbers;
    match kind % 5 {
        0 => go_on(|| Rng::new(reactor()), state, Value::Null, then),
        1 => go_on(|| Balloon::new(reactor()), state, json!({"target": first, "actual": second}), then),
        2 => go_on(|| Vsock::new(3, None, None, reactor()), state, json!({"cid": first}), then),
        3 => {
            let disk = || {
                let image = Image::open(vec![(memfd(&[7; 1 << 16]), Format::Raw)], false).unwrap();
                Block::new(image, "disk", vec![reactor()], Arc::new(|| ()))
            };
            let own = json!({"sectors": 128, "read_only": false, "queues": 1, "serial": "disk"});
            go_on(disk, state, own, then);
        }
        _ => {
            let [owes_add, owes_name, ready, guest_open, told_open, bounced] = state.flags;
            let port = |(id, name): (u32, &str)| {
                json!({"id": id, "name": name, "state": {
                    "owes_add": owes_add, "owes_name": owes_name, "ready": ready, "guest_open": guest_open,
                    "told_open": told_open, "bounced": bounced, "sent": first,
                }})
            };
            let ports: Vec<_> = [(0, ""), (1, "one"), (2, "two")].into_iter().map(port).collect();
            go_on(serial, state, json!({"ports": ports}), then);
        }
    }
}

fn port(registers: [u8; 9], received: Vec<u8>, held: Vec<u8>) {
    let state = UartState {
        baud_divisor_low: registers[0],
        baud_divisor_high: registers[1],
        interrupt_enable: registers[2],
        interrupt_identification: registers[3],
        line_control: registers[4],
        line_status: registers[5],
        modem_control: registers[6],
        modem_status: registers[7],
        scratch: registers[8],
        received,
        held,
    };
    let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
    if let Ok(uart) = Uart::restore(&state, Console::default(), interrupt, &threads().reactor) {
        threads().settle();
        let _ = uart.save();
        uart.end();
    }
}

fuzz_target!(|input: Input| {
    match input {
        Input::File(bytes) => drop(decode(&bytes.0)),
        Input::Content(bytes) => drop(decode(&seal(&bytes.0).unwrap())),
        Input::Device { kind, state, then } => device(kind, &state, &then.0),
        Input::Port { registers, received, held } => port(registers, received.0, held.0),
    }
});
