//! ACPI tables (ACPI 6.5): hardware-reduced, so that there is nothing to emulate but three registers.
//!
//! [`tables`] lays RSDP, XSDT, FADT, MADT and DSDT out one after another from [`layout::ACPI`] on.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use super::dsdt;
use crate::devices::power;
use crate::layout;

/// Who made the tables.
pub(super) const OEM: [u8; 6] = *b"CATLST";
/// For which machine.
pub(super) const OEM_TABLE: [u8; 8] = *b"CATALYST";
const REVISION: u32 = 1;
/// IAPC_BOOT_ARCH: no VGA to probe. Bit 1, the keyboard controller, is left out: it is there for its reset only, and
/// a kernel that looks for a keyboard loses time.
const NO_VGA: u16 = 1 << 2;

/// What the tables tell of the machine.
#[derive(Clone, Copy, Debug)]
pub struct Platform {
    /// Virtual CPUs; their APIC IDs count from 0.
    pub cpus: u8,
    /// virtio-mmio devices, at the places that the layout gives.
    pub virtio_devices: usize,
    /// Whether there is a first serial port.
    pub uart: bool,
}

/// Where the CMOS clock has the century.
const CENTURY: u8 = 0x32;

/// Bytes of tables.
#[derive(Debug, Default)]
pub(super) struct Bytes(pub Vec<u8>);

impl AmlSink for Bytes {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

/// The bytes of something.
pub(super) fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Bytes::default();
    aml.to_aml_bytes(&mut bytes);
    bytes.0
}

/// All tables, as they lie from [`layout::ACPI`] on.
pub fn tables(platform: &Platform) -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, REVISION);
    dsdt.append_slice(&dsdt::body(platform));
    let rsdp_size = Rsdp::len();
    let dsdt_at = layout::ACPI + align(rsdp_size);
    let fadt_at = dsdt_at + align(dsdt.len());
    let fadt = bytes(&fadt(dsdt_at));
    let madt_at = fadt_at + align(fadt.len());
    let madt = bytes(&madt(platform.cpus));
    let xsdt_at = madt_at + align(madt.len());
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(fadt_at);
    xsdt.add_entry(madt_at);

    let parts = [bytes(&Rsdp::new(OEM, xsdt_at)), dsdt.as_slice().to_vec(), fadt, madt, bytes(&xsdt)];
    let mut all = Vec::new();
    for part in parts {
        all.extend_from_slice(&part);
        all.resize(all.len().next_multiple_of(ALIGN), 0);
    }
    all
}

const ALIGN: usize = 16;

fn align(length: usize) -> u64 {
    length.next_multiple_of(ALIGN) as u64
}

fn register(offset: u64) -> GAS {
    GAS::new(AddressSpace::SystemMemory, 8, 0, AccessSize::ByteAccess, layout::POWER_START + offset)
}

/// Section 5.2.9: power off and reset go by registers in memory.
fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = NO_VGA.into();
    fadt.century = CENTURY;
    fadt.reset_reg = register(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = register(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(power::SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE).into();
    fadt.finalize()
}

/// Section 5.2.12: a local APIC each, one IOAPIC with the global system interrupts from 0 on.
fn madt(cpus: u8) -> MADT {
    #[expect(clippy::cast_possible_truncation, reason = "both lie below 4 GiB")]
    let (local, io) = (layout::LOCAL_APIC as u32, layout::IOAPIC as u32);
    let mut madt = MADT::new(OEM, OEM_TABLE, REVISION, LocalInterruptController::Address(local));
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, io, 0));
    madt
}
