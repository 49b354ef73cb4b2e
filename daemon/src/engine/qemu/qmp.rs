//! A small QMP client: the handful of commands and events that the engine needs, typed.
//!
//! Follows QEMU's docs/interop/qmp-spec. The process on the other side runs a guest that may
//! have broken out of its CPU, so what it sends is bounded like any hostile input: that, and
//! megabytes of generated types for a handful of commands, is why no general crate serves here.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;
use serde_json::{Value, json};
use thiserror::Error;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex as AsyncMutex, oneshot, watch};

/// Longest line that is accepted, in bytes.
const MAX_LINE: u64 = 256 * 1024;
/// An answer that takes longer than this will not come.
const ANSWER_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// Why a command had no effect.
#[derive(Debug, Error)]
pub enum QmpError {
    /// The connection failed.
    #[error("the control connection failed")]
    Io(#[from] io::Error),
    /// The connection is gone.
    #[error("the control connection is closed")]
    Closed,
    /// No answer in time.
    #[error("no answer within {} s", ANSWER_TIMEOUT.as_secs())]
    Timeout,
    /// QEMU says no.
    #[error("{0}")]
    Refused(String),
    /// What came is not QMP.
    #[error("an answer that is not QMP: {0}")]
    Malformed(String),
}

/// Why the guest or QEMU stopped (`ShutdownCause` of qapi/run-state.json).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Shutdown {
    /// Whether the guest asked for it.
    pub guest: bool,
    /// QEMU's word for it, e.g. `guest-shutdown`.
    #[serde(default)]
    pub reason: String,
}

type Answers = Arc<Mutex<HashMap<u64, oneshot::Sender<Result<Value, QmpError>>>>>;

/// A QMP connection in command mode.
#[derive(Debug)]
pub struct Qmp {
    write: AsyncMutex<(OwnedWriteHalf, u64)>,
    answers: Answers,
    shutdown: watch::Receiver<Option<Shutdown>>,
    reader: tokio::task::JoinHandle<()>,
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

#[derive(Deserialize)]
struct Status {
    running: bool,
}

impl Qmp {
    /// Reads the greeting and leaves negotiation mode.
    pub async fn connect(stream: UnixStream) -> Result<Self, QmpError> {
        let (read, write) = stream.into_split();
        let mut read = BufReader::new(read);
        let greeting = tokio::time::timeout(ANSWER_TIMEOUT, read_message(&mut read))
            .await
            .map_err(|_| QmpError::Timeout)??
            .ok_or(QmpError::Closed)?;
        if greeting.get("QMP").is_none() {
            return Err(QmpError::Malformed("no greeting".to_owned()));
        }
        let answers = Answers::default();
        let (events, shutdown) = watch::channel(None);
        let reader = tokio::spawn(read_all(read, Arc::clone(&answers), events));
        let qmp = Self { write: AsyncMutex::new((write, 0)), answers, shutdown, reader };
        qmp.execute("qmp_capabilities", None).await?;
        Ok(qmp)
    }

    /// `stop`: the virtual CPUs stop.
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.execute("stop", None).await.map(drop)
    }

    /// `cont`: the virtual CPUs go on.
    pub async fn cont(&self) -> Result<(), QmpError> {
        self.execute("cont", None).await.map(drop)
    }

    /// `system_powerdown`: presses the power button.
    pub async fn system_powerdown(&self) -> Result<(), QmpError> {
        self.execute("system_powerdown", None).await.map(drop)
    }

    /// `query-status`: whether the virtual CPUs run.
    pub async fn is_running(&self) -> Result<bool, QmpError> {
        let answer = self.execute("query-status", None).await?;
        let status: Status =
            serde_json::from_value(answer).map_err(|e| QmpError::Malformed(e.to_string()))?;
        Ok(status.running)
    }

    /// The last `SHUTDOWN` event, if there was one.
    pub fn shutdown(&self) -> Option<Shutdown> {
        self.shutdown.borrow().clone()
    }

    /// Waits until everything QEMU sent before it closed the connection was read.
    pub async fn drained(&self) {
        let mut shutdown = self.shutdown.clone();
        // An error says that the reader has ended, which is what is waited for.
        while shutdown.changed().await.is_ok() {}
    }

