//! Whether sshd and dockerd answer.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::session::Session;

/// First and longest interval between two tries, where no event tells.
const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(1);
/// How long a daemon may take to answer, on a slow machine too.
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);

/// Watches both and tells the host of changes.
pub fn watch(session: &Arc<Session>) {
    let ssh = Arc::clone(session);
    thread::spawn(move || {
        wait_for_ssh();
        ssh.set_status(|status| status.ssh = true);
    });
    let docker = Arc::clone(session);
    thread::spawn(move || {
        let told = watch_docker(Path::new("/run"), |answers| {
            docker.set_status(|status| status.docker = answers);
            true
        });
        if let Err(error) = told {
            eprintln!("catalyst-agent: /run cannot be watched for Docker's socket: {error}");
        }
    });
}

/// Tries sshd until it answers, less and less often: no event tells that a program listens.
pub fn wait_for_ssh() {
    let mut pause = FIRST;
    while !ssh_answers(SocketAddr::from(([127, 0, 0, 1], 22))) {
        thread::sleep(pause);
        pause = (pause * 2).min(LONGEST);
    }
}

fn ssh_answers(address: SocketAddr) -> bool {
    let banner = || -> io::Result<[u8; 4]> {
        let mut stream = TcpStream::connect_timeout(&address, ANSWERS_WITHIN)?;
        stream.set_read_timeout(Some(ANSWERS_WITHIN))?;
        let mut banner = [0; 4];
        stream.read_exact(&mut banner)?;
        Ok(banner)
    };
    banner().is_ok_and(|banner| &banner == b"SSH-")
}

fn docker_answers(socket: &Path) -> bool {
    let status = || -> io::Result<[u8; 12]> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWERS_WITHIN))?;
        stream.set_write_timeout(Some(ANSWERS_WITHIN))?;
        stream.write_all(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")?;
        let mut status = [0; 12];
        stream.read_exact(&mut status)?;
        Ok(status)
    };
    status().is_ok_and(|status| status.starts_with(b"HTTP/1.") && status.ends_with(b" 200"))
}

/// Tells each change of whether Docker answers at `docker.sock` in `folder`, until `tell` says
/// no. Between the creation of the socket and the first answer there is no event, so it tries;
/// else it sleeps.
fn watch_docker(folder: &Path, mut tell: impl FnMut(bool) -> bool) -> nix::Result<()> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let flags = AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_MOVED_FROM;
    inotify.add_watch(folder, flags)?;
    let socket = folder.join("docker.sock");
    let mut answered = false;
    let mut pause = FIRST;
    loop {
        let present = socket.exists();
        let answers = present && (answered || docker_answers(&socket));
        if answers != answered {
            answered = answers;
            pause = FIRST;
            if !tell(answers) {
                return Ok(());
            }
        }
        let trying = present && !answers;
        let timeout =
            if trying { PollTimeout::try_from(pause).unwrap_or(PollTimeout::MAX) } else { PollTimeout::NONE };
        let mut fds = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) => pause = (pause * 2).min(LONGEST),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
        if replaced(&inotify)? {
            // Gone, and maybe there again: another daemon, which has yet to answer.
            if answered && !tell(false) {
                return Ok(());
            }
            answered = false;
            pause = FIRST;
        }
    }
}

/// Reads the events that wait; true if one was of Docker's socket, or may have been.
fn replaced(inotify: &Inotify) -> nix::Result<bool> {
    let mut ours = false;
    loop {
        match inotify.read_events() {
            Ok(events) => {
                ours |= events.iter().any(|event| {
                    event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW)
                        || event.name.as_ref().is_some_and(|name| name == "docker.sock")
                });
            }
            Err(Errno::EAGAIN) => return Ok(ours),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc;

    use super::*;

    fn answer_once(mut stream: impl Read + Write, answer: &[u8]) {
        let _ = stream.read(&mut [0; 256]);
        stream.write_all(answer).unwrap();
    }

    #[test]
    fn ssh_is_ready_when_it_says_its_name() {
        for (banner, ready) in [(&b"SSH-2.0-OpenSSH_9.2\r\n"[..], true), (b"HTTP/1.0 200\r\n", false)] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let server = thread::spawn(move || listener.accept().unwrap().0.write_all(banner).unwrap());
            assert_eq!(ssh_answers(address), ready);
            server.join().unwrap();
            assert!(!ssh_answers(address), "nobody listens any more");
        }
    }

    #[test]
    fn docker_is_ready_from_its_first_good_answer_until_its_socket_goes() {
        let folder = std::env::temp_dir().join(format!("catalyst-agent-docker-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (sender, told) = mpsc::channel();
        let watched = folder.clone();
        let watcher = thread::spawn(move || {
            watch_docker(&watched, |answers| {
                sender.send(answers).unwrap();
                answers
            })
        });
        let socket = folder.join("docker.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        answer_once(listener.accept().unwrap().0, b"HTTP/1.0 503 Service Unavailable\r\n\r\n");
        answer_once(listener.accept().unwrap().0, b"HTTP/1.0 200 OK\r\n\r\nOK");
        let soon = Duration::from_secs(10);
        assert!(told.recv_timeout(soon).unwrap());
        std::fs::remove_file(&socket).unwrap();
        assert!(!told.recv_timeout(soon).unwrap());
        watcher.join().unwrap().unwrap();
        std::fs::remove_dir_all(folder).unwrap();
    }
}
