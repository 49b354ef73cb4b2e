//! A small QMP client: the handful of commands and events that the engine needs, typed.
//!
//! Follows QEMU's docs/interop/qmp-spec. The process on the other side runs a guest that may
//! have broken out of its CPU, so what it sends is bounded like any hostile input: that, and
//! megabytes of generated types for a handful of commands, is why no general crate serves here.

use std::collections::HashMap;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Deserialize;
use serde_json::{Value, json};
use thiserror::Error;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex as AsyncMutex, Notify, oneshot, watch};

use super::super::{Layer, sockets};
use super::blocks::Blocks;

/// Longest line that is accepted, in bytes.
const MAX_LINE: u64 = 1024 * 1024;
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

/// How an incoming migration stands (`MigrationStatus` of qapi/migration.json), as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Incoming {
    Loading,
    Completed,
    Failed,
}

/// What the events said so far.
#[derive(Debug, Default)]
struct Told {
    shutdown: Option<Shutdown>,
    incoming: Option<Incoming>,
}

/// Who waits for an answer, by its number; `None` when none comes any more.
type Answers = Arc<Mutex<Option<Waiting>>>;
type Waiting = HashMap<u64, oneshot::Sender<Result<Value, QmpError>>>;

/// A QMP connection in command mode.
#[derive(Debug)]
pub struct Qmp {
    write: AsyncMutex<(OwnedWriteHalf, u64)>,
    answers: Answers,
    told: watch::Receiver<Told>,
    no_room: Arc<Notify>,
    blocks: Blocks,
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
        let answers: Answers = Arc::new(Mutex::new(Some(HashMap::new())));
        let (events, told) = watch::channel(Told::default());
        let no_room = Arc::new(Notify::new());
        let reader = tokio::spawn(read_all(read, Arc::clone(&answers), events, Arc::clone(&no_room)));
        let qmp = Self {
            write: AsyncMutex::new((write, 0)),
            answers,
            told,
            no_room,
            blocks: Blocks::default(),
            reader,
        };
        qmp.execute("qmp_capabilities", None).await?;
        Ok(qmp)
    }

    /// `stop`: the virtual CPUs stop.
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.execute("stop", None).await.map(drop)
    }

    /// `cont`: the virtual CPUs go on. QEMU gives up descriptors only while they run, so what is not needed any more goes now.
    pub async fn cont(&self) -> Result<(), QmpError> {
        self.execute("cont", None).await?;
        self.blocks.tidy(self).await;
        Ok(())
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

    /// `gpa2hva` of the human monitor: where a guest physical address lies in QEMU's own memory.
    pub async fn host_address(&self, guest_address: u64) -> Result<u64, QmpError> {
        let line = json!({ "command-line": format!("gpa2hva {guest_address:#x}") });
        let answer = self.execute("human-monitor-command", Some(line)).await?;
        let text = answer.as_str().unwrap_or_default();
        let address =
            text.trim_end().rsplit_once(" is 0x").and_then(|(_, hex)| u64::from_str_radix(hex, 16).ok());
        address.ok_or_else(|| {
            QmpError::Malformed(format!("gpa2hva: {}", text.chars().take(200).collect::<String>()))
        })
    }

    /// `query-memory-size-summary`: bytes of RAM.
    pub async fn memory_size(&self) -> Result<u64, QmpError> {
        let answer = self.execute("query-memory-size-summary", None).await?;
        let size = answer.get("base-memory").and_then(Value::as_u64);
        size.ok_or_else(|| QmpError::Malformed("query-memory-size-summary without base-memory".to_owned()))
    }

    /// `xen-save-devices-state`: writes processors and devices, all but memory, to a file. Made for Xen, which keeps
    /// guests' memory by itself, as we do. `set` is a number for the file while it lasts.
    pub async fn save_devices(&self, state: OwnedFd, set: u32) -> Result<(), QmpError> {
        self.execute_with("add-fd", Some(json!({ "fdset-id": set })), Some(state)).await?;
        let file = json!({ "filename": format!("/dev/fdset/{set}"), "live": false });
        let saved = self.execute("xen-save-devices-state", Some(file)).await;
        self.blocks.give_up_set(set.into());
        saved.map(drop)
    }

    /// What device `disk` writes goes from now on into the qcow2 `overlay`; `below`, if there is any, takes the place of what its file until
    /// now lies on.
    pub async fn switch_disk(&self, disk: &str, overlay: Layer, below: Vec<Layer>) -> Result<(), QmpError> {
        self.blocks.switch(self, disk, overlay, below).await
    }

    /// `migrate-incoming`: loads the state from an inherited descriptor into a QEMU that waits for it.
    pub async fn load(&self, state: RawFd) -> Result<(), QmpError> {
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        self.execute("migrate-set-capabilities", Some(events)).await?;
        let mut told = self.told.clone();
        self.execute("migrate-incoming", Some(json!({ "uri": format!("fd:{state}") }))).await?;
        let ended =
            told.wait_for(|told| matches!(told.incoming, Some(Incoming::Completed | Incoming::Failed)));
        let ended = tokio::time::timeout(ANSWER_TIMEOUT, ended).await.map_err(|_| QmpError::Timeout)?;
        match ended.map_err(|_| QmpError::Closed)?.incoming {
            Some(Incoming::Completed) => Ok(()),
            _ => Err(QmpError::Refused("the saved state does not load".to_owned())),
        }
    }

    /// The last `SHUTDOWN` event, if there was one.
    pub fn shutdown(&self) -> Option<Shutdown> {
        self.told.borrow().shutdown.clone()
    }

    /// Waits until QEMU has stopped the virtual CPUs since there was no room for what they wrote.
    pub async fn no_room(&self) {
        self.no_room.notified().await;
    }

    /// Waits until everything QEMU sent before it closed the connection was read.
    pub async fn drained(&self) {
        let mut told = self.told.clone();
        // An error says that the reader has ended, which is what is waited for.
        while told.changed().await.is_ok() {}
    }

    pub(super) async fn execute(&self, command: &str, arguments: Option<Value>) -> Result<Value, QmpError> {
        self.execute_with(command, arguments, None).await
    }

    /// The same with a descriptor for QEMU to keep.
    pub(super) async fn execute_with(
        &self,
        command: &str,
        arguments: Option<Value>,
        descriptor: Option<OwnedFd>,
    ) -> Result<Value, QmpError> {
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
            let waits = |all: &mut Waiting| all.insert(id, sender);
            lock(&self.answers).as_mut().map(waits).map_or(Err(QmpError::Closed), |_| Ok(()))?;
            let line = format!("{message}\r\n");
            match descriptor {
                None => write.write_all(line.as_bytes()).await?,
                Some(descriptor) => sockets::send_with(write.as_ref(), line.as_bytes(), &descriptor).await?,
            }
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
    events: watch::Sender<Told>,
    no_room: Arc<Notify>,
) {
    let why = loop {
        let message = match read_message(&mut read).await {
            Ok(Some(message)) => message,
            Ok(None) => break None,
            Err(error) => break Some(error),
        };
        let data = || message.get("data").cloned().unwrap_or_default();
        match message.get("event").and_then(Value::as_str) {
            Some("SHUTDOWN") => {
                let cause = serde_json::from_value(data()).ok();
                events.send_modify(|told| told.shutdown = cause);
            }
            Some("MIGRATION") => {
                let incoming = match data().get("status").and_then(Value::as_str) {
                    Some("completed") => Incoming::Completed,
                    Some("failed") => Incoming::Failed,
                    _ => Incoming::Loading,
                };
                events.send_modify(|told| told.incoming = Some(incoming));
            }
            Some("BLOCK_IO_ERROR") => {
                let data = data();
                if data["nospace"] == true && data["action"] == "stop" {
                    no_room.notify_one();
                }
            }
            _ => {}
        }
        let Some(id) = message.get("id").and_then(Value::as_u64) else { continue };
        let waiting = lock(&answers).as_mut().and_then(|all| all.remove(&id));
        let answer = match message.get("error").and_then(|error| error.get("desc")?.as_str()) {
            Some(description) => Err(QmpError::Refused(description.chars().take(500).collect())),
            None => Ok(message.get("return").cloned().unwrap_or_default()),
        };
        if let Some(sender) = waiting {
            // Whoever asked may have given up.
            let _ = sender.send(answer);
        }
    };
    // A connection that breaks is a process that has ended, which is seen by itself.
    if let Some(why) = why.filter(|why| !matches!(why, QmpError::Io(_))) {
        tracing::warn!(%why, "QEMU's answers are not read any more");
    }
    *lock(&answers) = None;
}

fn lock(answers: &Answers) -> MutexGuard<'_, Option<Waiting>> {
    answers.lock().unwrap_or_else(PoisonError::into_inner)
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
        answers.lock().unwrap().as_mut().unwrap().insert(7, sender);
        drop(receiver);
        qmp.told.clone().wait_for(|told| told.shutdown.is_some()).await.unwrap();
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
