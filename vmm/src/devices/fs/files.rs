//! What a guest may do with the host's files.
//!
//! The crate's `PassthroughFs` does the work. It was written for a guest's own file system and trusts it more than
//! a hypervisor on a desktop should: here names are checked, flags of open(2) that would lead out of the folder or
//! change how the host does its I/O are taken away, and what a guest keeps open is counted. What is not here
//! is answered with ENOSYS, which a guest's kernel knows how to live with.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, ROOT_ID, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::passthrough::PassthroughFs;

use super::hard_link;
use super::root::Owner;
use super::{FsError, ShareRoot, xattr};
use crate::virtio::Counters;

/// Descriptors that are left to the rest of the monitor.
const RESERVED: u64 = 256;
/// Flags of open(2) that a guest may use. `O_PATH` would follow links, `O_DIRECT` is between the guest and its own
/// cache, and the others are of no use through FUSE.
const OPEN_FLAGS: i32 =
    libc::O_ACCMODE | libc::O_APPEND | libc::O_TRUNC | libc::O_NONBLOCK | libc::O_SYNC | libc::O_DSYNC;
/// Bits of a mode that let a file run as its owner or group. On the host that is the owner of the share.
const SET_ID: u32 = libc::S_ISUID | libc::S_ISGID;

/// What a chown sets.
const OWNERS: SetattrValid = SetattrValid::UID.union(SetattrValid::GID);

/// The shared files, as one guest sees them.
pub struct Files {
    inner: PassthroughFs<()>,
    owner: Owner,
    /// The guest's users are the host's.
    keeps_owners: bool,
    session: Mutex<Session>,
    /// Most descriptors for the guest.
    most: usize,
    counters: Counters,
}

/// What the guest has from us since it mounted the file system.
#[derive(Debug, Default)]
struct Session {
    mounted: bool,
    /// How often each inode was looked up and not forgotten.
    inodes: HashMap<u64, u64>,
    /// Open files and folders, with their inodes.
    handles: HashMap<u64, u64>,
}

impl Files {
    /// At most `most` inodes and handles are open for the guest.
    pub(super) fn new(root: ShareRoot, most: usize, counters: Counters) -> Self {
        Self {
            inner: root.files,
            owner: root.owner,
            keeps_owners: false,
            session: Mutex::default(),
            most,
            counters,
        }
    }

    /// Serves `root`. Raises the process's limit of open files as far as it may be.
    pub fn serving(root: ShareRoot) -> Result<Self, FsError> {
        let most = raise_limit().map_err(FsError::Limit)?;
        Ok(Self::new(root, most, Counters::default()))
    }

    /// The same for a process that may act as any user: files keep their owners in both directions, bits that let them run as
    /// somebody, capabilities and what users note of them. What the guest's kernel allows, by what it sees of a file, is done.
    pub fn keeping_owners(root: ShareRoot) -> Result<Self, FsError> {
        Ok(Self { keeps_owners: true, ..Self::serving(root)? })
    }

    /// Where a file is now, from the process's root.
    pub fn path_of(&self, inode: u64) -> io::Result<PathBuf> {
        self.inner.readlinkat_proc_file(inode)
    }

    /// Whether the guest has the file system mounted.
    pub(super) fn is_mounted(&self) -> bool {
        self.session().mounted
    }

    /// Closes and forgets everything that the guest has.
    pub fn end_session(&self) {
        let session = std::mem::take(&mut *self.session());
        let context = Context::new();
        for (handle, inode) in session.handles {
            // It is known to be open.
            let _ = self.inner.release(&context, inode, 0, handle, false, false, None);
        }
        for (inode, lookups) in session.inodes {
            self.inner.forget(&context, inode, lookups);
        }
    }

    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether one more descriptor is within what the guest may have.
    fn admit(&self) -> io::Result<()> {
        let session = self.session();
        if session.inodes.len() + session.handles.len() < self.most {
            Ok(())
        } else {
            Err(error(libc::ENFILE))
        }
    }

    fn looked_up(&self, entry: Entry) -> Entry {
        if entry.inode != ROOT_ID {
            *self.session().inodes.entry(entry.inode).or_default() += 1;
        }
        Entry { attr: self.shown(entry.attr), ..entry }
    }

