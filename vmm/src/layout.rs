//! Where things lie in guest physical address space.
//!
//! ```text
//! 0                  RAM: tables of the boot in the first MiB, the kernel from 1 MiB on
//! 3 GiB              hole: virtio-mmio, IOAPIC, local APICs, pages that KVM wants on Intel
//! 4 GiB              the rest of RAM
//! end of RAM         nothing: room for 64-bit device windows, up to the processor's address width
//! ```

/// First address of the hole below 4 GiB; RAM below it is at most this much.
pub const HOLE_START: u64 = 0xc000_0000;
/// First address after the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// First address of the virtio-mmio devices.
pub const VIRTIO_START: u64 = 0xd000_0000;
/// Each has one page.
pub const VIRTIO_SIZE: u64 = 0x1000;
/// The most that interrupts can be given to: global system interrupts 5 to 23.
pub const VIRTIO_MAX: usize = 18;
/// Global system interrupt of the first; the n-th has the n-th after it.
pub const VIRTIO_FIRST_GSI: u32 = 6;

/// The registers of power, reset and the events of ACPI (`devices::power`).
pub const POWER_START: u64 = 0xcfff_f000;
/// Their length.
pub const POWER_SIZE: u64 = 0x1000;
/// Global system interrupt of ACPI events.
pub const POWER_GSI: u32 = 5;

/// IOAPIC, where every PC has it.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Local APICs, where every PC has them.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// One page for KVM_SET_IDENTITY_MAP_ADDR (kernel api.rst): Intel without unrestricted guests.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for KVM_SET_TSS_ADDR, the same.
pub const TSS: u64 = 0xfffb_d000;

/// First serial port: 8 registers.
pub const UART_PORT: u16 = 0x3f8;
/// Its interrupt.
pub const UART_GSI: u32 = 4;
/// CMOS clock: index and data.
pub const RTC_PORT: u16 = 0x70;
/// Keyboard controller's data register.
pub const I8042_DATA_PORT: u16 = 0x60;
/// Keyboard controller's command register.
pub const I8042_COMMAND_PORT: u16 = 0x64;

/// Global descriptor table of the boot processor's first instructions.
pub const BOOT_GDT: u64 = 0x500;
/// `struct hvm_start_info` of the PVH boot protocol.
pub const PVH_START_INFO: u64 = 0x6000;
/// Its memory map and module list.
pub const PVH_TABLES: u64 = 0x6100;
/// The zero page of the Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// Stack of the boot processor's first instructions.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables for the 64-bit entry: three pages and one directory each for the first four GiB.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line, with its end (COMMAND_LINE_SIZE of Linux on x86).
pub const COMMAND_LINE_MAX: usize = 2048;
/// First address that RAM below 1 MiB does not have: the extended BIOS data area begins.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables: where firmware tables are looked for.
pub const ACPI: u64 = 0xe_0000;
/// Last address of what is kept for ACPI tables, plus one.
pub const ACPI_END: u64 = 0x10_0000;
/// The page of the VM generation ID, at the end of what is kept for ACPI.
pub const GENERATION_ID: u64 = 0xf_f000;
/// Where a PC's firmware begins, in the page of the generation ID: some kernels jump there for a reset.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// First address of the kernel and of RAM above 1 MiB.
pub const HIGH_RAM: u64 = 0x10_0000;
