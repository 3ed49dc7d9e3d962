//! Serving connections: one byte stream at a time, or every one that a unix socket accepts.

use std::convert::Infallible;
use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixListener;
use tokio::task::JoinSet;

use crate::error::RpcError;
use crate::{CONNECTION_WINDOW, MAX_STREAMS, STREAM_WINDOW};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// How long calls that still run may take when the server ends.
const DRAIN: Duration = Duration::from_secs(2);

fn builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(30)).max_buf_size(64 << 10);
    builder
        .http2()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(MAX_STREAMS)
        .max_send_buf_size(STREAM_WINDOW as usize)
        .max_header_list_size(256 << 10);
    builder
}

/// Serves one connection until the other side closes it. HTTP/2 with prior knowledge and HTTP/1.1 are told apart.
///
/// `service` is a tower service: an `axum::Router` or [`tower::service_fn`]. Its errors cannot happen: a refusal is a response.
pub async fn serve<S, Svc, B>(stream: S, service: Svc) -> Result<(), RpcError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    Svc: tower::Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
    Svc::Future: Send + 'static,
    B: hyper::body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    serve_until(stream, service, std::future::pending()).await
}

/// As [`serve`], until `over` resolves: then calls that run are let run to their end, and no other begins.
pub async fn serve_until<S, Svc, B>(stream: S, service: Svc, over: impl Future<Output = ()>) -> Result<(), RpcError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    Svc: tower::Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
    Svc::Future: Send + 'static,
    B: hyper::body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let builder = builder();
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    let (mut connection, mut over) = (std::pin::pin!(connection), std::pin::pin!(over));
    let done = tokio::select! {
        done = connection.as_mut() => done,
        () = &mut over => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    done.map_err(|source| RpcError::Serve { source })
}

/// Serves every connection of `listener` until `shutdown` resolves. Calls that run then are let run to their end, two seconds at
/// most: a follower gets the rest.
pub async fn serve_unix<Svc, B>(listener: UnixListener, service: Svc, shutdown: impl Future<Output = ()>)
where
    Svc: tower::Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
    Svc::Future: Send + 'static,
    B: hyper::body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let mut shutdown = std::pin::pin!(shutdown);
    let mut connections = JoinSet::new();
    let graceful = GracefulShutdown::new();
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let service = TowerToHyperService::new(service.clone());
                    let connection = builder().serve_connection(TokioIo::new(stream), service).into_owned();
                    let connection = graceful.watch(connection);
                    connections.spawn(async move {
                        if let Err(error) = connection.await {
                            tracing::debug!(%error, "connection ended");
                        }
                    });
                }
                Err(error) => {
                    // Out of descriptors: the pause lets connections end before the next try.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
        }
    }
    // Whatever is left is dropped with its task.
    let _ = tokio::time::timeout(DRAIN, graceful.shutdown()).await;
}
