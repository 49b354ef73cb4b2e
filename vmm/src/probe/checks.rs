//! Instructions that every kernel needs and that an interpreter of kernel code may lack, each tried by name.

use super::guest::{DATA, Guest, PORT_DONE, Program, RunError};

/// One instruction to try.
pub(super) struct Instruction {
    pub(super) name: &'static str,
    pub(super) run: fn(&mut Guest) -> Result<(), RunError>,
}

/// What is tried, in this order.
pub(super) const ALL: [Instruction; 3] = [
    Instruction { name: "lock cmpxchg16b", run: cmpxchg16b },
    Instruction { name: "xrstor", run: xrstor },
    Instruction { name: "int3", run: int3 },
];

/// ```text
/// f0 48 0f c7 0f   lock cmpxchg16b [rdi]
/// e6 e1            out  0xe1, al
/// f4               hlt
/// ```
const CMPXCHG16B: Program =
    Program { code: &[0xf0, 0x48, 0x0f, 0xc7, 0x0f, 0xe6, 0xe1, 0xf4], breakpoint_handler: &[] };

/// ```text
/// 48 0f ae 2f      xrstor64 [rdi]
/// e6 e1            out  0xe1, al
/// f4               hlt
/// ```
const XRSTOR: Program =
    Program { code: &[0x48, 0x0f, 0xae, 0x2f, 0xe6, 0xe1, 0xf4], breakpoint_handler: &[] };

/// ```text
///       cc               int3
///       e6 e1            out  0xe1, al
///       f4               hlt
/// #BP:  bb 33 cc 33 cc   mov  ebx, 0xcc33cc33
///       48 cf            iretq
/// ```
const INT3: Program = Program {
    code: &[0xcc, 0xe6, 0xe1, 0xf4],
    breakpoint_handler: &[0xbb, 0x33, 0xcc, 0x33, 0xcc, 0x48, 0xcf],
};
/// What the handler leaves in RBX.
const HANDLED: u64 = 0xcc33_cc33;

/// The standard XSAVE area's parts used here (Intel SDM volume 1, chapter 13.4): MXCSR, XMM0, XSTATE_BV; its size.
const MXCSR: usize = 24;
const XMM0: usize = 160;
const XSTATE_BV: usize = 512;
const XSAVE_AREA: usize = 576;
/// XSTATE_BV: the area holds SSE state; x87 state is initial.
const SSE_STATE: u8 = 0b10;
/// MXCSR as after reset.
const MXCSR_RESET: u32 = 0x1f80;

fn cmpxchg16b(guest: &mut Guest) -> Result<(), RunError> {
    if !guest.has_cmpxchg16b() {
        return Err(RunError::NoFeature("cmpxchg16b"));
    }
    guest.load(&CMPXCHG16B)?;
    let (old, new) =
        (0x0f1e_2d3c_4b5a_6978_8796_a5b4_c3d2_e1f0_u128, 0x1122_3344_5566_7788_99aa_bbcc_ddee_ff00);
    guest.write(DATA, &old.to_le_bytes())?;
    guest.change_registers(|registers| {
        (registers.rax, registers.rdx) = halves(old);
        (registers.rbx, registers.rcx) = halves(new);
    })?;
    guest.run_to(PORT_DONE)?;
    if guest.read(DATA)? == new.to_le_bytes() {
        Ok(())
    } else {
        Err(RunError::WrongResult("the 16 bytes were not exchanged"))
    }
}

fn xrstor(guest: &mut Guest) -> Result<(), RunError> {
    if !guest.has_xsave() {
        return Err(RunError::NoFeature("xsave"));
    }
    guest.load(&XRSTOR)?;
    let pattern = *b"catalyst's probe";
    let mut area = [0; XSAVE_AREA];
    area[MXCSR..MXCSR + 4].copy_from_slice(&MXCSR_RESET.to_le_bytes());
    area[XMM0..XMM0 + 16].copy_from_slice(&pattern);
    area[XSTATE_BV] = SSE_STATE;
    guest.write(DATA, &area)?;
    guest.change_registers(|registers| {
        // The states to restore: x87 and SSE.
        registers.rax = 0b11;
        registers.rdx = 0;
    })?;
    guest.run_to(PORT_DONE)?;
    if guest.xmm0()? == pattern { Ok(()) } else { Err(RunError::WrongResult("xmm0 was not restored")) }
}

fn int3(guest: &mut Guest) -> Result<(), RunError> {
    guest.load(&INT3)?;
    guest.run_to(PORT_DONE)?;
    if guest.registers()?.rbx == HANDLED {
        Ok(())
    } else {
        Err(RunError::WrongResult("the handler in the IDT was not called"))
    }
}

/// The low and the high 64 bits.
fn halves(value: u128) -> (u64, u64) {
    let bytes = value.to_le_bytes();
    let (mut low, mut high) = ([0; 8], [0; 8]);
    low.copy_from_slice(&bytes[..8]);
    high.copy_from_slice(&bytes[8..]);
    (u64::from_le_bytes(low), u64::from_le_bytes(high))
}
