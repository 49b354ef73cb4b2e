//! The disk, on raw images and on qcow2 overlays.

#![no_main]
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use catalyst_vmm::description::Format;
use catalyst_vmm::devices::block::{Block, Image};
use catalyst_vmm_fuzz::{All, Data, Few, Guest, Message, OVERLAY, OVERLAY_SIZE, Op, memfd, threads};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    qcow2: bool,
    read_only: bool,
    ops: All<Op<Request>>,
}

/// A request: header, then ranges or data.
#[derive(Arbitrary, Debug)]
enum Request {
    Sectors { queue: u8, kind: u8, sector: u16, ranges: Few<(u16, u32, u8)>, data: u16 },
    Plain(u32, u64, Data),
}

impl Message for Request {
    fn queue(&self) -> u8 {
        if let Self::Sectors { queue, .. } = self { *queue } else { 0 }
    }
    fn bytes(&self, _: &[u64]) -> Vec<u8> {
        let header =
            |kind: u32, sector: u64| [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        match self {
            Self::Sectors { kind, sector, ranges, data, .. } => {
                let kind = [0, 1, 4, 8, 11, 13][usize::from(kind % 6)];
                let mut bytes = header(kind, u64::from(*sector) % 2100);
                for (sector, sectors, flags) in &ranges.0 {
                    bytes.extend(u64::from(*sector).to_le_bytes());
                    bytes.extend(sectors.to_le_bytes());
                    bytes.extend(u32::from(*flags).to_le_bytes());
                }
                if kind == 1 {
                    bytes.resize(16 + 512 * (usize::from(*data) % 8), 7);
                }
                bytes
            }
            Self::Plain(kind, sector, rest) => [header(*kind, *sector), rest.0.clone()].concat(),
        }
    }
}

fuzz_target!(|input: Input| {
    let raw = |size| {
        let file = memfd(&[]);
        file.set_len(size).unwrap();
        (file, Format::Raw)
    };
    let layers = if input.qcow2 {
        vec![(memfd(OVERLAY), Format::Qcow2), raw(OVERLAY_SIZE / 2)]
    } else {
        vec![raw(OVERLAY_SIZE + 100)]
    };
    let image = Image::open(layers, input.read_only).unwrap();
    let reactors = vec![Arc::clone(&threads().reactor); 2];
    Guest::new(Block::new(image, "fuzz", reactors, Arc::new(|| ()))).run(&input.ops.0, |disk, _, _| {
        let _ = disk.image().flush();
    });
});
