//! What the other commands ask the shim, on its control socket.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use tokio::sync::mpsc;

use super::guest::{Guest, Stdio, told};
use super::host::{self, Host};
use crate::console;
use crate::failure::Outcome;
use crate::stdio::Ended;
use crate::wire::{self, Answer, Request};

/// Stack of a thread that but reads.
const STACK: usize = 256 * 1024;

/// A connection: what was asked first, and what comes after it.
pub struct Peer {
    /// It.
    pub stream: UnixStream,
    /// What was asked.
    pub request: Request,
    /// What came along.
    pub descriptors: Vec<OwnedFd>,
    /// What is asked after it.
    pub more: mpsc::UnboundedReceiver<Request>,
}

/// Connections to the socket, as they come.
pub fn peers(listener: UnixListener) -> io::Result<mpsc::UnboundedReceiver<Peer>> {
    let (sender, peers) = mpsc::unbounded_channel();
    let accept = move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let sender = sender.clone();
            // One that is not served is seen to be closed.
            let _ = thread(move || read(stream, &sender));
        }
    };
    thread(accept)?;
    Ok(peers)
}

/// Serves the socket of a container; others may join it, if it is one that has a VM.
pub fn listen(listener: UnixListener, guest: Arc<Guest>, host: Option<Arc<Host>>) -> io::Result<()> {
    let mut peers = peers(listener)?;
    tokio::spawn(async move {
        while let Some(peer) = peers.recv().await {
            match (&host, &peer.request) {
                (Some(host), Request::Join(_)) => drop(tokio::spawn(host::serve(Arc::clone(host), peer))),
                _ => drop(tokio::spawn(serve(peer, Arc::clone(&guest)))),
            }
        }
    });
    Ok(())
}

fn thread(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name("control".to_owned()).stack_size(STACK).spawn(work).map(|_| ())
}

/// Reads what a connection asks, to its end.
fn read(stream: UnixStream, peers: &mpsc::UnboundedSender<Peer>) {
    let Ok(reading) = stream.try_clone() else { return };
    let Ok(Some((request, descriptors))) = wire::receive(&reading) else { return };
    let (sender, more) = mpsc::unbounded_channel();
    if peers.send(Peer { stream, request, descriptors, more }).is_err() {
        return;
    }
    while let Ok(Some((request, _))) = wire::receive(&reading) {
        if sender.send(request).is_err() {
            return;
        }
    }
}

async fn serve(peer: Peer, guest: Arc<Guest>) {
    let Peer { stream, request, descriptors, more } = peer;
    let done = |outcome: Outcome| match outcome {
        Ok(()) => Answer::Done,
        Err(failure) => told(&failure),
    };
    let answer = match request {
        Request::Start => done(guest.start().await),
        Request::Kill { signal } => done(guest.kill(signal).await),
        Request::Pause => done(guest.pause(true).await),
        Request::Resume => done(guest.pause(false).await),
        Request::State => {
            let (status, pids) = guest.status();
            Answer::State { status, pids }
        }
        Request::Join(_) => Answer::Failed("This container has joined another: join that one".to_owned()),
        Request::Resize { .. } => Answer::Failed("There is no terminal on this connection".to_owned()),
        Request::Exec { process, pid } => {
            let Some(stdio) = stdio(descriptors, process.terminal.is_some()) else {
                let missing = Answer::Failed("Descriptors for the program are missing".to_owned());
                let _ = wire::send(&stream, &missing, &[]);
                return;
            };
            match guest.exec(*process, stdio).await {
                Ok((control, end)) => {
                    guest.note(pid, true);
                    // Whoever asked may be gone, which is seen below.
                    let _ = wire::send(&stream, &Answer::Done, &[]);
                    let ended = attend(control, end, more).await;
                    guest.note(pid, false);
                    Answer::Exited { code: ended, out_of_memory: false }
                }
                Err(failure) => told(&failure),
            }
        }
    };
    // Whoever asked may not have waited.
    let _ = wire::send(&stream, &answer, &[]);
}

/// Stays with another program until it has ended, or whoever stands for it: then it is ended.
async fn attend(
    control: catalyst_agent_link::ExecControl,
    end: impl Future<Output = Ended>,
    mut more: mpsc::UnboundedReceiver<Request>,
) -> i32 {
    tokio::pin!(end);
    loop {
        tokio::select! {
            ended = &mut end => return ended.code().unwrap_or(137),
            request = more.recv() => {
                // A program that has ended takes neither.
                let _ = match request {
                    Some(Request::Kill { signal }) => control.signal(signal).await,
                    Some(Request::Resize { rows, cols }) => control.resize(rows, cols).await,
                    Some(_) => Ok(()),
                    None => return 137,
                };
            }
        }
    }
}

/// The descriptors of a program: input, output and errors, of a terminal the first two.
pub fn stdio(descriptors: Vec<OwnedFd>, terminal: bool) -> Option<Stdio> {
    let mut files = descriptors.into_iter().map(console::file);
    let (input, output) = (files.next()?, files.next()?);
    if terminal {
        return Some(Stdio { input: Some(input), output, errors: None });
    }
    let input = Some(input).filter(|input| !console::is_null(input));
    Some(Stdio { input, output, errors: Some(files.next()?) })
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_program_has_as_many_descriptors_as_it_needs() {
        let some =
            |count| (0..count).map(|_| OwnedFd::from(File::open("/dev/null").unwrap())).collect::<Vec<_>>();
        assert!(stdio(some(2), false).is_none() && stdio(some(1), true).is_none());
        let terminal = stdio(some(2), true).unwrap();
        assert!(terminal.input.is_some() && terminal.errors.is_none());
        let plain = stdio(some(3), false).unwrap();
        assert!(plain.input.is_none() && plain.errors.is_some());
    }

    #[tokio::test]
    async fn a_connection_s_requests_come_in_order_and_its_end_is_seen() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (sender, mut peers) = mpsc::unbounded_channel();
        let reading = std::thread::spawn(move || read(theirs, &sender));
        wire::send(&ours, &Request::State, &[]).unwrap();
        wire::send(&ours, &Request::Resize { rows: 1, cols: 2 }, &[]).unwrap();
        let mut peer = peers.recv().await.unwrap();
        assert_eq!(peer.request, Request::State);
        assert_eq!(peer.more.recv().await, Some(Request::Resize { rows: 1, cols: 2 }));
        drop(ours);
        assert_eq!(peer.more.recv().await, None);
        reading.join().unwrap();
    }
}
