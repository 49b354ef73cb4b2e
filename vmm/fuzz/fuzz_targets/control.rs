//! The control server: lines of any bytes, which it answers in order or whose sender it sends away.

#![no_main]
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::{Arc, LazyLock, Mutex};

use catalyst_vmm::control::protocol::{Answer, Command, RunState};
use catalyst_vmm::control::{Commanded, Server};
use catalyst_vmm_fuzz::{PATIENCE, threads};
use libfuzzer_sys::fuzz_target;

/// A machine that does everything but one thing.
struct Machine;

impl Commanded for Machine {
    fn command(&mut self, command: Command, _: Option<std::fs::File>) -> Result<Answer, String> {
        match command {
            Command::State => Ok(Answer::State(RunState::Running)),
            Command::Stats => Ok(Answer::Stats(Box::default())),
            Command::Pause => Err("It does not want to".into()),
            _ => Ok(Answer::Done),
        }
    }
    fn attach_console(&mut self, _: UnixStream) -> Result<(), String> {
        Ok(())
    }
    fn can_attach(&mut self) -> Result<(), String> {
        Ok(())
    }
    fn quit(&mut self) {}
}

/// The first byte says in what pieces the rest is sent.
fn talk(address: &SocketAddr, data: &[u8]) {
    let Some((piece, bytes)) = data.split_first() else { return };
    let mut client = UnixStream::connect_addr(address).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.set_write_timeout(Some(PATIENCE)).unwrap();
    for (count, piece) in bytes.chunks(16 * (1 + usize::from(*piece))).enumerate() {
        if client.write_all(piece).is_err() {
            break;
        }
        // Enough of them to be read apart. A socket holds few pieces, however small, so what reads them goes on then.
        match count {
            0..4 => threads().settle(),
            _ => threads().reactor.resume(),
        }
    }
    // It may have closed already.
    let _ = client.shutdown(Shutdown::Write);
    threads().reactor.resume();
    let mut answers = Vec::new();
    let ended = client.read_to_end(&mut answers);
    if let Err(error) = &ended {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "neither answered nor closed");
    }
    let whole = answers.rsplitn(2, |byte| *byte == b'\n').nth(1).unwrap_or_default();
    let mut count = 0;
    for line in whole.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        serde_json::from_slice::<serde_json::Value>(line).expect("an answer is no JSON");
        count += 1;
    }
    let asked = bytes.split(|byte| *byte == b'\n').count();
    assert!(count <= asked, "{count} answers to {asked} lines");
}

fuzz_target!(|data: &[u8]| {
    static SERVER: LazyLock<(SocketAddr, Arc<Mutex<Server>>)> = LazyLock::new(|| {
        let name = format!("catalyst-fuzz-control-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        let server = Server::start(listener, Box::new(Machine), &threads().reactor).unwrap();
        (address, server)
    });
    talk(&SERVER.0, data);
});
