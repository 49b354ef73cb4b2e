//! What the control socket asks of a machine.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::{Ended, Machine};
use crate::control::Commanded;
use crate::control::protocol::{Answer, Cause, Command};
use crate::description::{Format, MAX_LAYERS};

/// A machine, for the control server.
#[expect(missing_debug_implementations, reason = "of a function")]
pub struct Commands {
    machine: Arc<Machine>,
    ended: Ended,
    /// What the disk is to lie on after the next switch.
    below: Vec<(File, Format)>,
}

impl Commands {
    /// Commands for `machine`; `ended` is told of a quit.
    pub fn new(machine: Arc<Machine>, ended: Ended) -> Self {
        Self { machine, ended, below: Vec::new() }
    }
}

impl Commanded for Commands {
    fn command(&mut self, command: Command, descriptor: Option<File>) -> Result<Answer, String> {
        match command {
            Command::State => return Ok(Answer::State(self.machine.run_state())),
            Command::Stats => return Ok(Answer::Stats(Box::new(self.machine.stats()))),
            Command::Save => {
                let saved = self.machine.save().map_err(|error| crate::chain(&error))?;
                return Ok(Answer::Saved(hexadecimal(&saved)));
            }
            Command::Ram => return Ok(Answer::Ram(self.machine.ram())),
            Command::DiskLayer(format) => {
                let file = descriptor.ok_or("The request came without a descriptor")?;
                if self.below.len() >= MAX_LAYERS {
                    return Err(format!("A disk has at most {MAX_LAYERS} layers"));
                }
                self.below.push((file, format));
            }
            Command::SwitchDisk => {
                let below = std::mem::take(&mut self.below);
                let overlay = descriptor.ok_or("The request came without a descriptor")?;
                self.machine.switch_disk(overlay, below).map_err(|error| crate::chain(&error))?;
            }
            Command::SetLink(up) => self.machine.set_link(up)?,
            Command::Pause => self.machine.pause().map_err(|error| crate::chain(&error))?,
            Command::Resume => self.machine.resume().map_err(|error| crate::chain(&error))?,
            Command::PowerButton => self.machine.press_power_button(),
            Command::Quit => self.quit(),
            Command::AttachConsole => return Err("This is answered by the connection".into()),
        }
        Ok(Answer::Done)
    }

    fn attach_console(&mut self, stream: UnixStream) -> Result<(), String> {
        self.machine.devices.attach_console(stream)
    }

    fn can_attach(&mut self) -> Result<(), String> {
        self.machine.devices.can_attach_console()
    }

    fn quit(&mut self) {
        (self.ended)(Cause::Quit);
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |value: u8| char::from(DIGITS[usize::from(value)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}
