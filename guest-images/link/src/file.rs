//! Files to and from the guest.

use bytes::Bytes;
use catalyst_agent_protocol::{FileSpec, Reply, Request, StreamChannel};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;

use crate::exec::{GRANT_AT, PIECE, send_with_credit};
use crate::link::accept;
use crate::streams::Arrival;
use crate::{AgentError, AgentLink};

/// A file that comes from the guest; dropped, it stops coming.
#[derive(Debug)]
pub struct FileStream {
    /// Its size in bytes when it was opened. The guest says so.
    pub size: u64,
    /// Its permission bits.
    pub mode: u32,
    link: AgentLink,
    stream: u32,
    arrivals: mpsc::UnboundedReceiver<Arrival>,
    consumed: u32,
}

impl AgentLink {
    /// Writes a file of `spec.size` bytes in the guest; it takes its place when it is whole.
    pub async fn put_file(&self, spec: FileSpec, mut from: impl AsyncRead + Unpin) -> Result<(), AgentError> {
        let mut left = spec.size;
        let (mut reply, end) = self.open_upload(Request::PutFile(spec)).await?;
        let guard = Closing { link: self, stream: end.id };
        let mut buffer = vec![0_u8; PIECE];
        while left > 0 {
            let wanted = PIECE.min(usize::try_from(left).unwrap_or(PIECE));
            let length = from.read(&mut buffer[..wanted]).await?;
            if length == 0 {
                return Err(AgentError::Gone("the file ended before its size was reached".to_owned()));
            }
            tokio::select! {
                biased;
                // An answer before the end is a refusal.
                early = &mut reply => return answer(early),
                sent = send_with_credit(self, guard.stream, &end.input, &buffer[..length]) => sent?,
            }
            left -= length as u64;
        }
        self.send_data(guard.stream, &[]).await?;
        answer(reply.await)
    }

    /// Reads a file of the guest.
    pub async fn get_file(&self, path: String) -> Result<FileStream, AgentError> {
        let (reply, end) = self.open(Request::GetFile { path }).await?;
        let Reply::File { size, mode } = reply else {
            self.close(end.id);
            return Err(AgentError::Unexpected);
        };
        let link = self.clone();
        Ok(FileStream { size, mode, link, stream: end.id, arrivals: end.arrivals, consumed: 0 })
    }
}

fn answer(reply: Result<Reply, tokio::sync::oneshot::error::RecvError>) -> Result<(), AgentError> {
    match reply.map(accept) {
        Ok(Ok(Reply::Done)) => Ok(()),
        Ok(Ok(_)) => Err(AgentError::Unexpected),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(AgentError::Gone("it ended or started anew".to_owned())),
    }
}

struct Closing<'a> {
    link: &'a AgentLink,
    stream: u32,
}

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.link.close(self.stream);
    }
}

impl FileStream {
    /// The next bytes; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, AgentError> {
        match self.arrivals.recv().await {
            Some(Arrival::Output(bytes)) => {
                self.consumed += u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                if self.consumed >= GRANT_AT {
                    let consumed = std::mem::take(&mut self.consumed);
                    self.link.grant(self.stream, StreamChannel::Output, consumed);
                }
                Ok(Some(bytes))
            }
            Some(Arrival::OutputEnd) => Ok(None),
            Some(Arrival::Lost(why)) => Err(AgentError::Gone(why)),
            Some(Arrival::Errors(_) | Arrival::Exited(_)) => Err(AgentError::Unexpected),
            None => Err(AgentError::Gone("the stream has ended".to_owned())),
        }
    }
}

impl Drop for FileStream {
    fn drop(&mut self) {
        self.link.close(self.stream);
    }
}
