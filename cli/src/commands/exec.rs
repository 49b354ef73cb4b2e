//! `guest exec`: a command in the guest, over the agent.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use catalyst_api::exec::{CHANNEL_STDERR, CHANNEL_STDOUT};
use catalyst_api::{ExecFrame, ExecRequest};
use nix::sys::signal::Signal;
use tungstenite::Message;

use super::Context;
use crate::Outcome;
use crate::args;
use crate::client::path;
use crate::link::Link;
use crate::output;
use crate::progress::Board;
use crate::session::{self, Peer, SessionError, Step};
use crate::terminal::{self, RawMode};
use crate::wait::Wait;

/// Runs the command and returns its exit code.
pub fn run(context: &Context, asked: args::Exec) -> Outcome {
    let client = context.client()?;
    let wait = Wait { client: &client, id: &asked.id, what: "its agent", limit: context.timeout };
    // One of others has none, and the daemon says so.
    wait.until(&Board::new(), |vm| Ok((vm.guest.agent || vm.foreign).then_some(())))?;
    let target = path(&["vms", &asked.id, "exec", "stream"]);
    Ok(ExitCode::from(converse(client.host(), &target, asked)?))
}

fn converse(host: &crate::host::Host, target: &str, asked: args::Exec) -> Result<u8, SessionError> {
    let attached = asked.interactive || asked.tty || !io::stdin().is_terminal();
    let request = ExecRequest {
        argv: asked.command,
        user: asked.user,
        cwd: asked.cwd,
        env: environment(asked.env, asked.tty),
        terminal: asked.tty.then(terminal::size),
        stdin: None,
        attach_stdin: attached,
        timeout_s: None,
    };
    let mut link = Link::open(host, target)?;
    let signals = terminal::signals()?;
    let _raw = if asked.tty { RawMode::enter()? } else { None };
    link.send(Message::text(serde_json::to_string(&request)?))?;
    let mut peer = Command { tty: asked.tty, interrupted: false };
    session::run(&mut link, &signals, attached, &mut peer)
}

/// The variables asked for, and with a terminal its kind, as ssh passes it on.
fn environment(mut asked: Vec<String>, tty: bool) -> Vec<String> {
    let named = asked.iter().any(|variable| variable.starts_with("TERM="));
    if let Some(kind) = std::env::var("TERM").ok().filter(|kind| tty && !named && !kind.is_empty()) {
        asked.push(format!("TERM={kind}"));
    }
    asked
}

/// A command that runs in the guest.
struct Command {
    tty: bool,
    interrupted: bool,
}

impl Peer for Command {
    fn message(&mut self, _: &mut Link, message: Message) -> Result<Step, SessionError> {
        match message {
            Message::Binary(data) => show(&data)?,
            Message::Text(text) => match serde_json::from_str(&text)? {
                ExecFrame::Exit { code } => return Ok(Step::End(exit_code(code))),
                ExecFrame::Error(error) => return Err(error.into()),
                _ => {}
            },
            _ => {}
        }
        Ok(Step::On)
    }

    fn input(&mut self, link: &mut Link, data: &[u8]) -> Result<Step, SessionError> {
        link.send(Message::binary(data.to_vec()))?;
        Ok(Step::On)
    }

    fn input_end(&mut self, link: &mut Link) -> Result<(), SessionError> {
        tell(link, &ExecFrame::StdinEnd)
    }

    fn signal(&mut self, link: &mut Link, signal: Signal) -> Result<Step, SessionError> {
        match signal {
            Signal::SIGWINCH if self.tty => tell(link, &ExecFrame::Resize(terminal::size()))?,
            Signal::SIGWINCH => {}
            // The first is the command's; who sends a second wants out whatever the guest does.
            _ if self.interrupted => return Ok(Step::End(exit_code(128 + signal as i32))),
            _ => {
                self.interrupted = true;
                tell(link, &ExecFrame::Signal { signal: signal as i32 })?;
            }
        }
        Ok(Step::On)
    }
}

fn tell(link: &mut Link, frame: &ExecFrame) -> Result<(), SessionError> {
    Ok(link.send(Message::text(serde_json::to_string(frame)?))?)
}

/// Puts a frame's data where its channel byte says.
fn show(frame: &[u8]) -> Result<(), output::OutputError> {
    match frame.split_first() {
        Some((&CHANNEL_STDOUT, data)) => output::bytes(data),
        Some((&CHANNEL_STDERR, data)) => Ok(io::stderr().lock().write_all(data)?),
        _ => Ok(()),
    }
}

/// What a process can say of a command's exit code: its low 8 bits, as wait(2) gives them.
fn exit_code(code: i32) -> u8 {
    code.to_le_bytes()[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_pass_through() {
        assert_eq!([0, 1, 137, 255, 256].map(exit_code), [0, 1, 137, 255, 0]);
    }
}
