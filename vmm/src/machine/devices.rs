//! The devices of a machine, and how each is wired to buses, interrupts and threads.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use super::descriptors::Descriptors;
use super::{Begin, BuildError, Ended, lock};
use crate::bus::{Attached, Taken};
use crate::confine::Role;
use crate::console::Console;
use crate::control::protocol::Cause;
use crate::description::{self, Description, Format};
use crate::devices::balloon::Balloon;
use crate::devices::block::{Block, Image, ImageError, NoRoom};
use crate::devices::fs::{Fs, ShareRoot};
use crate::devices::i8042::I8042;
use crate::devices::net::Net;
use crate::devices::rng::Rng;
use crate::devices::rtc::{Rtc, RtcState};
use crate::devices::serial::Serial;
use crate::devices::uart::{Uart, UartState};
use crate::devices::vsock::Vsock;
use crate::layout;
use crate::reactor::Reactor;
use crate::snapshot::{DeviceState, MachineState};
use crate::vcpu::Buses;
use crate::virtio::counters::Counted;
use crate::virtio::mmio::{QUEUE_NOTIFY, Saved, Transport};
use crate::virtio::{Counters, VirtioDevice};
use crate::vm::Vm;

/// A device behind its transport.
type Virtio<D> = Arc<Mutex<Transport<D>>>;

/// All devices that something is asked of later.
#[derive(Debug, Default)]
pub(super) struct Devices {
    uart: Option<Uart>,
    rtc: Arc<Mutex<Rtc>>,
    disks: Vec<Virtio<Block>>,
    nics: Vec<Virtio<Net>>,
    share: Option<Virtio<Fs>>,
    /// All virtio devices, in the order in which the guest finds them.
    virtio: Vec<Named>,
}

/// A virtio device of whatever kind.
#[derive(Debug)]
struct Named {
    name: String,
    counters: Counters,
    device: Arc<Mutex<dyn Saved>>,
}

/// Puts devices where they belong while the machine is built.
pub(super) struct Wiring<'a> {
    vm: &'a Vm,
    begin: Begin,
    no_room: NoRoom,
    buses: Buses,
    reactors: Vec<Arc<Reactor>>,
    virtio: Vec<Named>,
    /// What devices go on from; [`MachineState::check`] said that they are the same.
    saved: Option<&'a MachineState>,
}

/// Names a device that could not be made.
fn device<E: Into<Box<dyn std::error::Error + Send + Sync>>>(name: &str) -> impl FnOnce(E) -> BuildError {
    let device = name.to_owned();
    move |source| BuildError::Device { device, source: source.into() }
}

impl<'a> Wiring<'a> {
    pub(super) fn new(vm: &'a Vm, begin: Begin, no_room: NoRoom, saved: Option<&'a MachineState>) -> Self {
        let (buses, reactors, virtio) = (Buses::default(), Vec::new(), Vec::new());
        Self { vm, begin, no_room, buses, reactors, virtio, saved }
    }

    /// What was put together.
    pub(super) fn finish(self) -> (Buses, Vec<Arc<Reactor>>) {
        (self.buses, self.reactors)
    }

    /// An eventfd that raises an interrupt.
    pub(super) fn interrupt(&self, gsi: u32) -> Result<EventFd, BuildError> {
        let event = crate::virtio::event().map_err(|error| BuildError::Io("an eventfd", error))?;
        self.vm.wire_interrupt(&event, gsi)?;
        Ok(event)
    }

    /// Registers in memory.
    pub(super) fn attach_mmio(
        &mut self,
        start: u64,
        length: u64,
        device: Attached,
    ) -> Result<(), BuildError> {
        self.buses.mmio.attach(start, length, device).map_err(taken)
    }

    fn attach_ports(&mut self, start: u16, length: u64, device: Attached) -> Result<(), BuildError> {
        self.buses.ports.attach(start.into(), length, device).map_err(taken)
    }

    fn reactor(&mut self, name: &str, role: Role) -> Result<Arc<Reactor>, BuildError> {
        let begin = Arc::clone(&self.begin);
        let reactor = Reactor::spawn(name, move || begin(role))
            .map(Arc::new)
            .map_err(|error| BuildError::Io("a thread for devices", error))?;
        // The machine is built paused, and so is all of it.
        reactor.pause();
        self.reactors.push(Arc::clone(&reactor));
        Ok(reactor)
    }

