//! qcow2 images over a raw base: the last 64 bytes are what is done with the disk, 8 bytes each.

#![no_main]
#![allow(clippy::unwrap_used)]

use catalyst_vmm::description::Format;
use catalyst_vmm::devices::block::Image;
use catalyst_vmm_fuzz::{OVERLAY_SIZE, memfd};
use imago::io_buffers::{IoVector, IoVectorMut};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((bytes, ops)) = data.split_last_chunk::<64>() else { return };
    let base = memfd(&[]);
    base.set_len(OVERLAY_SIZE / 2).unwrap();
    let alone = ops[0] & 0x80 != 0;
    let mut layers = vec![(memfd(bytes), Format::Qcow2)];
    if !alone {
        layers.push((base, Format::Raw));
    }
    let Ok(image) = Image::open(layers, ops[1] & 0x80 != 0) else { return };
    let size = image.size();
    for op in ops.as_chunks::<8>().0 {
        let [kind, _, a, b, c, d, e, f] = *op;
        // Whole sectors within the disk, as the device checks before.
        let offset = match u64::from(u32::from_le_bytes([a, b, c, d])) << 9 {
            offset if offset < size => offset,
            offset => offset.checked_rem(size).unwrap_or(0) & !511,
        };
        let length = ((u64::from(u16::from_le_bytes([e, f])) % 512 + 1) << 9).min(size - offset);
        let mut buffer = vec![kind; usize::try_from(length).unwrap()];
        let _ = match kind % 8 {
            _ if length == 0 => Ok(()),
            0 => image.flush(),
            1 | 2 => image.read(IoVectorMut::from(&mut buffer[..]), offset),
            3 | 4 if !image.is_read_only() => image.write(IoVector::from(&buffer[..]), offset),
            5 => image.discard(offset, length),
            6 => image.write_zeroes(offset, length, true),
            _ => image.write_zeroes(offset, length, false),
        };
    }
    let _ = image.flush();
});
