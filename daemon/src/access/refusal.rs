//! The answer to those who are not served: status 403 and `{"code":403,"message":…}`, on one line.

use std::error::Error;
use std::io;

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// What a refused client may still send before its connection is dropped, in bytes.
const LAST_WORDS: u64 = 64 << 10;

/// The answer to one request.
pub(super) fn response(reason: &dyn Error) -> Response {
    let code = StatusCode::FORBIDDEN;
    (code, Json(json!({ "code": code.as_u16(), "message": message(reason) }))).into_response()
}

/// Gives the same answer to a whole connection, without reading its requests.
pub(super) async fn refuse<S>(mut stream: S, reason: &(dyn Error + Sync)) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let body = json!({ "code": StatusCode::FORBIDDEN.as_u16(), "message": message(reason) }).to_string();
    let answer = format!(
        "HTTP/1.1 403 Forbidden\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         connection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await?;
    // To close with unread bytes would reset the connection and might take the answer with it.
    tokio::io::copy(&mut stream.take(LAST_WORDS), &mut tokio::io::sink()).await?;
    Ok(())
}

/// The reason and its causes.
fn message(reason: &dyn Error) -> String {
    let mut text = reason.to_string();
    let mut cause = reason.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
