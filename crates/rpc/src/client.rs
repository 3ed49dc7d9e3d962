//! The client: one HTTP/2 connection shared by every call, made when it is first needed and made again when it is gone.

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt, Stream, StreamExt, TryStreamExt};
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use joey_api::error::ErrorBody;
use joey_model::{ErrorKind, Fault};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Mutex;

use crate::body::{Body, empty, full, into_stream, stream};
use crate::error::RpcError;
use crate::{BODY_LIMIT, CONNECTION_WINDOW, STREAM_WINDOW};

/// Bytes of a text in a refusal.
const REFUSAL_LIMIT: usize = 16 << 10;

/// Any byte stream.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

type Connector = dyn Fn() -> BoxFuture<'static, io::Result<Box<dyn Io>>> + Send + Sync;

/// A peer that is spoken to. Clones share the connection.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
    limit: usize,
    patience: Option<Duration>,
}

struct Shared {
    peer: String,
    connect: Box<Connector>,
    /// Held while a connection is made, so that callers who come meanwhile share it.
    connection: Mutex<Option<SendRequest<Body>>>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("peer", &self.shared.peer).finish_non_exhaustive()
    }
}

impl Client {
    /// A client of the unix socket at `path`.
    pub fn unix(path: PathBuf) -> Self {
        let peer = path.display().to_string();
        Self::from_connector(peer, move || {
            let path = path.clone();
            async move { crate::socket::connect_unix(&path).await }
        })
    }

    /// A client of whatever `connect` connects to; `peer` names it in errors.
    pub fn from_connector<F, Fut, S>(peer: impl Into<String>, connect: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = io::Result<S>> + Send + 'static,
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let connect = move || connect().map(|made| made.map(|stream| Box::new(stream) as Box<dyn Io>)).boxed();
        let shared = Shared { peer: peer.into(), connect: Box::new(connect), connection: Mutex::new(None) };
        Self { shared: Arc::new(shared), limit: BODY_LIMIT, patience: None }
    }

