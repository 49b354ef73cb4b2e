//! Virtio devices from the guest's side: each access to a register and each interrupt is a virtual CPU's.

use catalyst_vmm::description::{Disk, Format, Layer, Port, Serial, Vsock};
use catalyst_vmm::layout;
use vm_memory::GuestAddress;

use crate::guest::{Guest, until};
use crate::machine::{Machine, Plan, file};

pub const WRITE: u16 = 2;
const NEXT: u16 = 1;

/// A driver of the device in `slot`, as virtio 1.2, section 3.1.1 has it.
pub struct Driver<'a> {
    guest: &'a Guest,
    registers: u64,
    gsi: u32,
}

/// One queue of eight descriptors.
#[derive(Clone)]
pub struct Queue {
    at: u64,
    number: u32,
    offered: u16,
}

impl<'a> Driver<'a> {
    /// The driver of a device that is at work already.
    pub fn again(machine: &'a Machine, slot: u32) -> Self {
        let registers = layout::VIRTIO_START + u64::from(slot) * layout::VIRTIO_SIZE;
        Self { guest: &machine.guest, registers, gsi: layout::VIRTIO_FIRST_GSI + slot }
    }

    pub fn new(machine: &'a Machine, slot: u32, kind: u32) -> Self {
        let driver = Self::again(machine, slot);
        assert_eq!([0, 4, 8].map(|offset| driver.read(offset)), [0x7472_6976, 2, kind]);
        driver.guest.route(driver.gsi);
        for status in [0, 1, 3] {
            driver.write(0x70, status);
        }
        // VIRTIO_F_VERSION_1 alone.
        driver.write(0x24, 1);
        driver.write(0x20, 1);
        driver.write(0x70, 11);
        assert_eq!(driver.read(0x70), 11, "the features are taken");
        driver
    }

    pub fn read(&self, offset: u64) -> u32 {
        self.guest.read32(self.registers + offset)
    }

    fn write(&self, offset: u64, value: u32) {
        self.guest.write32(self.registers + offset, value);
    }

    pub fn queue(&self, number: u32) -> Queue {
        let at = self.guest.take(0x3000);
        self.write(0x30, number);
        self.write(0x38, 8);
        for (register, address) in [(0x80, at), (0x90, at + 0x1000), (0xa0, at + 0x2000)] {
            self.write(register, u32::try_from(address).unwrap());
            self.write(register + 4, 0);
        }
        self.write(0x44, 1);
        Queue { at, number, offered: 0 }
    }

    pub fn ready(&self) {
        self.write(0x70, 15);
        assert_eq!(self.read(0x70), 15, "the device works");
    }

    /// Offers one chain of (address, length, flags), waits for its interrupt and that it is used; bytes written.
    pub fn request(&self, queue: &mut Queue, parts: &[(u64, u32, u16)]) -> u32 {
        let before = self.guest.interrupts(self.gsi);
        self.offer(queue, parts);
        self.write(0x50, queue.number);
        self.used(queue, before)
    }

    /// Offers one chain, and tells nobody.
    pub fn offer(&self, queue: &mut Queue, parts: &[(u64, u32, u16)]) {
        let memory = &self.guest.memory;
        for (index, (address, length, flags)) in parts.iter().enumerate() {
            let last = index + 1 == parts.len();
            let flags = if last { *flags } else { flags | NEXT };
            let at = queue.at + 16 * index as u64;
            memory.write_obj(*address, GuestAddress(at)).unwrap();
            memory.write_obj(*length, GuestAddress(at + 8)).unwrap();
            memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
            memory.write_obj(u16::try_from(index + 1).unwrap(), GuestAddress(at + 14)).unwrap();
        }
        let ring = queue.at + 0x1000;
        memory.write_obj(0_u16, GuestAddress(ring + 4 + 2 * u64::from(queue.offered % 8))).unwrap();
        queue.offered += 1;
        memory.write_obj(queue.offered, GuestAddress(ring + 2)).unwrap();
    }

