//! A one-vCPU guest in 64-bit ring 0, loaded with one small program after another.
//!
//! It is made once: inside an emulated machine `KVM_CREATE_VM` alone takes 50 ms. 2 MiB of memory at 0, mapped one to one by a single large page. The processor starts in long mode with the
//! tables below (Intel SDM volume 3A: chapter 4.5 page tables, 3.4.5 segment descriptors, 7.14 64-bit gates).

use kvm_bindings::{
    CpuId, KVM_INTERNAL_ERROR_EMULATION, KVM_MAX_CPUID_ENTRIES, KVMIO, kvm_dtable, kvm_regs, kvm_segment,
    kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcr, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::bounded::kick_signal;

/// Guest memory, in bytes: one large page.
const MEMORY_SIZE: usize = 2 << 20;
const PAGE_SIZE: usize = 0x1000;
const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const PML4: u64 = 0x3000;
const PDPT: u64 = 0x4000;
const PAGE_DIRECTORY: u64 = 0x5000;
const STACK_TOP: u64 = 0x8000;
/// Where a guest's code lies and starts.
pub(super) const CODE: u64 = 0x9000;
/// Where the handler of vector 3 lies.
pub(super) const BREAKPOINT_HANDLER: u64 = 0xa000;
/// A page for a guest's data; RDI points to it at the start.
pub(super) const DATA: u64 = 0xb000;

/// The port to which a guest writes when it is about to begin.
pub(super) const PORT_READY: u16 = 0xe0;
/// The port to which a guest writes when it has done what it was made for.
pub(super) const PORT_DONE: u16 = 0xe1;

/// Present, writable.
const PAGE_TABLE_ENTRY: u64 = 0x3;
/// Present, writable, a 2 MiB page.
const LARGE_PAGE: u64 = 0x83;
/// Descriptors: null, 64-bit code of ring 0, data of ring 0.
const DESCRIPTORS: [u64; 3] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u16 = 0x10;
const TASK_SELECTOR: u16 = 0x18;
/// Entries of the IDT; only that of #BP (3) is present.
const IDT_ENTRIES: u64 = 4;
const BREAKPOINT_VECTOR: u64 = 3;

/// CR0: protection, monitor coprocessor, extension type, numeric error, write protect, paging.
const CR0: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
/// CR4: physical address extension, FXSAVE, SIMD exceptions.
const CR4: u64 = 1 << 5 | 1 << 9 | 1 << 10;
/// CR4: XSAVE is on.
const CR4_OSXSAVE: u64 = 1 << 18;
/// XCR0: x87 and SSE state.
const XCR0: u64 = 0b11;
/// EFER: long mode enabled and active.
const EFER: u64 = 1 << 8 | 1 << 10;
/// RFLAGS: only the bit that is always set.
const RFLAGS: u64 = 1 << 1;
/// CPUID leaf 1, ECX: CMPXCHG16B.
const CPUID_CX16: u32 = 1 << 13;
/// CPUID leaf 1, ECX: XSAVE.
const CPUID_XSAVE: u32 = 1 << 26;
/// Three pages that Intel processors without unrestricted guests want; far above the guest's memory.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// Times that `KVM_RUN` is called again after an exit that asks for it, before it counts as a failure.
const RETRIES: u32 = 16;

ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, u32);

/// `struct kvm_signal_mask` with the kernel's 8-byte signal set behind its length.
#[repr(C)]
struct SignalMask {
    len: u32,
    set: [u8; 8],
}