    /// A client of a service in this process, through a pipe. `service` is what [`crate::serve`] takes.
    pub fn in_process<Svc, B>(peer: impl Into<String>, service: Svc) -> Self
    where
        Svc: tower::Service<Request<Incoming>, Response = Response<B>, Error = std::convert::Infallible>
            + Clone
            + Send
            + Sync
            + 'static,
        Svc::Future: Send + 'static,
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        Self::from_connector(peer, move || {
            let (near, far) = tokio::io::duplex(STREAM_WINDOW as usize);
            tokio::spawn(crate::server::serve(far, service.clone()));
            std::future::ready(Ok(near))
        })
    }

    /// The same peer, but JSON answers and lines may have up to `limit` bytes.
    pub fn with_limit(&self, limit: usize) -> Self {
        Self { limit, ..self.clone() }
    }

    /// The same peer, but an answer that does not begin within this is given up, and so is JSON that is not there as a whole. A
    /// stream that has begun may take as long as it likes.
    pub fn with_patience(&self, patience: Option<Duration>) -> Self {
        Self { patience, ..self.clone() }
    }

    /// What errors call the other side.
    pub fn peer(&self) -> &str {
        &self.shared.peer
    }

    /// Sends a request and gives back the answer whatever its status. A connection that turns out to be closed before
    /// the request was sent is replaced once.
    pub async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, RpcError> {
        let mut request = request;
        if request.uri().authority().is_none() {
            *request.uri_mut() = absolute(request.uri())?;
        }
        let mut connection = self.connection().await?;
        match connection.try_send_request(request).await {
            Ok(response) => Ok(response),
            Err(mut failed) => match failed.take_message() {
                Some(request) => {
                    self.forget().await;
                    let mut connection = self.connection().await?;
                    connection.send_request(request).await.map_err(|source| self.protocol(source))
                }
                None => Err(self.protocol(failed.into_error())),
            },
        }
    }

    /// Sends `body` as JSON (or no body) and reads a JSON answer; an empty answer reads as `null`, so as `()`.
    /// An answer that is not 2xx is [`RpcError::Remote`].
    pub async fn call<Req, Res>(&self, method: Method, path: &str, body: Option<&Req>) -> Result<Res, RpcError>
    where
        Req: Serialize + ?Sized,
        Res: DeserializeOwned,
    {
        self.json(json_request(method, path, body)?).await
    }

    /// As [`Client::call`], for a request with a body of its own.
    pub async fn json<Res: DeserializeOwned>(&self, request: Request<Body>) -> Result<Res, RpcError> {
        let whole = async {
            let response = self.accepted(request).await?;
            self.collect(response.into_body()).await
        };
        let bytes = self.in_time(whole).await?;
        let bytes: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(bytes).map_err(|source| RpcError::Decode { peer: self.shared.peer.clone(), source })
    }

    /// Reads a stream of JSON objects, one a line. It ends after the first error.
    pub async fn lines<T>(&self, path: &str) -> Result<BoxStream<'static, Result<T, RpcError>>, RpcError>
    where
        T: DeserializeOwned + Send + 'static,
    {
        self.lines_of::<(), T>(Method::GET, path, None).await
    }

    /// As [`Client::lines`], for a request with a method and a JSON body of its own.
    pub async fn lines_of<Req, T>(
        &self,
        method: Method,
        path: &str,
        body: Option<&Req>,
    ) -> Result<BoxStream<'static, Result<T, RpcError>>, RpcError>
    where
        Req: Serialize + ?Sized,
        T: DeserializeOwned + Send + 'static,
    {
        let response = self.accepted(json_request(method, path, body)?).await?;
        let reader = Lines {
            bytes: into_stream(response.into_body()).boxed(),
            buffer: BytesMut::new(),
            seen: 0,
            limit: self.limit,
            peer: self.shared.peer.clone(),
        };
        Ok(futures::stream::try_unfold(reader, |mut reader| async move {
            Ok(reader.next::<T>().await?.map(|value| (value, reader)))
        })
        .boxed())
    }

    /// Reads the answer's bytes as they come.
    pub async fn bytes(&self, method: Method, path: &str) -> Result<BoxStream<'static, io::Result<Bytes>>, RpcError> {
        let response = self.accepted(json_request::<()>(method, path, None)?).await?;
        Ok(into_stream(response.into_body()).boxed())
    }

    /// Sends a stream and reads one, both at once, each with back-pressure of its own.
    pub async fn duplex(
        &self,
        method: Method,
        path: &str,
        outgoing: impl Stream<Item = Bytes> + Send + 'static,
    ) -> Result<BoxStream<'static, io::Result<Bytes>>, RpcError> {
        let request = request(method, path, stream(outgoing.map(Ok)))?;
        let response = self.accepted(request).await?;
        Ok(into_stream(response.into_body()).map_err(io::Error::other).boxed())
    }

    /// Sends a request and turns an answer that is not 2xx into [`RpcError::Remote`].
    pub async fn accepted(&self, request: Request<Body>) -> Result<Response<Incoming>, RpcError> {
        let answered = async {
            let response = self.send(request).await?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            let bytes = self.collect(response.into_body()).await?;
            Err(RpcError::Remote(refusal(status, &bytes)))
        };
        self.in_time(answered).await
    }

    async fn in_time<T>(&self, done: impl Future<Output = Result<T, RpcError>>) -> Result<T, RpcError> {
        let Some(patience) = self.patience else { return done.await };
        let late = |_| Err(RpcError::Late { peer: self.shared.peer.clone(), patience });
        tokio::time::timeout(patience, done).await.unwrap_or_else(late)
    }

    async fn collect(&self, body: Incoming) -> Result<Bytes, RpcError> {
        let peer = || self.shared.peer.clone();
        match Limited::new(body, self.limit).collect().await {
            Ok(collected) => Ok(collected.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => Err(RpcError::TooLong { peer: peer(), limit: self.limit }),
            Err(error) => Err(RpcError::Broken { peer: peer(), source: io::Error::other(error) }),
        }
    }

    /// Resolves when there is a connection to the peer, which may take as long as an answer.
    pub async fn connected(&self) -> Result<(), RpcError> {
        self.in_time(async { self.connection().await.map(drop) }).await
    }

    async fn connection(&self) -> Result<SendRequest<Body>, RpcError> {
        let mut slot = self.shared.connection.lock().await;
        if let Some(connection) = slot.as_ref().filter(|connection| !connection.is_closed()) {
            return Ok(connection.clone());
        }
        let peer = || self.shared.peer.clone();
        let stream = (self.shared.connect)().await.map_err(|source| RpcError::Connect { peer: peer(), source })?;
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(STREAM_WINDOW as usize)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|source| self.protocol(source))?;
        tokio::spawn(connection.map(drop));
        *slot = Some(sender.clone());
        Ok(sender)
    }

    async fn forget(&self) {
        *self.shared.connection.lock().await = None;
    }

    fn protocol(&self, source: hyper::Error) -> RpcError {
        RpcError::Protocol { peer: self.shared.peer.clone(), source }
    }
}

