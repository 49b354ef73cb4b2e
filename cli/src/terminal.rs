//! The user's terminal: raw mode, size, and signals as readable events.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

use catalyst_api::TerminalSize;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use rustix::termios::tcgetwinsize;

/// Size taken where there is no terminal.
const FALLBACK: TerminalSize = TerminalSize { rows: 24, cols: 80 };

/// Standard input in raw mode for as long as this lives.
#[derive(Debug)]
pub struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Puts standard input into raw mode, if it is a terminal.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSANOW, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Nothing can be done for a terminal that has gone.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.before);
    }
}

/// Size of the terminal in characters, from whichever standard stream is one.
pub fn size() -> TerminalSize {
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let streams = [stdout.as_fd(), stdin.as_fd(), stderr.as_fd()];
    streams
        .into_iter()
        .filter_map(|stream| tcgetwinsize(stream).ok())
        .find(|size| size.ws_row > 0 && size.ws_col > 0)
        .map_or(FALLBACK, |size| TerminalSize { rows: size.ws_row, cols: size.ws_col })
}

/// Makes SIGINT, SIGTERM, SIGHUP, SIGQUIT and SIGWINCH readable from a descriptor instead of ending
/// the program, so that the terminal is always put back. To be called before any thread is started.
pub fn signals() -> io::Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGWINCH] {
        set.add(signal);
    }
    set.thread_block()?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?)
}
