//! Word to the service manager that the agent is ready: sd_notify(3), the datagram itself.

use std::env;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Says READY=1 to whoever `NOTIFY_SOCKET` names; nobody is no error.
pub fn ready() {
    if let Err(error) = send(b"READY=1\n") {
        eprintln!("catalyst-agent: the service manager could not be told READY=1: {error}");
    }
}

/// Asks for so many seconds more before the start counts as failed (`EXTEND_TIMEOUT_USEC` of sd_notify(3)).
pub fn more_time(seconds: u64) {
    // Where nobody waits, nobody is told.
    let _ = send(format!("EXTEND_TIMEOUT_USEC={}\n", seconds * 1_000_000).as_bytes());
}

fn send(text: &[u8]) -> io::Result<()> {
    let Some(path) = env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(&path)?,
    };
    UnixDatagram::unbound()?.send_to_addr(text, &address)?;
    Ok(())
}
