//! Inside a VM: address, login, commands.

use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, State};
use axum::response::Response;
use catalyst_api::exec::{CHANNEL_STDERR, CHANNEL_STDOUT};
use catalyst_api::{Address, ApiError, ErrorCode, ExecFrame, ExecOutput, ExecRequest, SshInfo};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::super::App;
use super::super::body::JsonBody;
use super::super::error::Refusal;
use catalyst_agent_link::{ExecEvent, ExecExit, ExecSession, ExecSpec, ExecStdin, Terminal};

const TAG: &str = "Guest";
/// What a buffered command may write on each of stdout and stderr, in bytes.
const MAX_OUTPUT: usize = 1 << 20;
/// How long a buffered command may take where nothing is said.
const DEFAULT_TIMEOUT_S: u32 = 60;
/// How long a client of the stream may take to say what to run.
const FIRST_FRAME: Duration = Duration::from_secs(10);

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(address))
        .routes(routes!(ssh))
        .routes(routes!(exec))
        .routes(routes!(stream))
}

/// The guest's address, once it holds it.
#[utoipa::path(get, path = "/v1/vms/{id}/address", tag = TAG, params(("id" = String, Path)),
    responses((status = 200, body = Address), (status = 404, body = ApiError), (status = 409, body = ApiError)))]
async fn address(State(app): State<App>, Path(id): Path<String>) -> Result<Json<Address>, Refusal> {
    let address = app.machines.address(&id).await?.to_string();
    Ok(Json(Address { address }))
}

/// What a client needs for `ssh`, once sshd answers.
#[utoipa::path(get, path = "/v1/vms/{id}/ssh", tag = TAG, params(("id" = String, Path)),
    responses((status = 200, body = SshInfo), (status = 404, body = ApiError), (status = 409, body = ApiError)))]
async fn ssh(State(app): State<App>, Path(id): Path<String>) -> Result<Json<SshInfo>, Refusal> {
    Ok(Json(app.machines.ssh(&id).await?))
}

/// Runs a command and answers when it has ended.
#[utoipa::path(post, path = "/v1/vms/{id}/exec", tag = TAG, params(("id" = String, Path)),
    request_body = ExecRequest,
    responses((status = 200, body = ExecOutput), (status = 404, body = ApiError), (status = 409, body = ApiError),
        (status = 502, body = ApiError), (status = 504, body = ApiError)))]
async fn exec(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(request): JsonBody<ExecRequest>,
) -> Result<Json<ExecOutput>, Refusal> {
    if request.terminal.is_some() {
        let message = "A terminal needs the stream: /v1/vms/{id}/exec/stream";
        return Err(Refusal::new(ErrorCode::InvalidRequest, message));
    }
    let limit = Duration::from_secs(request.timeout_s.unwrap_or(DEFAULT_TIMEOUT_S).into());
    let stdin = request.stdin.clone();
    let command = agent_request(request, stdin.is_some())?;
    let session = app.machines.exec(&id, command).await?;
    match tokio::time::timeout(limit, collect(session, stdin)).await {
        Ok(output) => output.map(Json),
        Err(_) => Err(Refusal::new(
            ErrorCode::GuestTimeout,
            format!("The command did not end within {} s and was ended", limit.as_secs()),
        )),
    }
}

fn agent_request(request: ExecRequest, stdin: bool) -> Result<ExecSpec, Refusal> {
    let invalid = |message: &str| Refusal::new(ErrorCode::InvalidRequest, message);
    if request.argv.is_empty() || request.argv.len() > 1024 || request.argv[0].is_empty() {
        return Err(invalid("'argv' is the program and its arguments: 1 to 1024 words, the first not empty"));
    }
    let texts = request.argv.iter().chain(&request.env).chain(&request.user).chain(&request.cwd);
    let mut length = 0;
    for text in texts {
        if text.contains('\0') {
            return Err(invalid("Words, environment, user and folder cannot hold a NUL character"));
        }
        length += text.len();
    }
    if length > 32 * 1024 {
        return Err(invalid("Words and environment are longer than 32 KiB; send the data on stdin"));
    }
    let env = request
        .env
        .into_iter()
        .map(|pair| pair.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned())))
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| invalid("'env' holds NAME=value"))?;
    Ok(ExecSpec {
        argv: request.argv,
        env,
        cwd: request.cwd,
        user: request.user,
        terminal: request.terminal.map(|size| Terminal { rows: size.rows, cols: size.cols, term: None }),
        stdin,
        timeout_ms: request.timeout_s.map(|seconds| u64::from(seconds) * 1000),
    })
}

async fn collect(session: ExecSession, stdin: Option<String>) -> Result<ExecOutput, Refusal> {
    let (sink, _control, mut events) = session.split();
    let feeder = tokio::spawn(feed(sink, stdin));
    let (mut stdout, mut stderr, mut truncated) = (Vec::new(), Vec::new(), false);
    let exit = loop {
        let (kept, bytes) = match events.next().await {
            Some(ExecEvent::Stdout(bytes)) => (&mut stdout, bytes),
            Some(ExecEvent::Stderr(bytes)) => (&mut stderr, bytes),
            Some(ExecEvent::Exit(status)) => break status,
            Some(ExecEvent::Lost(why)) => return Err(lost(&why)),
            None => return Err(lost("the agent ended the command without a word")),
        };
        let room = MAX_OUTPUT.saturating_sub(kept.len()).min(bytes.len());
        kept.extend_from_slice(&bytes[..room]);
        truncated |= room < bytes.len();
    };
    feeder.abort();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok(ExecOutput { exit_code: exit_code(exit), stdout: text(stdout), stderr: text(stderr), truncated })
}

