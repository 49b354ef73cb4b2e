//! One FUSE message: a chain with the message in its readable parts and room for the answer in the others.

use std::io::Write;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{InHeader, OutHeader};
use fuse_backend_rs::api::server::{MAX_BUFFER_SIZE, Server};
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use vm_memory::ByteValued;

use super::files::Files;
use crate::memory::GuestRam;
use crate::virtio::queue::Chain;

/// Most bytes of a message or an answer: 1 MiB of data, and what stands before it.
const MAX_MESSAGE: u64 = MAX_BUFFER_SIZE as u64 + 4096;
/// Most parts of a chain: the pages of a message, and some for headers. More than readv(2) takes would fail there.
const MAX_PARTS: usize = 512;

/// Answers the message in `chain`. Returns how many bytes were written, and whether the message was one.
pub(super) fn answer(server: &Server<Arc<Files>>, memory: &GuestRam, chain: &Chain) -> (u32, bool) {
    if !is_bounded(chain) {
        return (0, false);
    }
    let Ok(reader) = Reader::from_descriptor_chain(memory.as_ref(), chain.clone()) else { return (0, false) };
    let Ok(writer) = VirtioFsWriter::new(memory.as_ref(), chain.clone()) else { return (0, false) };
    match server.handle_message(reader, Writer::VirtioFs(writer), None, None) {
        Ok(written) => (u32::try_from(written).unwrap_or(u32::MAX), true),
        // The crate leaves some malformed messages without an answer; the guest's process would wait for ever.
        Err(_) => (refuse(memory, chain).unwrap_or(0), false),
    }
}

/// Whether the chain is no longer than a message can be. What is counted here may change until it is used; addresses
/// and lengths are then checked again, and the crate's own limits hold.
fn is_bounded(chain: &Chain) -> bool {
    let (mut readable, mut writable) = (0, 0);
    for (index, part) in chain.clone().enumerate() {
        let total = if part.is_write_only() { &mut writable } else { &mut readable };
        *total += u64::from(part.len());
        if index >= MAX_PARTS || *total > MAX_MESSAGE {
            return false;
        }
    }
    true
}

/// Answers with EINVAL, if there is a header to answer to and room for it.
fn refuse(memory: &GuestRam, chain: &Chain) -> Option<u32> {
    let mut reader = Reader::from_descriptor_chain(memory.as_ref(), chain.clone()).ok()?;
    let mut writer = VirtioFsWriter::new(memory.as_ref(), chain.clone()).ok()?;
    let InHeader { unique, .. } = reader.read_obj().ok()?;
    let len = u32::try_from(size_of::<OutHeader>()).ok()?;
    let header = OutHeader { len, error: -libc::EINVAL, unique };
    writer.write_all(header.as_slice()).ok()?;
    Some(len)
}
