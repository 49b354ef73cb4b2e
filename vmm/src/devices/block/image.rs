//! A disk's chain of images, raw and qcow2, through the crate `imago`.
//!
//! The chain comes as open files. Nothing is opened by name: a header that names an external data file is refused, and
//! a backing file's name in a header says only that there is one. A chain must go on exactly where a header names a
//! backing file: one that ends there is refused, with the name, and so is one that goes on below an image that
//! stands alone. Which file is the backing one is the caller's word; the name is not compared.
//!
//! What a killed process loses: data and metadata of raw images are the kernel's once a write is done, so nothing. Of
//! a qcow2, what was written to newly allocated clusters since the last flush may be lost, since imago keeps L2
//! tables and refcounts in memory until then; what was flushed, or written to clusters that were flushed, stays. The
//! image itself is always whole: at worst clusters leak, which `qemu-img check -r leaks` gives back. For that:
//! * whatever changes tables in memory has the image for itself (reads and writes in place share it), so a flush, or
//!   an L2 table that makes room for another, never meets a table half changed;
//! * clusters are free for others only after the tables that named them have been written;
//! * see `storage` for entries that imago writes at once.
//!
//! A discard also punches holes into the file (fallocate(2)), since imago would only keep the clusters for others.
//!
//! When the host loses power, what was not flushed may be lost in any order, the order of metadata included: only
//! the process's death is guarded, not the machine's.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, ShallowMapping, StorageOpenOptions};

use super::SECTOR;
use super::header::{self, Header};
use super::storage::{Layer, Shared};
use crate::description::Format;

/// Longest name of a backing file, in bytes.
const MAX_NAME: u32 = 1023;

/// Why a disk's images were not opened.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A chain of nothing.
    #[error("The disk has no image; give it at least one")]
    Empty,
    /// A file that is in the chain twice.
    #[error("Image {0} of the disk is also further up: there is a loop in its backing chain")]
    Loop(usize),
    /// A file that cannot be used.
    #[error("Cannot use image {layer} of the disk")]
    File {
        /// Its place in the chain; 0 is the disk's own image.
        layer: usize,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// An image that is not taken.
    #[error("Image {layer} of the disk is refused")]
    Refused {
        /// Its place in the chain; 0 is the disk's own image.
        layer: usize,
        /// Why.
        #[source]
        why: Refused,
    },
}

/// Why an image is not taken.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Its header is of something else.
    #[error("it has no qcow2 header; say that its format is raw if it is")]
    NotQcow2,
    /// What its header says cannot be.
    #[error("its qcow2 header makes no sense ({0}); see `qemu-img check`")]
    Damaged(String),
    /// It is encrypted.
    #[error("it is encrypted; convert it with `qemu-img convert`")]
    Encrypted,
    /// Its data lies elsewhere.
    #[error(
        "its header asks for an external data file, which is not followed; convert it with `qemu-img convert`"
    )]
    ExternalData,
    /// It names a backing file, but is the last of the chain.
    #[error("its header names the backing file {0:?}; that name is not followed, and the chain ends here")]
    NameNotFollowed(String),
    /// It stands alone, but is not the last of the chain.
    #[error("it has no backing file, but the chain goes on below it")]
    StandsAlone,
    /// Its refcounts are of another width, which is a power of two.
    #[error(
        "its refcounts have 2^{0} bits, and only such of 16 can be written; convert it with `qemu-img convert`"
    )]
    RefcountWidth(u32),
    /// It has internal snapshots.
    #[error("it has {0} internal snapshots and cannot be written; delete them with `qemu-img snapshot -d`")]
    Snapshots(u32),
    /// It is to take a disk's place, and has another size.
    #[error("it has {0} bytes, and the disk {1}")]
    Size(u64, u64),
    /// It shall be written, but its file cannot.
    #[error("its file is not open for writing, and the disk is not read-only")]
    NotWritable,
}

/// A disk's content. Clones are one disk, which all of its queues share.
#[derive(Clone, Debug)]
pub struct Image(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// The chain's files, for another that stands on it.
    layers: Vec<(File, Format)>,
    access: RwLock<FormatAccess<Layer>>,
    /// The disk's own file.
    file: Arc<Shared>,
    /// Of the disk's own image, if that is a qcow2.
    header: Option<Header>,
    /// Bytes, whole sectors.
    size: u64,
    read_only: bool,
    /// Clusters were given up in memory since the last flush; they must not be used anew before the next.
    freed: AtomicBool,
}