async fn feed(mut sink: ExecStdin, stdin: Option<String>) {
    if let Some(text) = stdin {
        // A command that does not read its input has its reasons.
        let _ = sink.write(Bytes::from(text)).await;
    }
    let _ = sink.close().await;
}

fn lost(why: &str) -> Refusal {
    Refusal::new(ErrorCode::GuestFailed, format!("The command was lost: {why}"))
}

/// As shells tell it: 128 and the signal's number.
fn exit_code(status: ExecExit) -> i32 {
    match status {
        ExecExit::Code(code) => code,
        ExecExit::Signal(signal) => 128 + signal,
    }
}

/// Runs a command with its input and output as a stream (see the types' description).
#[utoipa::path(get, path = "/v1/vms/{id}/exec/stream", tag = TAG, params(("id" = String, Path)),
    responses((status = 101, description = "WebSocket"), (status = 404, body = ApiError),
        (status = 409, body = ApiError)))]
async fn stream(
    State(app): State<App>,
    Path(id): Path<String>,
    upgrade: WebSocketUpgrade,
) -> Result<Response, Refusal> {
    // Refused before the upgrade, where a client sees the reason best.
    app.machines.agent(&id)?;
    Ok(upgrade.on_upgrade(move |mut socket| async move {
        if let Err(refusal) = serve(&app, &id, &mut socket).await {
            let _ = send(&mut socket, &ExecFrame::Error(refusal.0)).await;
        }
    }))
}

async fn serve(app: &App, id: &str, socket: &mut WebSocket) -> Result<(), Refusal> {
    let first = tokio::time::timeout(FIRST_FRAME, socket.recv()).await;
    let Ok(Some(Ok(Message::Text(text)))) = first else {
        return Err(Refusal::new(ErrorCode::InvalidRequest, "The first frame is the command, as text"));
    };
    let request: ExecRequest = serde_json::from_str(&text).map_err(|error| {
        Refusal::new(ErrorCode::InvalidRequest, format!("The first frame is not a command: {error}"))
    })?;
    let stdin = request.attach_stdin || request.terminal.is_some();
    let session = app.machines.exec(id, agent_request(request, stdin)?).await?;
    relay(session, socket).await
}

async fn relay(session: ExecSession, socket: &mut WebSocket) -> Result<(), Refusal> {
    let (sink, control, mut events) = session.split();
    // Input goes through a task of its own: a command that does not read it must not hold up output.
    let (input, mut queue) = tokio::sync::mpsc::channel::<Bytes>(8);
    let feeder = tokio::spawn(async move {
        let mut sink = sink;
        while let Some(bytes) = queue.recv().await {
            if sink.write(bytes).await.is_err() {
                return;
            }
        }
        let _ = sink.close().await;
    });
    let mut input = Some(input);
    let result = loop {
        // While the command's input is full, nothing is read of the client, but output goes on.
        let ready = input.as_ref().is_none_or(|input| input.capacity() > 0);
        tokio::select! {
            event = events.next() => match event {
                Some(ExecEvent::Stdout(bytes)) => if output(socket, CHANNEL_STDOUT, &bytes).await.is_err() { break Ok(()) },
                Some(ExecEvent::Stderr(bytes)) => if output(socket, CHANNEL_STDERR, &bytes).await.is_err() { break Ok(()) },
                Some(ExecEvent::Exit(status)) => {
                    let _ = send(socket, &ExecFrame::Exit { code: exit_code(status) }).await;
                    break Ok(());
                }
                Some(ExecEvent::Lost(why)) => break Err(lost(&why)),
                None => break Err(lost("the agent ended the command without a word")),
            },
            message = socket.recv(), if ready => match message {
                Some(Ok(Message::Binary(bytes))) => if let Some(input) = &input {
                    // There was room; if the feeder has ended, the command does not read.
                    let _ = input.try_send(bytes);
                },
                Some(Ok(Message::Text(text))) => match serde_json::from_str(&text) {
                    Ok(ExecFrame::StdinEnd) => input = None,
                    Ok(ExecFrame::Resize(size)) => drop(control.resize(size.rows, size.cols).await),
                    Ok(ExecFrame::Signal { signal }) => drop(control.signal(signal).await),
                    _ => break Err(Refusal::new(ErrorCode::InvalidRequest, "A text frame that is not known")),
                },
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                // The client is gone: so is the command, when the session is dropped.
                Some(Ok(Message::Close(_)) | Err(_)) | None => break Ok(()),
            },
            () = room(input.as_ref()), if !ready => {}
        }
    };
    feeder.abort();
    result
}

/// Waits until the input's queue has room again.
async fn room(input: Option<&tokio::sync::mpsc::Sender<Bytes>>) {
    if let Some(input) = input {
        // An error says that the feeder has ended; then there is nothing to wait for.
        drop(input.reserve().await);
    }
}

async fn output(socket: &mut WebSocket, channel: u8, bytes: &[u8]) -> Result<(), axum::Error> {
    let mut frame = Vec::with_capacity(bytes.len() + 1);
    frame.push(channel);
    frame.extend_from_slice(bytes);
    socket.send(Message::Binary(frame.into())).await
}

async fn send(socket: &mut WebSocket, frame: &ExecFrame) -> Result<(), axum::Error> {
    let text = serde_json::to_string(frame).map_err(axum::Error::new)?;
    socket.send(Message::Text(text.into())).await
}
