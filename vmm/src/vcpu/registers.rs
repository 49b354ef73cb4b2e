//! The registers that the boot processor begins with.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::boot::Entry;
use crate::layout;
use crate::vm::{VmError, call};

/// Null, code, data, task state; code of 64 bits for the 64-bit entry, of 32 for PVH.
const NULL: u64 = 0;
const CODE64: u64 = 0x00af_9b00_0000_ffff;
const CODE32: u64 = 0x00cf_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const TASK: u64 = 0x008f_8b00_0000_ffff;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

/// CR0: protection, extension type; paging.
const PROTECTED: u64 = 1 | 1 << 4;
const PAGING: u64 = 1 << 31;
/// CR4: physical address extension.
const PAE: u64 = 1 << 5;
/// EFER: long mode enabled and active.
const LONG_MODE: u64 = 1 << 8 | 1 << 10;
/// RFLAGS: the bit that is always set.
const FLAGS: u64 = 1 << 1;

/// Sets the boot processor up for its entry, and writes the table that its segments come from. The others wait for
/// their startup message as KVM makes them.
pub fn set_entry(memory: &GuestMemoryMmap<()>, vcpu: &VcpuFd, entry: Entry) -> Result<(), VmError> {
    let mut system = vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?;
    let general = match entry {
        Entry::Pvh(address) => {
            set_segments(memory, &mut system, CODE32)?;
            system.cr0 = PROTECTED;
            system.cr4 = 0;
            system.efer = 0;
            kvm_regs { rip: address, rbx: layout::PVH_START_INFO, rflags: FLAGS, ..Default::default() }
        }
        Entry::Long(address) => {
            set_segments(memory, &mut system, CODE64)?;
            system.cr0 = PROTECTED | PAGING;
            system.cr3 = layout::PAGE_TABLES;
            system.cr4 = PAE;
            system.efer = LONG_MODE;
            kvm_regs {
                rip: address,
                rsi: layout::ZERO_PAGE,
                rsp: layout::BOOT_STACK,
                rbp: layout::BOOT_STACK,
                rflags: FLAGS,
                ..Default::default()
            }
        }
    };
    vcpu.set_sregs(&system).map_err(call("KVM_SET_SREGS"))?;
    vcpu.set_regs(&general).map_err(call("KVM_SET_REGS"))
}

fn set_segments(memory: &GuestMemoryMmap<()>, system: &mut kvm_sregs, code: u64) -> Result<(), VmError> {
    // Linux's protocol wants code at 0x10 and data at 0x18.
    let table = [NULL, NULL, code, DATA, TASK];
    for (at, descriptor) in (layout::BOOT_GDT..).step_by(8).zip(table) {
        memory.write_obj(descriptor, GuestAddress(at)).map_err(|_| VmError::Memory(layout::BOOT_GDT))?;
    }
    system.gdt.base = layout::BOOT_GDT;
    system.gdt.limit = 8 * 5 - 1;
    system.idt.base = 0;
    system.idt.limit = 0;
    let data = segment(DATA, DATA_SELECTOR);
    system.cs = segment(code, CODE_SELECTOR);
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
    system.tr = segment(TASK, TASK_SELECTOR);
    Ok(())
}

/// A descriptor taken apart (Intel SDM volume 3A, section 3.4.5). All of ours begin at 0.
fn segment(descriptor: u64, selector: u16) -> kvm_segment {
    let bit = |at: u32| u8::from(descriptor >> at & 1 != 0);
    let limit = descriptor & 0xffff | descriptor >> 32 & 0xf_0000;
    #[expect(clippy::cast_possible_truncation, reason = "twenty bits and four bits")]
    let (limit, kind) = (limit as u32, (descriptor >> 40 & 0xf) as u8);
    kvm_segment {
        base: 0,
        limit: if bit(55) == 1 { limit << 12 | 0xfff } else { limit },
        selector,
        type_: kind,
        present: bit(47),
        dpl: 0,
        db: bit(54),
        s: bit(44),
        l: bit(53),
        g: bit(55),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_taken_apart_as_the_processor_does() {
        let code = segment(CODE64, CODE_SELECTOR);
        assert_eq!((code.limit, code.type_, code.l, code.db, code.g, code.s), (u32::MAX, 0xb, 1, 0, 1, 1));
        let code = segment(CODE32, CODE_SELECTOR);
        assert_eq!((code.limit, code.l, code.db, code.present), (u32::MAX, 0, 1, 1));
        let task = segment(TASK, TASK_SELECTOR);
        assert_eq!((task.type_, task.s, task.present), (0xb, 0, 1));
    }
}