impl Image {
    /// Opens a chain: `layers[0]` is the disk's own image, the last one the base. All but the first are only read; so
    /// is the first if `read_only`.
    pub fn open(layers: Vec<(File, Format)>, read_only: bool) -> Result<Self, ImageError> {
        let mut seen = Vec::with_capacity(layers.len());
        for (layer, (file, _)) in layers.iter().enumerate() {
            let metadata = file.metadata().map_err(|source| ImageError::File { layer, source })?;
            let identity = (metadata.dev(), metadata.ino());
            if seen.contains(&identity) {
                return Err(ImageError::Loop(layer));
            }
            seen.push(identity);
        }
        let kept = layers.iter().map(|(file, format)| Ok((file.try_clone()?, *format)));
        let kept: io::Result<_> = kept.collect();
        let kept = kept.map_err(|source| ImageError::File { layer: 0, source })?;
        let mut opened = None;
        for (layer, (file, format)) in layers.into_iter().enumerate().rev() {
            let below = opened.take().map(|(access, _, _)| access);
            opened = Some(open_layer(layer, file, format, layer == 0 && !read_only, below)?);
        }
        let (access, file, header) = opened.ok_or(ImageError::Empty)?;
        if let (Some(header), false) = (&header, read_only) {
            file.guard(header);
        }
        let size = access.size() / SECTOR * SECTOR;
        let freed = AtomicBool::new(false);
        let access = RwLock::new(access);
        Ok(Self(Arc::new(Inner { layers: kept, access, file, header, size, read_only, freed })))
    }

    /// The same disk, written to the qcow2 `overlay` from now on, which is empty and as large. This one must not be
    /// written any more. Its first layer stays below the overlay; `below` takes the place of all others, if there is any.
    pub fn under(&self, overlay: File, below: Vec<(File, Format)>) -> Result<Self, ImageError> {
        let failed = |source| ImageError::File { layer: 0, source };
        self.flush().map_err(failed)?;
        let kept = if below.is_empty() { self.0.layers.len() } else { 1 };
        let kept = self.0.layers.iter().take(kept).map(|(file, format)| Ok((file.try_clone()?, *format)));
        let first = std::iter::once(Ok((overlay, Format::Qcow2)));
        let layers: io::Result<Vec<_>> = first.chain(kept).chain(below.into_iter().map(Ok)).collect();
        let image = Self::open(layers.map_err(failed)?, self.is_read_only())?;
        if image.size() != self.size() {
            return Err(ImageError::Refused { layer: 0, why: Refused::Size(image.size(), self.size()) });
        }
        Ok(image)
    }

    /// Its size in bytes, a multiple of [`SECTOR`]; what is left of a last sector is not seen.
    pub fn size(&self) -> u64 {
        self.0.size
    }

    /// Whether it is only read.
    pub fn is_read_only(&self) -> bool {
        self.0.read_only
    }

    /// In what pieces space can be given back, in bytes: clusters, or a file system's usual blocks.
    pub fn granularity(&self) -> u64 {
        self.0.header.map_or(4096, |header| header.cluster_size())
    }

    /// Reads at `offset` until `data` is full.
    pub fn read(&self, data: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        self.0.shared().readv(data, offset)
    }

    /// Writes all of `data` at `offset`.
    pub fn write(&self, data: IoVector<'_>, offset: u64) -> io::Result<()> {
        let shared = self.0.shared();
        if self.0.is_in_place(&shared, offset, data.len())? {
            return shared.writev(data, offset);
        }
        drop(shared);
        let access = self.0.exclusive();
        self.0.allocate(&access, data, offset)
    }

