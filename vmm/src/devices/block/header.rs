//! What a qcow2 header says, checked before anything believes it (QEMU's docs/interop/qcow2.txt).

use super::image::Refused;

/// Bytes of a header that are read here; version 2 has fewer, and nothing of theirs is used then.
pub(super) const LENGTH: usize = 104;

const MAGIC: u32 = 0x5146_49fb;
/// Incompatible feature: guest data lies in another file.
const EXTERNAL_DATA: u64 = 1 << 2;
/// Sizes beyond this do not fit file offsets.
const MAX_SIZE: u64 = 1 << 56;

/// Where an image's tables are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    /// The cluster size is 2 to the power of this, in bytes.
    pub cluster_bits: u32,
    /// Offset of the active L1 table in the file.
    pub l1_offset: u64,
    /// Entries of the active L1 table.
    pub l1_entries: u32,
    /// Offset of the refcount table in the file.
    pub reftable_offset: u64,
    /// Length of the refcount table, in clusters.
    pub reftable_clusters: u32,
    /// Where the backing file's name is in the file, and its length in bytes.
    pub backing_name: Option<(u64, u32)>,
}

impl Header {
    /// Reads a header; `writable` says that the image is to be written to.
    pub fn parse(bytes: &[u8; LENGTH], writable: bool) -> Result<Self, Refused> {
        let u32_at =
            |at: usize| bytes[at..at + 4].iter().fold(0, |value, &byte| value << 8 | u32::from(byte));
        let u64_at = |at: usize| u64::from(u32_at(at)) << 32 | u64::from(u32_at(at + 4));
        if u32_at(0) != MAGIC {
            return Err(Refused::NotQcow2);
        }
        let version = u32_at(4);
        let cluster_bits = u32_at(20);
        if !(2..=3).contains(&version) || !(9..=21).contains(&cluster_bits) {
            return Err(Refused::Damaged(format!("version {version}, 2^{cluster_bits} bytes a cluster")));
        }
        if u32_at(32) != 0 {
            return Err(Refused::Encrypted);
        }
        if version == 3 && u64_at(72) & EXTERNAL_DATA != 0 {
            return Err(Refused::ExternalData);
        }
        let header = Self {
            cluster_bits,
            l1_entries: u32_at(36),
            l1_offset: u64_at(40),
            reftable_offset: u64_at(48),
            reftable_clusters: u32_at(56),
            backing_name: Some((u64_at(8), u32_at(16))).filter(|&(offset, _)| offset != 0),
        };
        let size = u64_at(24);
        if size > MAX_SIZE || u64::from(header.l1_entries) < size.div_ceil(header.l2_coverage()) {
            return Err(Refused::Damaged(format!("{size} bytes, but {} L1 entries", header.l1_entries)));
        }
        if writable {
            // What is done for images that survive a crash at any moment (see `storage`) knows only these.
            let refcount_order = if version == 3 { u32_at(96) } else { 4 };
            if refcount_order != 4 {
                return Err(Refused::RefcountWidth(refcount_order));
            }
            if u32_at(60) != 0 {
                return Err(Refused::Snapshots(u32_at(60)));
            }
        }
        Ok(header)
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of the disk that one L2 table maps.
    pub fn l2_coverage(&self) -> u64 {
        1 << (2 * self.cluster_bits - 3)
    }
}
