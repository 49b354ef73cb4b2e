//! The device as its driver sees it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::QueueState;
use vmm_sys_util::epoll::EventSet;

use super::files::{self, Files};
use super::worker::Worker;
use super::{FsError, FsState, MAX_TAG, ShareRoot};
use crate::reactor::{Reactor, Registration};
use crate::virtio::{
    self, ActivateError, Activation, Counters, RestoreError, VirtioDevice, read_config_bytes,
};

/// The queue of messages that must not wait, and one of requests. A message of 256 pages and its headers fit.
const QUEUE_SIZES: &[u16] = &[64, 512];

/// A virtio-fs device.
#[derive(Debug)]
pub struct Fs {
    /// `struct virtio_fs_config`: the tag, filled with zeros, and the number of request queues.
    config: [u8; MAX_TAG + 4],
    files: Arc<Files>,
    reactor: Arc<Reactor>,
    counters: Counters,
    active: Option<Active>,
}

#[derive(Debug)]
struct Active {
    worker: Arc<Mutex<Worker>>,
    registration: Registration,
}

impl Fs {
    /// A device that shares `root`; the guest mounts it by `tag`. Requests are answered on the reactor's thread,
    /// which waits for the host's disk at times. Raises the process's limit of open files as far as it may be, and
    /// clears its umask, since the guest's kernel applies its own.
    pub fn new(tag: &str, root: ShareRoot, reactor: Arc<Reactor>) -> Result<Self, FsError> {
        let most = files::raise_limit().map_err(FsError::Limit)?;
        Self::with_limit(tag, root, reactor, most)
    }

    /// With at most `most` descriptors for the guest.
    pub(super) fn with_limit(
        tag: &str,
        root: ShareRoot,
        reactor: Arc<Reactor>,
        most: usize,
    ) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > MAX_TAG || tag.contains('\0') {
            return Err(FsError::Tag(tag.to_owned()));
        }
        let mut config = [0; MAX_TAG + 4];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        config[MAX_TAG..].copy_from_slice(&1_u32.to_le_bytes());
        let counters = Counters::default();
        let files = Arc::new(Files::new(root, most, counters.clone()));
        Ok(Self { config, files, reactor, counters, active: None })
    }

    fn watch(&self, worker: Worker) -> std::io::Result<Active> {
        let watched = worker.watched();
        let worker = Arc::new(Mutex::new(worker));
        let handler: Arc<Mutex<Worker>> = Arc::clone(&worker);
        let active = Active { worker, registration: self.reactor.register(handler) };
        for &(fd, token) in &watched {
            if let Err(error) = active.registration.watch(fd, token, EventSet::IN) {
                active.stop();
                return Err(error);
            }
        }
        Ok(active)
    }
}

impl Active {
    fn worker(&self) -> MutexGuard<'_, Worker> {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(self) {
        let mut worker = self.worker();
        for (fd, _) in worker.watched() {
            // One that is not watched yet is not watched now either.
            let _ = self.registration.unwatch(fd);
        }
        worker.stop();
    }
}

impl VirtioDevice for Fs {
    type State = FsState;

    const TYPE: u32 = 26;

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if let Some(missing) = activation.queues.iter().position(|queue| !queue.is_usable()) {
            return Err(ActivateError::NoQueue(missing));
        }
        let failed = |source| ActivateError::Io { what: "watch the queues of a virtio-fs device", source };
        let again = virtio::event().map_err(failed)?;
        let worker = Worker::new(Arc::clone(&self.files), activation.queues, again, self.counters.clone());
        self.active = Some(self.watch(worker).map_err(failed)?);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            active.stop();
            self.files.end_session();
        }
    }

    fn queue_states(&self) -> Vec<QueueState> {
        self.active.as_ref().map(|active| active.worker().queue_states()).unwrap_or_default()
    }

    fn save(&self) -> FsState {
        FsState { mounted: self.files.is_mounted() }
    }

    fn restore(&mut self, state: &FsState) -> Result<(), RestoreError> {
        // Nobody saves such a machine; a guest would find its open files gone.
        if state.mounted { Err(RestoreError::Damaged("the share was mounted".into())) } else { Ok(()) }
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        self.reset();
    }
}
