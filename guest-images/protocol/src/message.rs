//! What control frames say, as JSON. Unknown messages are answered, not fatal.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::frame::Channel;
use crate::set_up::{Content, SetUpReport};

/// Every control message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Control {
    /// Guest, when it opens the port: whoever is there may say hello. Its epoch is 0.
    Up,
    /// Either side; the guest answers the host's.
    Hello {
        /// Protocol version of the sender.
        version: u32,
        /// Guest: version of the agent, at most 64 characters.
        #[serde(default)]
        agent: String,
    },
    /// Host: do this.
    Request {
        /// Comes back in the reply; also the stream's number where one is opened. Not 0.
        id: u32,
        /// What.
        request: Request,
    },
    /// Guest: the answer to a request.
    Reply {
        /// The request's number.
        id: u32,
        /// How it went.
        reply: Reply,
    },
    /// Receiver of a stream: as many bytes more may come.
    Credit {
        /// The stream.
        stream: u32,
        /// The channel of it.
        channel: StreamChannel,
        /// Bytes.
        bytes: u32,
    },
    /// Guest: how it is, whenever that changes.
    Status(Status),
    /// Guest: how far its setting up is, when that changes; to a host that asked in this epoch.
    SetUp(SetUpReport),
    /// Guest: a program in the container asks for a name; the host answers with [`Request::Resolved`], or never.
    Resolve {
        /// Comes back with the answer.
        query: u32,
        /// Whether it came by TCP; an answer by UDP is cut by whoever answers.
        tcp: bool,
        /// The DNS message, at most [`crate::container::MAX_QUERY`] bytes.
        message: Content,
    },
    /// Guest: the kernel has ended a program of the container since memory was short.
    OutOfMemory {
        /// In which container; the one that the VM is has no name.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        container: String,
    },
    /// Guest: a command has ended. Comes after the ends of its output.
    Exited {
        /// The stream.
        stream: u32,
        /// How.
        exit: ExecExit,
    },
}

/// A [`Channel`] that has credits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamChannel {
    /// [`Channel::Input`].
    Input,
    /// [`Channel::Output`].
    Output,
    /// [`Channel::Errors`].
    Errors,
}

impl From<StreamChannel> for Channel {
    fn from(channel: StreamChannel) -> Self {
        match channel {
            StreamChannel::Input => Self::Input,
            StreamChannel::Output => Self::Output,
            StreamChannel::Errors => Self::Errors,
        }
    }
}

/// What the host can ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    /// Take this identity.
    Identify(Box<Identity>),
    /// Run a command; the request's number is its stream.
    Exec(ExecSpec),
    /// Give a command's terminal another size.
    Resize {
        /// The command.
        stream: u32,
        /// The size.
        terminal: Terminal,
    },
    /// Send a command a signal.
    Signal {
        /// The command.
        stream: u32,
        /// Signal number, 1 to 64.
        signal: i32,
    },
    /// End a command, or give up a file; nothing more is wanted of the stream.
    Close {
        /// The stream.
        stream: u32,
    },
    /// Write a file; its bytes follow as input, the reply comes when it is whole.
    PutFile(FileSpec),
    /// Read a file; its bytes come as output after the reply.
    GetFile {
        /// Absolute path.
        path: String,
    },
    /// Shut down.
    Shutdown {
        /// What comes after.
        kind: ShutdownKind,
    },
    /// Set the clock, and mix a seed into the random generator: the guest stood still, and another may have gone on from the
    /// same memory.
    SetClock {
        /// Nanoseconds since 1970.
        unix_ns: u64,
        /// 32 random bytes in hexadecimal, or nothing.
        #[serde(default)]
        seed: String,
    },
    /// Come to rest before the guest's memory is copied: what is held back is written, free memory is filled with zeros,
    /// which take no room in a copy. What runs goes on running.
    Rest,
    /// Set the guest up as this, if it was not yet, from the document that lies ready; without one, say how far that is.
    SetUp {
        /// The document's instance.
        instance: String,
        /// Whether the document lies ready.
        document: bool,
    },
    /// Take away what is of this guest alone, before its disk becomes a template: keys, ids, logs.
    Forget,
    /// Mount a folder of the host, which is served over the port for folders.
    MountFolder {
        /// It.
        folder: Folder,
    },
    /// Unmount it wherever it is mounted; `busy` with the names of programs if one uses it.
    UnmountFolder {
        /// Its name.
        name: String,
    },
    /// Make the container of the document ready. Once, under its name. `not_found` and `denied` are about its program.
    CreateContainer {
        /// The document, a [`crate::container::Container`] as JSON; one that fits no frame lies in [`crate::container::DOCUMENT`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        document: Option<String>,
    },
    /// Start the container's program, once; the request's number is its stream. When it ends, so do all other programs in it.
    StartContainer {
        /// Which; the one that the VM is has no name.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        name: String,
    },
    /// Run another program in the container; the request's number is its stream.
    ExecContainer {
        /// Which.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        name: String,
        /// The program.
        process: Box<crate::container::Process>,
    },
    /// End the container if it has not ended, and forget it and its trees, which are gone by now. One that is not there is no error.
    RemoveContainer {
        /// Which.
        name: String,
    },
    /// The container's network is this from now on.
    SetNetwork(crate::container::Network),
    /// The answer to [`Control::Resolve`].
    Resolved {
        /// Which.
        query: u32,
        /// The DNS message, at most [`crate::container::MAX_QUERY`] bytes.
        message: Content,
    },
    /// Say something.
    Ping,
    /// What this version does not know.
    #[serde(other)]
    Unknown,
}

