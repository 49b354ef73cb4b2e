use std::io::Write;

use proptest::prelude::*;

use super::testing::elf;
use super::*;
use crate::memory::{Backing, GuestRam, map};

fn memory() -> GuestRam {
    map(32, Backing::Anonymous, false).unwrap()
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn kernel(bytes: &[u8], initrd: Option<&[u8]>) -> Kernel {
    Kernel {
        image: file(bytes),
        initrd: initrd.map(file),
        command_line: "console=ttyS0".to_owned(),
        protocol: Protocol::Auto,
    }
}

fn read<const N: usize>(memory: &GuestRam, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

#[test]
fn an_elf_kernel_with_a_note_is_entered_by_pvh_and_told_everything() {
    let memory = memory();
    let image = elf(b"code", 0x20_0000, 0x1000, Some(0x20_0002));
    assert_eq!(load(&memory, kernel(&image, Some(b"disk")), b"tables").unwrap(), Entry::Pvh(0x20_0002));
    assert_eq!(&read::<4>(&memory, 0x20_0000), b"code");
    assert_eq!(&read::<6>(&memory, layout::ACPI), b"tables");
    assert_eq!(&read::<14>(&memory, layout::COMMAND_LINE), b"console=ttyS0\0");
    let word = |at| u64::from_le_bytes(read(&memory, layout::PVH_START_INFO + at));
    assert_eq!(u32::from_le_bytes(read(&memory, layout::PVH_START_INFO)), 0x336e_c578);
    assert_eq!((word(24), word(32)), (layout::COMMAND_LINE, layout::ACPI));
    let modules = word(16);
    let (at, size): ([u8; 8], [u8; 8]) = (read(&memory, modules), read(&memory, modules + 8));
    assert_eq!(u64::from_le_bytes(size), 4);
    assert_eq!(&read::<4>(&memory, u64::from_le_bytes(at)), b"disk");
}

#[test]
fn without_a_note_it_is_entered_in_64_bit_mode() {
    let memory = memory();
    let image = elf(b"code", 0x20_0000, 0x1000, None);
    assert_eq!(load(&memory, kernel(&image, None), b"").unwrap(), Entry::Long(0x20_0000));
    // The zero page counts the entries of its map at 0x1e8.
    assert_eq!(read::<1>(&memory, layout::ZERO_PAGE + 0x1e8), [5]);
    let mut pvh = kernel(&image, None);
    pvh.protocol = Protocol::Pvh;
    assert!(load(&memory, pvh, b"").unwrap_err().to_string().contains("PVH"));
}

#[test]
fn the_map_has_no_overlap_and_all_memory_above_one_mib() {
    for mib in [16, 3 << 10, 5 << 10] {
        let memory = map(mib, Backing::Anonymous, false).unwrap();
        let ranges = map::ranges(&memory);
        for pair in ranges.windows(2) {
            assert!(pair[0].start + pair[0].length <= pair[1].start);
        }
        let high: u64 = ranges
            .iter()
            .filter(|range| range.kind == map::RAM && range.start > 0)
            .map(|range| range.length)
            .sum();
        assert_eq!(high, (mib << 20) - layout::HIGH_RAM);
    }
}

#[test]
fn bad_images_are_refused_by_what_is_wrong() {
    let memory = memory();
    let refused = |image: &[u8], initrd: Option<&[u8]>| {
        load(&memory, kernel(image, initrd), b"").unwrap_err().to_string()
    };
    assert!(refused(b"", None).contains("neither"));
    assert!(refused(&[0; 0x1000], None).contains("neither"));
    let good = elf(&[0x90; 64], 0x20_0000, 0x1000, None);
    let cut = refused(&good[..good.len() - 8], None);
    assert!(cut.contains("cut off"), "{cut}");
    assert!(refused(&good[..70], None).contains("Cannot read the kernel"));
    for (address, size) in [(0x20_0000, 64 << 20), (0xf000, 64), (u64::MAX - 1, 64), (1 << 40, 64)] {
        let refused = refused(&elf(&[0x90; 64], address, size, None), None);
        assert!(refused.contains("memory"), "{address:#x}: {refused}");
    }
    assert!(refused(&elf(&[0x90; 64], 0x20_0000, 64, Some(0xf000_0000)), None).contains("entry"));
    assert!(refused(&good, Some(&vec![0; 31 << 20])).contains("initial RAM disk"));
}

#[test]
fn acpi_tables_have_right_checksums_and_fit() {
    for cpus in [1, 32] {
        let platform = acpi::Platform { cpus, virtio_devices: layout::VIRTIO_MAX, uart: true };
        let tables = acpi::tables(&platform);
        assert!((tables.len() as u64) < layout::GENERATION_ID - layout::ACPI);
        let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!((&tables[..8], sum(&tables[..20]), sum(&tables[..36])), (&b"RSD PTR "[..], 0, 0));
        let at = |address: u64| usize::try_from(address - layout::ACPI).unwrap();
        let table = |start: usize| {
            let length = u32::from_le_bytes(tables[start + 4..start + 8].try_into().unwrap());
            &tables[start..start + length as usize]
        };
        let word = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let xsdt = table(at(word(&tables, 24)));
        let (fadt, madt) = (table(at(word(xsdt, 36))), table(at(word(xsdt, 44))));
        let dsdt = table(at(word(fadt, 140)));
        for (table, signature) in [(xsdt, b"XSDT"), (fadt, b"FACP"), (madt, b"APIC"), (dsdt, b"DSDT")] {
            assert_eq!((&table[..4], sum(table)), (&signature[..], 0));
        }
        assert_eq!(madt.len(), 44 + 8 * usize::from(cpus) + 12);
    }
}

/// The disassembler of ACPICA is the judge of AML, where it is installed.
#[test]
fn the_dsdt_is_understood_by_iasl() {
    let platform = acpi::Platform { cpus: 2, virtio_devices: 3, uart: true };
    let tables = acpi::tables(&platform);
    let start = tables.windows(4).position(|window| window == b"DSDT").unwrap();
    let length = u32::from_le_bytes(tables[start + 4..start + 8].try_into().unwrap()) as usize;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dsdt.aml");
    std::fs::write(&path, &tables[start..start + length]).unwrap();
    let run = std::process::Command::new("iasl").arg("-d").arg(&path).output();
    let Ok(run) = run else {
        println!("SKIPPED: iasl (Debian: acpica-tools) is not installed");
        return;
    };
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let text = std::fs::read_to_string(folder.path().join("dsdt.dsl")).unwrap();
    for word in ["LNRO0005", "VM_Gen_Counter", "_EVT", "Notify (\\_SB.PWRB, 0x80)", "_S5", "PNP0501"] {
        assert!(text.contains(word), "{word} in {text}");
    }
}

proptest! {
    #[test]
    fn no_image_makes_the_loader_panic(
        flips in prop::collection::vec((0_usize..300, any::<u8>()), 1..20),
        cut in 0_usize..300,
    ) {
        let mut image = elf(&[0x90; 64], 0x20_0000, 0x1000, Some(0x20_0000));
        for (at, value) in flips {
            let at = at % image.len();
            image[at] = value;
        }
        image.truncate(image.len().saturating_sub(cut % 64));
        let memory = memory();
        let _ = load(&memory, kernel(&image, None), b"");
    }
}
