//! Files to and from a guest.

use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use catalyst_api::words::AbsolutePath;
use catalyst_api::{ApiError, ErrorCode};
use futures_util::{StreamExt, TryStreamExt, stream};
use serde::Deserialize;
use tokio_util::io::StreamReader;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::super::App;
use super::super::error::Refusal;
use catalyst_agent_link::{AgentError, FileSpec, FileStream, ProblemKind};

const TAG: &str = "Guest";

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(get_file, put_file))
}

#[derive(Deserialize)]
struct FileQuery {
    path: String,
    mode: Option<String>,
}

/// Reads a file of the guest.
#[utoipa::path(get, path = "/v1/vms/{id}/files", tag = TAG,
    params(("id" = String, Path), ("path" = AbsolutePath, Query, description = "Absolute path in the guest")),
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 404, body = ApiError), (status = 409, body = ApiError), (status = 502, body = ApiError)))]
async fn get_file(
    State(app): State<App>,
    Path(id): Path<String>,
    Query(query): Query<FileQuery>,
) -> Result<Response, Refusal> {
    check_path(&query.path)?;
    let file = app.machines.agent(&id)?.get_file(query.path).await.map_err(|error| refusal(&error))?;
    let body = Body::from_stream(stream::try_unfold(file, next_piece));
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], body).into_response())
}

async fn next_piece(mut file: FileStream) -> Result<Option<(bytes::Bytes, FileStream)>, AgentError> {
    Ok(file.next().await?.map(|bytes| (bytes, file)))
}

/// Writes a file in the guest; it takes its place when it is whole. Needs `Content-Length`.
#[utoipa::path(put, path = "/v1/vms/{id}/files", tag = TAG,
    params(("id" = String, Path), ("path" = AbsolutePath, Query, description = "Absolute path in the guest"),
        ("mode" = Option<String>, Query, pattern = "^[0-7]{1,4}$", description = "Permission bits in octal, by default 0644")),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 204), (status = 400, body = ApiError), (status = 404, body = ApiError),
        (status = 409, body = ApiError), (status = 502, body = ApiError)))]
async fn put_file(
    State(app): State<App>,
    Path(id): Path<String>,
    Query(query): Query<FileQuery>,
    request: Request,
) -> Result<StatusCode, Refusal> {
    check_path(&query.path)?;
    if query.path.ends_with('/') {
        return Err(invalid("'path' is a folder's: give the file's own name"));
    }
    let mode = query.mode.as_deref().unwrap_or("0644");
    let mode = u32::from_str_radix(mode, 8).ok().filter(|mode| *mode <= 0o7777);
    let mode = mode.ok_or_else(|| invalid("'mode' is up to four octal digits, such as 0644"))?;
    let length =
        request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    let size: u64 = length.ok_or_else(|| invalid("The length of the file is needed: send Content-Length"))?;
    let spec = FileSpec { path: query.path, mode, owner: None, size };
    let bytes = request.into_body().into_data_stream().map(|piece| piece.map_err(std::io::Error::other));
    let reader = StreamReader::new(bytes.into_stream());
    app.machines.agent(&id)?.put_file(spec, reader).await.map_err(|error| refusal(&error))?;
    Ok(StatusCode::NO_CONTENT)
}

fn check_path(path: &str) -> Result<(), Refusal> {
    if path.starts_with('/') && !path.contains('\0') && path.len() <= 4096 {
        Ok(())
    } else {
        Err(invalid("'path' is an absolute path of at most 4096 bytes"))
    }
}

fn invalid(message: &str) -> Refusal {
    Refusal::new(ErrorCode::InvalidRequest, message)
}

fn refusal(error: &AgentError) -> Refusal {
    let code = match error {
        AgentError::Refused { kind: ProblemKind::NotFound, .. } => ErrorCode::PathNotFound,
        AgentError::Refused { kind: ProblemKind::Invalid, .. } => ErrorCode::InvalidRequest,
        _ => ErrorCode::GuestFailed,
    };
    Refusal::new(code, super::super::error::chain(error).join(": "))
}