    /// Waits until the last chain has come back, with one more interrupt than there were; bytes written.
    pub fn used(&self, queue: &Queue, before: u64) -> u32 {
        let memory = &self.guest.memory;
        let used = queue.at + 0x2000;
        until("the chain comes back", || {
            memory.read_obj::<u16>(GuestAddress(used + 2)).unwrap() == queue.offered
        });
        until("its interrupt comes", || self.guest.interrupts(self.gsi) > before);
        assert_eq!(self.read(0x60) & 1, 1, "used buffer notification");
        self.write(0x64, 1);
        memory.read_obj(GuestAddress(used + 8 + 8 * u64::from((queue.offered - 1) % 8))).unwrap()
    }
}

#[test]
fn random_bytes_come_with_an_interrupt() {
    let Some(mut plan) = Plan::new() else { return };
    plan.description.rng = true;
    let mut machine = plan.start();
    machine.guest.enable_interrupts();
    let driver = Driver::new(&machine, 0, 4);
    let mut queue = driver.queue(0);
    driver.ready();
    let buffer = machine.guest.take(64);
    assert_eq!(driver.request(&mut queue, &[(buffer, 64, WRITE)]), 64);
    assert_ne!(machine.guest.bytes(buffer, 64), [0; 64]);
    let rng = machine.stats().devices["rng"];
    assert_eq!((rng.requests, rng.interrupts, rng.read_bytes), (1, 1, 64));
}

#[test]
fn a_disk_is_written_and_read_and_its_file_has_it() {
    let Some(mut plan) = Plan::new() else { return };
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let fd = plan.give(std::fs::File::options().read(true).write(true).open(image.path()).unwrap());
    plan.description.disks = vec![Disk {
        layers: vec![Layer { fd, format: Format::Raw }],
        read_only: false,
        queues: 1,
        serial: String::new(),
    }];
    let machine = plan.start();
    machine.guest.enable_interrupts();
    let driver = Driver::new(&machine, 0, 2);
    let mut queue = driver.queue(0);
    driver.ready();
    assert_eq!(driver.read(0x100), 2048, "sectors");
    let (header, data) = (machine.guest.take(17), machine.guest.take(512));
    let memory = &machine.guest.memory;
    let mut request = |kind: u32, sector: u64, flags: u16| {
        memory.write_obj(kind, GuestAddress(header)).unwrap();
        memory.write_obj(sector, GuestAddress(header + 8)).unwrap();
        driver.request(&mut queue, &[(header, 16, 0), (data, 512, flags), (header + 16, 1, WRITE)]);
        memory.read_obj::<u8>(GuestAddress(header + 16)).unwrap()
    };
    memory.write_slice(&[0xa5; 512], GuestAddress(data)).unwrap();
    assert_eq!(request(1, 3, 0), 0);
    assert_eq!(std::fs::read(image.path()).unwrap()[3 * 512..4 * 512], [0xa5; 512]);
    memory.write_slice(&[0; 512], GuestAddress(data)).unwrap();
    assert_eq!(request(0, 3, WRITE), 0);
    assert_eq!(machine.guest.bytes(data, 512), [0xa5; 512]);
    assert_eq!(request(0, 1 << 40, WRITE), 1, "an I/O error beyond the end");
}

#[test]
fn every_device_is_where_the_tables_say() {
    let Some(mut plan) = Plan::new() else { return };
    plan.as_user = is_root();
    let disk = plan.give(file(&[0; 4096]));
    plan.description.disks = vec![Disk {
        layers: vec![Layer { fd: disk, format: Format::Raw }],
        read_only: true,
        queues: 2,
        serial: "0001".into(),
    }];
    let port = Port { name: "org.catalyst.agent.0".into(), listener: plan.listen("agent") };
    plan.description.serial = Some(Serial { console: None, ports: vec![port] });
    (plan.description.rng, plan.description.balloon) = (true, true);
    plan.description.vsock = Some(Vsock { cid: 3, listener: Some(plan.listen("vsock")), upstream: None });
    let machine = plan.start();
    let kinds: Vec<u32> = (0..6)
        .map(|slot| machine.guest.read32(layout::VIRTIO_START + slot * layout::VIRTIO_SIZE + 8))
        .collect();
    assert_eq!(kinds, [2, 3, 4, 5, 19, u32::MAX]);
}

fn is_root() -> bool {
    // SAFETY: it only answers.
    unsafe { libc::geteuid() == 0 }
}
