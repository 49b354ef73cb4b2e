//! What a VM wrote: its console and its process; and the console live.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use catalyst_api::ApiError;
use futures_util::stream;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::super::App;
use super::super::error::Refusal;
use crate::engine::sockets;
use crate::machines::error::GuestError;
use crate::store::logs;

/// What is sent of a log at once, in bytes.
const CHUNK: u64 = 64 * 1024;
/// How often a log that is followed is looked at. A guest writes byte by byte: to be told of
/// each write would cost more than this.
const FOLLOW: Duration = Duration::from_millis(200);

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(console)).routes(routes!(log)).routes(routes!(attach))
}

#[derive(Deserialize)]
struct LogQuery {
    #[serde(default)]
    follow: bool,
    /// Only so many bytes of its end, and what follows.
    tail: Option<u64>,
}

/// What the guest wrote to its serial console.
#[utoipa::path(get, path = "/v1/vms/{id}/console", tag = "Guest",
    params(("id" = String, Path), ("follow" = Option<bool>, Query, description = "Go on with what comes"),
        ("tail" = Option<u64>, Query, maximum = 9_007_199_254_740_991_i64, description = "Begin so many bytes before its end")),
    responses((status = 200, body = String, content_type = "text/plain"), (status = 404, body = ApiError)))]
async fn console(
    State(app): State<App>,
    Path(id): Path<String>,
    Query(query): Query<LogQuery>,
) -> Result<Response, Refusal> {
    let path = app.machines.get(&id)?.dir().console_log();
    Ok(text(path, &query))
}

/// What the VM process wrote.
#[utoipa::path(get, path = "/v1/vms/{id}/log", tag = "VMs",
    params(("id" = String, Path), ("follow" = Option<bool>, Query, description = "Go on with what comes"),
        ("tail" = Option<u64>, Query, maximum = 9_007_199_254_740_991_i64, description = "Begin so many bytes before its end")),
    responses((status = 200, body = String, content_type = "text/plain"), (status = 404, body = ApiError)))]
async fn log(
    State(app): State<App>,
    Path(id): Path<String>,
    Query(query): Query<LogQuery>,
) -> Result<Response, Refusal> {
    let path = app.machines.get(&id)?.dir().engine_log();
    Ok(text(path, &query))
}

struct Follower {
    path: PathBuf,
    at: u64,
    follow: bool,
}

fn text(path: PathBuf, query: &LogQuery) -> Response {
    let length =
        query.tail.and_then(|_| std::fs::symlink_metadata(&path).ok()).map_or(0, |found| found.len());
    let at = length.saturating_sub(query.tail.unwrap_or(length));
    let start = Follower { path, at, follow: query.follow };
    let body = Body::from_stream(stream::try_unfold(start, next_chunk));
    ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], body).into_response()
}

async fn next_chunk(mut from: Follower) -> io::Result<Option<(Bytes, Follower)>> {
    loop {
        let (path, at) = (from.path.clone(), from.at);
        let read = tokio::task::spawn_blocking(move || read_chunk(&path, at)).await;
        let (bytes, at) = read.map_err(io::Error::other)??;
        from.at = at;
        if !bytes.is_empty() {
            return Ok(Some((bytes.into(), from)));
        }
        if !from.follow {
            return Ok(None);
        }
        tokio::time::sleep(FOLLOW).await;
    }
}

/// The next bytes after `at` and where they end; a log that was cut is read from its start.
fn read_chunk(path: &std::path::Path, at: u64) -> io::Result<(Vec<u8>, u64)> {
    let mut log = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), 0)),
        opened => opened?,
    };
    let length = log.metadata()?.len();
    let start = if length < at { 0 } else { at };
    let end = length.min(start + CHUNK);
    let bytes = logs::read_from(&mut log, start, end)?;
    let at = start + bytes.len() as u64;
    Ok((bytes, at))
}

/// The console live: a WebSocket of binary frames both ways. One client at a time.
#[utoipa::path(get, path = "/v1/vms/{id}/console/attach", tag = "Guest", params(("id" = String, Path)),
    responses((status = 101, description = "WebSocket"), (status = 404, body = ApiError),
        (status = 409, body = ApiError)))]
async fn attach(
    State(app): State<App>,
    Path(id): Path<String>,
    upgrade: WebSocketUpgrade,
) -> Result<Response, Refusal> {
    let vm = app.machines.get(&id)?;
    let id = vm.dir().id().clone();
    let state = vm.state();
    if !state.has_process() {
        return Err(GuestError::State { id, state }.into());
    }
    let claim = vm.claim_console().ok_or_else(|| GuestError::ConsoleBusy(id.clone()))?;
    let console = sockets::connect(&vm.dir().run(), sockets::CONSOLE)
        .await
        .map_err(|source| GuestError::Io { what: "open the console", id, source })?;
    Ok(upgrade.on_upgrade(async move |socket| {
        relay(socket, console).await;
        drop(claim);
    }))
}

async fn relay(mut socket: WebSocket, mut console: UnixStream) {
    let mut buffer = vec![0_u8; 4096];
    loop {
        tokio::select! {
            read = console.read(&mut buffer) => {
                let Ok(length @ 1..) = read else { return };
                let frame = Message::Binary(Bytes::copy_from_slice(&buffer[..length]));
                if socket.send(frame).await.is_err() {
                    return;
                }
            }
            message = socket.recv() => match message {
                Some(Ok(Message::Binary(bytes))) => if console.write_all(&bytes).await.is_err() { return },
                Some(Ok(Message::Text(text))) => if console.write_all(text.as_bytes()).await.is_err() { return },
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
            },
        }
    }
}
