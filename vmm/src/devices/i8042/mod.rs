//! The keyboard controller, of which there is only the reset line: the command 0xfe, by `vm-superio`.
//!
//! Attach it at port 0x60 for five ports. Its status says that there is a byte to be read, always. Linux's driver then
//! finds after sixteen reads (less than 1 ms) that there is no controller, where the zero of `vm-superio` makes it wait
//! half a second for an answer (drivers/input/serio/i8042.c, `i8042_flush`); and who is about to reset finds at once that
//! the controller takes a command (arch/x86/kernel/reboot.c, `kb_wait`), where all ones make it wait.

mod device;
#[cfg(test)]
mod tests;

pub use device::I8042;
