//! Messages between the commands and a container's shim: JSON after its length, with descriptors (unix(7), SCM_RIGHTS).
//!
//! Both ends are root's; what is checked is that a message is whole.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use catalyst_agent_protocol::container::{Container, Process};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Longest message, in bytes.
const LONGEST: usize = 4 << 20;
/// Most descriptors that come with one, as many as the kernel passes on (`SCM_MAX_FD`).
const MOST_DESCRIPTORS: usize = 253;

/// What a shim is asked.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    /// Start the container's program.
    Start,
    /// Send its program a signal.
    Kill {
        /// Signal number.
        signal: i32,
    },
    /// Run another program, with the descriptors that come along: input, output, errors; of a terminal but one.
    Exec {
        /// It.
        process: Box<Process>,
        /// The process on the host that stands for it.
        pid: u32,
    },
    /// The other program's terminal has another size.
    Resize {
        /// Rows.
        rows: u16,
        /// Columns.
        cols: u16,
    },
    /// Run a container in the VM of this one, with the descriptors that come along. What follows on the connection are signals for it
    /// and sizes of its terminal; when the connection ends, so does the container.
    Join(Box<Join>),
    /// Say how the container is.
    State,
    /// Stand still.
    Pause,
    /// Go on.
    Resume,
}

/// A container that joins another one's VM. Its descriptors are the listening socket for its commands, its trees, then input, output
/// and errors; of a terminal the first two.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    /// The process on the host that stands for it.
    pub pid: u32,
    /// Virtual CPUs that it asks for.
    pub cpus: u32,
    /// Memory in MiB that it asks for.
    pub memory_mib: u64,
    /// It, but for where its trees are.
    pub container: Container,
    /// The names of its trees.
    pub trees: Vec<String>,
}

/// What a shim answers.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It was done.
    Done,
    /// How the container is.
    State {
        /// Its status.
        status: Status,
        /// Processes that stand for its programs.
        pids: Vec<u32>,
    },
    /// The other program has ended, or the container that has joined.
    Exited {
        /// Its exit code.
        code: i32,
        /// The kernel has ended a program of that container since memory was short.
        out_of_memory: bool,
    },
    /// It was not done, and why.
    Failed(String),
}

/// How a container is, in the words of the runtime specification ("State").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Being made.
    Creating,
    /// Ready.
    Created,
    /// Its program runs.
    Running,
    /// Standing still.
    Paused,
    /// Ended.
    Stopped,
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// Sends a message, with descriptors.
pub fn send(mut stream: &UnixStream, message: &impl Serialize, descriptors: &[RawFd]) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let length = u32::try_from(text.len()).ok().filter(|_| text.len() <= LONGEST);
    let length = length.ok_or_else(|| io::Error::other("the message is too long"))?.to_le_bytes();
    let rights = [ControlMessage::ScmRights(descriptors)];
    let rights = if descriptors.is_empty() { &rights[..0] } else { &rights[..] };
    let sent =
        sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&length)], rights, MsgFlags::MSG_NOSIGNAL, None)?;
    if sent != length.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    stream.write_all(&text)
}

/// Receives a message with its descriptors; none at the end of the connection.
pub fn receive<T: DeserializeOwned>(mut stream: &UnixStream) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut length = [0; 4];
    let mut space = nix::cmsg_space!([RawFd; MOST_DESCRIPTORS]);
    let mut descriptors = Vec::new();
    let got = {
        let mut parts = [IoSliceMut::new(&mut length)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
        for message in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = message {
                // SAFETY: the kernel has just made these descriptors for this process; nobody else has them.
                descriptors.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
            }
        }
        received.bytes
    };
    if got == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut length[got..])?;
    let length = u32::from_le_bytes(length) as usize;
    if length > LONGEST {
        return Err(io::Error::other("a message is too long"));
    }
    let mut text = vec![0; length];
    stream.read_exact(&mut text)?;
    Ok(Some((serde_json::from_slice(&text)?, descriptors)))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut read, write) = std::io::pipe().unwrap();
        let process = Box::new(Process { args: vec!["x".repeat(300_000)], ..Process::default() });
        let sending = std::thread::spawn(move || {
            send(&ours, &Request::Exec { process, pid: 7 }, &[write.as_fd().as_raw_fd()]).unwrap();
            send(&ours, &Request::Kill { signal: 9 }, &[]).unwrap();
        });
        let (request, descriptors) = receive::<Request>(&theirs).unwrap().unwrap();
        sending.join().unwrap();
        assert!(matches!(request, Request::Exec { process, pid: 7 } if process.args[0].len() == 300_000));
        let [descriptor] = <[OwnedFd; 1]>::try_from(descriptors).unwrap();
        std::fs::File::from(descriptor).write_all(b"through").unwrap();
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
        assert_eq!(receive::<Request>(&theirs).unwrap().unwrap().0, Request::Kill { signal: 9 });
        assert!(receive::<Request>(&theirs).unwrap().is_none());
    }

    #[test]
    fn half_a_message_and_one_that_is_too_long_are_errors() {
        for bytes in
            [&[3, 0, 0][..], &[9, 0, 0, 0, b'"'], &[255, 255, 255, 255, b'x'], &[2, 0, 0, 0, b'{', b'!']]
        {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            ours.write_all(bytes).unwrap();
            drop(ours);
            assert!(receive::<Request>(&theirs).is_err(), "{bytes:?}");
        }
    }
}