    /// Gives the space of a range of the disk back where that can be done, of whole pieces of
    /// [`Image::granularity`]; what is read there then is what was there before, what is below, or zeroes.
    pub fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        let granularity = self.granularity();
        let end = self.end(offset, length)? / granularity * granularity;
        let mut access = self.0.exclusive();
        let mut at = offset.next_multiple_of(granularity);
        while at < end {
            let (piece, place) = mapped(&access, at, self.0.until_boundary(at, end))?;
            if place != Place::Nowhere {
                self.0.settle(&access)?;
                self.0.freed.store(true, Ordering::Relaxed);
                match access.discard_to_any(at, piece) {
                    Err(error) if error.kind() == io::ErrorKind::Unsupported => return Ok(()),
                    done => done?,
                }
                self.0.punch(place, piece);
            }
            at += piece;
        }
        Ok(())
    }

    /// Makes a range of the disk read as zeroes; with `unmap` its space is given back where that can be done.
    pub fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let granularity = self.granularity();
        let end = self.end(offset, length)?;
        let mut access = self.0.exclusive();
        let mut at = offset;
        while at < end {
            let whole = at.is_multiple_of(granularity) && end - at >= granularity;
            // A part of a cluster may need a new one, so it goes apart from whole ones, which give theirs up.
            let until = if whole {
                end / granularity * granularity
            } else {
                end.min((at + 1).next_multiple_of(granularity))
            };
            let (piece, place) = mapped(&access, at, self.0.until_boundary(at, until))?;
            self.0.settle(&access)?;
            self.0.freed.store(true, Ordering::Relaxed);
            let zeroed = if unmap && whole {
                access.discard_to_zero(at, piece)
            } else {
                access.write_zeroes(at, piece)
            };
            match zeroed {
                // qcow2 of version 2 has no zero clusters, and some file systems no holes.
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    self.0.fill(&access, at, piece)?;
                }
                Ok(()) if unmap && whole => self.0.punch(place, piece),
                done => done?,
            }
            at += piece;
        }
        Ok(())
    }

    /// Puts all that was written to the disk (fdatasync(2)). The monitor calls it before it ends too.
    pub fn flush(&self) -> io::Result<()> {
        if self.0.read_only {
            return Ok(());
        }
        let shared = self.0.shared();
        shared.flush()?;
        drop(shared);
        self.0.file.sync_data()
    }

    fn end(&self, offset: u64, length: u64) -> io::Result<u64> {
        let end = offset.checked_add(length).filter(|&end| end <= self.size() && !self.is_read_only());
        end.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

/// Where a range of a disk has its data in its own image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Nowhere: it is below, or zeroes.
    Nowhere,
    /// Somewhere, but not as it is.
    Packed,
    /// At this offset of the file.
    At(u64),
}

impl Inner {
    fn shared(&self) -> RwLockReadGuard<'_, FormatAccess<Layer>> {
        // A panic ends the monitor's process, so no lock is ever found poisoned there.
        self.access.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn exclusive(&self) -> RwLockWriteGuard<'_, FormatAccess<Layer>> {
        self.access.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a range can be written without any change of tables.
    fn is_in_place(
        &self,
        access: &FormatAccess<Layer>,
        mut offset: u64,
        mut length: u64,
    ) -> io::Result<bool> {
        if self.header.is_none() {
            return Ok(true);
        }
        while length > 0 {
            let (mapped, place) = mapped(access, offset, length)?;
            if !matches!(place, Place::At(_)) {
                return Ok(false);
            }
            offset += mapped;
            length -= mapped;
        }
        Ok(true)
    }

    /// Writes what may need new clusters.
    fn allocate(
        &self,
        access: &FormatAccess<Layer>,
        mut data: IoVector<'_>,
        mut offset: u64,
    ) -> io::Result<()> {
        while !data.is_empty() {
            let (mapped, place) = mapped(access, offset, data.len())?;
            self.settle(access)?;
            let (piece, rest) = data.split_at(mapped);
            if place == Place::Packed {
                // It is given up for a new cluster.
                self.freed.store(true, Ordering::Relaxed);
            }
            access.writev(piece, offset)?;
            offset += mapped;
            data = rest;
        }
        Ok(())
    }

