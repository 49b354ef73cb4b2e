//! The guest: a program that does what the test tells it, one small thing after another.
//!
//! It polls a mailbox in its memory, which the test has mapped too. So drivers are written in the tests, in Rust, while
//! each access to a register, each interrupt and each instruction is a real one of a virtual CPU.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use catalyst_vmm::control::protocol::RamRange;
use catalyst_vmm::layout;
use catalyst_vmm::memory::GuestRam;
use vm_memory::{ByteValued, Bytes, GuestAddress};

/// Where the program lies and begins.
pub const CODE: u64 = 0x40_0000;
/// Requests and answers; the second CPU's counter is not here, since it runs in real mode.
const MAILBOX: u64 = 0x30_0000;
const IDT: u64 = 0x31_0000;
const IDT_POINTER: u64 = 0x31_1000;
/// First of the memory that tests take from [`Guest::take`].
const FREE: u64 = 0x50_0000;
/// Vectors from here on, 32 of them, have handlers that count.
const FIRST_VECTOR: u64 = 0x20;
const VECTORS: u64 = 32;
/// The code selector that the 64-bit entry begins with.
const CODE_SELECTOR: u64 = 0x10;
/// Bytes of one handler's beginning.
const STUB: u64 = 16;

/// Far longer than anything takes, on whatever machine.
pub const LONG: Duration = Duration::from_secs(30);

/// Fields of the mailbox.
mod mailbox {
    pub const ASKED: u64 = 0;
    pub const DONE: u64 = 8;
    pub const ROUTINE: u64 = 16;
    pub const ADDRESS: u64 = 24;
    pub const VALUE: u64 = 32;
    pub const COUNT: u64 = 40;
    pub const RESULT: u64 = 48;
    pub const IDLE: u64 = 56;
    pub const INTERRUPTS: u64 = 0x100;
}

// The addresses are those above. A routine has its address in RDX, its value in RAX, its count in RCX, and answers in
// RAX.
std::arch::global_asm!(
    ".pushsection .rodata.kvm_guest, \"a\"",
    ".balign 16",
    ".globl kvm_guest_begin, kvm_guest_end, kvm_guest_stubs, kvm_guest_read32, kvm_guest_read64, kvm_guest_write8, kvm_guest_write32, kvm_guest_in8, kvm_guest_out8, kvm_guest_out_bytes, kvm_guest_read_many, kvm_guest_load_idt, kvm_guest_int3, kvm_guest_triple_fault, kvm_guest_count_up",
    "kvm_guest_begin:",
    "mov ebx, 0x300000",
    "mov esp, 0x2f0000",
    "2:",
    "inc qword ptr [rbx + 56]",
    "mov rax, [rbx]",
    "cmp rax, [rbx + 8]",
    "je 2b",
    "mov rdx, [rbx + 24]",
    "mov rax, [rbx + 32]",
    "mov rcx, [rbx + 40]",
    "call qword ptr [rbx + 16]",
    "mov [rbx + 48], rax",
    "mov rax, [rbx]",
    "mov [rbx + 8], rax",
    "jmp 2b",
    "kvm_guest_read32: mov eax, [rdx]",
    "ret",
    "kvm_guest_read64: mov rax, [rdx]",
    "ret",
    "kvm_guest_write8: mov [rdx], al",
    "ret",
    "kvm_guest_write32: mov [rdx], eax",
    "ret",
    "kvm_guest_in8: in al, dx",
    "movzx eax, al",
    "ret",
    "kvm_guest_out8: out dx, al",
    "ret",
    // RCX bytes from RAX on, one by one.
    "kvm_guest_out_bytes: mov rsi, rax",
    "3: mov al, [rsi]",
    "out dx, al",
    "inc rsi",
    "dec rcx",
    "jnz 3b",
    "ret",
    // RCX times.
    "kvm_guest_read_many: mov eax, [rdx]",
    "dec rcx",
    "jnz kvm_guest_read_many",
    "ret",
    "kvm_guest_load_idt: lidt [rdx]",
    "sti",
    "ret",
    // Counts in a register and in memory, until the word after the counter is not 0. Answers the count, or 0 if the two were
    // not the same once, or what else is in registers did not stay.
    "kvm_guest_count_up: mov r8, [rdx]",
    "mov r9, rax",
    "mov r15, rax",
    "not r15",
    "4: inc r8",
    "inc qword ptr [rdx]",
    "cmp r8, [rdx]",
    "jne 5f",
    "cmp qword ptr [rdx + 8], 0",
    "je 4b",
    "not r15",
    "cmp r9, r15",
    "jne 5f",
    "mov rax, r8",
    "ret",
    "5: xor eax, eax",
    "ret",
    "kvm_guest_int3: int3",
    "ret",
    // Nobody handles it, nor what comes of that.
    "kvm_guest_triple_fault: lidt [rdx]",
    "ud2",
    ".balign 16",
    "kvm_guest_stubs:",
    ".set kvm_guest_vector, 0",
    ".rept 32",
    ".balign 16",
    // push imm8: by its name it would be taken for an address.
    ".byte 0x6a, kvm_guest_vector",
    "jmp kvm_guest_count",
    ".set kvm_guest_vector, kvm_guest_vector + 1",
    ".endr",
    // Counts, and tells the local APIC that it is done.
    "kvm_guest_count: push rax",
    "push rcx",
    "mov rcx, [rsp + 16]",
    "mov eax, 0x300100",
    "inc qword ptr [rax + rcx * 8]",
    "mov eax, 0xfee000b0",
    "mov dword ptr [rax], 0",
    "pop rcx",
    "pop rax",
    "add rsp, 8",
    "iretq",
    "kvm_guest_end:",
    ".popsection",
);

