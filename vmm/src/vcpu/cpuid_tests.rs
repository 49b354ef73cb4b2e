use super::*;

fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = registers;
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

const ALL: u32 = u32::MAX;

/// An Intel processor with everything, a third-level cache among it.
fn intel() -> Vec<kvm_cpuid_entry2> {
    vec![
        leaf(0, 0, [0x1f, 0, 0, 0]),
        leaf(1, 0, [0, 0x1234_5678, ALL, ALL]),
        leaf(4, 0, [1 | 1 << 5 | 0x3 << 26, 0, 0, 0]),
        leaf(4, 1, [3 | 3 << 5, 0, 0, 0]),
        leaf(7, 0, [1, ALL, ALL, ALL]),
        leaf(0xa, 0, [ALL; 4]),
        leaf(0xb, 0, [ALL; 4]),
        leaf(0xd, 0, [0x6_00e7, 0x340, 0x2b00, 0]),
        leaf(0xd, 2, [0x100, 0x240, 0, 0]),
        leaf(0xd, 7, [0x400, 0x680, 0, 0]),
        leaf(0xd, 9, [8, 0xa80, 0, 0]),
        leaf(0xd, 17, [0x40, 0xac0, 2, 0]),
        leaf(0xd, 18, [0x2000, 0xb00, 6, 0]),
        leaf(0x12, 0, [ALL; 4]),
        leaf(0x1d, 1, [ALL; 4]),
        leaf(0x4000_0000, 0, [0x4000_0001, 0, 0, 0]),
    ]
}

fn amd() -> Vec<kvm_cpuid_entry2> {
    vec![
        leaf(0, 0, [0x10, 0, 0, 0]),
        leaf(1, 0, [0, 0, ALL, ALL]),
        leaf(0x8000_0001, 0, [0, 0, ALL, ALL]),
        leaf(0x8000_0008, 0, [0x3030, 0, 0xffff, 0]),
        leaf(0x8000_000a, 0, [ALL; 4]),
        leaf(0x8000_001d, 0, [1 | 1 << 5, 0, 0, 0]),
        leaf(0x8000_001d, 3, [3 | 3 << 5, 0, 0, 0]),
        leaf(0x8000_001e, 0, [7, 7, 7, 0]),
    ]
}

fn shaped(supported: &[kvm_cpuid_entry2], cpus: u8, index: u8) -> Vec<kvm_cpuid_entry2> {
    Template::from_supported(supported, cpus, true).for_vcpu(index).unwrap().as_slice().to_vec()
}

fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
    leaves.iter().copied().find(|leaf| (leaf.function, leaf.index) == (function, index))
}

#[test]
fn a_guest_sees_a_hypervisor_and_none_of_what_it_cannot_use() {
    let leaves = shaped(&intel(), 2, 0);
    let one = find(&leaves, 1, 0).unwrap();
    assert_eq!(one.ecx >> 31, 1, "hypervisor");
    assert_eq!((one.ecx >> 5 & 1, one.ecx >> 3 & 1, one.ecx >> 15 & 1), (0, 0, 0), "VMX, MONITOR, PDCM");
    assert_eq!(one.ecx >> 24 & 1, 1, "TSC deadline");
    let seven = find(&leaves, 7, 0).unwrap();
    assert_eq!((seven.ebx >> 2 & 1, seven.ecx >> 30 & 1, seven.ecx >> 16 & 1), (0, 0, 0), "SGX, LA57");
    assert_eq!(seven.edx & (1 << 22 | 1 << 24 | 1 << 25), 0, "AMX");
    for function in [0xa, 0x12, 0x1d] {
        assert!(leaves.iter().all(|leaf| leaf.function != function), "{function:#x}");
    }
    assert!(find(&leaves, 0x4000_0000, 0).is_some(), "KVM's own leaf");
    let leaves = shaped(&amd(), 2, 0);
    assert_eq!(find(&leaves, 0x8000_0001, 0).unwrap().ecx & (1 << 2), 0, "SVM");
    assert!(find(&leaves, 0x8000_000a, 0).is_none());
}

#[test]
fn the_area_of_xsave_shrinks_with_amx() {
    let leaves = shaped(&intel(), 1, 0);
    let area = find(&leaves, 0xd, 0).unwrap();
    assert_eq!((area.eax, area.ecx), (0xe7, 0xa88));
    assert!(find(&leaves, 0xd, 17).is_none() && find(&leaves, 0xd, 18).is_none());
    assert_eq!(find(&leaves, 0xd, 7).unwrap().ebx, 0x680);
}

#[test]
fn without_the_kernel_s_timer_there_is_no_tsc_deadline() {
    let template = Template::from_supported(&intel(), 1, false);
    let leaves = template.for_vcpu(0).unwrap();
    assert_eq!(find(leaves.as_slice(), 1, 0).unwrap().ecx >> 24 & 1, 0);
}

/// Every leaf that tells of topology tells the same: one socket of n cores.
#[test]
fn the_leaves_of_topology_agree() {
    for cpus in [1, 2, 3, 8, 32] {
        let bits = u32::from(cpus).next_power_of_two().trailing_zeros();
        for index in [0, cpus - 1] {
            let id = u32::from(index);
            let leaves = shaped(&intel(), cpus, index);
            let one = find(&leaves, 1, 0).unwrap();
            assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff), (id, 1 << bits));
            assert_eq!((one.ebx & 0xffff, one.edx >> 28 & 1), (0x5678, u32::from(cpus > 1)));
            for function in [0xb, 0x1f] {
                let threads = find(&leaves, function, 0).unwrap();
                let cores = find(&leaves, function, 1).unwrap();
                assert_eq!((threads.eax, threads.ebx, threads.ecx, threads.edx), (0, 1, 0x100, id));
                assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (bits, u32::from(cpus), 0x201, id));
                assert_eq!(find(&leaves, function, 2).unwrap().ecx, 2);
            }
            let first = find(&leaves, 4, 0).unwrap().eax;
            let last = find(&leaves, 4, 1).unwrap().eax;
            assert_eq!((first >> 14 & 0xfff, last >> 14 & 0xfff), (0, (1 << bits) - 1));
            assert_eq!(first >> 26, (1 << bits) - 1);

            let leaves = shaped(&amd(), cpus, index);
            let cores = find(&leaves, 0x8000_0008, 0).unwrap();
            assert_eq!((cores.ecx & 0xff, cores.ecx >> 12 & 0xf), (u32::from(cpus) - 1, bits));
            let id_leaf = find(&leaves, 0x8000_001e, 0).unwrap();
            assert_eq!((id_leaf.eax, id_leaf.ebx, id_leaf.ecx), (id, id, 0));
            let last = find(&leaves, 0x8000_001d, 3).unwrap().eax;
            assert_eq!(last >> 14 & 0xfff, u32::from(cpus) - 1);
        }
    }
}
