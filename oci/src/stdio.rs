//! Bytes between a program in the guest and the descriptors that its engine gave for it.
//!
//! The descriptors are others' too, so they stay as they are, blocking or not: each is read or written in a thread of its own.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use bytes::Bytes;
use catalyst_agent_link::{ExecEvent, ExecEvents, ExecExit, ExecStdin};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::{mpsc, oneshot};

/// Bytes that are read at once.
const PIECE: usize = 32 * 1024;
/// Pieces that may wait to be written.
const WAITING: usize = 8;
/// How long the last output may take to be taken, once the program has ended.
const FLUSH_LIMIT: Duration = Duration::from_secs(30);
/// Stack of a thread that but reads or writes.
const STACK: usize = 128 * 1024;

/// How a program came to its end.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    /// It ended.
    Exit(ExecExit),
    /// The guest is gone.
    Lost(String),
}

impl Ended {
    /// The exit code as a shell tells it.
    pub fn code(&self) -> Option<i32> {
        match self {
            Self::Exit(ExecExit::Code(code)) => Some(*code),
            Self::Exit(ExecExit::Signal(signal)) => Some(128 + signal),
            Self::Lost(_) => None,
        }
    }
}

/// Feeds a program's input from a descriptor, to its end.
pub fn feed(mut stdin: ExecStdin, input: File) -> io::Result<()> {
    let (sender, mut pieces) = mpsc::channel::<Bytes>(1);
    thread("stdin", move || {
        let mut buffer = vec![0; PIECE];
        while let Ok(length @ 1..) = read_some(&input, &mut buffer) {
            if sender.blocking_send(Bytes::copy_from_slice(&buffer[..length])).is_err() {
                return;
            }
        }
    })?;
    tokio::spawn(async move {
        while let Some(piece) = pieces.recv().await {
            if stdin.write(piece).await.is_err() {
                return;
            }
        }
        // A program that has ended needs no end of its input.
        let _ = stdin.close().await;
    });
    Ok(())
}

/// Writes a program's output to descriptors until it has ended and all is written.
pub async fn relay(mut events: ExecEvents, output: File, errors: Option<File>) -> io::Result<Ended> {
    let output = Sink::new(output)?;
    let errors = errors.map(Sink::new).transpose()?;
    let ended = loop {
        match events.next().await {
            Some(ExecEvent::Stdout(bytes)) => output.write(bytes).await,
            Some(ExecEvent::Stderr(bytes)) => errors.as_ref().unwrap_or(&output).write(bytes).await,
            Some(ExecEvent::Exit(exit)) => break Ended::Exit(exit),
            Some(ExecEvent::Lost(why)) => break Ended::Lost(why),
            None => break Ended::Lost("its stream has ended".to_owned()),
        }
    };
    let flushed = async {
        output.flush().await;
        if let Some(errors) = errors {
            errors.flush().await;
        }
    };
    // Whoever does not read for so long has lost interest.
    let _ = tokio::time::timeout(FLUSH_LIMIT, flushed).await;
    Ok(ended)
}

/// A descriptor that is written in a thread.
struct Sink {
    pieces: mpsc::Sender<Bytes>,
    done: oneshot::Receiver<()>,
}

impl Sink {
    fn new(file: File) -> io::Result<Self> {
        let (pieces, mut waiting) = mpsc::channel::<Bytes>(WAITING);
        let (tell, done) = oneshot::channel();
        thread("stdout", move || {
            let mut open = true;
            while let Some(piece) = waiting.blocking_recv() {
                // Once nobody reads any more, what the program says is taken and let go.
                open = open && write_whole(&file, &piece).is_ok();
            }
            drop(file);
            let _ = tell.send(());
        })?;
        Ok(Self { pieces, done })
    }

    async fn write(&self, piece: Bytes) {
        let _ = self.pieces.send(piece).await;
    }

    async fn flush(self) {
        drop(self.pieces);
        let _ = self.done.await;
    }
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn(work).map(|_| ())
}

fn read_some(mut file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match file.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                await_it(file.as_fd(), PollFlags::POLLIN)?;
            }
            read => return read,
        }
    }
}

fn write_whole(mut file: &File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(length) => bytes = &bytes[length..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                await_it(file.as_fd(), PollFlags::POLLOUT)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn await_it(file: BorrowedFd<'_>, what: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::new(file, what)], PollTimeout::NONE) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, OwnedFd};

    use nix::fcntl::{FcntlArg, OFlag, fcntl};

    use super::*;

    #[test]
    fn codes_are_as_a_shell_tells_them() {
        assert_eq!(Ended::Exit(ExecExit::Code(7)).code(), Some(7));
        assert_eq!(Ended::Exit(ExecExit::Signal(9)).code(), Some(137));
        assert_eq!(Ended::Lost(String::new()).code(), None);
    }

    #[tokio::test]
    async fn a_sink_that_is_slow_gets_all_and_one_that_is_closed_holds_nobody_up() {
        let (mut read, write) = std::io::pipe().unwrap();
        let write = File::from(OwnedFd::from(write));
        fcntl(&write, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let sink = Sink::new(write).unwrap();
        let reading = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            let mut all = Vec::new();
            read.read_to_end(&mut all).unwrap();
            all.len()
        });
        for _ in 0..20 {
            sink.write(Bytes::from(vec![1; PIECE])).await;
        }
        sink.flush().await;
        assert_eq!(reading.join().unwrap(), 20 * PIECE);

        let (read, write) = std::io::pipe().unwrap();
        drop(read);
        let sink = Sink::new(File::from(OwnedFd::from(write))).unwrap();
        for _ in 0..20 {
            sink.write(Bytes::from_static(b"x")).await;
        }
        sink.flush().await;
    }

    #[test]
    fn a_descriptor_that_does_not_block_is_waited_for() {
        let (read, mut write) = std::io::pipe().unwrap();
        let read = File::from(OwnedFd::from(read));
        fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        assert!(read.as_raw_fd() > 2);
        let writing = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            write.write_all(b"late").unwrap();
        });
        let mut buffer = [0; 8];
        assert_eq!(read_some(&read, &mut buffer).unwrap(), 4);
        writing.join().unwrap();
        assert_eq!(read_some(&read, &mut buffer).unwrap(), 0);
    }
}
