//! The DSDT: processors, the devices on fixed places, and the methods of power button and generation ID.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If,
    Interrupt, Local, Memory32Fixed, Method, Name, Notify, ONE, OpRegion, OpRegionSpace, Package, Path,
    ResourceTemplate, Scope, Store, ZERO,
};

use super::acpi::{Platform, bytes};
use crate::devices::power;
use crate::layout;

/// The DSDT's content after its header.
pub(super) fn body(platform: &Platform) -> Vec<u8> {
    let mut devices = processors(platform.cpus);
    devices.extend(events());
    devices.extend(virtio(platform.virtio_devices));
    devices.extend(clock());
    if platform.uart {
        devices.extend(uart());
    }
    let mut body = Scope::raw(path("\\_SB_"), devices);
    // S5 by sleep type 5 (section 7.4.2).
    let (five, zero) = (power::SLEEP_TYPE_OFF, ZERO);
    body.extend(bytes(&Name::new(path("\\_S5_"), &Package::new(vec![&five, &zero, &zero, &zero]))));
    body
}

fn path(text: &str) -> Path {
    Path::new(text)
}

/// An interrupt of a device: edge, active high, its own.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn low(address: u64) -> u32 {
    // Everything in the layout that is told here lies below 4 GiB.
    u32::try_from(address).unwrap_or(u32::MAX)
}

fn processors(cpus: u8) -> Vec<u8> {
    let mut all = Vec::new();
    for cpu in 0..cpus {
        let (name, uid) = (path(&format!("C{cpu:03X}")), cpu);
        let hid = Name::new(path("_HID"), &"ACPI0007");
        all.extend(bytes(&Device::new(name, vec![&hid, &Name::new(path("_UID"), &uid)])));
    }
    all
}

/// The generic event device (section 5.6.9) with the power button and the generation ID behind it.
fn events() -> Vec<u8> {
    let region = low(layout::POWER_START + power::EVENTS);
    let one_dword = 4_u8;
    let registers = OpRegion::new(path("EREG"), OpRegionSpace::SystemMemory, &region, &one_dword);
    let fields = Field::new(
        path("EREG"),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"EVTS", 32)],
    );
    let told = |bit: u8, device: &str| {
        // With a null target this is the expression whose value is compared.
        let (local, device, value) = (Local(0), path(device), 0x80_u8);
        let happened = And::new(&ZERO, &local, &bit);
        Raw(bytes(&If::new(&Equal::new(&happened, &bit), vec![&Notify::new(&device, &value)])))
    };
    let button = told(power::POWER_BUTTON, "\\_SB_.PWRB");
    let generation = told(power::NEW_GENERATION, "\\_SB_.VGEN");
    let (local, taken) = (Local(0), path("EVTS"));
    let take = Store::new(&local, &taken);
    let evt = Method::new(path("_EVT"), 1, true, vec![&take, &button, &generation]);
    let interrupt = interrupt(layout::POWER_GSI);
    let resources = ResourceTemplate::new(vec![&interrupt]);
    let mut all = bytes(&Device::new(
        path("GED_"),
        vec![
            &Name::new(path("_HID"), &"ACPI0013"),
            &Name::new(path("_CRS"), &resources),
            &registers,
            &fields,
            &evt,
        ],
    ));
    let hid = Name::new(path("_HID"), &EISAName::new("PNP0C0C"));
    all.extend(bytes(&Device::new(path("PWRB"), vec![&hid])));
    all.extend(generation_id());
    all
}

/// Bytes that are AML already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

/// Microsoft's "Virtual Machine Generation ID": where the 16 bytes lie.
fn generation_id() -> Vec<u8> {
    let address = low(layout::GENERATION_ID);
    let name = "VM_Gen_Counter";
    bytes(&Device::new(
        path("VGEN"),
        vec![
            &Name::new(path("_HID"), &"CATL0001"),
            &Name::new(path("_CID"), &name),
            &Name::new(path("_DDN"), &name),
            &Name::new(path("ADDR"), &Package::new(vec![&address, &ZERO])),
        ],
    ))
}

/// Linux's name for virtio-mmio devices that ACPI tells of.
fn virtio(count: usize) -> Vec<u8> {
    let mut all = Vec::new();
    let places = (layout::VIRTIO_START..).step_by(0x1000).zip(layout::VIRTIO_FIRST_GSI..);
    for (index, (address, gsi)) in places.take(count.min(layout::VIRTIO_MAX)).enumerate() {
        let registers = Memory32Fixed::new(true, low(address), low(layout::VIRTIO_SIZE));
        let interrupt = interrupt(gsi);
        let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
        let uid = u8::try_from(index).unwrap_or(u8::MAX);
        all.extend(bytes(&Device::new(
            path(&format!("V{index:03X}")),
            vec![
                &Name::new(path("_HID"), &"LNRO0005"),
                &Name::new(path("_UID"), &uid),
                &Name::new(path("_CCA"), &ONE),
                &Name::new(path("_CRS"), &resources),
            ],
        )));
    }
    all
}

fn uart() -> Vec<u8> {
    let ports = IO::new(layout::UART_PORT, layout::UART_PORT, 1, 8);
    let interrupt = interrupt(layout::UART_GSI);
    let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    bytes(&Device::new(
        path("COM1"),
        vec![
            &Name::new(path("_HID"), &EISAName::new("PNP0501")),
            &Name::new(path("_UID"), &ZERO),
            &Name::new(path("_CRS"), &resources),
        ],
    ))
}

fn clock() -> Vec<u8> {
    let ports = IO::new(layout::RTC_PORT, layout::RTC_PORT, 1, 2);
    let resources = ResourceTemplate::new(vec![&ports]);
    bytes(&Device::new(
        path("RTC_"),
        vec![&Name::new(path("_HID"), &EISAName::new("PNP0B00")), &Name::new(path("_CRS"), &resources)],
    ))
}
