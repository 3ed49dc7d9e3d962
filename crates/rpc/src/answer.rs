//! Answers and request bodies of a server: JSON, faults with their status, lines of JSON, streams.

use std::io;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use http::{Response, StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use joey_api::error::{ErrorBody, http_status};
use joey_model::{ErrorKind, Fault};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::body::{Body, empty, full, stream};

/// 200 with `value` as JSON.
pub fn json_answer(value: &impl Serialize) -> Response<Body> {
    json_with(StatusCode::OK, value)
}

/// 201 with `value` as JSON.
pub fn created(value: &impl Serialize) -> Response<Body> {
    json_with(StatusCode::CREATED, value)
}

/// An answer without a body.
pub fn empty_answer(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(empty());
    *response.status_mut() = status;
    response
}

/// The refusal `fault` says, as [`ErrorBody`] with the status of its kind.
pub fn fault_answer(fault: Fault) -> Response<Body> {
    let status = StatusCode::from_u16(http_status(fault.kind)).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    json_with(status, &ErrorBody::from(fault))
}

/// 200 with a body that is sent as the stream gives it.
pub fn stream_answer(bytes: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> Response<Body> {
    with_type(StatusCode::OK, "application/octet-stream", stream(bytes))
}

/// 200 with one JSON object a line for every value of the stream.
pub fn lines_answer<T: Serialize + Send + 'static>(values: impl Stream<Item = T> + Send + 'static) -> Response<Body> {
    let lines = values.map(|value| {
        let mut line = serde_json::to_vec(&value).map_err(io::Error::other)?;
        line.push(b'\n');
        Ok(Bytes::from(line))
    });
    with_type(StatusCode::OK, "application/x-ndjson", stream(lines))
}

/// Reads a request's body as JSON of at most `limit` bytes.
pub async fn read_json<T, B>(body: B, limit: usize) -> Result<T, Fault>
where
    T: DeserializeOwned,
    B: hyper::body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let bytes = match Limited::new(body, limit).collect().await {
        Ok(collected) => collected.to_bytes(),
        Err(error) if error.is::<LengthLimitError>() => {
            let message = format!("request body is longer than {limit} bytes");
            return Err(Fault::new(ErrorKind::Invalid, "BodyTooLong", message));
        }
        Err(_) => return Err(Fault::new(ErrorKind::Retryable, "ConnectionLost", "request body broke off")),
    };
    serde_json::from_slice(&bytes).map_err(|error| {
        Fault::new(ErrorKind::Invalid, "InvalidBody", format!("request body is not understood: {error}"))
    })
}

fn json_with(status: StatusCode, value: &impl Serialize) -> Response<Body> {
    match serde_json::to_vec(value) {
        Ok(bytes) => with_type(status, "application/json", full(bytes)),
        Err(error) => {
            tracing::error!(%error, "an answer cannot be written as JSON");
            empty_answer(StatusCode::INTERNAL_SERVER_ERROR)
        }
    }
}

fn with_type(status: StatusCode, content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}
