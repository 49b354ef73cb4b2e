//! `console`: the VM's serial console, both ways.

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use nix::sys::signal::Signal;
use tungstenite::Message;

use super::Context;
use crate::Outcome;
use crate::client::path;
use crate::host::Host;
use crate::link::{Link, LinkError};
use crate::output;
use crate::session::{self, Peer, SessionError, Step};
use crate::terminal::{self, RawMode};
use crate::wait;

/// Ctrl-].
const LEAVE: u8 = 0x1d;

/// Attaches until the user leaves or the VM stops.
pub fn run(context: &Context, id: &str) -> Outcome {
    let client = context.client()?;
    let vm = client.vm(id)?;
    // A paused VM has a console too; it is only silent.
    if !vm.state.has_process() {
        wait::running(&vm)?;
    }
    match attach(client.host(), id) {
        Ok(code) => Ok(ExitCode::from(code)),
        // The line ends with the VM; whether that is why is asked of the daemon.
        Err(SessionError::Link(LinkError::Closed { .. } | LinkError::Lost { .. }))
            if client.vm(id).is_ok_and(|vm| !vm.state.has_process()) =>
        {
            output::info(&format!("VM '{id}' has stopped"));
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => Err(error.into()),
    }
}

fn attach(host: &Host, id: &str) -> Result<u8, SessionError> {
    let mut link = Link::open(host, &path(&["vms", id, "console", "attach"]))?;
    let terminal = io::stdin().is_terminal();
    let leave = if terminal { "; Ctrl-] leaves" } else { "" };
    output::info(&format!("Attached to the console of VM '{id}'{leave}"));
    let signals = terminal::signals()?;
    let raw = RawMode::enter()?;
    let result = session::run(&mut link, &signals, true, &mut Console { terminal });
    let was_raw = raw.is_some();
    drop(raw);
    if was_raw {
        // The guest's cursor may stand anywhere in its line.
        output::print("\n")?;
    }
    result
}

/// A serial line.
struct Console {
    terminal: bool,
}

impl Peer for Console {
    fn message(&mut self, _: &mut Link, message: Message) -> Result<Step, SessionError> {
        if let Message::Binary(data) = message {
            output::bytes(&data)?;
        }
        Ok(Step::On)
    }

    fn input(&mut self, link: &mut Link, data: &[u8]) -> Result<Step, SessionError> {
        let end = if self.terminal { data.iter().position(|&byte| byte == LEAVE) } else { None };
        let typed = &data[..end.unwrap_or(data.len())];
        if !typed.is_empty() {
            link.send(Message::binary(typed.to_vec()))?;
        }
        Ok(if end.is_some() { Step::End(0) } else { Step::On })
    }

    fn input_end(&mut self, _: &mut Link) -> Result<(), SessionError> {
        // A serial line has no end of input; what the guest says is still shown.
        Ok(())
    }

    fn signal(&mut self, _: &mut Link, signal: Signal) -> Result<Step, SessionError> {
        match signal {
            Signal::SIGWINCH => Ok(Step::On),
            _ => Ok(Step::End(u8::try_from(128 + signal as i32).unwrap_or(1))),
        }
    }
}