    /// Attributes as the guest sees them.
    fn shown(&self, mut attributes: stat64) -> stat64 {
        let Owner { host, guest } = self.owner;
        attributes.st_uid = if attributes.st_uid == host.0 { guest.0 } else { attributes.st_uid };
        attributes.st_gid = if attributes.st_gid == host.1 { guest.1 } else { attributes.st_gid };
        attributes
    }

    /// Attributes that the guest sets, as they are meant here.
    fn meant(&self, mut attributes: stat64) -> stat64 {
        let Owner { host, guest } = self.owner;
        attributes.st_uid = if attributes.st_uid == guest.0 { host.0 } else { attributes.st_uid };
        attributes.st_gid = if attributes.st_gid == guest.1 { host.1 } else { attributes.st_gid };
        attributes
    }

    fn opened(&self, inode: u64, handle: Option<u64>) {
        self.session().handles.extend(handle.map(|handle| (handle, inode)));
    }

    /// Nothing but a folder gets the bits that let it run as somebody, but where owners are kept: the host has other users.
    fn check_set_id(&self, mode: u32) -> io::Result<()> {
        if self.keeps_owners { Ok(()) } else { check_set_id(mode) }
    }

    /// Flags of FUSE with which the guest's kernel has bits taken away that let a file run as somebody.
    fn kills(&self, fuse_flags: u32) -> u32 {
        if self.keeps_owners { fuse_flags } else { 0 }
    }

    /// Whether there are extended attributes.
    fn admit_xattr(&self) -> io::Result<()> {
        if self.keeps_owners { Ok(()) } else { Err(error(libc::ENOSYS)) }
    }

    /// Opens a file that is there, as CREATE does.
    fn open_existing(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        (flags, fuse_flags): (i32, u32),
    ) -> Created {
        let entry = self.lookup(context, parent, name)?;
        match self.open(context, entry.inode, bits(flags), fuse_flags) {
            Ok((handle, options, passthrough)) => Ok((entry, handle, options, passthrough)),
            Err(error) => {
                self.forget(context, entry.inode, 1);
                Err(error)
            }
        }
    }
}

type Opened = io::Result<(Option<u64>, OpenOptions, Option<u32>)>;
type Created = io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)>;

