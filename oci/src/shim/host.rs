//! Containers that join the VM of this one: those of a pod, and those that are to be in the network of another.
//!
//! The shim of one that joins ([`super::member`]) hands over all that it has: its trees, its stdio, and the socket on which it is asked
//! things. From then on it is served here, and its own shim stays to be the process that its engine knows.

use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use catalyst_agent_link::AgentLink;
use catalyst_agent_protocol::container::Container;
use tokio::sync::{Mutex, mpsc};

use super::control::{self, Peer};
use super::guest::{Guest, Of, Stdio, told};
use super::machine::{LAST_WORDS, Trees, create_container, gone};
use super::memory::Short;
use super::shelf::Shelf;
use crate::daemon::Daemon;
use crate::failure::{Failure, Outcome, Tried, chain, said};
use crate::stdio::Ended;
use crate::wire::{self, Answer, Join, Request};

/// How long a guest may take to take a container away.
const CLEAR_LIMIT: Duration = Duration::from_secs(12);

/// A VM that containers can join.
#[derive(Debug)]
pub struct Host {
    /// Its agent.
    pub link: AgentLink,
    daemon: Daemon,
    vm: String,
    shelf: Shelf,
    short: Arc<Short>,
    /// How many have joined; one is made at a time.
    joined: Mutex<u32>,
}

/// What a container that joins brings along, but for its files.
struct Brought {
    listener: UnixListener,
    stdio: Stdio,
}

impl Brought {
    /// From the descriptors that came along; its files too.
    fn of(join: &Join, descriptors: Vec<OwnedFd>) -> Outcome<(Self, Trees)> {
        let mut descriptors = descriptors.into_iter();
        let listener = descriptors.next().map(UnixListener::from);
        let trees: Trees = join.trees.iter().cloned().zip(descriptors.by_ref()).collect();
        let stdio = control::stdio(descriptors.collect(), join.container.process.terminal.is_some());
        match (listener, stdio) {
            (Some(listener), Some(stdio)) if trees.len() == join.trees.len() => {
                Ok((Self { listener, stdio }, trees))
            }
            _ => said("Descriptors of the container are missing"),
        }
    }
}

/// The name of the container that joins as the `number`th.
pub fn name(number: u32) -> String {
    format!("c{number}")
}

impl Host {
    /// Of a VM that has had so many that joined.
    pub fn new(
        link: AgentLink,
        daemon: Daemon,
        vm: String,
        shelf: Shelf,
        short: Arc<Short>,
        had: u32,
    ) -> Arc<Self> {
        Arc::new(Self { link, daemon, vm, shelf, short, joined: Mutex::new(had) })
    }

    /// Makes a container ready; its name here.
    pub async fn admit(&self, container: &mut Container, trees: Trees) -> Outcome<String> {
        let mut joined = self.joined.lock().await;
        let name = name(*joined);
        *joined = joined.wrapping_add(1);
        container.name.clone_from(&name);
        container.joins = true;
        self.shelf.put(&name, trees).await?;
        let made = create_container(&self.link, container).await;
        if made.is_err() {
            self.clear(&name).await;
        }
        made.map(|()| name)
    }

    /// Serves a container that is ready, until it has ended or its shim has.
    async fn stay(&self, name: String, join: &Join, brought: Brought, peer: UnixStream, more: More) {
        // It answers until its end is told.
        let listening = brought.listener.try_clone().map(Listening);
        let ended = self.attend(&name, join.pid, brought, &peer, more).await;
        // Nothing of it is left when its shim ends, after which its engine takes its files away.
        self.clear(&name).await;
        let out_of_memory = self.short.take(&name);
        let answer = match &ended {
            // The end of the connection tells it.
            Ok(Ended::Lost(_)) => None,
            Ok(ended) => ended.code().map(|code| Answer::Exited { code, out_of_memory }),
            Err(failure) => Some(told(failure)),
        };
        if let Some(answer) = answer {
            // Whoever stood for it may be gone.
            let _ = wire::send(&peer, &answer, &[]);
        }
        // A thread still reads from it, and has it open.
        let _ = peer.shutdown(Shutdown::Both);
        drop(listening);
    }

    async fn clear(&self, name: &str) {
        // Its files go first, so that the guest sees that they are gone.
        if let Err(failure) = self.shelf.take(name).await {
            eprintln!("catalyst-oci: {}", chain(&failure));
        }
        // A guest that does not answer has lost them all the same.
        let _ = tokio::time::timeout(CLEAR_LIMIT, self.link.remove_container(name)).await;
    }

