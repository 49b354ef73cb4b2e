//! Request bodies: bounded, and refused in one line where they are not what they should be.

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use catalyst_api::ErrorCode;
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::error::Refusal;

/// Largest body that is read, in bytes.
pub const MAX_SIZE: usize = 1 << 20;

/// So much of a body that is too large is taken off the wire: a connection that is closed with more to read is reset, and its client may
/// lose the answer.
const MAX_DROPPED: usize = 64 << 20;

/// The bytes of a body, whatever its content type.
#[derive(Debug)]
pub struct Raw(pub Vec<u8>);

/// A JSON body, whatever its content type: `curl -d` sends one of forms.
#[derive(Debug)]
pub struct JsonBody<T>(pub T);

impl<S: Send + Sync> FromRequest<S> for Raw {
    type Rejection = Response;

    async fn from_request(request: Request, _: &S) -> Result<Self, Response> {
        match read(request.into_body()).await {
            Some(bytes) => Ok(Self(bytes)),
            // Plain text: the layer around each API gives it that API's form.
            None => Err((StatusCode::PAYLOAD_TOO_LARGE, too_large()).into_response()),
        }
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &S) -> Result<Self, Refusal> {
        let too_large = || Refusal::new(ErrorCode::BodyTooLarge, too_large());
        let bytes = read(request.into_body()).await.ok_or_else(too_large)?;
        parse(&bytes).map(Self).map_err(|error| {
            Refusal::new(
                ErrorCode::InvalidRequest,
                format!("The body is not what this request takes: {error}"),
            )
        })
    }
}

/// The whole body, if it can be read and is not too large.
async fn read(body: Body) -> Option<Vec<u8>> {
    let mut pieces = body.into_data_stream();
    let (mut bytes, mut length) = (Vec::new(), 0);
    while let Some(piece) = pieces.next().await {
        let piece = piece.ok()?;
        length += piece.len();
        if length <= MAX_SIZE {
            bytes.extend_from_slice(&piece);
        } else {
            bytes = Vec::new();
        }
        if length > MAX_DROPPED {
            return None;
        }
    }
    (length <= MAX_SIZE).then_some(bytes)
}

/// Reads an object. A whole number may be written with a point (`7.0`), as languages do that know one sort of numbers.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> serde_json::Result<T> {
    let error = match serde_json::from_slice(bytes) {
        // What derives its reading takes an array as well, by the order of the fields.
        Ok(_) if bytes.trim_ascii_start().starts_with(b"[") => return Err(not_an_object()),
        Err(error) if error.is_data() => error,
        read => return read,
    };
    let Ok(mut value) = serde_json::from_slice(bytes) else { return Err(error) };
    if whole_numbers(&mut value) { serde_json::from_value(value) } else { Err(error) }
}

fn not_an_object() -> serde_json::Error {
    serde::de::Error::custom("it is an array, not an object")
}

/// Writes whole numbers without a point; whether there were any.
fn whole_numbers(value: &mut Value) -> bool {
    /// The largest whole numbers that all such numbers below can stand for.
    const MOST: f64 = 9_007_199_254_740_992.0;
    match value {
        Value::Number(number) => {
            let float = number.as_f64().filter(|float| number.is_f64() && float.fract() == 0.0);
            #[expect(clippy::cast_possible_truncation, reason = "it is whole, and not too large")]
            let whole = float.filter(|float| float.abs() <= MOST).map(|float| float as i64);
            whole.inspect(|whole| *number = (*whole).into()).is_some()
        }
        // All of them, so no `any`.
        Value::Array(all) => all.iter_mut().fold(false, |some, one| whole_numbers(one) | some),
        Value::Object(all) => all.values_mut().fold(false, |some, one| whole_numbers(one) | some),
        _ => false,
    }
}

fn too_large() -> String {
    format!("The body cannot be read, or is larger than {MAX_SIZE} bytes")
}

#[cfg(test)]
mod tests {
    use catalyst_api::{CloneVm, PublishPort, UpdateVm};

    use super::*;

    #[test]
    fn a_whole_number_may_have_a_point() {
        let update: UpdateVm = parse(br#"{"cpus": 2.0, "memory_mib": 2e3}"#).unwrap();
        assert_eq!((update.cpus, update.memory_mib), (Some(2), Some(2000)));
        let port: PublishPort = parse(br#"{"host_port": 8080.0, "guest_port": 80}"#).unwrap();
        assert_eq!((port.host_port, port.guest_port), (8080, 80));
        for body in
            [&br#"{"cpus": 2.5}"#[..], br#"{"cpus": -1.0}"#, br#"{"cpus": 1e300}"#, br#"{"cpu": 2.0}"#]
        {
            assert!(parse::<UpdateVm>(body).is_err());
        }
    }

    #[test]
    fn an_array_is_no_object() {
        assert!(parse::<UpdateVm>(b" [null, null]").unwrap_err().to_string().contains("not an object"));
        assert!(parse::<CloneVm>(br#"[["a"]]"#).is_err());
    }

    #[test]
    fn the_error_says_where() {
        let error = parse::<UpdateVm>(b"{\n\"cpus\": \"two\"}").unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
    }
}