macro_rules! symbols {
    ($($name:ident),*) => {
        unsafe extern "C" {
            $(static $name: u8;)*
        }
    };
}
symbols!(
    kvm_guest_begin,
    kvm_guest_end,
    kvm_guest_stubs,
    kvm_guest_read32,
    kvm_guest_read64,
    kvm_guest_write8,
    kvm_guest_write32,
    kvm_guest_in8,
    kvm_guest_out8,
    kvm_guest_out_bytes,
    kvm_guest_read_many,
    kvm_guest_load_idt,
    kvm_guest_int3,
    kvm_guest_triple_fault,
    kvm_guest_count_up
);

/// The program's bytes, which run at [`CODE`].
pub fn program() -> &'static [u8] {
    let (begin, end) = (&raw const kvm_guest_begin, &raw const kvm_guest_end);
    // SAFETY: both symbols are of one section of this program, with the code between them.
    unsafe { std::slice::from_raw_parts(begin, end.offset_from_unsigned(begin)) }
}

/// Where a symbol lies in the guest.
fn in_guest(symbol: *const u8) -> u64 {
    CODE + (symbol as u64 - &raw const kvm_guest_begin as u64)
}

/// What the guest can be told to do.
#[derive(Clone, Copy, Debug)]
pub enum Routine {
    Read32,
    Read64,
    Write8,
    Write32,
    In8,
    Out8,
    OutBytes,
    ReadMany,
    LoadIdt,
    Int3,
    TripleFault,
    CountUp,
    /// What stands in place of firmware.
    ResetVector,
}

impl Routine {
    fn address(self) -> u64 {
        in_guest(match self {
            Self::Read32 => &raw const kvm_guest_read32,
            Self::Read64 => &raw const kvm_guest_read64,
            Self::Write8 => &raw const kvm_guest_write8,
            Self::Write32 => &raw const kvm_guest_write32,
            Self::In8 => &raw const kvm_guest_in8,
            Self::Out8 => &raw const kvm_guest_out8,
            Self::OutBytes => &raw const kvm_guest_out_bytes,
            Self::ReadMany => &raw const kvm_guest_read_many,
            Self::LoadIdt => &raw const kvm_guest_load_idt,
            Self::Int3 => &raw const kvm_guest_int3,
            Self::TripleFault => &raw const kvm_guest_triple_fault,
            Self::CountUp => &raw const kvm_guest_count_up,
            Self::ResetVector => return layout::RESET_VECTOR,
        })
    }
}

