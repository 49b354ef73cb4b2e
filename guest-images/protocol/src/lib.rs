//! What host and guest agent say to each other over the port `org.catalyst.agent.0`.
//!
//! Two layers, neither of which does I/O: [`frame`] cuts a byte stream that may begin in the
//! middle of something into checked frames; [`message`] gives the frames their meaning. The
//! whole is described in docs/AGENT-PROTOCOL.md; [`VERSION`] counts its incompatible changes.
//!
//! # Epochs
//! A port has no notion of a connection: bytes of an earlier daemon may still wait in it. So the
//! host chooses a random epoch each time it opens the port and says [`message::Control::Hello`];
//! the guest drops what belonged to the epoch before and answers with the same epoch. Each side
//! drops frames of any other epoch than the last that was greeted.
//!
//! # Credits
//! A stream's receiver grants its sender bytes: [`INITIAL_CREDIT`] at first, more as they are
//! consumed. A sender without credit waits; the other streams go on.

pub mod container;
pub mod frame;
pub mod line;
pub mod message;
pub mod set_up;

pub use container::Container;
pub use frame::{Channel, Decoder, Frame, FrameError, HEADER, MAX_PAYLOAD, encode};
pub use line::{Line, LineControl};
pub use message::{
    Control, ExecExit, ExecSpec, FileSpec, Folder, HostKey, Identity, Problem, ProblemKind, Reply, Request,
    ShutdownKind, Status, StreamChannel, Terminal, is_label,
};
pub use set_up::{Content, SetUp, SetUpReport, SetUpState};

/// Version of the protocol. Sides of different versions say so and part.
pub const VERSION: u32 = 1;

/// Name of the virtio-serial port (virtio 1.2 section 5.3.6.2, `VIRTIO_CONSOLE_PORT_NAME`).
pub const PORT_NAME: &str = "org.catalyst.agent.0";

/// Name of the port by which the guest reaches folders of the host: a [`Line`] that carries FUSE messages.
pub const FOLDERS_PORT_NAME: &str = "org.catalyst.folders.0";

/// Name of the port by which the runtime of a container speaks with the agent: the same protocol as on [`PORT_NAME`], by another host.
pub const CONTAINER_PORT_NAME: &str = "org.catalyst.container.0";

/// Bytes a sender may have on the way on each channel of a new stream.
pub const INITIAL_CREDIT: u32 = 256 * 1024;

/// Streams that may be open at once.
pub const MAX_STREAMS: usize = 256;

/// Bytes in lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
