//! Commands in the guest.
//!
//! `POST /v1/vms/{id}/exec` runs one and answers when it has ended ([`ExecRequest`] to
//! [`ExecOutput`]). `GET /v1/vms/{id}/exec/stream` is a WebSocket: the client's first
//! message is a text frame with an [`ExecRequest`]; after that, binary frames of the client
//! are stdin, binary frames of the daemon are a channel byte (1 stdout, 2 stderr) and data,
//! and text frames either way are [`ExecFrame`]s.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::words::{Variable, Word};

/// Channel byte of stdout in a binary frame of the daemon.
pub const CHANNEL_STDOUT: u8 = 1;
/// Channel byte of stderr in a binary frame of the daemon.
pub const CHANNEL_STDERR: u8 = 2;

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TerminalSize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// A command to run in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// Program and arguments; no shell is involved. 1 to 1024 words.
    #[schema(value_type = Vec<Word>, min_items = 1, max_items = 1024)]
    pub argv: Vec<String>,
    /// User in the guest; by default root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Word>)]
    pub user: Option<String>,
    /// Working directory; by default the user's home.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Word>)]
    pub cwd: Option<String>,
    /// Added to the environment, as `NAME=value`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<Variable>)]
    pub env: Vec<String>,
    /// Gives the command a terminal of this size (streams only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<TerminalSize>,
    /// Text for its standard input (`POST` only; a stream sends binary frames).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// Whether the stream will send standard input; else it is empty.
    #[serde(default)]
    pub attach_stdin: bool,
    /// Ends the command after this many seconds (`POST`: by default 60).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u32>,
}

/// What a command left, for `POST`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExecOutput {
    /// Exit code; 128 plus the signal's number if a signal ended it.
    pub exit_code: i32,
    /// Standard output, at most 1 MiB, invalid UTF-8 replaced.
    pub stdout: String,
    /// Standard error, likewise.
    pub stderr: String,
    /// Whether either was cut.
    pub truncated: bool,
}

/// Text frames of the exec stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ExecFrame {
    /// Client: standard input ends here.
    StdinEnd,
    /// Client: the terminal has a new size.
    Resize(TerminalSize),
    /// Client: send this signal (number).
    Signal {
        /// Signal number, 1 to 64.
        signal: i32,
    },
    /// Daemon: the command has ended; the last frame.
    Exit {
        /// Exit code; 128 plus the signal's number if a signal ended it.
        code: i32,
    },
    /// Daemon: it could not be run, or the guest was lost; the last frame.
    Error(crate::ApiError),
}
