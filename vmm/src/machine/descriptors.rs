//! Descriptors that the description names, taken over by this process one by one.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use crate::description::{Description, DescriptionError};

/// The descriptors of a description that was checked: each is open, and named once.
#[derive(Debug)]
pub struct Descriptors(Vec<RawFd>);

impl Descriptors {
    /// Finds out whether all are open, and keeps them from programs that this one might start.
    pub fn check(description: &Description) -> Result<Self, DescriptionError> {
        let named = description.descriptors();
        for (field, fd) in &named {
            // SAFETY: fcntl on a number, whatever it is, only answers.
            if unsafe { libc::fcntl(*fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
                return Err(DescriptionError::NotOpen { field: field.clone(), fd: *fd });
            }
        }
        Ok(Self(named.into_iter().map(|(_, fd)| fd).collect()))
    }

    /// Takes one over; `None` if it was taken before, or is not of this description.
    pub fn take(&mut self, fd: RawFd) -> Option<OwnedFd> {
        let at = self.0.iter().position(|known| *known == fd)?;
        self.0.swap_remove(at);
        // SAFETY: it was open when it was checked, the caller gave it to this process alone, and since each is named
        // once and taken once, nobody else owns it.
        Some(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Takes one over as a file.
    pub fn file(&mut self, fd: RawFd) -> Result<File, DescriptionError> {
        let field = String::from("descriptor");
        self.take(fd).map(File::from).ok_or(DescriptionError::NotOpen { field, fd })
    }

    /// Takes one over as a listening socket.
    pub fn listener(&mut self, fd: RawFd) -> Result<UnixListener, DescriptionError> {
        let field = String::from("descriptor");
        self.take(fd).map(UnixListener::from).ok_or(DescriptionError::NotOpen { field, fd })
    }
}
