//! The port to the host: found, opened, read.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use catalyst_agent_protocol::{Decoder, Frame};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

/// How long the port may take to appear after the agent's start.
const APPEARS_WITHIN: Duration = Duration::from_secs(10);
/// Bytes read at once.
const READ_SIZE: usize = 64 * 1024;

/// The open port.
#[derive(Debug)]
pub struct Port {
    file: File,
    socket: bool,
}

/// What the reader of the port meets.
#[derive(Debug)]
pub enum Event {
    /// A frame.
    Frame(Frame),
    /// The host closed its end.
    HostGone,
}

/// Finds the port with that name, waiting a while for it to appear.
pub fn find(name: &str) -> io::Result<Option<PathBuf>> {
    // The kernel tells by a uevent that a port got its name; the node in /dev is older than that.
    let kind = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let events =
        socket(AddressFamily::Netlink, SockType::Datagram, kind, SockProtocol::NetlinkKObjectUEvent)?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&events), &NetlinkAddr::new(0, 1))?;
    let until = Instant::now() + APPEARS_WITHIN;
    loop {
        if let Some(path) = scan(name, Path::new("/sys/class/virtio-ports"), Path::new("/dev")) {
            return Ok(Some(path));
        }
        let Some(left) = until.checked_duration_since(Instant::now()) else { return Ok(None) };
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(events.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut scrap = [0; 4096];
        while recv(std::os::fd::AsRawFd::as_raw_fd(&events), &mut scrap, MsgFlags::empty()).is_ok() {}
    }
}

fn scan(wanted: &str, class: &Path, dev: &Path) -> Option<PathBuf> {
    fs::read_dir(class).ok()?.flatten().find_map(|entry| {
        let name = fs::read_to_string(entry.path().join("name")).ok()?;
        (name.trim_end() == wanted).then(|| dev.join(entry.file_name()))
    })
}

impl Port {
    /// Opens the port; a Unix socket is connected to.
    pub fn open(path: &Path) -> io::Result<Self> {
        let socket = fs::metadata(path)?.file_type().is_socket();
        let file = if socket {
            File::from(OwnedFd::from(UnixStream::connect(path)?))
        } else {
            OpenOptions::new().read(true).write(true).open(path)?
        };
        Ok(Self { file, socket })
    }

    /// The same port for the thread that writes. Writes block while the host does not read or is
    /// not there.
    pub fn writer(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Reads frames for as long as the port lives.
    pub fn read(&mut self, mut handle: impl FnMut(Event)) -> io::Result<()> {
        let mut decoder = Decoder::new();
        let mut buffer = vec![0; READ_SIZE];
        let epoll = self.watch()?;
        loop {
            let count = match self.file.read(&mut buffer) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if count == 0 {
                decoder.clear();
                handle(Event::HostGone);
                if self.socket {
                    return Ok(());
                }
                wait_for_host(&epoll)?;
                continue;
            }
            decoder.push(&buffer[..count]);
            while let Some(frame) = decoder.next_frame() {
                handle(Event::Frame(frame));
            }
        }
    }

    fn watch(&self) -> io::Result<Epoll> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        match epoll.add(&self.file, EpollEvent::new(interest, 0)) {
            // A regular file has no events, and no host that comes back either.
            Ok(()) | Err(nix::errno::Errno::EPERM) => Ok(epoll),
            Err(error) => Err(error.into()),
        }
    }
}

/// Waits until the host opens its end.
///
/// While it is closed, a read returns 0 at once and poll(2) says POLLHUP at once, so neither can
/// wait. Edge-triggered epoll can: the driver wakes its waiters whenever the host opens or closes
/// the port, and each of these is one event.
fn wait_for_host(epoll: &Epoll) -> io::Result<()> {
    let mut events = [EpollEvent::empty()];
    loop {
        match epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) if events[0].events().contains(EpollFlags::EPOLLHUP) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use catalyst_agent_protocol::PORT_NAME;

    use super::*;

    #[test]
    fn the_port_is_found_by_its_name() {
        let root = std::env::temp_dir().join(format!("catalyst-agent-ports-{}", std::process::id()));
        for (port, name) in [("vport1p1", "com.redhat.spice.0\n"), ("vport2p3", "org.catalyst.agent.0\n")] {
            fs::create_dir_all(root.join(port)).unwrap();
            fs::write(root.join(port).join("name"), name).unwrap();
        }
        assert_eq!(scan(PORT_NAME, &root, Path::new("/dev")), Some("/dev/vport2p3".into()));
        fs::remove_dir_all(root.join("vport2p3")).unwrap();
        assert_eq!(scan(PORT_NAME, &root, Path::new("/dev")), None);
        fs::remove_dir_all(root).unwrap();
    }
}