/// Why a guest did not do what it was made for. The messages follow "the guest: …".
#[derive(Debug, thiserror::Error)]
pub(super) enum RunError {
    #[error("there is no guest to run it in")]
    NoGuest,
    #[error("{step} failed: {error}")]
    SetUp { step: &'static str, error: errno::Error },
    #[error("the processor that KVM offers lacks {0}")]
    NoFeature(&'static str),
    #[error("not interpreted: KVM could not emulate the instruction at {rip:#x} (bytes there: {bytes})")]
    NotEmulated { bytes: String, rip: u64 },
    #[error("stopped with exit {exit} at {rip:#x} (bytes there: {bytes})")]
    Exit { exit: String, rip: u64, bytes: String },
    #[error("did not end in time and was stopped at {rip:#x} (bytes there: {bytes})")]
    Interrupted { rip: u64, bytes: String },
    #[error("ran to its end, but {0}")]
    WrongResult(&'static str),
}

/// A program: its code, which is loaded and starts at [`CODE`], and what is loaded at [`BREAKPOINT_HANDLER`].
pub(super) struct Program {
    pub(super) code: &'static [u8],
    pub(super) breakpoint_handler: &'static [u8],
}

/// The guest: at its program's first instruction, or at a port write.
pub(super) struct Guest {
    cpuid: CpuId,
    vcpu: VcpuFd,
    _vm: VmFd,
    // Last: the vCPU and the VM refer to it.
    memory: GuestMemoryMmap<()>,
}

impl Guest {
    /// A guest without a program.
    pub(super) fn new(kvm: &Kvm) -> Result<Self, RunError> {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)])
            .map_err(|_| set_up("mapping 2 MiB")(errno::Error::last()))?;
        let vm = kvm.create_vm().map_err(set_up("KVM_CREATE_VM"))?;
        vm.set_tss_address(TSS_ADDRESS).map_err(set_up("KVM_SET_TSS_ADDR"))?;
        let host = memory
            .get_host_address(GuestAddress(0))
            .map_err(|_| set_up("finding the mapping")(errno::Error::new(libc::EFAULT)))?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY_SIZE as u64,
            userspace_addr: host as u64,
        };
        // SAFETY: the region is exactly the mapping that `memory` owns, and `Guest` keeps it until the vCPU and the
        // VM are closed (fields are dropped in their order).
        unsafe { vm.set_user_memory_region(region) }.map_err(set_up("KVM_SET_USER_MEMORY_REGION"))?;
        let vcpu = vm.create_vcpu(0).map_err(set_up("KVM_CREATE_VCPU"))?;
        let cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(set_up("KVM_GET_SUPPORTED_CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(set_up("KVM_SET_CPUID2"))?;
        // Read back: a kernel may offer more than it says it supports.
        let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(set_up("KVM_GET_CPUID2"))?;
        let guest = Self { cpuid, vcpu, _vm: vm, memory };
        guest.set_signal_mask()?;
        Ok(guest)
    }

    /// Puts `program` and a processor in its first state into the guest, whatever the one before left behind.
    pub(super) fn load(&self, program: &Program) -> Result<(), RunError> {
        self.write_tables()?;
        for address in [CODE, BREAKPOINT_HANDLER, DATA] {
            self.write(address, &[0; PAGE_SIZE])?;
        }
        self.write(CODE, program.code)?;
        self.write(BREAKPOINT_HANDLER, program.breakpoint_handler)?;
        self.set_registers()
    }

    /// Whether the processor has CMPXCHG16B.
    pub(super) fn has_cmpxchg16b(&self) -> bool {
        self.features() & CPUID_CX16 != 0
    }

    /// Whether the processor has XSAVE, which the guest then finds switched on for x87 and SSE.
    pub(super) fn has_xsave(&self) -> bool {
        self.features() & CPUID_XSAVE != 0
    }

    /// The general registers.
    pub(super) fn registers(&self) -> Result<kvm_regs, RunError> {
        self.vcpu.get_regs().map_err(set_up("KVM_GET_REGS"))
    }

    /// Sets the general registers, before the first [`Guest::run_to`] only.
    pub(super) fn change_registers(&self, change: impl FnOnce(&mut kvm_regs)) -> Result<(), RunError> {
        let mut registers = self.registers()?;
        change(&mut registers);
        self.vcpu.set_regs(&registers).map_err(set_up("KVM_SET_REGS"))
    }

    /// Register XMM0, as bytes in memory order.
    pub(super) fn xmm0(&self) -> Result<[u8; 16], RunError> {
        Ok(self.vcpu.get_fpu().map_err(set_up("KVM_GET_FPU"))?.xmm[0])
    }

    /// Writes into the guest's memory.
    pub(super) fn write(&self, address: u64, bytes: &[u8]) -> Result<(), RunError> {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|_| set_up("writing the guest's memory")(errno::Error::new(libc::EFAULT)))
    }

    /// Reads from the guest's memory.
    pub(super) fn read<const N: usize>(&self, address: u64) -> Result<[u8; N], RunError> {
        let mut bytes = [0; N];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .map_err(|_| set_up("reading the guest's memory")(errno::Error::new(libc::EFAULT)))?;
        Ok(bytes)
    }

    /// Runs the guest until it writes to `port`. Any other exit is an error that names it.
    pub(super) fn run_to(&mut self, port: u16) -> Result<(), RunError> {
        for _ in 0..RETRIES {
            let exit = match self.vcpu.run() {
                Ok(VcpuExit::IoOut(written, _)) if written == port => return Ok(()),
                Ok(VcpuExit::Intr) => return Err(self.interrupted()),
                Ok(VcpuExit::InternalError) => return Err(self.internal_error()),
                Ok(exit) => format!("{exit:?}"),
                Err(error) if error.errno() == libc::EINTR => return Err(self.interrupted()),
                Err(error) if error.errno() == libc::EAGAIN => continue,
                Err(error) => format!("KVM_RUN: {error}"),
            };
            return Err(self.unexpected(exit));
        }
        Err(self.unexpected("KVM_RUN: asked to try again without end".to_owned()))
    }

    /// CPUID leaf 1, ECX.
    fn features(&self) -> u32 {
        self.cpuid.as_slice().iter().find(|entry| entry.function == 1).map_or(0, |entry| entry.ecx)
    }

