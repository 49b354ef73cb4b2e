//! Disks of others: VMDK (VMware's "Virtual Disk Format 5.0") and qcow2, looked at before anything opens them.
//!
//! A VMDK's descriptor names the files that the disk consists of, a qcow2's header those below it. QEMU would follow such
//! names. So they are read here, only what lies beside the disk is opened, and QEMU gets descriptors and a text of ours.
//! Disks of others are never written: what a guest changes goes into an overlay.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::super::disk::DiskError;
use super::hardware::is_disk_name;

/// What a file is that is no disk that is known.
const NO_IMAGE: &str = "it is neither a VMDK nor a qcow2";
/// Bytes of a sector.
const SECTOR: u64 = 512;
/// Bytes of a file that say what it is.
const HEAD: usize = 512;
/// Largest descriptor, in bytes.
const MAX_DESCRIPTOR: u64 = 64 * 1024;
/// Most files that a disk may consist of: with 2 GB each, 512 GB.
const MAX_EXTENTS: usize = 256;
/// Largest disk, in bytes.
const MAX_BYTES: u64 = 16 << 40;

/// A disk that is only read.
#[derive(Debug)]
pub struct Image {
    /// Its size in bytes.
    pub bytes: u64,
    /// What it consists of.
    pub parts: Parts,
    /// The files' names, that of the disk first.
    pub files: Vec<String>,
}

/// What a disk consists of.
#[derive(Debug)]
pub enum Parts {
    /// One qcow2, which stands on nothing.
    Qcow2(File),
    /// The disk as it is.
    Raw(File),
    /// One sparse VMDK: growable or compressed.
    Vmdk(File),
    /// The files that a VMDK's descriptor names.
    Extents(Vec<Extent>),
}

/// A file of a VMDK.
#[derive(Debug)]
pub struct Extent {
    /// It.
    pub file: File,
    /// How many sectors of the disk it holds.
    pub sectors: u64,
    /// The sector of the file at which they begin, where they lie in it as they are; `None` in a sparse one.
    pub flat: Option<u64>,
}

/// Opens the disk `name` in `folder`.
pub fn open(folder: &Path, name: &str) -> Result<Image, DiskError> {
    let file = open_file(folder, name)?;
    let unusable = unusable(folder, name);
    let read_failed = |source| DiskError::Io { what: "read", path: shown(folder, name), source };
    let mut start = [0; HEAD];
    let length = read_at_most(&file, &mut start).map_err(read_failed)?;
    let start = &start[..length];
    if start.starts_with(b"QFI\xfb") {
        let bytes = qcow2(start).map_err(unusable)?;
        return Ok(Image { bytes, parts: Parts::Qcow2(file), files: vec![name.to_owned()] });
    }
    if start.starts_with(b"KDMV") {
        let header = Sparse::read(start).map_err(unusable)?;
        if let Some(at) = header.descriptor {
            let text = descriptor_at(&file, at).map_err(read_failed)?;
            check_parent(&text).map_err(unusable)?;
        }
        let bytes = in_bytes(header.sectors).map_err(unusable)?;
        return Ok(Image { bytes, parts: Parts::Vmdk(file), files: vec![name.to_owned()] });
    }
    let about = file.metadata().map_err(read_failed)?;
    let is_text = start.starts_with(b"# Disk DescriptorFile");
    if !is_text || about.len() > MAX_DESCRIPTOR {
        return Err(unusable(NO_IMAGE));
    }
    let text = descriptor_at(&file, (0, about.len())).map_err(read_failed)?;
    check_parent(&text).map_err(unusable)?;
    let mut files = vec![name.to_owned()];
    let mut extents = Vec::new();
    let mut sectors = 0_u64;
    for line in extent_lines(&text) {
        let named = parse_extent(line).map_err(unusable)?;
        if extents.len() == MAX_EXTENTS {
            return Err(unusable("it consists of more than 256 files"));
        }
        let extent = open_extent(folder, &named)?;
        sectors = sectors.saturating_add(extent.sectors);
        extents.push(extent);
        files.push(named.name);
    }
    if extents.is_empty() {
        return Err(unusable("its descriptor names no file that holds data"));
    }
    Ok(Image { bytes: in_bytes(sectors).map_err(unusable)?, parts: Parts::Extents(extents), files })
}

