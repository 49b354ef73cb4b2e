//! The container of a Kubernetes pod that but holds its namespaces (CRI: the sandbox). It needs no VM: the pod's own container, in a
//! VM, takes the pod's network, as one that is alone takes its own.

use std::io;
use std::os::unix::net::UnixListener;

use catalyst_agent_link::ExecExit;
use tokio::signal::unix::{SignalKind, signal};

use super::control::{Peer, peers};
use super::guest::is_deadly;
use crate::stdio::Ended;
use crate::wire::{self, Answer, Request, Status};

/// Answers commands until a signal ends it.
pub async fn stay(listener: UnixListener, ready: impl FnOnce() -> io::Result<()>) -> io::Result<Ended> {
    let mut peers = peers(listener)?;
    let mut terminated = signal(SignalKind::terminate())?;
    let mut interrupted = signal(SignalKind::interrupt())?;
    ready()?;
    let mut status = Status::Created;
    loop {
        let peer = tokio::select! {
            _ = terminated.recv() => return Ok(Ended::Exit(ExecExit::Signal(libc::SIGTERM))),
            _ = interrupted.recv() => return Ok(Ended::Exit(ExecExit::Signal(libc::SIGINT))),
            Some(peer) = peers.recv() => peer,
        };
        let Peer { stream, request, .. } = peer;
        let (answer, end) = answer(&request, &mut status);
        // Whoever asked may not have waited.
        let _ = wire::send(&stream, &answer, &[]);
        if let Some(signal) = end {
            return Ok(Ended::Exit(ExecExit::Signal(signal)));
        }
    }
}

/// The answer, and by which signal it ends.
fn answer(request: &Request, status: &mut Status) -> (Answer, Option<i32>) {
    match request {
        Request::State => (Answer::State { status: *status, pids: vec![std::process::id()] }, None),
        Request::Start if *status == Status::Created => {
            *status = Status::Running;
            (Answer::Done, None)
        }
        Request::Kill { signal } => (Answer::Done, Some(*signal).filter(|signal| is_deadly(*signal))),
        _ => (Answer::Failed("The container that holds a pod's namespaces runs nothing".to_owned()), None),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[tokio::test]
    async fn it_is_started_and_stays_until_a_signal_ends_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let asking = std::thread::spawn(move || {
            let ask = |request: Request| {
                let stream = UnixStream::connect(&path).unwrap();
                wire::send(&stream, &request, &[]).unwrap();
                wire::receive::<Answer>(&stream).unwrap().unwrap().0
            };
            assert!(matches!(ask(Request::State), Answer::State { status: Status::Created, .. }));
            assert_eq!(ask(Request::Start), Answer::Done);
            assert!(matches!(ask(Request::Start), Answer::Failed(_)));
            assert_eq!(ask(Request::Kill { signal: libc::SIGWINCH }), Answer::Done);
            assert!(matches!(ask(Request::State), Answer::State { status: Status::Running, .. }));
            assert_eq!(ask(Request::Kill { signal: libc::SIGTERM }), Answer::Done);
        });
        let ended = stay(listener, || Ok(())).await.unwrap();
        assert_eq!(ended.code(), Some(143));
        asking.join().unwrap();
    }
}
