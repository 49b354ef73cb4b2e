//! `catalyst-vmm boot-files`: finds on a guest's disk the kernel and the initial RAM disk that its own loader would start.
//!
//! There is no firmware here that could start that loader. What a disk holds is its guest's, and whoever made it may mean ill; so it is
//! looked at by a process of its own, which reads the disk and writes three files that it was given, and can do nothing else: it opens no
//! file, has no privilege, little time and little memory.
//!
//! - `disk`: partitions, and what is in them.
//! - `files`: files of ext4.
//! - `loader`: GRUB's configuration.
//! - `modules`: whether the kernel has the drivers that it needs here.
//! - `initrd`: loads those that the guest's own initial RAM disk may lack.
//! - `find`: all of it together.

pub mod disk;
mod files;
mod find;
mod initrd;
pub mod loader;
pub mod modules;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, RawFd};
use std::rc::Rc;

use serde::{Deserialize, Serialize};

use crate::confine::{self, ConfineError, Filters, Role, SeccompError};
use crate::description::Layer;
use crate::devices::block::{Image, ImageError};
pub use find::{FindError, Found, find};

/// Longest request, in bytes.
const MAX_REQUEST: u64 = 64 << 10;
/// Longest answer, in bytes.
pub const MAX_ANSWER: u64 = 64 << 10;
/// Seconds of the processor's time that a search may take.
const MOST_SECONDS: u64 = 60;
/// Memory that it may take, in bytes.
const MOST_MEMORY: u64 = 2 << 30;

/// What is looked at, and where what is found goes. Descriptors are named by their numbers in the process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The disk's chain of images, its own first.
    pub layers: Vec<Layer>,
    /// An empty file for the kernel.
    pub kernel: RawFd,
    /// An empty file for the initial RAM disk.
    pub initrd: RawFd,
    /// An empty file for the answer, as JSON.
    pub answer: RawFd,
    /// Whether the guest has a network card.
    pub has_nic: bool,
    /// The name that it has where the guest was made.
    #[serde(default)]
    pub nic_name: Option<NicName>,
}

/// A network card that is known by its slot: `ens33` is that in slot 33.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicName {
    /// Its MAC address here.
    pub mac: [u8; 6],
    /// The number of the slot.
    pub slot: u16,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Answer {
    /// A kernel that can be started.
    Found {
        /// Its command line.
        command_line: String,
        /// Its version.
        version: String,
        /// Whether there is an initial RAM disk.
        has_initrd: bool,
    },
    /// None, and why: the end of a sentence.
    Refused(String),
}

/// Why nothing was looked at.
#[derive(Debug, thiserror::Error)]
pub enum BootFilesError {
    /// A descriptor.
    #[error("Cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The request.
    #[error("The request cannot be read")]
    Request(#[source] serde_json::Error),
    /// The disk.
    #[error("Cannot open the disk")]
    Image(#[from] ImageError),
    /// Confinement.
    #[error("Cannot confine the process")]
    Confine(#[from] ConfineError),
    /// System call filter.
    #[error("Cannot confine the process's thread")]
    Seccomp(#[from] SeccompError),
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> BootFilesError {
    move |source| BootFilesError::Io { what, source }
}

/// Serves the request that is read from a descriptor.
pub fn run(request: RawFd) -> Result<(), BootFilesError> {
    confine::share_one_heap();
    let mut text = Vec::new();
    take(request).take(MAX_REQUEST).read_to_end(&mut text).map_err(failed("read the request"))?;
    let request: Request = serde_json::from_slice(&text).map_err(BootFilesError::Request)?;
    limit(libc::RLIMIT_CPU, MOST_SECONDS)?;
    limit(libc::RLIMIT_AS, MOST_MEMORY)?;
    let filters = Filters::compile()?;
    confine::drop_privileges(&[])?;
    filters.install(Role::BootFiles)?;
    serve(&request)
}

fn serve(request: &Request) -> Result<(), BootFilesError> {
    let layers = request.layers.iter().map(|layer| (take(layer.fd), layer.format)).collect();
    let disk: Rc<dyn disk::Source> = Rc::new(Image::open(layers, true)?);
    let answer = match find(&disk, request.has_nic, request.nic_name.as_ref()) {
        Ok(found) => {
            take(request.kernel).write_all(&found.kernel).map_err(failed("write the kernel"))?;
            let initrd = found.initrd.as_deref();
            let written = take(request.initrd).write_all(initrd.unwrap_or_default());
            written.map_err(failed("write the initial RAM disk"))?;
            let has_initrd = initrd.is_some();
            Answer::Found { command_line: found.command_line, version: found.version, has_initrd }
        }
        Err(error) => Answer::Refused(crate::chain(&error)),
    };
    let text = serde_json::to_vec(&answer).map_err(|error| failed("write the answer")(error.into()))?;
    take(request.answer).write_all(&text).map_err(failed("write the answer"))
}

fn take(fd: RawFd) -> File {
    // SAFETY: the caller gave these descriptors to this process alone, and each is named once.
    unsafe { File::from_raw_fd(fd) }
}

fn limit(resource: libc::__rlimit_resource_t, most: u64) -> Result<(), BootFilesError> {
    let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
    // SAFETY: the structure is whole.
    if unsafe { libc::setrlimit(resource, &raw const limit) } == 0 {
        return Ok(());
    }
    Err(failed("limit what it takes")(io::Error::last_os_error()))
}