    async fn attend(
        &self,
        name: &str,
        pid: u32,
        brought: Brought,
        peer: &UnixStream,
        mut more: More,
    ) -> Outcome<Ended> {
        let speak = || "serve the container that joins".to_owned();
        let Brought { listener, stdio } = brought;
        let of = Of { name: name.to_owned(), pid };
        let (guest, mut events) =
            Guest::new(self.link.clone(), of, self.daemon.clone(), self.vm.clone(), stdio);
        control::listen(listener, Arc::clone(&guest), None).tried(speak)?;
        wire::send(peer, &Answer::Done, &[]).tried(speak)?;
        let mut status = self.link.status();
        loop {
            tokio::select! {
                biased;
                ended = events.recv() => {
                    return Ok(ended.unwrap_or(Ended::Lost("nobody waits for it".to_owned())));
                }
                request = more.recv() => match request {
                    // Whoever sent it waits for no answer, and neither does the end.
                    Some(Request::Kill { signal }) => {
                        let guest = Arc::clone(&guest);
                        tokio::spawn(async move { guest.kill(signal).await });
                    }
                    Some(Request::Resize { .. }) => guest.resize().await,
                    Some(_) => {}
                    None => return Ok(Ended::Lost("its shim has ended".to_owned())),
                },
                () = gone(&mut status) => {
                    // An end that was told is on its way.
                    tokio::time::sleep(LAST_WORDS).await;
                    return Ok(events.try_recv().unwrap_or(Ended::Lost("the VM has ended".to_owned())));
                }
            }
        }
    }
}

/// What is asked on a connection after the first.
type More = mpsc::UnboundedReceiver<Request>;

/// A listening socket, whose listener ends with this (shutdown(2)).
struct Listening(UnixListener);

impl Drop for Listening {
    fn drop(&mut self) {
        // SAFETY: the descriptor is open. It fails for what is shut down already.
        unsafe { libc::shutdown(self.0.as_raw_fd(), libc::SHUT_RDWR) };
    }
}

/// A container that asks to join.
pub struct Joining {
    /// What it asks.
    pub join: Box<Join>,
    brought: Brought,
    stream: UnixStream,
    more: More,
}

impl Joining {
    /// Who has connected, and its files; none if that is nobody who could join, who has been told so.
    pub fn of(peer: Peer) -> Option<(Self, Trees)> {
        let Peer { stream, request, descriptors, more } = peer;
        let Request::Join(join) = request else { return None };
        match Brought::of(&join, descriptors) {
            Ok((brought, trees)) => Some((Self { join, brought, stream, more }, trees)),
            Err(failure) => {
                refuse(&stream, &failure);
                None
            }
        }
    }

    /// Serves it where it was admitted, under its name there, or tells it why it was not.
    pub async fn serve(self, admitted: Outcome<(Arc<Host>, String)>) {
        match admitted {
            Ok((host, name)) => host.stay(name, &self.join, self.brought, self.stream, self.more).await,
            Err(failure) => refuse(&self.stream, &failure),
        }
    }
}

/// Serves a container that joins a VM that is there.
pub async fn serve(host: Arc<Host>, peer: Peer) {
    let Some((mut joining, trees)) = Joining::of(peer) else { return };
    let admitted = host.admit(&mut joining.join.container, trees).await;
    joining.serve(admitted.map(|name| (host, name))).await;
}

fn refuse(peer: &UnixStream, failure: &Failure) {
    // It may have ended.
    let _ = wire::send(peer, &told(failure), &[]);
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn what_is_brought_along_is_whole_or_refused() {
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        let join = Join {
            pid: 7,
            cpus: 1,
            memory_mib: 128,
            container: Container::default(),
            trees: vec!["root".into(), "m1".into()],
        };
        let folder = tempfile::tempdir().unwrap();
        let some = |count: usize| {
            let path = folder.path().join(count.to_string());
            let listener = OwnedFd::from(UnixListener::bind(path).unwrap());
            std::iter::once(listener).chain((1..count).map(|_| null())).collect::<Vec<_>>()
        };
        let (brought, trees) = Brought::of(&join, some(6)).unwrap();
        assert_eq!(trees.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["root", "m1"]);
        assert!(brought.stdio.input.is_none() && brought.stdio.errors.is_some());
        for count in [1, 2, 3, 5] {
            assert!(Brought::of(&join, some(count)).is_err(), "{count}");
        }
        assert!(Brought::of(&join, Vec::new()).is_err());
    }

    #[test]
    fn a_listener_ends_when_it_is_no_longer_served() {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let listening = Listening(listener.try_clone().unwrap());
        let waiting = std::thread::spawn(move || listener.accept().is_err());
        std::thread::sleep(std::time::Duration::from_millis(50));
        drop(listening);
        assert!(waiting.join().unwrap());
    }
}
