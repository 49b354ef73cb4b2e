//! Layers that give every answer its API's form, and every request a line in the log.

use std::time::Instant;

use axum::Json;
use axum::body::to_bytes;
use axum::extract::Request;
use axum::http::{StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use catalyst_api::ErrorCode;
use tracing::Instrument;

use super::error::{LegacyRefusal, Refusal};

/// Longest text that is taken from an answer that is not JSON.
const MAX_TEXT: usize = 4096;

/// Logs each request under an id of its own, which whatever it causes carries too.
pub async fn log(request: Request, next: Next) -> Response {
    let id = uuid::Uuid::new_v4().simple().to_string();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let span = tracing::info_span!("request", id = &id[..8]);
    let started = Instant::now();
    async move {
        let response = next.run(request).await;
        let (status, us) = (response.status().as_u16(), started.elapsed().as_micros());
        if response.status().is_server_error() {
            tracing::warn!(%method, path, status, us);
        } else {
            tracing::debug!(%method, path, status, us);
        }
        response
    }
    .instrument(span)
    .await
}

/// What no route takes.
pub async fn no_such_path(uri: Uri) -> Response {
    let path: String = uri.path().chars().take(200).collect();
    if path.starts_with("/api") {
        LegacyRefusal::new(StatusCode::NOT_FOUND, format!("There is no path {path}")).into_response()
    } else {
        Refusal::new(ErrorCode::PathNotFound, format!("There is no path {path}; the API is described at /"))
            .into_response()
    }
}

/// Gives errors that a library answered in plain text the form of `/api`.
pub async fn legacy_errors(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    match plain_error(response).await {
        Ok(response) => response,
        Err((status, text)) => LegacyRefusal::new(status, text).into_response(),
    }
}

/// Gives errors that a library answered in plain text the form of `/v1`.
pub async fn v1_errors(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    match plain_error(response).await {
        Ok(response) => response,
        Err((status, text)) => {
            let code = match status {
                StatusCode::METHOD_NOT_ALLOWED => ErrorCode::MethodNotAllowed,
                StatusCode::NOT_FOUND => ErrorCode::PathNotFound,
                StatusCode::PAYLOAD_TOO_LARGE => ErrorCode::BodyTooLarge,
                StatusCode::FORBIDDEN => ErrorCode::Forbidden,
                status if status.is_client_error() => ErrorCode::InvalidRequest,
                _ => ErrorCode::Internal,
            };
            (status, Json(Refusal::new(code, text).0)).into_response()
        }
    }
}

async fn plain_error(response: Response) -> Result<Response, (StatusCode, String)> {
    let status = response.status();
    let json = response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"application/json"));
    if !(status.is_client_error() || status.is_server_error()) || json {
        return Ok(response);
    }
    let bytes = to_bytes(response.into_body(), MAX_TEXT).await.unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes).trim().replace('\n', " ");
    let text = match (text.is_empty(), status) {
        (false, _) => text,
        (true, StatusCode::METHOD_NOT_ALLOWED) => "This path does not know this method".to_owned(),
        (true, status) => status.canonical_reason().unwrap_or("error").to_owned(),
    };
    Err((status, text))
}