/// The test's end of the mailbox.
#[derive(Debug)]
pub struct Guest {
    pub memory: Ram,
    asked: Cell<u64>,
    free: Cell<u64>,
}

/// How the test reaches guest memory.
#[derive(Debug)]
pub enum Ram {
    /// It maps the same file.
    Mapped(GuestRam),
    /// It is the monitor's own: through its process (proc_pid_mem(5)).
    Process(File, Vec<RamRange>),
}

impl Ram {
    /// Where an address lies in the monitor's process.
    fn host(ranges: &[RamRange], address: GuestAddress) -> u64 {
        let range = ranges.iter().find(|range| address.0 - range.guest < range.length).unwrap();
        range.host + (address.0 - range.guest)
    }

    pub fn read_slice(&self, bytes: &mut [u8], address: GuestAddress) -> io::Result<()> {
        match self {
            Self::Mapped(memory) => memory.read_slice(bytes, address).map_err(io::Error::other),
            Self::Process(file, ranges) => file.read_exact_at(bytes, Self::host(ranges, address)),
        }
    }

    pub fn write_slice(&self, bytes: &[u8], address: GuestAddress) -> io::Result<()> {
        match self {
            Self::Mapped(memory) => memory.write_slice(bytes, address).map_err(io::Error::other),
            Self::Process(file, ranges) => file.write_all_at(bytes, Self::host(ranges, address)),
        }
    }

    pub fn read_obj<T: ByteValued + Default>(&self, address: GuestAddress) -> io::Result<T> {
        let mut value = T::default();
        self.read_slice(value.as_mut_slice(), address).map(|()| value)
    }

    pub fn write_obj<T: ByteValued>(&self, value: T, address: GuestAddress) -> io::Result<()> {
        self.write_slice(value.as_slice(), address)
    }
}

impl Guest {
    /// The guest that has this memory.
    pub fn new(memory: Ram) -> Self {
        Self { memory, asked: Cell::new(0), free: Cell::new(FREE) }
    }

    /// The same guest, elsewhere.
    pub fn again(&self, memory: Ram) -> Self {
        Self { memory, asked: self.asked.clone(), free: self.free.clone() }
    }

    fn field(&self, field: u64) -> u64 {
        let address = GuestAddress(MAILBOX + field);
        match &self.memory {
            Ram::Mapped(memory) => memory.load(address, Ordering::Acquire).unwrap(),
            process @ Ram::Process(..) => process.read_obj(address).unwrap(),
        }
    }

    fn set_field(&self, field: u64, value: u64) {
        let address = GuestAddress(MAILBOX + field);
        match &self.memory {
            Ram::Mapped(memory) => memory.store(value, address, Ordering::Release).unwrap(),
            process @ Ram::Process(..) => process.write_obj(value, address).unwrap(),
        }
    }

    /// Tells the guest to do something, and does not wait.
    pub fn ask(&self, routine: Routine, address: u64, value: u64, count: u64) {
        assert!(self.is_done(), "one thing at a time");
        self.set_field(mailbox::ROUTINE, routine.address());
        self.set_field(mailbox::ADDRESS, address);
        self.set_field(mailbox::VALUE, value);
        self.set_field(mailbox::COUNT, count);
        self.asked.set(self.asked.get() + 1);
        self.set_field(mailbox::ASKED, self.asked.get());
    }

    /// Whether it has done what it was told.
    pub fn is_done(&self) -> bool {
        self.field(mailbox::DONE) == self.asked.get()
    }