    /// Gives a virtio device the next place, its interrupt and its doorbells, and what was saved of it.
    fn virtio<D: VirtioDevice + 'static>(&mut self, name: &str, new: D) -> Result<Virtio<D>, BuildError> {
        let slot = self.virtio.len();
        if slot >= layout::VIRTIO_MAX {
            let why = format!("there is room for {} virtio devices", layout::VIRTIO_MAX);
            return Err(device(name)(why));
        }
        let address = layout::VIRTIO_START + slot as u64 * layout::VIRTIO_SIZE;
        let counters = new.counters().clone();
        let mut transport = Transport::new(new, Arc::clone(self.vm.memory())).map_err(device(name))?;
        for (queue, kick) in (0..).zip(transport.kicks()) {
            self.vm.wire_doorbell(kick, address + QUEUE_NOTIFY, queue)?;
        }
        #[expect(clippy::cast_possible_truncation, reason = "the slot is below VIRTIO_MAX")]
        let gsi = layout::VIRTIO_FIRST_GSI + slot as u32;
        self.vm.wire_interrupt(transport.interrupt().event(), gsi)?;
        if let Some(state) = self.saved.and_then(|saved| saved.device(name)) {
            Saved::restore(&mut transport, state)
                .map_err(|source| BuildError::Restore { device: name.to_owned(), source: source.into() })?;
        }
        let transport = Arc::new(Mutex::new(transport));
        self.attach_mmio(address, layout::VIRTIO_SIZE, transport.clone())?;
        self.virtio.push(Named { name: name.to_owned(), counters, device: transport.clone() });
        Ok(transport)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it is used as a function for map_err")]
fn taken(taken: Taken) -> BuildError {
    device("bus")(taken.to_string())
}

impl Devices {
    /// Makes all devices of a description.
    pub(super) fn make(
        description: &Description,
        descriptors: &mut Descriptors,
        share: Option<ShareRoot>,
        wiring: &mut Wiring<'_>,
        ended: &Ended,
    ) -> Result<Self, BuildError> {
        let mut all = Self::default();
        let shared = wiring.reactor("devices", Role::Devices)?;
        if let Some(console) = &description.uart {
            let console = console_ends(*console, descriptors)?;
            let interrupt = wiring.interrupt(layout::UART_GSI)?;
            let uart = match wiring.saved.and_then(|saved| saved.uart.as_ref()) {
                Some(state) => Uart::restore(state, console, interrupt, &shared),
                None => Uart::new(console, interrupt, &shared),
            };
            let uart = uart.map_err(device("uart"))?;
            wiring.attach_ports(layout::UART_PORT, 8, Arc::new(Mutex::new(uart.clone())))?;
            all.uart = Some(uart);
        }
        for (index, disk) in description.disks.iter().enumerate() {
            all.disks.push(make_disk(index, disk, descriptors, wiring)?);
        }
        for (index, nic) in description.nics.iter().enumerate() {
            let name = format!("nic{index}");
            let reactor = wiring.reactor(&name, Role::Net)?;
            let net = Net::new(descriptors.file(nic.tap)?, nic.mac, reactor).map_err(device(&name))?;
            let net = wiring.virtio(&name, net)?;
            if let Some(up) = nic.link_up {
                lock(&net).device_mut().set_link(up);
            }
            all.nics.push(net);
        }
        if let Some(serial) = &description.serial {
            let console = serial.console.map(|console| console_ends(console, descriptors)).transpose()?;
            let mut ports = Vec::new();
            for port in &serial.ports {
                ports.push((port.name.clone(), descriptors.listener(port.listener)?));
            }
            let serial = Serial::new(console, ports, &shared).map_err(device("serial"))?;
            wiring.virtio("serial", serial)?;
        }
        if description.rng {
            wiring.virtio("rng", Rng::new(Arc::clone(&shared)))?;
        }
        if description.balloon {
            wiring.virtio("balloon", Balloon::new(Arc::clone(&shared)))?;
        }
        if let Some(vsock) = &description.vsock {
            let listener = vsock.listener.map(|fd| descriptors.listener(fd)).transpose()?;
            let upstream = vsock.upstream.map(|fd| descriptors.file(fd)).transpose()?.map(Into::into);
            wiring.virtio("vsock", Vsock::new(vsock.cid, listener, upstream, Arc::clone(&shared)))?;
        }
        if let (Some(description), Some(root)) = (&description.share, share) {
            let reactor = wiring.reactor("share", Role::Share)?;
            let fs = Fs::new(&description.tag, root, reactor).map_err(device("share"))?;
            all.share = Some(wiring.virtio("share", fs)?);
        }
        all.rtc = legacy(wiring, ended)?;
        all.virtio = std::mem::take(&mut wiring.virtio);
        Ok(all)
    }

    /// What each virtio device did.
    pub(super) fn counted(&self) -> BTreeMap<String, Counted> {
        self.virtio.iter().map(|named| (named.name.clone(), named.counters.counted())).collect()
    }

