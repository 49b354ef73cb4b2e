//! Word that the DHCP server has acknowledged a lease, for guests that no agent tells of.

use std::ffi::{CStr, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;

use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Network;
use crate::privilege::as_root;

/// Room for what is read at once; more comes with the next read.
const BUFFER: usize = 4096;

/// What is written to the list of acknowledged leases, from now on.
#[derive(Debug)]
pub struct Acknowledgements {
    watch: AsyncFd<OwnedFd>,
    name: Option<OsString>,
}

impl Network {
    /// Listens for leases that the network's DHCP server acknowledges. The network must be up, or have been.
    pub fn acknowledgements(&self) -> io::Result<Acknowledgements> {
        let list = self.files().acknowledged();
        let folder = list.parent().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        // The folder's, since each start of the server may make the list anew.
        let events = WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO;
        as_root(|| inotify::add_watch(&watch, folder, events))?;
        // SAFETY: the descriptor is owned by the AsyncFd and stays the same one until it is dropped.
        let watch = unsafe { AsyncFd::register_with_interest(watch, Interest::READABLE) };
        let watch = watch.map_err(|refused| io::Error::other(refused.to_string()))?;
        Ok(Acknowledgements { watch, name: list.file_name().map(ToOwned::to_owned) })
    }
}

impl Acknowledgements {
    /// Waits until the list has changed since this was called the last time.
    pub async fn next(&self) -> io::Result<()> {
        loop {
            let mut ready = self.watch.readable().await?;
            if self.read()? {
                return Ok(());
            }
            ready.clear_ready();
        }
    }

    /// Reads all there is to read; whether the list was in it.
    fn read(&self) -> io::Result<bool> {
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut reader = Reader::new(self.watch.get_ref(), &mut buffer);
        let mut changed = false;
        loop {
            match reader.next() {
                Ok(event) => {
                    let name = event.file_name().map(CStr::to_bytes);
                    changed |= name == self.name.as_deref().map(OsStrExt::as_bytes);
                }
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(changed),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}