    fn write_tables(&self) -> Result<(), RunError> {
        for (index, descriptor) in DESCRIPTORS.iter().enumerate() {
            self.write(GDT + 8 * index as u64, &descriptor.to_le_bytes())?;
        }
        // A 64-bit interrupt gate of ring 0 without a stack switch; the handler lies in the lowest 64 KiB.
        let gate = BREAKPOINT_HANDLER & 0xffff | u64::from(CODE_SELECTOR) << 16 | 0x8e << 40;
        self.write(IDT + 16 * BREAKPOINT_VECTOR, &gate.to_le_bytes())?;
        self.write(PML4, &(PDPT | PAGE_TABLE_ENTRY).to_le_bytes())?;
        self.write(PDPT, &(PAGE_DIRECTORY | PAGE_TABLE_ENTRY).to_le_bytes())?;
        self.write(PAGE_DIRECTORY, &LARGE_PAGE.to_le_bytes())
    }

    /// The general and system registers of a processor in long mode at [`CODE`].
    fn set_registers(&self) -> Result<(), RunError> {
        // A program that ended in a fault may have left an exception to be delivered.
        self.vcpu.set_vcpu_events(&kvm_vcpu_events::default()).map_err(set_up("KVM_SET_VCPU_EVENTS"))?;
        let xsave = self.has_xsave();
        let mut system = self.vcpu.get_sregs().map_err(set_up("KVM_GET_SREGS"))?;
        system.cs = segment(CODE_SELECTOR, 0xb, true);
        let data = segment(DATA_SELECTOR, 0x3, false);
        (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
        system.tr = kvm_segment {
            selector: TASK_SELECTOR,
            limit: 0x67,
            type_: 0xb,
            present: 1,
            ..Default::default()
        };
        system.gdt = table(GDT, 8 * DESCRIPTORS.len() as u64);
        system.idt = table(IDT, 16 * IDT_ENTRIES);
        system.cr0 = CR0;
        system.cr3 = PML4;
        system.cr4 = if xsave { CR4 | CR4_OSXSAVE } else { CR4 };
        system.efer = EFER;
        self.vcpu.set_sregs(&system).map_err(set_up("KVM_SET_SREGS"))?;
        if xsave {
            let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
            xcrs.xcrs[0] = kvm_xcr { xcr: 0, reserved: 0, value: XCR0 };
            self.vcpu.set_xcrs(&xcrs).map_err(set_up("KVM_SET_XCRS"))?;
        }
        let general = kvm_regs { rip: CODE, rsp: STACK_TOP, rdi: DATA, rflags: RFLAGS, ..Default::default() };
        self.vcpu.set_regs(&general).map_err(set_up("KVM_SET_REGS"))
    }

    /// Lets the kick signal, and no other, through while the vCPU runs (api.rst, `KVM_SET_SIGNAL_MASK`).
    fn set_signal_mask(&self) -> Result<(), RunError> {
        let kick = u32::try_from(kick_signal() - 1).ok().and_then(|bit| 1u64.checked_shl(bit)).unwrap_or(0);
        let mask = SignalMask { len: 8, set: (!kick).to_ne_bytes() };
        // SAFETY: the kernel reads `len` and that many bytes behind it, all of them in `mask`.
        let result = unsafe { ioctl_with_ref(&self.vcpu, KVM_SET_SIGNAL_MASK(), &mask) };
        if result < 0 { Err(set_up("KVM_SET_SIGNAL_MASK")(errno::Error::last())) } else { Ok(()) }
    }

    fn interrupted(&self) -> RunError {
        let (rip, bytes) = self.position();
        RunError::Interrupted { rip, bytes }
    }

    fn unexpected(&self, exit: String) -> RunError {
        let (rip, bytes) = self.position();
        RunError::Exit { exit, rip, bytes }
    }

    fn internal_error(&mut self) -> RunError {
        let (rip, bytes) = self.position();
        // SAFETY: the exit was KVM_EXIT_INTERNAL_ERROR, for which the kernel fills this member; it is plain data.
        let suberror = unsafe { self.vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
        if suberror == KVM_INTERNAL_ERROR_EMULATION {
            RunError::NotEmulated { bytes, rip }
        } else {
            RunError::Exit { exit: format!("KVM_EXIT_INTERNAL_ERROR, suberror {suberror}"), rip, bytes }
        }
    }

    /// RIP and the bytes of the instruction there: in a guest mapped one to one they are simply in its memory.
    /// The kernel's own copy of them (api.rst, `KVM_EXIT_INTERNAL_ERROR`) is newer and optional.
    fn position(&self) -> (u64, String) {
        let Ok(registers) = self.vcpu.get_regs() else { return (0, "unknown".to_owned()) };
        let bytes =
            self.read::<8>(registers.rip).map_or_else(|_| "outside its memory".to_owned(), |b| hex(&b));
        (registers.rip, bytes)
    }
}

fn set_up(step: &'static str) -> impl FnOnce(errno::Error) -> RunError {
    move |error| RunError::SetUp { step, error }
}

fn segment(selector: u16, type_: u8, code: bool) -> kvm_segment {
    kvm_segment {
        selector,
        type_,
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        l: u8::from(code),
        db: u8::from(!code),
        ..Default::default()
    }
}

fn table(base: u64, size: u64) -> kvm_dtable {
    // The tables above are a few dozen bytes.
    kvm_dtable { base, limit: u16::try_from(size - 1).unwrap_or(u16::MAX), ..Default::default() }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}