    /// Waits until it has; what it answers.
    pub fn wait(&self) -> u64 {
        until("the guest has done what it was told", || self.is_done());
        self.field(mailbox::RESULT)
    }

    /// Tells it and waits.
    pub fn call(&self, routine: Routine, address: u64, value: u64) -> u64 {
        self.ask(routine, address, value, 0);
        self.wait()
    }

    pub fn read32(&self, address: u64) -> u32 {
        u32::try_from(self.call(Routine::Read32, address, 0)).unwrap()
    }

    pub fn write32(&self, address: u64, value: u32) {
        self.call(Routine::Write32, address, value.into());
    }

    pub fn write8(&self, address: u64, value: u8) {
        self.call(Routine::Write8, address, value.into());
    }

    pub fn in8(&self, port: u16) -> u8 {
        u8::try_from(self.call(Routine::In8, port.into(), 0)).unwrap()
    }

    pub fn out8(&self, port: u16, value: u8) {
        self.call(Routine::Out8, port.into(), value.into());
    }

    /// Writes bytes to a port one by one; does not wait.
    pub fn ask_out(&self, port: u16, bytes: &[u8]) {
        let at = self.take(bytes.len() as u64);
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        self.ask(Routine::OutBytes, port.into(), at, bytes.len() as u64);
    }

    /// How often the program went round while it had nothing to do.
    pub fn idle_rounds(&self) -> u64 {
        self.field(mailbox::IDLE)
    }

    /// Pages that nothing else has, at least `length` bytes.
    pub fn take(&self, length: u64) -> u64 {
        let at = self.free.get();
        self.free.set(at + length.next_multiple_of(0x1000));
        at
    }

    /// Sets the interrupt table and the local APIC up, and lets interrupts come.
    pub fn enable_interrupts(&self) {
        for vector in 0..VECTORS {
            let handler = in_guest(&raw const kvm_guest_stubs) + vector * STUB;
            // A present interrupt gate (Intel SDM volume 3A, section 7.14.1); the handler lies below 4 GiB.
            let gate = handler & 0xffff | CODE_SELECTOR << 16 | 0x8e00 << 32 | (handler >> 16) << 48;
            let at = GuestAddress(IDT + 16 * (FIRST_VECTOR + vector));
            self.memory.write_obj(gate, at).unwrap();
        }
        self.memory.write_obj(0xfff_u16, GuestAddress(IDT_POINTER)).unwrap();
        self.memory.write_obj(IDT, GuestAddress(IDT_POINTER + 2)).unwrap();
        // The old interrupt controllers would come between: all their lines are masked.
        self.out8(0x21, 0xff);
        self.out8(0xa1, 0xff);
        // Spurious interrupt vector register: on.
        self.write32(layout::LOCAL_APIC + 0xf0, 0x1ff);
        self.call(Routine::LoadIdt, IDT_POINTER, 0);
    }

    /// Leads an interrupt of the IOAPIC to its vector, edge-triggered, to the first CPU.
    pub fn route(&self, gsi: u32) {
        assert!(u64::from(gsi) < VECTORS);
        for (register, value) in [(0x11 + 2 * gsi, 0), (0x10 + 2 * gsi, 0x20 + gsi)] {
            self.write32(layout::IOAPIC, register);
            self.write32(layout::IOAPIC + 0x10, value);
        }
    }

    /// How often it came.
    pub fn interrupts(&self, gsi: u32) -> u64 {
        self.field(mailbox::INTERRUPTS + 8 * u64::from(gsi))
    }

    /// Triple fault: an interrupt table without an entry.
    pub fn ask_triple_fault(&self) {
        let empty = self.take(16);
        self.ask(Routine::TripleFault, empty, 0, 0);
    }

    /// Bytes of its memory.
    pub fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

/// Waits for what must come soon.
pub fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !happened() {
        assert!(begun.elapsed() < LONG, "in vain: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}