    /// How many virtio devices there are.
    pub(super) fn virtio_devices(&self) -> usize {
        self.virtio.len()
    }

    /// Whether the guest has the share mounted.
    pub(super) fn is_mounted(&self) -> bool {
        self.share.as_ref().is_some_and(|share| VirtioDevice::save(lock(share).device()).mounted)
    }

    /// What is saved of the serial port, and of the clock. Output that the port has gathered is written.
    pub(super) fn save_legacy(&self) -> (Option<UartState>, RtcState) {
        (self.uart.as_ref().map(Uart::save), lock(&self.rtc).save())
    }

    /// What is saved of virtio devices.
    pub(super) fn save_virtio(&self) -> serde_json::Result<Vec<DeviceState>> {
        let save = |named: &Named| {
            let state = lock(&named.device).save()?;
            Ok(DeviceState { name: named.name.clone(), state })
        };
        self.virtio.iter().map(save).collect()
    }

    /// Puts what was written to the disks' images; the name of one where that fails.
    pub(super) fn flush_disks(&self) -> Result<(), (String, std::io::Error)> {
        for (index, disk) in self.disks.iter().enumerate() {
            lock(disk).device().image().flush().map_err(|error| (format!("disk{index}"), error))?;
        }
        Ok(())
    }

    /// Puts all cables in or pulls them out.
    pub(super) fn set_link(&self, up: bool) -> Result<(), String> {
        if self.nics.is_empty() {
            return Err("This machine has no NIC".into());
        }
        for nic in &self.nics {
            lock(nic).device_mut().set_link(up);
        }
        Ok(())
    }

    /// The first disk goes on in another file; `None` if there is no disk.
    pub(super) fn switch_disk(
        &self,
        overlay: File,
        below: Vec<(File, Format)>,
    ) -> Result<Option<()>, ImageError> {
        self.disks.first().map(|disk| lock(disk).device_mut().switch(overlay, below)).transpose()
    }

    /// Writes out what is held back.
    pub(super) fn flush(&self) {
        if let Some(uart) = &self.uart {
            uart.flush();
        }
        for disk in &self.disks {
            if let Err(error) = lock(disk).device().image().flush() {
                eprintln!("catalyst-vmm: a disk's last writes failed: {error}");
            }
        }
    }

    /// Makes `stream` the first serial port's terminal.
    pub(super) fn attach_console(&self, stream: UnixStream) -> Result<(), String> {
        let uart = self.uart.as_ref().ok_or("This machine has no serial port")?;
        uart.attach(stream).map_err(|error| crate::chain(&error))
    }

    /// Whether that would work.
    pub(super) fn can_attach_console(&self) -> Result<(), String> {
        let uart = self.uart.as_ref().ok_or("This machine has no serial port")?;
        if uart.has_client() { Err("The serial port has a terminal already".into()) } else { Ok(()) }
    }
}

fn make_disk(
    index: usize,
    disk: &description::Disk,
    descriptors: &mut Descriptors,
    wiring: &mut Wiring<'_>,
) -> Result<Virtio<Block>, BuildError> {
    let name = format!("disk{index}");
    let mut layers = Vec::new();
    for layer in &disk.layers {
        layers.push((descriptors.file(layer.fd)?, layer.format));
    }
    let image = Image::open(layers, disk.read_only).map_err(device(&name))?;
    let mut reactors = Vec::new();
    for queue in 0..disk.queues {
        reactors.push(wiring.reactor(&format!("{name}.{queue}"), Role::Block)?);
    }
    let no_room = Arc::clone(&wiring.no_room);
    wiring.virtio(&name, Block::new(image, &disk.serial, reactors, no_room))
}

fn console_ends(console: description::Console, descriptors: &mut Descriptors) -> Result<Console, BuildError> {
    let listener = console.listener.map(|fd| descriptors.listener(fd)).transpose()?;
    let log = console.log.map(|fd| descriptors.file(fd)).transpose()?;
    Ok(Console::new(listener, log))
}

/// The two devices that every PC has: a clock, and a keyboard controller that only resets.
fn legacy(wiring: &mut Wiring<'_>, ended: &Ended) -> Result<Arc<Mutex<Rtc>>, BuildError> {
    let ended = Arc::clone(ended);
    let i8042 = Arc::new(Mutex::new(I8042::new(move || ended(Cause::Reset))));
    wiring.attach_ports(layout::I8042_DATA_PORT, 5, i8042)?;
    let rtc = Rtc::new(wiring.saved.map_or_else(RtcState::default, |saved| saved.rtc));
    let rtc = Arc::new(Mutex::new(rtc));
    wiring.attach_ports(layout::RTC_PORT, 2, rtc.clone())?;
    Ok(rtc)
}