/// Opens the disk `name` in `folder` as [`open`] does, or takes a file that ends in `.raw` or `.img` for the disk itself.
pub fn open_or_raw(folder: &Path, name: &str) -> Result<Image, DiskError> {
    let opened = open(folder, name);
    let ending = Path::new(name).extension().unwrap_or_default().to_ascii_lowercase();
    if !matches!(opened, Err(DiskError::Unusable { why: NO_IMAGE, .. }))
        || !(ending == "raw" || ending == "img")
    {
        return opened;
    }
    let file = open_file(folder, name)?;
    let length = file
        .metadata()
        .map_err(|source| DiskError::Io { what: "read", path: shown(folder, name), source })?
        .len();
    let bytes = in_bytes(length.div_ceil(SECTOR)).map_err(unusable(folder, name))?;
    Ok(Image { bytes, parts: Parts::Raw(file), files: vec![name.to_owned()] })
}

/// A descriptor of ours of a VMDK, which names its files by what `pass` calls them.
pub fn descriptor(extents: Vec<Extent>, mut pass: impl FnMut(File) -> String) -> String {
    let mut text = String::from("# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n");
    text += "createType=\"twoGbMaxExtentSparse\"\n";
    for Extent { file, sectors, flat } in extents {
        let name = pass(file);
        // Writing to a String cannot fail.
        let _ = match flat {
            None => writeln!(text, "RW {sectors} SPARSE \"{name}\""),
            Some(offset) => writeln!(text, "RW {sectors} FLAT \"{name}\" {offset}"),
        };
    }
    text
}

fn shown(folder: &Path, name: &str) -> String {
    folder.join(name).display().to_string()
}

fn unusable(folder: &Path, name: &str) -> impl Fn(&'static str) -> DiskError + Copy {
    move |why| DiskError::Unusable { path: shown(folder, name), why }
}

/// Opens a regular file for reading; a link is none.
fn open_file(folder: &Path, name: &str) -> Result<File, DiskError> {
    let path = shown(folder, name);
    if !is_disk_name(name) {
        return Err(DiskError::Unusable { path, why: "it is not the name of a disk beside the VMX" });
    }
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.open(folder.join(name)).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => DiskError::Missing(path.clone()),
        _ => DiskError::Io { what: "open", path: path.clone(), source },
    })?;
    match file.metadata() {
        Ok(about) if about.is_file() => Ok(file),
        Ok(_) => Err(DiskError::Unusable { path, why: "it is not a regular file" }),
        Err(source) => Err(DiskError::Io { what: "read", path, source }),
    }
}

fn read_at_most(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read_at(&mut buffer[length..], length as u64)? {
            0 => break,
            read => length += read,
        }
    }
    Ok(length)
}

fn in_bytes(sectors: u64) -> Result<u64, &'static str> {
    match sectors.checked_mul(SECTOR) {
        Some(0) => Err("it is empty"),
        Some(bytes) if bytes <= MAX_BYTES => Ok(bytes),
        _ => Err("it is larger than 16 TiB"),
    }
}

/// The size that a qcow2's header says, if it stands on nothing (QEMU's docs/interop/qcow2.txt).
fn qcow2(header: &[u8]) -> Result<u64, &'static str> {
    let [version, method] = [4, 32].map(|at| be32(header, at));
    let [backing, size, incompatible] = [8, 24, 72].map(|at| be64(header, at));
    match version {
        Some(2 | 3) => {}
        _ => return Err("it is a qcow2 of a version that is not known"),
    }
    if backing != Some(0) {
        return Err("its header names a disk below it, which is never followed");
    }
    if method != Some(0) {
        return Err("it is encrypted");
    }
    // Dirty (0) and corrupt (1) are QEMU's business; a data file (2) would be followed.
    if version == Some(3) && incompatible.is_none_or(|bits| bits & 4 != 0) {
        return Err("its header names an external data file, which is never followed");
    }
    let bytes = size.ok_or("it is too short for a qcow2")?;
    if bytes == 0 || bytes > MAX_BYTES || bytes % SECTOR != 0 {
        return Err("its size is none that a disk can have");
    }
    Ok(bytes)
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// What the header of a sparse extent says (`SparseExtentHeader`).
struct Sparse {
    sectors: u64,
    /// Where its descriptor begins and its length, in bytes.
    descriptor: Option<(u64, u64)>,
}