    async fn execute(&self, command: &str, arguments: Option<Value>) -> Result<Value, QmpError> {
        let (sender, receiver) = oneshot::channel();
        {
            let mut guard = self.write.lock().await;
            let (write, last) = &mut *guard;
            *last += 1;
            let id = *last;
            let mut message = json!({ "execute": command, "id": id });
            if let Some(arguments) = arguments {
                message["arguments"] = arguments;
            }
            self.answers.lock().unwrap_or_else(PoisonError::into_inner).insert(id, sender);
            write.write_all(format!("{message}\r\n").as_bytes()).await?;
        }
        match tokio::time::timeout(ANSWER_TIMEOUT, receiver).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(QmpError::Closed),
            Err(_) => Err(QmpError::Timeout),
        }
    }
}

async fn read_message<R: AsyncBufRead + Unpin>(read: &mut R) -> Result<Option<Value>, QmpError> {
    let mut line = Vec::new();
    let length = read.take(MAX_LINE).read_until(b'\n', &mut line).await?;
    if length == 0 {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        return Err(QmpError::Malformed(format!("a line of {length} bytes or more, or cut short")));
    }
    serde_json::from_slice(&line).map(Some).map_err(|error| QmpError::Malformed(error.to_string()))
}

async fn read_all(
    mut read: BufReader<OwnedReadHalf>,
    answers: Answers,
    events: watch::Sender<Option<Shutdown>>,
) {
    while let Ok(Some(message)) = read_message(&mut read).await {
        if message.get("event").and_then(Value::as_str) == Some("SHUTDOWN") {
            let cause = message.get("data").cloned().unwrap_or_default();
            events.send_replace(serde_json::from_value(cause).ok());
        }
        let Some(id) = message.get("id").and_then(Value::as_u64) else { continue };
        let waiting = answers.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        let answer = match message.get("error").and_then(|error| error.get("desc")?.as_str()) {
            Some(description) => Err(QmpError::Refused(description.chars().take(500).collect())),
            None => Ok(message.get("return").cloned().unwrap_or_default()),
        };
        if let Some(sender) = waiting {
            // Whoever asked may have given up.
            let _ = sender.send(answer);
        }
    }
    answers.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn with_server(lines: &'static [&'static str]) -> Result<Qmp, QmpError> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        tokio::spawn(async move {
            for line in lines {
                theirs.write_all(line.as_bytes()).await.unwrap();
            }
            let mut rest = Vec::new();
            let _ = theirs.read_to_end(&mut rest).await;
        });
        Qmp::connect(ours).await
    }

    #[tokio::test]
    async fn a_refusal_carries_the_words_of_qemu() {
        let qmp = with_server(&[
            "{\"QMP\":{}}\n",
            "{\"return\":{},\"id\":1}\n",
            "{\"event\":\"SHUTDOWN\",\"data\":{\"guest\":true,\"reason\":\"guest-shutdown\"}}\n",
        ])
        .await
        .unwrap();
        let answers = Arc::clone(&qmp.answers);
        let (sender, receiver) = oneshot::channel();
        answers.lock().unwrap().insert(7, sender);
        drop(receiver);
        let mut shutdown = qmp.shutdown.clone();
        if shutdown.borrow_and_update().is_none() {
            shutdown.changed().await.unwrap();
        }
        assert_eq!(qmp.shutdown().unwrap().reason, "guest-shutdown");
    }

    #[tokio::test]
    async fn what_is_no_qmp_is_an_error() {
        assert!(matches!(with_server(&["hello\n"]).await, Err(QmpError::Malformed(_))));
        assert!(matches!(with_server(&["{}\n"]).await, Err(QmpError::Malformed(_))));
    }

    #[tokio::test]
    async fn an_endless_line_is_refused_at_the_bound() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        tokio::spawn(async move { while theirs.write_all(&[b'x'; 4096]).await.is_ok() {} });
        assert!(matches!(Qmp::connect(ours).await, Err(QmpError::Malformed(_))));
    }
}
