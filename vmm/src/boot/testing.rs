//! Kernel images, for tests: what a linker would make of a few bytes of code.

/// An ELF image with one segment of `code` at `address`, `size` bytes long in memory, entered at its beginning; with
/// `pvh` it has a PVH note of that entry.
pub fn elf(code: &[u8], address: u64, size: u64, pvh: Option<u32>) -> Vec<u8> {
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(64, 0);
    image[24..32].copy_from_slice(&address.to_le_bytes());
    image[32..40].copy_from_slice(&64_u64.to_le_bytes());
    image[54..56].copy_from_slice(&56_u16.to_le_bytes());
    image[56..58].copy_from_slice(&2_u16.to_le_bytes());
    let mut note = Vec::new();
    if let Some(entry) = pvh {
        for word in [4, 4, 18] {
            note.extend_from_slice(&u32::to_le_bytes(word));
        }
        note.extend_from_slice(b"Xen\0");
        note.extend_from_slice(&entry.to_le_bytes());
    }
    let content = 64 + 2 * 56;
    let segments = [
        (1_u32, content, address, code.len() as u64, size),
        (4, content + code.len() as u64, 0, note.len() as u64, note.len() as u64),
    ];
    for (kind, offset, address, in_file, in_memory) in segments {
        image.extend_from_slice(&kind.to_le_bytes());
        image.extend_from_slice(&[0; 4]);
        for word in [offset, address, address, in_file, in_memory, 8] {
            image.extend_from_slice(&word.to_le_bytes());
        }
    }
    image.extend_from_slice(code);
    image.extend_from_slice(&note);
    image
}
