//! A layer's file as imago sees it, with what keeps a qcow2 whole when the process dies at any moment.
//!
//! imago keeps L2 tables and refcount blocks in memory and writes refcounts before what refers to the clusters. But
//! it writes a new entry of the L1 table or of the refcount table at once, while the refcount of the cluster that
//! the entry names is still in memory only. A process killed then would leave an image that names a cluster which
//! the next one takes for free. So before such an entry is written here, its cluster's refcount is put to disk.

use std::fmt::{self, Display, Formatter};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageExt};

use super::header::Header;

/// Bits of an entry that are an offset in the file, in both tables.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bytes of a table's entry.
const ENTRY: usize = 8;

/// The file of one layer.
#[derive(Debug)]
pub(super) struct Layer {
    file: File,
    shared: Arc<Shared>,
}

/// What the image keeps of its own layer's file while imago has the layer.
#[derive(Debug)]
pub(super) struct Shared {
    /// The same open file, for what imago has no call for.
    same: std::fs::File,
    tables: OnceLock<Tables>,
}

/// The tables of a qcow2 that is written to.
#[derive(Debug)]
struct Tables {
    cluster_bits: u32,
    l1: Range<u64>,
    reftable: Range<u64>,
    /// An entry could not be written: memory and disk no longer agree, so nothing more is written.
    broken: AtomicBool,
}

impl Shared {
    pub fn new(same: std::fs::File) -> Self {
        Self { same, tables: OnceLock::new() }
    }

    /// From now on the header stays as it is, and the tables that it names are guarded.
    pub fn guard(&self, header: &Header) {
        let entries = u64::from(header.l1_entries) * ENTRY as u64;
        let l1 = header.l1_offset..header.l1_offset.saturating_add(entries);
        let clusters = u64::from(header.reftable_clusters) * header.cluster_size();
        let reftable = header.reftable_offset..header.reftable_offset.saturating_add(clusters);
        self.reserve(&l1);
        self.reserve(&reftable);
        let tables =
            Tables { cluster_bits: header.cluster_bits, l1, reftable, broken: AtomicBool::new(false) };
        // Only the first call counts; there is one.
        let _ = self.tables.set(tables);
    }

    /// Puts what was written to the disk (fdatasync(2)).
    pub fn sync_data(&self) -> io::Result<()> {
        self.same.sync_data()
    }

    /// Gives a table that is a hole in the file its place there, so that entries can be written when no space is
    /// left. Where that cannot be, such a write fails (see `Tables::broken`).
    fn reserve(&self, range: &Range<u64>) {
        let length = self.same.metadata().map_or(0, |metadata| metadata.len());
        let end = range.end.min(length);
        self.fallocate(0, range.start, end.saturating_sub(range.start));
    }

    /// Gives the space of a range back; what is read there then is zeroes. Where that cannot be, all stays.
    pub fn punch(&self, offset: u64, length: u64) {
        self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, length);
    }

    fn fallocate(&self, mode: libc::c_int, offset: u64, length: u64) {
        if let (Ok(offset), Ok(length)) = (libc::off_t::try_from(offset), libc::off_t::try_from(length)) {
            // SAFETY: the descriptor is open, and the call takes numbers only.
            unsafe { libc::fallocate(self.same.as_raw_fd(), mode, offset, length) };
        }
    }
}

impl Layer {
    pub fn new(file: File, shared: Arc<Shared>) -> Self {
        Self { file, shared }
    }

    /// Puts the refcount of the cluster at `offset` to disk, if it says there that the cluster is free.
    fn claim(&self, tables: &Tables, offset: u64) -> io::Result<()> {
        let cluster = offset >> tables.cluster_bits;
        // Refcounts have 16 bits (see `Header::parse`).
        let per_block = 1 << (tables.cluster_bits - 1);
        let at = tables.reftable.start + cluster / per_block * ENTRY as u64;
        if at >= tables.reftable.end {
            return Err(io::Error::other("a cluster lies beyond the refcount table"));
        }
        let mut entry = [0; ENTRY];
        self.file.read(&mut entry[..], at)?;
        let block = u64::from_be_bytes(entry) & OFFSET;
        if block == 0 {
            // A refcount block that counts itself, and is about to be entered.
            return Ok(());
        }
        let at = block + cluster % per_block * 2;
        let mut count = [0; 2];
        self.file.read(&mut count[..], at)?;
        if count == [0; 2] {
            self.file.write(&1_u16.to_be_bytes()[..], at)?;
        }
        Ok(())
    }

    fn write_entries(&self, tables: &Tables, data: IoVector<'_>, offset: u64) -> io::Result<()> {
        let mut bytes = vec![0; usize::try_from(data.len()).map_err(io::Error::other)?];
        data.copy_into_slice(&mut bytes);
        for entry in bytes.as_chunks::<ENTRY>().0 {
            let names = u64::from_be_bytes(*entry) & OFFSET;
            if names != 0 {
                self.claim(tables, names)?;
            }
        }
        // SAFETY: what the caller of `pure_writev` promised is handed on.
        unsafe { self.file.pure_writev(data, offset) }
    }
}

impl Display for Layer {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        self.file.fmt(formatter)
    }
}

impl Storage for Layer {
    fn mem_align(&self) -> usize {
        self.file.mem_align()
    }

    fn req_align(&self) -> usize {
        self.file.req_align()
    }

    fn zero_align(&self) -> usize {
        self.file.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.file.discard_align()
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    unsafe fn pure_readv(&self, data: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: the caller's promise is handed on.
        unsafe { self.file.pure_readv(data, offset) }
    }

    unsafe fn pure_writev(&self, data: IoVector<'_>, offset: u64) -> io::Result<()> {
        let Some(tables) = self.shared.tables.get() else {
            // SAFETY: the caller's promise is handed on.
            return unsafe { self.file.pure_writev(data, offset) };
        };
        if tables.broken.load(Ordering::Relaxed) {
            return Err(io::Error::other("an entry of the image's tables could not be written before"));
        }
        if offset < 1 << tables.cluster_bits {
            // imago would do this to move a table that is full; its guard would then look at the old place.
            return Err(io::Error::other("the image's tables are full, or it maps its own header"));
        }
        if tables.l1.contains(&offset) || tables.reftable.contains(&offset) {
            let written = self.write_entries(tables, data, offset);
            if written.is_err() {
                tables.broken.store(true, Ordering::Relaxed);
            }
            return written;
        }
        // SAFETY: the caller's promise is handed on.
        unsafe { self.file.pure_writev(data, offset) }
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: the caller's promise is handed on.
        unsafe { self.file.pure_write_zeroes(offset, length) }
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: the caller's promise is handed on.
        unsafe { self.file.pure_write_allocated_zeroes(offset, length) }
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: the caller's promise is handed on.
        unsafe { self.file.pure_discard(offset, length) }
    }

    fn flush(&self) -> io::Result<()> {
        // A file has no buffer of its own, so there is nothing to call.
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.shared.sync_data()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: the caller's promise is handed on.
        unsafe { self.file.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.file.get_storage_helper()
    }

    fn resize(&self, size: u64, mode: PreallocateMode) -> io::Result<()> {
        self.file.resize(size, mode)
    }
}
