//! The folder that is shared.

use std::fmt;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::ROOT_ID;
use fuse_backend_rs::api::filesystem::{Context, FileSystem};
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};

use super::FsError;

/// The folder that a device shares, opened.
pub struct ShareRoot {
    pub(super) files: PassthroughFs<()>,
    pub(super) owner: Owner,
}

/// Who the guest takes for the owner of the monitor's own files.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner {
    /// The monitor's own user and group.
    pub(super) host: (u32, u32),
    /// What the guest sees instead.
    pub(super) guest: (u32, u32),
}

/// What a device needs of /proc, opened while the process still has one.
///
/// The crate opens files by `/proc/self/fd/N`, and opens that folder when it is set up. In the empty root of the
/// monitor's namespace there is no /proc: so it is set up before, and given its root after.
pub struct Unrooted(PassthroughFs<()>);

impl ShareRoot {
    /// Shares `folder`, which may be closed then. Needs /proc.
    ///
    /// Unlike a mount, a folder does not keep a guest in that holds a folder of it which is moved out of it.
    pub fn folder(folder: &File) -> Result<Self, FsError> {
        // The dot, since a link at the end is not followed.
        let files = set_up(format!("/proc/self/fd/{}/.", folder.as_raw_fd()))?;
        files.import().map_err(FsError::Root)?;
        Ok(Self::of(files))
    }

    /// Shows files of the monitor's own user and group as the guest's `uid` and `gid`, who may then use them: the
    /// guest's kernel checks permissions by what it sees, and the monitor's user is nobody there. Without this they
    /// are shown as they are.
    #[must_use]
    pub fn shown_as(mut self, uid: u32, gid: u32) -> Self {
        self.owner.guest = (uid, gid);
        self
    }

    fn of(files: PassthroughFs<()>) -> Self {
        // SAFETY: no memory is involved, and neither fails.
        let own = unsafe { (libc::geteuid(), libc::getegid()) };
        Self { files, owner: Owner { host: own, guest: own } }
    }
}

impl Unrooted {
    /// Opens what is needed of /proc.
    pub fn open() -> Result<Self, FsError> {
        set_up("/".into()).map(Self)
    }

    /// Shares the process's root folder, which must be `root`: what `confine::enter_namespace` gave.
    pub fn at(self, root: &File) -> Result<ShareRoot, FsError> {
        self.0.import().map_err(FsError::Root)?;
        let (found, _) = self.0.getattr(&Context::new(), ROOT_ID, None).map_err(FsError::Root)?;
        let meant = root.metadata().map_err(FsError::Root)?;
        // Else the guest would get the host's root.
        if (found.st_dev, found.st_ino) != (meant.dev(), meant.ino()) {
            return Err(FsError::NotRoot);
        }
        Ok(ShareRoot::of(self.0))
    }
}

fn set_up(root_dir: String) -> Result<PassthroughFs<()>, FsError> {
    let config = Config {
        root_dir,
        // Names and attributes are asked for each time: the host changes them as well.
        attr_timeout: Duration::ZERO,
        entry_timeout: Duration::ZERO,
        cache_policy: CachePolicy::Auto,
        writeback: false,
        // Opens are seen by the host: its permissions count, and an unlinked file lives on.
        no_open: false,
        no_opendir: false,
        xattr: false,
        // Needs a capability, as do open_by_handle_at(2) and what it is for.
        inode_file_handles: false,
        killpriv_v2: false,
        // Else a number is kept for ever for each file that was ever seen.
        use_host_ino: true,
        // The root is opened here, once.
        do_import: false,
        ..Config::default()
    };
    PassthroughFs::new(config).map_err(FsError::Proc)
}

impl fmt::Debug for ShareRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShareRoot").field("owner", &self.owner).finish_non_exhaustive()
    }
}

impl fmt::Debug for Unrooted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unrooted").finish_non_exhaustive()
    }
}
