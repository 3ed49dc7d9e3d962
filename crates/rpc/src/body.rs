//! Bodies: nothing, bytes, a stream of bytes. What is in them is not known here.

use std::io;

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, BodyStream, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};

/// A request's or response's body.
pub type Body = UnsyncBoxBody<Bytes, io::Error>;

/// A body without bytes.
pub fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// A body of these bytes.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A body that is sent as the stream gives it. An error resets the HTTP stream, so the reader sees an error too.
pub fn stream(bytes: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> Body {
    StreamBody::new(bytes.map_ok(Frame::data)).boxed_unsync()
}

/// The bytes of a received body as they come. Trailers and empty parts are dropped.
pub fn into_stream(body: Incoming) -> impl Stream<Item = io::Result<Bytes>> + Send + Unpin + 'static {
    BodyStream::new(body).filter_map(|frame| {
        std::future::ready(match frame {
            Ok(frame) => frame.into_data().ok().filter(|data| !data.is_empty()).map(Ok),
            Err(error) => Some(Err(io::Error::other(error))),
        })
    })
}
