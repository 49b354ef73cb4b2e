//! The device as its driver sees it.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::QueueState;
use vmm_sys_util::epoll::EventSet;

use super::port::Port;
use super::worker::{AGAIN, CLIENTS, KICKS, Worker};
use super::{
    CONTROL_RECEIVE, CONTROL_TRANSMIT, QUEUE_SIZE, SavedPort, SerialError, SerialState,
    VIRTIO_CONSOLE_F_MULTIPORT,
};
use crate::console::{Console, TOKENS};
use crate::reactor::{EventHandler, Reactor};
use crate::virtio::{
    ActivateError, Activation, Counters, RestoreError, VirtioDevice, Virtqueue, event, read_config_bytes,
};

/// The console device.
#[derive(Debug)]
pub struct Serial {
    worker: Arc<Mutex<Worker>>,
    queue_sizes: Vec<u16>,
    /// cols, rows: not known; max_nr_ports; emerg_wr: not offered (section 5.3.4).
    config: [u8; 12],
    counters: Counters,
}

impl Serial {
    /// A device whose console is `console`, if there is to be one, with these named ports. Clients are accepted from
    /// now on; what they send waits for the guest.
    pub fn new(
        console: Option<Console>,
        ports: Vec<(String, UnixListener)>,
        reactor: &Reactor,
    ) -> Result<Self, SerialError> {
        let count = u32::try_from(ports.len()).unwrap_or(u32::MAX).saturating_add(1);
        let named = (1..).zip(ports).map(|(id, (name, listener))| {
            let console = Console::new(Some(listener), None);
            Port::new(id, name, console)
        });
        let ports = console.map(|console| Port::new(0, String::new(), console)).into_iter().chain(named);
        let counters = Counters::default();
        let worker = Worker {
            ports: ports.collect(),
            queues: Vec::new(),
            given_up: Vec::new(),
            multiport: false,
            again: event()?,
            registration: None,
            counters: counters.clone(),
        };
        let worker = Arc::new(Mutex::new(worker));
        let handler: Arc<Mutex<dyn EventHandler>> = worker.clone();
        let registration = Arc::new(reactor.register(handler));
        let mut config = [0; 12];
        config[4..8].copy_from_slice(&count.to_le_bytes());
        let queue_sizes = vec![QUEUE_SIZE; 2 * (count as usize + 1)];
        let device = Self { worker, queue_sizes, config, counters };
        {
            let mut worker = device.worker();
            registration.watch(worker.again.as_raw_fd(), AGAIN, EventSet::IN)?;
            for (token, port) in (CLIENTS..).step_by(TOKENS as usize).zip(&mut worker.ports) {
                port.console.begin(&registration, token)?;
            }
            worker.registration = Some(registration);
        }
        Ok(device)
    }

    fn worker(&self) -> MutexGuard<'_, Worker> {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for Serial {
    type State = SerialState;
    const TYPE: u32 = 3;

    fn features(&self) -> u64 {
        VIRTIO_CONSOLE_F_MULTIPORT
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut worker = self.worker();
        let multiport = activation.features & VIRTIO_CONSOLE_F_MULTIPORT != 0;
        let needed: &[usize] = if multiport { &[CONTROL_RECEIVE, CONTROL_TRANSMIT] } else { &[0, 1] };
        if let Some(missing) = needed.iter().find(|index| !activation.queues[**index].is_usable()) {
            return Err(ActivateError::NoQueue(*missing));
        }
        if let Some(registration) = &worker.registration {
            for (token, queue) in (KICKS..).zip(&activation.queues) {
                if queue.is_usable() {
                    registration
                        .watch(queue.kick_fd(), token, EventSet::IN)
                        .map_err(|source| ActivateError::Io { what: "watch a queue's eventfd", source })?;
                }
            }
        }
        worker.queues = activation.queues;
        worker.multiport = multiport;
        if let (false, Some(port)) = (multiport, worker.ports.first_mut().filter(|port| port.is_console())) {
            // A driver of one port says nothing of it.
            port.state.guest_open = true;
        }
        // The rest is the reactor's; full means that it comes.
        let _ = worker.again.write(1);
        Ok(())
    }

    fn reset(&mut self) {
        let mut worker = self.worker();
        worker.stop();
        worker.given_up.clear();
    }

    fn queue_states(&self) -> Vec<QueueState> {
        let worker = self.worker();
        worker.queues.iter().chain(&worker.given_up).map(Virtqueue::state).collect()
    }

    fn save(&self) -> SerialState {
        let saved = |port: &Port| SavedPort { id: port.id, name: port.name.clone(), state: port.state };
        SerialState { ports: self.worker().ports.iter().map(saved).collect() }
    }

    fn restore(&mut self, state: &SerialState) -> Result<(), RestoreError> {
        let mut worker = self.worker();
        let names = |ports: &mut dyn Iterator<Item = (u32, &String)>| -> Vec<String> {
            ports.map(|(id, name)| format!("{id} {name}")).collect()
        };
        RestoreError::unless_same(
            "ports",
            &names(&mut state.ports.iter().map(|port| (port.id, &port.name))),
            &names(&mut worker.ports.iter().map(|port| (port.id, &port.name))),
        )?;
        for (port, saved) in worker.ports.iter_mut().zip(&state.ports) {
            port.restore(saved.state);
        }
        Ok(())
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }
}

impl Drop for Serial {
    /// The reactor keeps the worker for as long as it is registered, and the ports keep the registration.
    fn drop(&mut self) {
        let registration = {
            let mut worker = self.worker();
            worker.stop();
            for port in &mut worker.ports {
                port.console.end();
            }
            worker.registration.take()
        };
        drop(registration);
    }
}
