//! Terminals: made here, their master sent to the engine, their slave kept raw, since the guest has a terminal of its own that does
//! the rest.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use catalyst_agent_link::Terminal;
use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::failure::{Outcome, Tried};

/// Makes a terminal of that size, sends its master to the socket (runc's docs/terminals.md) and makes its slave, which is raw, this
/// process's own: sizes of it are told by SIGWINCH.
pub fn open(socket: &Path, size: Option<&Terminal>) -> Outcome<File> {
    let what = || "make a terminal".to_owned();
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).tried(what)?;
    grantpt(&master).and_then(|()| unlockpt(&master)).tried(what)?;
    let name = ptsname_r(&master).tried(what)?;
    let slave = File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(&name);
    let slave = slave.tried(|| format!("open the terminal {name}"))?;
    make_raw(&slave).tried(what)?;
    if let Some(size) = size {
        set_size(&slave, size.rows, size.cols).tried(what)?;
    }
    own(&slave).tried(|| format!("take the terminal {name}"))?;
    // Whoever waits for the end of what this process was started with is not to wait for the program.
    for number in 0..3 {
        // SAFETY: both descriptors are open; nothing here relies on what 0 to 2 were.
        if unsafe { libc::dup2(slave.as_raw_fd(), number) } == -1 {
            return Err(io::Error::last_os_error()).tried(|| format!("take the terminal {name}"));
        }
    }
    send_master(socket, &master, &name).tried(|| format!("send the terminal to {}", socket.display()))?;
    Ok(slave)
}

fn send_master(socket: &Path, master: &impl AsRawFd, name: &str) -> io::Result<()> {
    let stream = UnixStream::connect(socket)?;
    let descriptors = [master.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let parts = [IoSlice::new(name.as_bytes())];
    sendmsg::<()>(stream.as_raw_fd(), &parts, &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Makes a terminal raw; how it was before.
pub fn make_raw(terminal: &impl AsFd) -> io::Result<Termios> {
    let before = tcgetattr(terminal)?;
    let mut raw = before.clone();
    cfmakeraw(&mut raw);
    tcsetattr(terminal, SetArg::TCSANOW, &raw)?;
    Ok(before)
}

/// Puts a terminal back to how it was.
pub fn restore(terminal: &impl AsFd, before: &Termios) {
    // Whoever closed it needs it no more.
    let _ = tcsetattr(terminal, SetArg::TCSANOW, before);
}

fn own(terminal: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open; the call has no memory.
    if unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Rows and columns, unless they are not known.
pub fn size(terminal: &impl AsRawFd) -> Option<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel fills the struct.
    let got = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (got == 0 && size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

fn set_size(terminal: &File, rows: u16, cols: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel reads the struct.
    if unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// One of this process's own descriptors, doubled.
pub fn inherited(number: std::os::fd::RawFd) -> io::Result<File> {
    // SAFETY: 0 to 2 are open from the start and are closed nowhere.
    let own = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
    Ok(File::from(own.try_clone_to_owned()?))
}

/// Whether a descriptor is /dev/null, from which no input comes (`Documentation/admin-guide/devices.txt`: 1, 3).
pub fn is_null(file: &File) -> bool {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    file.metadata().is_ok_and(|found| {
        found.file_type().is_char_device() && found.rdev() == nix::sys::stat::makedev(1, 3)
    })
}

/// A descriptor as a file.
pub fn file(descriptor: OwnedFd) -> File {
    File::from(descriptor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_set_and_read_and_raw_is_undone() {
        let pty = nix::pty::openpty(None, None).unwrap();
        let slave = File::from(pty.slave);
        assert_eq!(size(&slave), None);
        set_size(&slave, 30, 100).unwrap();
        assert_eq!(size(&slave), Some((30, 100)));
        let before = make_raw(&slave).unwrap();
        assert_ne!(tcgetattr(&slave).unwrap().local_flags, before.local_flags);
        restore(&slave, &before);
        assert_eq!(tcgetattr(&slave).unwrap().local_flags, before.local_flags);
    }

    #[test]
    fn nothing_comes_from_dev_null() {
        assert!(is_null(&File::open("/dev/null").unwrap()));
        assert!(!is_null(&File::open("/dev/zero").unwrap()));
        assert!(!is_null(&tempfile::tempfile().unwrap()));
    }
}
