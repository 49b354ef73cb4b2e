//! The life of a monitor process: read the description, give everything up, build, run, end.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{FromRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, PoisonError};

use crate::confine::{self, ConfineError, Filters, Role, SeccompError};
use crate::control::Server;
use crate::control::protocol::{Cause, Event};
use crate::description::{self, Description, DescriptionError};
use crate::devices::block::NoRoom;
use crate::devices::fs::{FsError, ShareRoot, Unrooted};
use crate::machine::{Begin, BuildError, Commands, Descriptors, Machine, MemoryUse, Surroundings};
use crate::reactor::Reactor;
use crate::vcpu::runner::Report;
use crate::vm::VmError;

/// Why a machine did not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The description could not be read.
    #[error("Cannot read the machine description from descriptor {fd}")]
    Read {
        /// The descriptor.
        fd: RawFd,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is no use.
    #[error(transparent)]
    Description(#[from] DescriptionError),
    /// The process could not be confined.
    #[error("Cannot confine the monitor")]
    Confine(#[from] ConfineError),
    /// The system call filters.
    #[error("Cannot confine the monitor")]
    Seccomp(#[from] SeccompError),
    /// The shared file system.
    #[error("Cannot prepare the shared folder")]
    Share(#[from] FsError),
    /// The process may not make a mount namespace.
    #[error(
        "A share without a folder takes a mount namespace of the monitor's own, and the monitor may not make one: start \
         it with CAP_SYS_ADMIN, with `confine`, or give the share a folder"
    )]
    NoNamespace,
    /// The machine could not be built.
    #[error("Cannot build the machine")]
    Build(#[from] BuildError),
    /// The control socket cannot be served.
    #[error("Cannot serve the control socket")]
    Control(#[source] io::Error),
    /// The guest could not be started.
    #[error("Cannot start the guest")]
    Start(#[from] VmError),
}

/// Runs the machine whose description is read from `description_fd`, until it ends; says why it did.
pub fn run(description_fd: RawFd) -> Result<Cause, RunError> {
    end_with_panics();
    confine::share_one_heap();
    let description = Description::from_json(&read_description(description_fd)?)?;
    // While there is a /proc.
    let memory_use = MemoryUse::open();
    let mut descriptors = Descriptors::check(&description)?;
    let (filters, share) = confine_process(&description, &mut descriptors)?;

    let (tell, told) = channel();
    let (report, full) = (reporter(tell.clone()), Arc::new(AtomicBool::new(false)));
    let begin = begin(filters.clone());
    let surroundings = Surroundings {
        descriptors,
        begin: begin.clone(),
        ended: Arc::clone(&report),
        no_room: no_room(tell, Arc::clone(&full)),
        share,
        memory_use,
    };
    let (machine, listener) = Machine::build(&description, surroundings)?;
    let machine = Arc::new(machine);

    let control_begin = begin.clone();
    let control =
        Reactor::spawn("control", move || control_begin(Role::Control)).map_err(RunError::Control)?;
    let commands = Commands::new(Arc::clone(&machine), report);
    let server = Server::start(listener, Box::new(commands), &control).map_err(RunError::Control)?;
    if let Some(filters) = filters {
        filters.install(Role::Main)?;
    }
    if !description.paused {
        machine.resume()?;
    }
    let announce = |event| server.lock().unwrap_or_else(PoisonError::into_inner).announce(event);
    let cause = loop {
        match told.recv() {
            Ok(Told::NoRoom) => {
                if let Err(error) = machine.pause() {
                    eprintln!("catalyst-vmm: {}", crate::chain(&error));
                    break Cause::Failure;
                }
                full.store(false, Ordering::Release);
                announce(Event::NoRoom);
            }
            Ok(Told::Ended(cause)) => break cause,
            // The senders live in the machine.
            Err(_) => break Cause::Failure,
        }
    };
    machine.finish();
    announce(Event::Exit { cause });
    // Nothing of what would be taken apart now outlives the process.
    std::mem::forget((machine, control));
    Ok(cause)
}

/// What parts of the machine tell this thread.
enum Told {
    Ended(Cause),
    NoRoom,
}

fn reporter(tell: Sender<Told>) -> Report {
    Arc::new(move |cause| {
        // Nobody listens any more once the end has begun.
        let _ = tell.send(Told::Ended(cause));
    })
}

/// Tells once until `full` is false again: what finds no room is tried again until the machine stands.
fn no_room(tell: Sender<Told>, full: Arc<AtomicBool>) -> NoRoom {
    Arc::new(move || {
        if !full.swap(true, Ordering::AcqRel) {
            let _ = tell.send(Told::NoRoom);
        }
    })
}

fn read_description(fd: RawFd) -> Result<Vec<u8>, RunError> {
    let error = |source| RunError::Read { fd, source };
    // SAFETY: fcntl on a number only answers; the File then owns what the caller gave to this process alone.
    let file = unsafe {
        if libc::fcntl(fd, libc::F_GETFD) < 0 {
            return Err(error(io::Error::last_os_error()));
        }
        File::from_raw_fd(fd)
    };
    let mut text = Vec::new();
    file.take(description::MAX_LENGTH + 1).read_to_end(&mut text).map_err(error)?;
    if text.len() as u64 > description::MAX_LENGTH {
        return Err(error(io::Error::other(format!("it is longer than {} bytes", description::MAX_LENGTH))));
    }
    Ok(text)
}

/// Gives up what the process came with, but for what the description's share needs; what is shared. Without
/// `confine` it stays as it is.
fn confine_process(
    description: &Description,
    descriptors: &mut Descriptors,
) -> Result<(Option<Arc<Filters>>, Option<ShareRoot>), RunError> {
    // All of these need the /proc that is about to go.
    let folder = description
        .share
        .as_ref()
        .and_then(|share| share.folder)
        .map(|fd| descriptors.file(fd))
        .transpose()?;
    let shared = folder.as_ref().map(ShareRoot::folder).transpose()?;
    let unrooted = (description.share.is_some() && shared.is_none()).then(Unrooted::open).transpose()?;
    if !description.confine {
        return if unrooted.is_some() { Err(RunError::NoNamespace) } else { Ok((None, shared)) };
    }
    let root = confine::enter_namespace()?;
    let shared = match (unrooted, &root) {
        (Some(unrooted), Some(root)) => Some(unrooted.at(root)?),
        (Some(_), None) => return Err(RunError::NoNamespace),
        (None, _) => shared,
    };
    let roots: Vec<&File> = folder.iter().chain(&root).collect();
    confine::drop_privileges(&roots)?;
    Ok((Some(Arc::new(Filters::compile()?)), shared))
}

/// What each thread does first.
fn begin(filters: Option<Arc<Filters>>) -> Begin {
    Arc::new(move |role| {
        if let Some(Err(error)) = filters.as_ref().map(|filters| filters.install(role)) {
            eprintln!("catalyst-vmm: {}", crate::chain(&error));
            std::process::abort();
        }
    })
}

/// A thread that panicked has left its device half changed: there is no going on.
fn end_with_panics() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        usual(panic);
        std::process::abort();
    }));
}