impl Sparse {
    fn read(header: &[u8]) -> Result<Self, &'static str> {
        let [capacity, at, length] = [12, 28, 36].map(|offset| le64(header, offset));
        let (Some(capacity), Some(at), Some(length)) = (capacity, at, length) else {
            return Err("it is too short for a VMDK");
        };
        // With none, QEMU takes what the descriptor in it names.
        if capacity == 0 {
            return Err("its header says that it is empty");
        }
        if at == 0 || length == 0 {
            return Ok(Self { sectors: capacity, descriptor: None });
        }
        let at = at.checked_mul(SECTOR).ok_or("its descriptor lies beyond its end")?;
        Ok(Self {
            sectors: capacity,
            descriptor: Some((at, length.saturating_mul(SECTOR).min(MAX_DESCRIPTOR))),
        })
    }
}

fn descriptor_at(file: &File, (at, length): (u64, u64)) -> io::Result<String> {
    let mut bytes = Vec::new();
    let mut file = file.try_clone()?;
    io::Seek::seek(&mut file, io::SeekFrom::Start(at))?;
    file.take(length).read_to_end(&mut bytes)?;
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    Ok(String::from_utf8_lossy(&bytes[..end]).into_owned())
}

/// A child holds only what differs from a parent that is another file.
fn check_parent(descriptor: &str) -> Result<(), &'static str> {
    let key = |line: &str| line.split('=').next().unwrap_or_default().trim().to_ascii_lowercase();
    let parent = |line: &str| line.split_once('=').map(|(_, id)| id.trim().to_ascii_lowercase());
    for line in descriptor.lines() {
        let child = match key(line).as_str() {
            "parentfilenamehint" => true,
            "parentcid" => parent(line).is_none_or(|id| id != "ffffffff"),
            _ => false,
        };
        if child {
            return Err("it is a snapshot or a linked clone, which needs another disk; consolidate it first");
        }
    }
    Ok(())
}

/// A line of a descriptor, `RW 4192256 SPARSE "disk-s001.vmdk"`.
struct Named {
    sectors: u64,
    name: String,
    flat: Option<u64>,
}

fn extent_lines(descriptor: &str) -> impl Iterator<Item = &str> {
    let is_extent = |line: &&str| {
        let access = line.split_whitespace().next().unwrap_or_default();
        ["RW", "RDONLY", "NOACCESS"].contains(&access)
    };
    descriptor.lines().map(str::trim).filter(is_extent)
}

fn parse_extent(line: &str) -> Result<Named, &'static str> {
    const MALFORMED: &str = "its descriptor has a line that cannot be understood";
    let (head, rest) = line.split_once('"').ok_or(MALFORMED)?;
    let (name, tail) = rest.rsplit_once('"').ok_or(MALFORMED)?;
    let head: Vec<&str> = head.split_whitespace().collect();
    let ["RW" | "RDONLY", sectors, kind] = head.as_slice() else { return Err(MALFORMED) };
    let sectors = sectors.parse().ok().filter(|count| *count != 0).ok_or(MALFORMED)?;
    let flat = match *kind {
        "SPARSE" => None,
        "FLAT" | "VMFS" => Some(match tail.trim() {
            "" => 0,
            offset => offset.parse().map_err(|_| MALFORMED)?,
        }),
        _ => return Err("its descriptor has an extent that is neither SPARSE nor FLAT"),
    };
    if !is_disk_name(name) {
        return Err("its descriptor names what is no disk file beside it");
    }
    Ok(Named { sectors, name: name.to_owned(), flat })
}

