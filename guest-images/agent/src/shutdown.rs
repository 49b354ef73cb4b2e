//! The end of the guest, as systemd(1) takes it by signals.

use std::time::Duration;

use catalyst_agent_protocol::ShutdownKind;

use crate::session::Session;

/// How long the answer may take to leave before the guest goes down all the same.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// Asks pid 1 to shut down, once all that waits for the host is written.
pub fn shut_down(session: &Session, kind: ShutdownKind) {
    session.outbox.flush(ANSWER_WITHIN);
    if session.config.files_only() {
        eprintln!("catalyst-agent: no shutdown ({kind:?}): --root is given");
        return;
    }
    ask_init(kind);
}

/// What pid 1 is asked by. systemd(1), "Signals": SIGRTMIN+4 starts poweroff.target, SIGRTMIN+5 reboot.target; in a VM without systemd
/// the first process takes the same (`init`).
pub fn signal_of(kind: ShutdownKind) -> i32 {
    match kind {
        ShutdownKind::PowerOff => libc::SIGRTMIN() + 4,
        ShutdownKind::Reboot => libc::SIGRTMIN() + 5,
    }
}

/// Asks pid 1 to shut down.
pub fn ask_init(kind: ShutdownKind) {
    let signal = signal_of(kind);
    // SAFETY: kill takes two numbers.
    if unsafe { libc::kill(1, signal) } != 0 {
        let error = std::io::Error::last_os_error();
        eprintln!("catalyst-agent: pid 1 could not be asked to shut down ({kind:?}): {error}");
    }
}