    /// Writes the tables if clusters were given up, so that these can be used anew.
    fn settle(&self, access: &FormatAccess<Layer>) -> io::Result<()> {
        if self.header.is_some() && self.freed.load(Ordering::Relaxed) {
            access.flush()?;
            self.freed.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Gives the file's space back that clusters had which a qcow2 gave up; imago only keeps them for others. Before
    /// the tables that say so are on disk, a killed process leaves zeroes there, which is as good as what was.
    fn punch(&self, place: Place, length: u64) {
        if let (Some(_), Place::At(offset)) = (&self.header, place) {
            self.file.punch(offset, length);
        }
    }

    /// How much of the range from `at` to `end` is mapped by one L2 table.
    fn until_boundary(&self, at: u64, end: u64) -> u64 {
        match &self.header {
            Some(header) => end.min((at + 1).next_multiple_of(header.l2_coverage())) - at,
            None => end - at,
        }
    }

    /// Writes zeroes as data.
    fn fill(&self, access: &FormatAccess<Layer>, offset: u64, length: u64) -> io::Result<()> {
        static ZEROES: [u8; 1 << 16] = [0; 1 << 16];
        let mut done = 0;
        while done < length {
            let piece = usize::try_from(length - done).unwrap_or(usize::MAX).min(ZEROES.len());
            self.allocate(access, IoVector::from(&ZEROES[..piece]), offset + done)?;
            done += piece as u64;
        }
        Ok(())
    }
}

/// How much from `at` on, at most `length`, lies in one place, and where.
fn mapped(access: &FormatAccess<Layer>, at: u64, length: u64) -> io::Result<(u64, Place)> {
    let (mapping, mapped) = access.get_shallow_mapping(at, length)?;
    let place = match mapping {
        ShallowMapping::Raw { offset, writable: true, .. } => Place::At(offset),
        ShallowMapping::Raw { .. } | ShallowMapping::Special { .. } => Place::Packed,
        _ => Place::Nowhere,
    };
    if mapped == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok((mapped, place)) }
}

type Opened = (FormatAccess<Layer>, Arc<Shared>, Option<Header>);

fn open_layer(
    layer: usize,
    file: File,
    format: Format,
    writable: bool,
    below: Option<FormatAccess<Layer>>,
) -> Result<Opened, ImageError> {
    let failed = |source| ImageError::File { layer, source };
    let refused = |why| ImageError::Refused { layer, why };
    // SAFETY: the descriptor is open, and the call only reads its flags.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    if writable && flags & libc::O_ACCMODE != libc::O_RDWR {
        return Err(refused(Refused::NotWritable));
    }
    let header = match format {
        Format::Raw if below.is_some() => return Err(refused(Refused::StandsAlone)),
        Format::Raw => None,
        Format::Qcow2 => {
            Some(read_header(&file, writable, below.is_some()).map_err(|error| match error {
                HeaderError::Io(source) => failed(source),
                HeaderError::Refused(why) => refused(why),
            })?)
        }
    };
    let shared = Arc::new(Shared::new(file.try_clone().map_err(failed)?));
    let options = StorageOpenOptions::new().write(writable).direct(flags & libc::O_DIRECT != 0);
    let file = imago::file::File::from_open_file(file, options).map_err(failed)?;
    let storage = Layer::new(file, Arc::clone(&shared));
    let access = if header.is_none() {
        FormatAccess::new(Raw::open_image(storage, writable).map_err(failed)?)
    } else {
        let builder = Qcow2::<Layer>::builder(storage).write(writable).backing(below).data_file(None);
        FormatAccess::new(builder.open(DenyImplicitOpenGate::default()).map_err(failed)?)
    };
    Ok((access, shared, header))
}

enum HeaderError {
    Io(io::Error),
    Refused(Refused),
}

fn read_header(file: &File, writable: bool, goes_on: bool) -> Result<Header, HeaderError> {
    let mut bytes = [0; header::LENGTH];
    match file.read_exact_at(&mut bytes, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(HeaderError::Refused(Refused::NotQcow2));
        }
        read => read.map_err(HeaderError::Io)?,
    }
    let header = Header::parse(&bytes, writable).map_err(HeaderError::Refused)?;
    match (header.backing_name, goes_on) {
        (None, true) => Err(HeaderError::Refused(Refused::StandsAlone)),
        (Some((offset, length)), false) => {
            let mut name = vec![0; length.min(MAX_NAME) as usize];
            let read = file.read_at(&mut name, offset).unwrap_or(0);
            name.truncate(read);
            let name = String::from_utf8_lossy(&name).into_owned();
            Err(HeaderError::Refused(Refused::NameNotFollowed(name)))
        }
        _ => Ok(header),
    }
}