/// A reader of lines in a stream of bytes.
struct Lines {
    bytes: BoxStream<'static, io::Result<Bytes>>,
    buffer: BytesMut,
    /// So many bytes of the buffer hold no line end.
    seen: usize,
    limit: usize,
    peer: String,
}

impl Lines {
    async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, RpcError> {
        loop {
            if let Some(at) = self.buffer[self.seen..].iter().position(|&byte| byte == b'\n') {
                let line = self.buffer.split_to(self.seen + at + 1);
                self.seen = 0;
                if line.len() > 1 {
                    return self.decode(&line).map(Some);
                }
                continue;
            }
            self.seen = self.buffer.len();
            if self.seen > self.limit {
                return Err(RpcError::TooLong { peer: self.peer.clone(), limit: self.limit });
            }
            match self.bytes.try_next().await {
                Ok(Some(bytes)) => self.buffer.extend_from_slice(&bytes),
                Ok(None) => {
                    let rest = self.buffer.split();
                    self.seen = 0;
                    return if rest.is_empty() { Ok(None) } else { self.decode(&rest).map(Some) };
                }
                Err(source) => return Err(RpcError::Broken { peer: self.peer.clone(), source }),
            }
        }
    }

    fn decode<T: DeserializeOwned>(&self, line: &[u8]) -> Result<T, RpcError> {
        serde_json::from_slice(line).map_err(|source| RpcError::Decode { peer: self.peer.clone(), source })
    }
}

fn json_request<Req: Serialize + ?Sized>(
    method: Method,
    path: &str,
    body: Option<&Req>,
) -> Result<Request<Body>, RpcError> {
    let Some(value) = body else { return request(method, path, empty()) };
    let bytes = serde_json::to_vec(value).map_err(|error| RpcError::Request { source: error.into() })?;
    let mut request = request(method, path, full(bytes))?;
    request.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    Ok(request)
}

fn request(method: Method, path: &str, body: Body) -> Result<Request<Body>, RpcError> {
    Request::builder().method(method).uri(path).body(body).map_err(|error| RpcError::Request { source: error.into() })
}

/// HTTP/2 wants a scheme and an authority; the name is of no meaning on a pipe.
fn absolute(uri: &http::Uri) -> Result<http::Uri, RpcError> {
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    http::Uri::builder()
        .scheme("http")
        .authority("joey")
        .path_and_query(path)
        .build()
        .map_err(|error| RpcError::Request { source: error.into() })
}

/// Text of a refusal, no longer than a reader takes in.
fn cut(mut text: String) -> String {
    if text.len() > REFUSAL_LIMIT {
        let end = (0..=REFUSAL_LIMIT).rev().find(|end| text.is_char_boundary(*end));
        text.truncate(end.unwrap_or(0));
    }
    text
}

fn refusal(status: StatusCode, bytes: &[u8]) -> Fault {
    if let Ok(body) = serde_json::from_slice::<ErrorBody>(bytes) {
        // It is shown and logged, and who wrote it may be anybody.
        let Fault { kind, reason, message, hint } = body.into();
        return Fault { kind, reason: cut(reason), message: cut(message), hint: hint.map(cut) };
    }
    let kind = match status.as_u16() {
        404 => ErrorKind::NotFound,
        401 | 403 => ErrorKind::Denied,
        409 => ErrorKind::Conflict,
        429 => ErrorKind::Exhausted,
        502..=504 => ErrorKind::Retryable,
        400..500 => ErrorKind::Invalid,
        _ => ErrorKind::Internal,
    };
    Fault::new(kind, "HttpStatus", format!("the answer has status {status}"))
}
