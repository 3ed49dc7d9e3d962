//! The listener: TLS, HTTP/1.1 and HTTP/2, bounds on what a stranger can hold open, and a clean end.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http::Request;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::{State, auth, service};

/// Time for a TLS handshake, and for the headers of a request.
const PATIENCE: Duration = Duration::from_secs(10);
/// Connections held at the same time.
const MAX_CONNECTIONS: usize = 4096;
/// Time that running requests get when the server ends.
const DRAIN: Duration = Duration::from_secs(10);

/// Accepts connections until `shutdown`, then lets running requests finish; watches end at once.
pub async fn serve(state: Arc<State>, listener: TcpListener, shutdown: impl Future<Output = ()>) {
    let acceptor = TlsAcceptor::from(state.tls.clone());
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let graceful = GracefulShutdown::new();
    let draining = CancellationToken::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut shutdown => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, mostly: a pause lets connections end.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(permit) = connections.clone().try_acquire_owned() else { continue };
        let (state, acceptor, draining) = (state.clone(), acceptor.clone(), draining.clone());
        let watcher = graceful.watcher();
        tokio::spawn(async move {
            connection(state, acceptor, stream, draining, watcher).await;
            drop(permit);
        });
    }
    draining.cancel();
    if tokio::time::timeout(DRAIN, graceful.shutdown()).await.is_err() {
        tracing::warn!("requests were still running when the API server ended");
    }
}

async fn connection(
    state: Arc<State>,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    draining: CancellationToken,
    watcher: hyper_util::server::graceful::Watcher,
) {
    let _ = stream.set_nodelay(true);
    let Ok(Ok(stream)) = tokio::time::timeout(PATIENCE, acceptor.accept(stream)).await else { return };
    let certificates = stream.get_ref().1.peer_certificates();
    let identity = certificates.and_then(|chain| chain.first()).and_then(auth::of_certificate);
    let service = service_fn(move |request: Request<Incoming>| {
        let (state, identity, draining) = (state.clone(), identity.clone(), draining.clone());
        async move {
            let request = request.map(|body| body.map_err(std::io::Error::other).boxed_unsync());
            Ok::<_, Infallible>(service::handle(state, identity, request, draining).await)
        }
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(PATIENCE);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Some(Duration::from_secs(30)))
        .max_concurrent_streams(250);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(%error, "a connection ended");
    }
}
