//! Request bodies: bounded, and refused in one line where they are not what they should be.

use axum::body::to_bytes;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use catalyst_api::ErrorCode;
use serde::de::DeserializeOwned;

use super::error::Refusal;

/// Largest body that is read, in bytes.
pub const MAX_SIZE: usize = 1 << 20;

/// The bytes of a body, whatever its content type.
#[derive(Debug)]
pub struct Raw(pub Vec<u8>);

/// A JSON body, whatever its content type: `curl -d` sends one of forms.
#[derive(Debug)]
pub struct JsonBody<T>(pub T);

impl<S: Send + Sync> FromRequest<S> for Raw {
    type Rejection = Response;

    async fn from_request(request: Request, _: &S) -> Result<Self, Response> {
        match to_bytes(request.into_body(), MAX_SIZE).await {
            Ok(bytes) => Ok(Self(bytes.to_vec())),
            // Plain text: the layer around each API gives it that API's form.
            Err(_) => Err((StatusCode::PAYLOAD_TOO_LARGE, too_large()).into_response()),
        }
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &S) -> Result<Self, Refusal> {
        let bytes = to_bytes(request.into_body(), MAX_SIZE)
            .await
            .map_err(|_| Refusal::new(ErrorCode::BodyTooLarge, too_large()))?;
        serde_json::from_slice(&bytes).map(Self).map_err(|error| {
            Refusal::new(
                ErrorCode::InvalidRequest,
                format!("The body is not what this request takes: {error}"),
            )
        })
    }
}

fn too_large() -> String {
    format!("The body cannot be read, or is larger than {MAX_SIZE} bytes")
}