impl FileSystem for Files {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.end_session();
        self.session().mounted = true;
        // With it the guest does not ask for capabilities at every write, nor for modes before it sets owners: bits that are not to stay
        // are taken away here.
        let kills = capable & FsOptions::HANDLE_KILLPRIV_V2;
        let mut owners = kills;
        if self.keeps_owners {
            // Of a process with rights the host's kernel leaves them to the crate.
            self.inner.init(kills)?;
            // Where a link leads does not change; another one is another file.
            owners |= capable & FsOptions::CACHE_SYMLINKS;
        }
        // READDIRPLUS is left out: names are valid for no time, so it would only keep files open. So are
        // the write-back cache and cached links, which the host does not see or the guest would not see change.
        Ok(FsOptions::ASYNC_READ
            | FsOptions::BIG_WRITES
            | FsOptions::MAX_PAGES
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::PARALLEL_DIROPS
            | owners)
    }

    fn destroy(&self) {
        self.end_session();
    }

    /// Where owners are not kept, files are made as the monitor's own user: it has no right to be another one, and the crate
    /// takes 0 for "as it is".
    fn id_remap(&self, context: &mut Context) -> io::Result<()> {
        if !self.keeps_owners {
            context.uid = 0;
            context.gid = 0;
        }
        Ok(())
    }

    fn lookup(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        // `..` is asked for only where a file system is exported by NFS, and would lead out of a moved folder.
        check_name(name)?;
        self.admit()?;
        self.inner.lookup(context, parent, name).map(|entry| self.looked_up(entry))
    }

    fn forget(&self, context: &Context, inode: u64, count: u64) {
        let mut session = self.session();
        if let Some(lookups) = session.inodes.get_mut(&inode) {
            *lookups = lookups.saturating_sub(count);
            if *lookups == 0 {
                session.inodes.remove(&inode);
            }
            drop(session);
            self.inner.forget(context, inode, count);
        }
    }

    fn batch_forget(&self, context: &Context, requests: Vec<(u64, u64)>) {
        for (inode, count) in requests {
            self.forget(context, inode, count);
        }
    }

    fn getattr(&self, context: &Context, inode: u64, handle: Option<u64>) -> io::Result<(stat64, Duration)> {
        let (attributes, valid) = self.inner.getattr(context, inode, handle)?;
        Ok((self.shown(attributes), valid))
    }

    fn setattr(
        &self,
        context: &Context,
        inode: u64,
        attributes: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        if valid.contains(SetattrValid::MODE) && attributes.st_mode & SET_ID != 0 {
            let (now, _) = self.inner.getattr(context, inode, None)?;
            self.check_set_id(now.st_mode & libc::S_IFMT | attributes.st_mode & !libc::S_IFMT)?;
        }
        let meant = self.meant(attributes);
        let set = |valid| self.inner.setattr(context, inode, meant, handle, valid);
        let (attributes, timeout) = match set(valid) {
            // Whom a file belongs to is the host's business: what unpacks an archive need not fail for it.
            Err(error)
                if error.raw_os_error() == Some(libc::EPERM)
                    && valid.intersects(OWNERS)
                    && !self.keeps_owners =>
            {
                set(valid - OWNERS)?
            }
            set => set?,
        };
        Ok((self.shown(attributes), timeout))
    }

    fn readlink(&self, context: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.inner.readlink(context, inode)
    }

    fn symlink(&self, context: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        self.admit()?;
        self.inner.symlink(context, target, parent, name).map(|entry| self.looked_up(entry))
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        device: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        check_name(name)?;
        self.check_set_id(mode)?;
        // A device of the host is nothing for a guest, whoever the monitor runs as.
        if !matches!(mode & libc::S_IFMT, 0 | libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK) {
            return Err(error(libc::EPERM));
        }
        self.admit()?;
        self.inner.mknod(context, parent, name, mode, device, umask).map(|entry| self.looked_up(entry))
    }

    fn mkdir(&self, context: &Context, parent: u64, name: &CStr, mode: u32, umask: u32) -> io::Result<Entry> {
        check_name(name)?;
        self.admit()?;
        self.inner.mkdir(context, parent, name, mode, umask).map(|entry| self.looked_up(entry))
    }

    fn unlink(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        check_name(name)?;
        self.inner.unlink(context, parent, name)
    }

    fn rmdir(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        check_name(name)?;
        self.inner.rmdir(context, parent, name)
    }

    fn rename(
        &self,
        context: &Context,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        check_name(old_name)?;
        check_name(new_name)?;
        self.inner.rename(context, old_parent, old_name, new_parent, new_name, flags)
    }

    fn link(&self, context: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        self.admit()?;
        let made = match self.inner.link(context, inode, parent, name) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                hard_link::make(&self.inner, inode, parent, name)?;
                self.inner.lookup(context, parent, name)
            }
            made => made,
        };
        made.map(|entry| self.looked_up(entry))
    }

    fn open(&self, context: &Context, inode: u64, flags: u32, fuse_flags: u32) -> Opened {
        self.admit()?;
        let flags = bits(flags.cast_signed() & OPEN_FLAGS);
        let opened = self.inner.open(context, inode, flags, self.kills(fuse_flags))?;
        self.opened(inode, opened.0);
        Ok(opened)
    }

    fn create(&self, context: &Context, parent: u64, name: &CStr, args: CreateIn) -> Created {
        check_name(name)?;
        self.check_set_id(args.mode)?;
        // One for the inode, one for the handle; the reserve has room for the second.
        self.admit()?;
        let asked = args.flags.cast_signed();
        let flags = asked & OPEN_FLAGS;
        // Always a new file: for one that is there the crate would keep an inode that it cannot open.
        let exclusive = flags | libc::O_EXCL | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let fuse_flags = args.fuse_flags;
        let args = CreateIn { flags: bits(exclusive), mode: args.mode & 0o7777, fuse_flags: 0, ..args };
        match self.inner.create(context, parent, name, args) {
            Ok((entry, handle, options, passthrough)) => {
                self.opened(entry.inode, handle);
                Ok((self.looked_up(entry), handle, options, passthrough))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && asked & libc::O_EXCL == 0 => {
                self.open_existing(context, parent, name, (flags, fuse_flags))
            }
            Err(error) => Err(error),
        }
    }

    fn read(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        to: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        let flags = bits(flags.cast_signed() & OPEN_FLAGS);
        let read = self.inner.read(context, inode, handle, to, size, offset, lock_owner, flags)?;
        self.counters.read(read);
        Ok(read)
    }

    fn write(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        from: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let flags = bits(flags.cast_signed() & OPEN_FLAGS);
        let kills = self.kills(fuse_flags);
        let written = self
            .inner
            .write(context, inode, handle, from, size, offset, lock_owner, delayed, flags, kills)?;
        self.counters.written(written);
        Ok(written)
    }

    fn fsync(&self, context: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.inner.fsync(context, inode, data_only, handle)
    }

    fn fallocate(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.inner.fallocate(context, inode, handle, mode, offset, length)
    }

    fn lseek(&self, context: &Context, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        self.inner.lseek(context, inode, handle, offset, whence)
    }

    fn release(
        &self,
        context: &Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        unlock: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.inner.release(context, inode, flags, handle, flush, unlock, lock_owner)?;
        self.session().handles.remove(&handle);
        Ok(())
    }

    fn statfs(&self, context: &Context, inode: u64) -> io::Result<statvfs64> {
        self.inner.statfs(context, inode)
    }

    fn getxattr(&self, _: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.admit_xattr()?;
        xattr::get(&self.inner, inode, name, size)
    }

    fn listxattr(&self, _: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.admit_xattr()?;
        xattr::list(&self.inner, inode, size)
    }

    fn setxattr(&self, _: &Context, inode: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        self.admit_xattr()?;
        xattr::set(&self.inner, inode, name, value, flags)
    }

    fn removexattr(&self, _: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.admit_xattr()?;
        xattr::remove(&self.inner, inode, name)
    }

    fn opendir(&self, context: &Context, inode: u64, _flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        self.admit()?;
        let opened = self.inner.opendir(context, inode, bits(libc::O_RDONLY))?;
        self.opened(inode, opened.0);
        Ok(opened)
    }

    fn readdir(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        // The crate's READDIR gives its own numbers for inodes, which differ from what stat(2) says in the guest.
        self.inner.readdirplus(context, inode, handle, size, offset, &mut |name, entry| {
            let added = add(name);
            // For one that did not fit the crate does it.
            if !matches!(added, Ok(0)) {
                self.inner.forget(context, entry.inode, 1);
            }
            added
        })
    }

    fn fsyncdir(&self, context: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.inner.fsyncdir(context, inode, data_only, handle)
    }

    fn releasedir(&self, context: &Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        self.inner.releasedir(context, inode, flags, handle)?;
        self.session().handles.remove(&handle);
        Ok(())
    }
}

impl fmt::Debug for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let session = self.session();
        f.debug_struct("Files")
            .field("mounted", &session.mounted)
            .field("inodes", &session.inodes.len())
            .field("handles", &session.handles.len())
            .finish_non_exhaustive()
    }
}

fn error(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

fn bits(flags: i32) -> u32 {
    flags.cast_unsigned()
}

/// A name is one part of a path, and neither the folder itself nor the one above.
fn check_name(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(error(libc::EINVAL)),
        name if name.contains(&b'/') => Err(error(libc::EINVAL)),
        _ => Ok(()),
    }
}

/// Nothing but a folder gets the bits that let it run as somebody: the host has other users.
fn check_set_id(mode: u32) -> io::Result<()> {
    let is_folder = mode & libc::S_IFMT == libc::S_IFDIR;
    if mode & SET_ID != 0 && !is_folder { Err(error(libc::EPERM)) } else { Ok(()) }
}

/// Raises the soft limit of open files to the hard one, and returns how many of them the guest may have.
pub(super) fn raise_limit() -> io::Result<usize> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel fills the struct.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } == -1 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the kernel reads the struct.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(limit.rlim_max.saturating_sub(RESERVED)).unwrap_or(usize::MAX))
}