/// A folder of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Folder {
    /// Its name among the host's: one part of a path.
    pub name: String,
    /// Where it is to be seen, besides below the place of all.
    #[serde(default)]
    pub path: Option<String>,
    /// Whether it may only be read.
    #[serde(default)]
    pub read_only: bool,
}

/// How a request went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum Reply {
    /// Done.
    Done,
    /// The command runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// The file comes.
    File {
        /// Its size in bytes when it was opened.
        size: u64,
        /// Its permission bits.
        mode: u32,
    },
    /// How far the guest's setting up is.
    SetUp(SetUpReport),
    /// Not done.
    Failed(Problem),
}

/// Why a request was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Which kind.
    pub kind: ProblemKind,
    /// One line.
    pub message: String,
}

/// Kinds of problems.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// The agent does not know this request.
    Unsupported,
    /// The request makes no sense.
    Invalid,
    /// There is no such program, file, user or stream.
    NotFound,
    /// The program may not be run.
    Denied,
    /// Too much at once.
    Busy,
    /// The guest's system said no.
    Failed,
}

/// Whether a text can be a host's name: one label of RFC 1123, section 2.1.
pub fn is_label(text: &str) -> bool {
    let inside = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    (1..=63).contains(&text.len())
        && text.bytes().all(inside)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// Who and where the guest is.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Host name: a label of letters, digits and `-`.
    pub hostname: String,
    /// DNS domain.
    pub domain: String,
    /// MAC address of the NIC that gets the address, as `52:54:…`.
    pub mac: String,
    /// Address.
    pub address: Ipv4Addr,
    /// Length of the network's prefix in bits.
    pub prefix: u8,
    /// Default route.
    pub gateway: Ipv4Addr,
    /// MAC address of the gateway, which then is not asked for, or nothing.
    #[serde(default)]
    pub gateway_mac: String,
    /// Name server.
    pub dns: Ipv4Addr,
    /// machine-id(5).
    pub machine_id: String,
    /// SSH host keys.
    pub host_keys: Vec<HostKey>,
    /// Lines of `authorized_keys` of the user `catalyst`.
    pub authorized_keys: Vec<String>,
    /// The time now, in nanoseconds since 1970.
    pub unix_ns: u64,
    /// 32 random bytes for the kernel's generator, in hexadecimal digits.
    pub seed: String,
    /// Whether the guest's memory is a copy of another's, so that boot_id and Docker's id must change too.
    pub clone: bool,
}

// Keys and seed never reach a log.
impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("hostname", &self.hostname)
            .field("mac", &self.mac)
            .field("address", &self.address)
            .field("clone", &self.clone)
            .finish_non_exhaustive()
    }
}

/// One SSH host key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostKey {
    /// `ed25519`, `ecdsa` or `rsa`, as in `/etc/ssh/ssh_host_<kind>_key`.
    pub kind: String,
    /// OpenSSH private key file.
    pub private: String,
    /// OpenSSH public key line.
    pub public: String,
}

impl std::fmt::Debug for HostKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostKey").field("kind", &self.kind).finish_non_exhaustive()
    }
}

/// A command to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecSpec {
    /// Program, found in PATH, and arguments.
    pub argv: Vec<String>,
    /// Added to the environment.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Working directory; by default the user's home.
    #[serde(default)]
    pub cwd: Option<String>,
    /// User, by default root.
    #[serde(default)]
    pub user: Option<String>,
    /// Gives it a terminal.
    #[serde(default)]
    pub terminal: Option<Terminal>,
    /// Whether input will come; else its stdin is empty.
    #[serde(default)]
    pub stdin: bool,
    /// Ends it after this many milliseconds.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
}

/// A terminal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
    /// `TERM`, by default `xterm-256color`.
    #[serde(default)]
    pub term: Option<String>,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecExit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

/// A file to write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSpec {
    /// Absolute path; what stands there is replaced when the file is whole.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// User and group.
    #[serde(default)]
    pub owner: Option<(u32, u32)>,
    /// Bytes that will come.
    pub size: u64,
}

/// What comes after a shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShutdownKind {
    /// Nothing.
    PowerOff,
    /// The next boot.
    Reboot,
}

/// How the guest is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The identity is applied.
    pub identity: bool,
    /// sshd accepts connections.
    pub ssh: bool,
    /// dockerd answers.
    pub docker: bool,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_request_of_a_later_version_is_known_as_unknown() {
        let text = r#"{"type":"request","id":7,"request":{"do":"teleport","where":"mars"}}"#;
        let message: Control = serde_json::from_str(text).unwrap();
        assert_eq!(message, Control::Request { id: 7, request: Request::Unknown });
    }

    #[test]
    fn keys_and_seed_are_not_in_the_debug_text() {
        let key = HostKey { kind: "rsa".into(), private: "SECRET".into(), public: "p".into() };
        assert!(!format!("{key:?}").contains("SECRET"));
    }

    proptest! {
        #[test]
        fn exec_requests_come_back(
            id in 1_u32..,
            argv in proptest::collection::vec(any::<String>(), 1..5),
            user in proptest::option::of(any::<String>()),
            rows in any::<u16>(),
        ) {
            let terminal = Some(Terminal { rows, cols: 80, term: None });
            let spec = ExecSpec { argv, user, terminal, ..ExecSpec::default() };
            let message = Control::Request { id, request: Request::Exec(spec) };
            let text = serde_json::to_vec(&message).unwrap();
            prop_assert_eq!(serde_json::from_slice::<Control>(&text).unwrap(), message);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..500)) {
            let _ = serde_json::from_slice::<Control>(&bytes);
        }
    }
}