fn open_extent(folder: &Path, named: &Named) -> Result<Extent, DiskError> {
    let file = open_file(folder, &named.name)?;
    let unusable = unusable(folder, &named.name);
    let read_failed = |source| DiskError::Io { what: "read", path: shown(folder, &named.name), source };
    if let Some(offset) = named.flat {
        let end = offset.checked_add(named.sectors).and_then(|end| end.checked_mul(SECTOR));
        let length = file.metadata().map_err(read_failed)?.len();
        if end.is_none_or(|end| end > length) {
            return Err(unusable("it is shorter than its descriptor says"));
        }
    } else {
        let mut header = [0; HEAD];
        let length = read_at_most(&file, &mut header).map_err(read_failed)?;
        if !header[..length].starts_with(b"KDMV") {
            return Err(unusable("it is not the sparse extent that its descriptor says"));
        }
        if Sparse::read(&header[..length]).map_err(unusable)?.sectors < named.sectors {
            return Err(unusable("it is smaller than its descriptor says"));
        }
    }
    Ok(Extent { file, sectors: named.sectors, flat: named.flat })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;

    fn made(folder: &Path, name: &str, options: &[&str]) {
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q"]).args(options).arg(folder.join(name)).arg("5G");
        assert!(command.status().unwrap().success());
    }

    fn why(folder: &Path, name: &str) -> String {
        open(folder, name).unwrap_err().to_string()
    }

    #[test]
    fn every_kind_that_boxes_have_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        for (kind, files) in [
            ("monolithicSparse", 1),
            ("streamOptimized", 1),
            ("twoGbMaxExtentSparse", 4),
            ("monolithicFlat", 2),
            ("twoGbMaxExtentFlat", 4),
        ] {
            let name = format!("{kind}.vmdk");
            made(folder, &name, &["-f", "vmdk", "-o", &format!("subformat={kind}")]);
            let image = open(folder, &name).unwrap();
            assert_eq!((image.bytes, image.files.len()), (5 << 30, files), "{kind}");
        }
        made(folder, "a.qcow2", &["-f", "qcow2"]);
        assert!(matches!(open(folder, "a.qcow2").unwrap().parts, Parts::Qcow2(_)));
    }

    #[test]
    fn names_that_lead_out_of_the_folder_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("box");
        fs::create_dir(&inner).unwrap();
        fs::write(folder.path().join("secret.vmdk"), vec![1; 1 << 20]).unwrap();
        std::os::unix::fs::symlink("../secret.vmdk", inner.join("link.vmdk")).unwrap();
        fs::create_dir(inner.join("folder.vmdk")).unwrap();
        fs::write(inner.join("thesis.doc"), vec![1; 1 << 20]).unwrap();
        for name in
            ["../secret.vmdk", "/etc/shadow", "link.vmdk", "folder.vmdk", "thesis.doc", "gone.vmdk", ".."]
        {
            let text = format!("# Disk DescriptorFile\nparentCID=ffffffff\nRW 16 FLAT \"{name}\" 0\n");
            fs::write(inner.join("disk.vmdk"), text).unwrap();
            open(&inner, "disk.vmdk").expect_err(name);
        }
        open(&inner, "link.vmdk").expect_err("a link");
    }

    #[test]
    fn disks_that_stand_on_others_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        made(folder, "base.qcow2", &["-f", "qcow2"]);
        made(folder, "child.qcow2", &["-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2"]);
        assert!(why(folder, "child.qcow2").contains("disk below it"));
        let data = format!("data_file={}", folder.join("data").display());
        made(folder, "data.qcow2", &["-f", "qcow2", "-o", &data]);
        assert!(why(folder, "data.qcow2").contains("external data file"));
        made(folder, "base.vmdk", &["-f", "vmdk"]);
        made(folder, "child.vmdk", &["-f", "vmdk", "-F", "vmdk", "-b", "base.vmdk"]);
        assert!(why(folder, "child.vmdk").contains("linked clone"));
    }

    #[test]
    fn a_header_that_would_make_qemu_follow_names_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        made(folder, "a.vmdk", &["-f", "vmdk"]);
        let mut bytes = fs::read(folder.join("a.vmdk")).unwrap();
        bytes[12..20].fill(0);
        fs::write(folder.join("a.vmdk"), &bytes).unwrap();
        assert!(why(folder, "a.vmdk").contains("empty"));
    }

    #[test]
    fn garbage_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let flat = |line: &str| format!("# Disk DescriptorFile\n{line}\n").into_bytes();
        fs::write(folder.join("x-flat.vmdk"), vec![0; 8192]).unwrap();
        let short = [&b"KDMV"[..], &[1; 20]].concat();
        for bad in [
            Vec::new(),
            b"hello".to_vec(),
            b"QFI\xfb\0\0\0\x09".to_vec(),
            b"KDMV".to_vec(),
            short,
            b"COWD\x01\0\0\0".to_vec(),
            flat(""),
            flat("RW x FLAT \"x-flat.vmdk\" 0"),
            flat("RW 17 FLAT \"x-flat.vmdk\" 0"),
            flat("RW 16 FLAT \"x-flat.vmdk\" 18446744073709551615"),
            flat("RW 16 SPARSE \"x-flat.vmdk\""),
            flat("RW 16 VMFSSPARSE \"x-flat.vmdk\""),
            flat("RW 0 FLAT \"x-flat.vmdk\" 0"),
        ] {
            fs::write(folder.join("d.vmdk"), &bad).unwrap();
            let text = why(folder, "d.vmdk");
            assert!(text.contains(".vmdk"), "{text}");
        }
    }
}
