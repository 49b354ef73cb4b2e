//! Kernel images: the first byte says how the kernel is entered and whether there is an initrd.

#![no_main]
#![allow(clippy::unwrap_used)]

use std::sync::LazyLock;

use catalyst_vmm::boot::{Kernel, load};
use catalyst_vmm::description::Protocol;
use catalyst_vmm::memory::{Backing, GuestRam, map};
use catalyst_vmm_fuzz::memfd;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    static MEMORY: LazyLock<GuestRam> = LazyLock::new(|| map(16, Backing::Anonymous, false).unwrap());
    let Some((how, image)) = data.split_first() else { return };
    let kernel = Kernel {
        image: memfd(image),
        initrd: (how & 4 != 0).then(|| memfd(&image[image.len() / 2..])),
        command_line: "console=ttyS0".into(),
        protocol: [Protocol::Auto, Protocol::Pvh, Protocol::Linux64, Protocol::Auto][usize::from(how & 3)],
    };
    // Either is fine, as long as it is an answer.
    let _ = load(&MEMORY, kernel, b"tables");
});
