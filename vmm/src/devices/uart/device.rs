//! The serial port as the guest and the reactor see it.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::{Error, NoEvents};
use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::{GATHER, MOST_GATHERED, UartError, UartState};
use crate::bus::BusDevice;
use crate::console::{AttachError, Console, Input, Wants};
use crate::reactor::{EventHandler, Reactor, Registration};

const TIMER: u32 = 0;
const LISTENER: u32 = 1;
const CLIENT: u32 = 2;
/// Length of the receiver's FIFO in `vm-superio`.
const FIFO: usize = 64;

/// The serial port. Clones are one port: one for the bus, one for the control socket. [`Uart::end`] takes it out of
/// its reactor.
#[derive(Clone, Debug)]
pub struct Uart(Arc<Mutex<Port>>);

#[derive(Debug)]
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

#[derive(Debug)]
struct Port {
    /// Its writer gathers output.
    serial: Serial<Interrupt, NoEvents, Vec<u8>>,
    console: Console,
    /// Input that the port took from the client and could not give to the guest yet.
    held: Vec<u8>,
    timer: TimerFd,
    timer_runs: bool,
    registration: Option<Arc<Registration>>,
}

impl Uart {
    /// A port whose output and input are `console`'s; `interrupt` is written for each interrupt.
    pub fn new(console: Console, interrupt: EventFd, reactor: &Reactor) -> Result<Self, UartError> {
        Self::build(&SerialState::default(), Vec::new(), console, interrupt, reactor)
    }

    /// A port as it was saved.
    pub fn restore(
        state: &UartState,
        console: Console,
        interrupt: EventFd,
        reactor: &Reactor,
    ) -> Result<Self, UartError> {
        if state.held.len() > FIFO {
            return Err(UartError::State(state.held.len()));
        }
        Self::build(&state.registers(), state.held.clone(), console, interrupt, reactor)
    }

    fn build(
        registers: &SerialState,
        held: Vec<u8>,
        console: Console,
        interrupt: EventFd,
        reactor: &Reactor,
    ) -> Result<Self, UartError> {
        let serial =
            Serial::from_state(registers, Interrupt(interrupt), NoEvents, Vec::new()).map_err(|error| {
                match error {
                    Error::Trigger(error) | Error::IOError(error) => UartError::Io(error),
                    Error::FullFifo => UartError::State(registers.in_buffer.len()),
                }
            })?;
        let timer = TimerFd::new().map_err(io::Error::from)?;
        let port = Port { serial, console, held, timer, timer_runs: false, registration: None };
        let uart = Self(Arc::new(Mutex::new(port)));
        let handler: Arc<Mutex<dyn EventHandler>> = uart.0.clone();
        let registration = Arc::new(reactor.register(handler));
        {
            let mut port = uart.port();
            registration.watch(port.timer.as_raw_fd(), TIMER, EventSet::IN)?;
            port.console.begin(&registration, LISTENER)?;
            port.registration = Some(registration);
            port.pass_input();
        }
        Ok(uart)
    }

    /// Makes `stream` the console's client.
    pub fn attach(&self, stream: UnixStream) -> Result<(), AttachError> {
        self.port().console.attach(stream)
    }

    /// Whether somebody is at the console.
    pub fn has_client(&self) -> bool {
        self.port().console.is_connected()
    }

    /// Writes what was gathered; the machine calls it when it ends.
    pub fn flush(&self) {
        self.port().flush();
    }

    /// What is saved. Output that was gathered is written.
    pub fn save(&self) -> UartState {
        let mut port = self.port();
        port.flush();
        UartState::new(port.serial.state(), &port.held)
    }

    /// Writes what was gathered and takes the port out of its reactor, after which neither keeps the other.
    pub fn end(&self) {
        let registration = {
            let mut port = self.port();
            port.flush();
            port.console.end();
            port.registration.take()
        };
        drop(registration);
    }

    fn port(&self) -> MutexGuard<'_, Port> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for Uart {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let (Ok(offset), [byte]) = (u8::try_from(offset), data) else { return };
        let mut port = self.port();
        *byte = port.serial.read(offset);
        if offset == 0 && port.serial.fifo_capacity() == FIFO {
            port.pass_input();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (Ok(offset), [byte]) = (u8::try_from(offset), data) else { return };
        let mut port = self.port();
        // Only the interrupt can fail, by a counter that is full: then it is pending.
        let _ = port.serial.write(offset, *byte);
        match offset {
            0 => port.gathered(*byte),
            // Loopback mode may have ended.
            4 => port.pass_input(),
            _ => {}
        }
    }
}

impl Port {
    fn gathered(&mut self, byte: u8) {
        let length = self.serial.writer().len();
        if length >= MOST_GATHERED || (byte == b'\n' && length > 0) {
            self.flush();
        } else if length > 0 && !self.timer_runs {
            // It is left running when a line ends, and finds nothing then: one start in a while, not one a line.
            match self.timer.reset(GATHER, None) {
                Ok(()) => self.timer_runs = true,
                Err(_) => self.flush(),
            }
        }
    }

    fn flush(&mut self) {
        let Self { serial, console, .. } = self;
        let bytes = serial.writer_mut();
        if !bytes.is_empty() {
            console.write(bytes);
            bytes.clear();
        }
    }

    /// Gives the guest what it has room for. No more is read from the client than that, so that nothing is lost.
    fn pass_input(&mut self) {
        let mut buffer = [0; FIFO];
        loop {
            if self.held.is_empty() {
                let room = self.serial.fifo_capacity();
                if room == 0 {
                    break;
                }
                match self.console.read(&mut buffer[..room]) {
                    Input::Bytes(count) => self.held.extend(&buffer[..count]),
                    Input::Nothing | Input::Gone => break,
                }
            }
            // In loopback mode nothing is taken.
            let taken = self.serial.enqueue_raw_bytes(&self.held).unwrap_or(0);
            self.held.drain(..taken);
            if taken == 0 {
                break;
            }
        }
        let input = self.held.is_empty() && self.serial.fifo_capacity() > 0;
        self.console.want(Wants { input, room: false });
    }
}

impl EventHandler for Port {
    fn ready(&mut self, token: u32, events: EventSet) {
        match token {
            TIMER => {
                // It has run out and only this reads it, so this does not block.
                let _ = self.timer.wait();
                self.timer_runs = false;
                self.flush();
            }
            LISTENER => {
                self.console.accept();
            }
            CLIENT => {
                self.pass_input();
                self.console.client_ready(events);
            }
            _ => {}
        }
    }
}
