//! What the reactor calls: kicks of queues, clients, and the control queues.

use std::io::Write;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::control::{Event, Message};
use super::port::{Left, Port};
use super::{CONTROL_RECEIVE, CONTROL_TRANSMIT, QUEUE_SIZE, ROUNDS};
use crate::reactor::{EventHandler, Registration};
use crate::virtio::{Counters, QueueError, Virtqueue};

/// There is more to do, or the device was activated.
pub const AGAIN: u32 = 0;
/// First token of the kicks of queues.
pub const KICKS: u32 = 0x100;
/// First token of the ports' consoles, which take two each: the listener's, and the client's.
pub const CLIENTS: u32 = 0x200;

/// The device's ports and, while it is active, its queues.
#[derive(Debug)]
pub struct Worker {
    pub ports: Vec<Port>,
    pub queues: Vec<Virtqueue>,
    /// The queues of a device that gave up and waits for a reset: kept only for saving.
    pub given_up: Vec<Virtqueue>,
    pub multiport: bool,
    pub again: EventFd,
    pub registration: Option<Arc<Registration>>,
    pub counters: Counters,
}

impl Worker {
    /// Gives the queues up and returns them.
    pub fn stop(&mut self) -> Vec<Virtqueue> {
        for queue in &self.queues {
            if let Some(registration) = &self.registration {
                // It fails for queues that the driver did not set up.
                let _ = registration.unwatch(queue.kick_fd());
            }
        }
        for port in &mut self.ports {
            port.reset();
        }
        std::mem::take(&mut self.queues)
    }

    fn serve(&mut self, token: u32, events: EventSet) -> Result<(), QueueError> {
        match token {
            AGAIN => {
                // It may have been read by an event before.
                let _ = self.again.read();
                self.hear()?;
                for at in 0..self.ports.len() {
                    self.work(at)?;
                }
            }
            KICKS..CLIENTS => self.kicked((token - KICKS) as usize)?,
            _ => self.client((token - CLIENTS) as usize, events)?,
        }
        self.tell()
    }

    fn kicked(&mut self, index: usize) -> Result<(), QueueError> {
        let Some(queue) = self.queues.get(index) else { return Ok(()) };
        queue.take_kick();
        match index {
            CONTROL_RECEIVE => Ok(()),
            CONTROL_TRANSMIT => self.hear(),
            _ => {
                let queue = |port: &Port| super::receive_queue(port.id);
                match self.ports.iter().position(|port| queue(port) == index & !1) {
                    Some(at) => self.work(at),
                    None => Ok(()),
                }
            }
        }
    }

    fn client(&mut self, number: usize, events: EventSet) -> Result<(), QueueError> {
        let (at, is_client) = (number / 2, number % 2 == 1);
        let Some(port) = self.ports.get_mut(at) else { return Ok(()) };
        if is_client {
            port.console.client_ready(events);
        } else {
            let left = port.console.is_left();
            if port.console.accept() && left {
                port.client_gone(&mut self.queues)?;
            }
        }
        self.work(at)
    }

    fn work(&mut self, at: usize) -> Result<(), QueueError> {
        let Some(port) = self.ports.get_mut(at) else { return Ok(()) };
        if port.work(&mut self.queues, &self.counters)? == Left::More {
            self.call_again();
        }
        Ok(())
    }

    fn call_again(&self) {
        // Full means that it will be called.
        let _ = self.again.write(1);
    }

    /// Reads what the driver says.
    fn hear(&mut self) -> Result<(), QueueError> {
        if !self.multiport {
            return Ok(());
        }
        for _ in 0..ROUNDS {
            let Some(queue) = self.queues.get_mut(CONTROL_TRANSMIT) else { return Ok(()) };
            let Some(chain) = queue.pop()? else {
                if queue.enable_kicks()? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            let memory = queue.memory().clone();
            let message = Message::read(chain, &memory);
            queue.push(head, 0)?;
            queue.notify()?;
            match message {
                Some(message) => self.heard(message)?,
                None => self.counters.failed(),
            }
        }
        self.call_again();
        Ok(())
    }

    fn heard(&mut self, message: Message) -> Result<(), QueueError> {
        if message.event == Event::DeviceReady {
            for port in &mut self.ports {
                port.state.owes_add = message.value;
            }
            return Ok(());
        }
        let Some(at) = self.ports.iter().position(|port| port.id == message.port) else {
            self.counters.failed();
            return Ok(());
        };
        self.ports[at].hear(message);
        self.work(at)
    }

    /// Tells the driver what it is to know, for as long as it has buffers for it.
    fn tell(&mut self) -> Result<(), QueueError> {
        if !self.multiport {
            return Ok(());
        }
        let Some(queue) = self.queues.get_mut(CONTROL_RECEIVE) else { return Ok(()) };
        let memory = queue.memory().clone();
        let mut told = false;
        let mut rounds = 0..QUEUE_SIZE;
        while let Some((port, message)) =
            self.ports.iter_mut().find_map(|port| port.next_message().map(|message| (port, message)))
        {
            if rounds.next().is_none() {
                // The others get their turn.
                let _ = self.again.write(1);
                break;
            }
            let Some(chain) = queue.pop()? else {
                if queue.enable_kicks()? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let bytes = message.bytes(&port.name);
            let written = chain
                .writer::<()>(&memory)
                .ok()
                .and_then(|mut writer| writer.write_all(&bytes).ok())
                .map_or(0, |()| u32::try_from(bytes.len()).unwrap_or(0));
            if written == 0 {
                // A buffer that cannot take it is the driver's loss, not a reason to offer it for ever.
                self.counters.failed();
            }
            queue.push(head, written)?;
            port.told(message);
            told = true;
        }
        if told { queue.notify() } else { Ok(()) }
    }
}

impl EventHandler for Worker {
    fn ready(&mut self, token: u32, events: EventSet) {
        if let Err(error) = self.serve(token, events) {
            if let Some(queue) = self.queues.first() {
                queue.give_up(&error);
            }
            // Kicks are not looked at until the reset, and clients wait.
            self.given_up = self.stop();
        }
    }
}
