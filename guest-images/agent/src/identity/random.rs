//! The kernel's random numbers, and what is made of them.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;

use nix::errno::Errno;

/// Bytes of a seed.
pub const SEED: usize = 32;

/// random(4): a count of bits, a count of bytes, the bytes.
#[repr(C)]
struct PoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; SEED],
}

nix::ioctl_write_ptr!(add_entropy, b'R', 0x03, [libc::c_int; 2]);
nix::ioctl_none!(reseed, b'R', 0x07);

/// Gives the kernel's generator a seed, credited in full, and makes it use it at once.
pub fn seed(seed: [u8; SEED]) -> io::Result<()> {
    let device = OpenOptions::new().write(true).open("/dev/urandom")?;
    let bytes = libc::c_int::try_from(SEED).map_err(io::Error::other)?;
    let info = PoolInfo { entropy_count: bytes * 8, buf_size: bytes, buf: seed };
    // SAFETY: the ioctl's number speaks of the two counts alone, but the kernel reads the bytes
    // after them as well: the pointer is to a struct that has them, laid out as C does.
    unsafe { add_entropy(device.as_raw_fd(), (&raw const info).cast()) }?;
    // SAFETY: the ioctl takes no argument.
    match unsafe { reseed(device.as_raw_fd()) } {
        // Kernels before 4.14 know no reseeding.
        Ok(_) | Err(Errno::EINVAL | Errno::ENOTTY) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Fills `bytes` with random ones.
pub fn fill(bytes: &mut [u8]) -> io::Result<()> {
    File::open("/dev/urandom")?.read_exact(bytes)
}

/// A random UUID (RFC 9562, version 4).
pub fn uuid() -> io::Result<String> {
    let mut bytes = [0; 16];
    fill(&mut bytes)?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let digits = format!("{:032x}", u128::from_be_bytes(bytes));
    Ok([&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-"))
}

/// Reads bytes from hexadecimal digits; `None` if it is not exactly so many.
pub fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let text = text.as_bytes();
    if text.len() != 2 * N || !text.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, digits) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_digits_are_read_exactly() {
        assert_eq!(from_hex("00fF"), Some([0, 255]));
        assert_eq!(from_hex::<2>("00f"), None);
        assert_eq!(from_hex::<2>("00f+"), None);
        assert_eq!(from_hex::<1>("é"), None);
    }

    #[test]
    fn the_kernel_takes_a_seed() {
        // Harmless to the machine of the test: a seed is mixed in and replaces nothing.
        match seed([7; SEED]) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                println!("SKIPPED: only CAP_SYS_ADMIN may credit a seed");
            }
            other => other.unwrap(),
        }
    }

    #[test]
    fn uuids_have_their_version_and_differ() {
        let (one, other) = (uuid().unwrap(), uuid().unwrap());
        assert_eq!((one.len(), &one[14..15]), (36, "4"));
        assert_ne!(one, other);
    }
}
